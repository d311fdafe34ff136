"""Paths of shipped files and of the model cache; atomic writes."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger(__name__)


def shipped(relative: str | Path) -> Path:
    """The path of a file or folder that ships with emogen, such as `prompts/list.jinja`.

    These folders are beside the package in a checkout, and inside it in an installed wheel. The path is returned
    whether or not it exists.
    """
    package = Path(__file__).resolve().parent
    inside = package / relative
    return inside if inside.exists() else package.parent / relative


def find(path: str | Path, base: Path | None = None) -> Path:
    """Resolve a path that a recipe or a command names.

    The path is looked up in `base` (the folder of the recipe that names it), then in the current folder, then among
    the shipped files. If it is in both folders and not the same file, a warning says which one is taken.

    Returns:
        The first path that exists, without `..` (as in `reviews/../rows.csv`) where that is the same file. If there is
        none, the path as given, so that the error that follows repeats what the user wrote.
    """
    path = expand(path)
    candidates = [path] if path.is_absolute() else [*([base / path] if base else []), path, shipped(path)]
    found = next((candidate for candidate in candidates if candidate.exists()), path)
    if found != path and path.exists() and not path.samefile(found):
        _say_which(found, path)
    short = Path(os.path.normpath(found))  # wrong where a link precedes `..`
    return short if short.exists() and short.samefile(found) else found


@cache  # once for each path
def _say_which(taken: Path, other: Path) -> None:
    log.warning(f"{taken} is read, which is beside the recipe, and not {other} of the current folder ({Path.cwd()})")


def expand(path: str | Path) -> Path:
    """A path with the home folder in the place of `~`; as it is if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_dir() -> Path:
    """The folder for unpacked models: `EMOGEN_CACHE`, or `~/.cache/emogen`."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "emogen"
    return Path(os.environ.get("EMOGEN_CACHE", default)).expanduser()


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file for an atomic write.

    The text goes to a temporary file beside `path`, which replaces `path` once it is complete and on disk. After an
    exception, `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with writing(path) as file:
        json.dump(value, file, indent=2)
