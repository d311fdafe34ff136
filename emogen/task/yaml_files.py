"""YAML files of `key: value` lines -> values, and the line of each key for messages."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from emogen import paths
from emogen.errors import InputError

MAX_VALUES = 100_000  # of a file, with its aliases expanded


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does: `2e-4` is a number, and `no` (as in `eval_strategy: no`) is a string."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError, TypeError, KeyError, OverflowError) as error:  # such as `!!int x`
            kind = node.tag.rpartition(":")[2]
            message = f"not a valid {kind}" + (f": {error}" if isinstance(error, ValueError) else "")
            if "string conversion" in message:
                message = "a number of thousands of digits"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None


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
        text = _read_text(path)
        node = yaml.compose(text, _Loader)
        if node is not None:
            _check_size(node)
        values = _load(text)
    except RecursionError:
        raise InputError(f"{path}: cannot be read: nested too deeply") from None
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


def place_of(path: str | Path, keys: Sequence[str | int]) -> str:
    """`file:line` of a value within a YAML file, or of the innermost one that exists.

    Args:
        keys: the keys and positions that lead to it, such as `("labels", 2, "name")`.
    """
    node = yaml.compose(_read_text(path), _Loader)
    for key in keys:
        if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
        elif isinstance(node, yaml.MappingNode):
            found = [value for name, value in node.value if name.value == str(key)]
            if not found:
                break
            node = found[0]
        else:
            break
    return f"{path}:{node.start_mark.line + 1}" if node is not None else str(path)


def read_value(text: str) -> Any:
    """The value of a YAML expression, or the text itself if it is not valid YAML."""
    try:
        return _load(text)
    except (yaml.YAMLError, ValueError):
        return text


def as_overrides(values: dict[str, Any]) -> list[str]:
    """Write keys and values as on the command line, `key=value`; `read_value` reads the values back as they are."""
    return [f"{key}={_as_yaml(value)}" for key, value in values.items()]


def _as_yaml(value: Any) -> str:
    """A value in JSON that is YAML, too: where JSON writes an emoji as two halves, YAML reads two characters."""
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    return re.sub("[^ -~]", lambda found: f"\\U{ord(found[0]):08x}", text)


def _plain(value: Any) -> Any:
    """The number in a scalar of numpy, as the searches of scikit-learn draw them; the name of a path."""
    import numpy as np

    return value.item() if isinstance(value, np.generic) else os.fspath(value)


def _check_size(root: yaml.Node) -> None:
    """Refuse aliases that contain themselves, or that expand to very many values.

    Raises:
        ValueError: the file has such aliases.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise ValueError(f"line {node.start_mark.line + 1}: an alias that contains itself")
            return sizes[id(node)]
        sizes[id(node)] = 0  # not yet known
        children = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(map(size, children))
        return sizes[id(node)]

    if size(root) > MAX_VALUES:
        raise ValueError(f"its aliases expand to more than {MAX_VALUES:,} values")


def _read_text(path: str | Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8; the message names the line.
    """
    content = paths.find(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8; save the file as UTF-8") from None


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
