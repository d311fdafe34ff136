"""YAML files of `key: value` lines -> values, and the line of each key for messages."""

import re
from pathlib import Path
from typing import Any

import yaml

from emogen import paths
from emogen.errors import InputError


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does: `2e-4` is a number, and `no` (as in `eval_strategy: no`) is a string."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a YAML file of `key: value` lines.

    Returns:
        The values, and the place of each key (`file:line`).

    Raises:
        InputError: the file cannot be read, is not valid YAML, is not a mapping, or repeats a key.
    """
    values, where, repeated = read_keys(path)
    if repeated:
        raise InputError("\n".join(repeated))
    return values, where


def read_keys(path: str | Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Read a YAML file as `read_yaml` does, but return the messages about repeated keys instead of raising them."""
    try:
        text = paths.find(path).read_text(encoding="utf-8")
        values = _load(text)
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if node is None:
        return {}, {}, []
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise InputError(f"{path}:1: expected `key: value` lines")
    values = {str(key): value for key, value in values.items()}
    where: dict[str, str] = {}
    repeated = []
    for key, _ in node.value:
        here = f"{path}:{key.start_mark.line + 1}"
        if key.value in where:
            repeated.append(f"{here}: {key.value}: given twice (first at {where[key.value]})")
        where[key.value] = here
    # A key that is not written as its string (`null`, a merged mapping) has no line.
    return values, dict.fromkeys(values, str(path)) | where, repeated


def read_value(text: str) -> Any:
    """The value of a YAML expression, or the text itself if it is not valid YAML."""
    try:
        return _load(text)
    except (yaml.YAMLError, ValueError):
        return text


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
