"""Where things are: the files that ship with emogen, and the cache for downloaded models."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def shipped(relative: str | Path) -> Path:
    """The path of a file or folder that ships with emogen, such as `prompts/list.jinja`.

    In a checkout these folders stand beside the package; in an installed wheel they are inside it.
    The path is returned whether or not it exists.
    """
    package = Path(__file__).resolve().parent
    inside = package / relative
    return inside if inside.exists() else package.parent / relative


def find(path: str | Path, base: Path | None = None) -> Path:
    """Resolve a path that a recipe or a command names.

    Tried in this order: in `base` (the folder of the recipe that names it), in the current folder, and
    among the files that ship with emogen. If none exists, the path as given comes back, so that
    the error which follows names what the user wrote.
    """
    path = Path(path).expanduser()
    candidates = [path] if path.is_absolute() else [*([base / path] if base else []), path, shipped(path)]
    return next((candidate for candidate in candidates if candidate.exists()), path)


def cache_dir() -> Path:
    """Folder for models that emogen unpacked (`EMOGEN_CACHE`, else `~/.cache/emogen`)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "emogen"
    return Path(os.environ.get("EMOGEN_CACHE", default)).expanduser()


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Open a text file to write all of it or nothing: it gets its name when it is complete, and on the disk."""
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
    """A JSON file, all of it or nothing."""
    with writing(path) as file:
        json.dump(value, file, indent=2)
