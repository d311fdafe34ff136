"""Complete checkpoints: a list of the files, with sizes and digests, is written after all of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from emogen import paths

FILES = "files.json"  # of a checkpoint: {name: [bytes, sha256]}


def list_files(checkpoint: Path) -> None:
    """Write the list of files into a checkpoint that is otherwise complete."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != FILES)
    paths.write_json(checkpoint / FILES, {str(path.relative_to(checkpoint)): _digest(path) for path in files})


def flaw(checkpoint: Path) -> str | None:
    """Why training cannot continue from a checkpoint, or None.

    A file may be missing, cut or damaged, because the run was killed while it was written or the disk was full.
    """
    try:
        listed = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
        if not isinstance(listed, dict) or not listed:
            raise ValueError
    except (OSError, ValueError):
        return "it is incomplete (the run was killed while it was written)"
    if not any(name.startswith(("optimizer", "global_step")) for name in listed):
        return "it has no state of the optimizer (save_only_model)"
    for name, digest in listed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} is damaged"
    return None


def _digest(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
