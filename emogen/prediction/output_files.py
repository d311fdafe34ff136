"""Files that are written in chunks: complete or not there, continued after an interruption, and by one process only."""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from emogen import paths
from emogen.claims import claim
from emogen.errors import InputError
from emogen.task.rows import Rows

STANDARD_OUTPUT = Path("-")


class ChunkWriter(Protocol):
    """Where the chunks of a prediction go."""

    def has(self, rows: Rows, n_before: int) -> bool: ...
    def add(self, texts: Sequence[str], n_rows: int) -> None: ...
    def finish(self, n_rows: int) -> None: ...


class StreamWriter:
    """Standard output. An interrupted prediction starts again."""

    def has(self, rows: Rows, n_before: int) -> bool:
        return False

    def add(self, texts: Sequence[str], n_rows: int) -> None:
        for text in texts:
            sys.stdout.write(text)
        sys.stdout.flush()

    def finish(self, n_rows: int) -> None:
        pass


class ResumableWriter:
    """Files that are written in chunks and get their names when they are complete. A kill costs at most one chunk.

    Until then each file is beside its final place, as `NAME.partial`. `NAME.partial.json` of the first file is a note:
    how many rows are complete, and the size and the sha256 of each file at that point. What follows is truncated before
    the work resumes. When all rows are written the note says so; then the files are renamed, and the note goes last. A
    call that finds such a note renames what is left.

    Args:
        files: the files to write, see `check_outputs`.
        job: what the files are computed from, as JSON values. A different job does not resume them.
        overwrite: replace existing files, and start again if a different job left partial ones.

    Raises:
        InputError: a file exists, a different job left partial files, or they were changed; and `overwrite` is not set.
    """

    def __init__(self, files: Sequence[Path], job: dict[str, Any], *, overwrite: bool = False):
        self.partial = {file: file.with_name(f"{file.name}.partial") for file in files}
        self.note = _note_of(files[0])
        self.job = job | {"outputs": [str(file) for file in files]}
        self.digest = hashlib.sha256()  # of the input
        self.hashes = [hashlib.sha256() for _ in files]  # of the output
        self.sizes = [0] * len(files)
        self.n_rows = 0  # rows that are written
        self.complete = False  # all of them
        for note in [_note_of(file) for file in files if _note_of(file).is_file()]:
            try:
                self._resume(note)
            except InputError:
                if not overwrite:
                    raise
                note.unlink()
        existing = [str(file) for file in files if file.exists()]
        if existing and not overwrite and not self.complete:
            raise InputError(f"{', '.join(existing)}: exists; add --overwrite to replace it")

    def _resume(self, path: Path) -> None:
        note = _read_note(path)
        if note["job"] != self.job:
            changed = [key for key, value in self.job.items() if note["job"].get(key) != value]
            raise InputError(
                f"{path}: belongs to other, interrupted work (other {', '.join(changed)}); "
                "resume that with its own command, or add --overwrite to start again"
            )
        if note["complete"]:
            self.n_rows, self.complete, self.expected = note["n_rows"], True, note["sha256"]
            return
        hashes = [_hash_start(*item) for item in zip(self.partial.values(), note["sizes"], strict=True)]
        for partial, found, digest in zip(self.partial.values(), hashes, note["hashes"], strict=True):
            if found.hexdigest() != digest:
                raise InputError(f"{partial}: not as it was written: cut or changed; add --overwrite to start again")
        self.hashes = hashes
        self.n_rows, self.expected, self.sizes = note["n_rows"], note["sha256"], note["sizes"]

    def has(self, rows: Rows, n_before: int) -> bool:
        """Whether these rows, which follow `n_before` others, are already written.

        Raises:
            InputError: other rows were written in their place: the input has changed.
        """
        content = "".join(f"{i}\n{text}\n" for i, text in zip(rows.ids, rows.texts, strict=True))
        self.digest.update(content.encode("utf-8", "surrogatepass"))
        n_after = n_before + len(rows)
        has_changed = n_after == self.n_rows and self.digest.hexdigest() != self.expected
        if has_changed or n_before < self.n_rows < n_after:
            raise self._input_changed()
        return n_after <= self.n_rows

    def add(self, texts: Sequence[str], n_rows: int) -> None:
        """Append a text to each file. Together they hold the next `n_rows` rows.

        Raises:
            InputError: all rows of the input were written before: the input has grown since.
        """
        if self.complete:
            raise self._input_changed()
        for k, (partial, text) in enumerate(zip(self.partial.values(), texts, strict=True)):
            content = text.encode("utf-8", "replace")
            with partial.open("r+b" if self.n_rows else "wb") as file:
                file.truncate(self.sizes[k])
                file.seek(0, os.SEEK_END)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self.hashes[k].update(content)
            self.sizes[k] += len(content)
        self.n_rows += n_rows
        self._write_note()

    def finish(self, n_rows: int) -> None:
        """Give the files their names.

        Raises:
            InputError: the files do not hold `n_rows` rows: the input has changed.
        """
        if n_rows != self.n_rows:
            raise self._input_changed()
        if not self.complete:
            self.complete = True
            self._write_note()
        for file, partial in self.partial.items():
            if partial.exists():  # otherwise an interrupted call has renamed it
                partial.replace(file)
        self.note.unlink()

    def _write_note(self) -> None:
        note = {
            "job": self.job,
            "n_rows": self.n_rows,
            "sha256": self.digest.hexdigest(),
            "sizes": self.sizes,
            "hashes": [digest.hexdigest() for digest in self.hashes],
            "complete": self.complete,
        }
        paths.write_json(self.note, note)

    def _input_changed(self) -> InputError:
        return InputError(
            f"{self.note}: the first {self.n_rows:,} rows of the input are not the rows that were labelled; "
            "add --overwrite to start again"
        )


def _note_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.partial.json")


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if {"job", "n_rows", "sha256", "sizes", "hashes", "complete"} <= set(note):
            return dict(note)
    except (ValueError, TypeError):
        pass
    raise InputError(f"{path}: not a note of an interrupted prediction; add --overwrite to start again")


def _hash_start(path: Path, size: int) -> "hashlib._Hash":
    """The hash of the first `size` bytes of a file, of all of it if it is shorter, of nothing if it is missing."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while size > 0 and (block := file.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
    return digest


def check_outputs(files: Sequence[Path]) -> list[Path]:
    """Resolve links to output files, create their folders, and refuse what cannot be replaced by a file.

    Raises:
        InputError: two outputs are the same file, or one is a folder, a device or a pipe.
    """
    if STANDARD_OUTPUT in files:
        if len(files) > 1:
            raise InputError("- writes to standard output, which holds one file: leave out -o or --jsonl")
        return list(files)
    resolved = [file.resolve() for file in files]  # a link is followed, so that its target is replaced
    for name, file in zip(files, resolved, strict=True):
        if resolved.count(file) > 1:
            raise InputError(f"{name}: named for two outputs; -o and --jsonl need different files")
        if file.exists() and not stat.S_ISREG(file.stat().st_mode):
            what = "a folder" if file.is_dir() else "a device or a pipe"
            raise InputError(f"{name}: {what}, not a file; name a file, or - for standard output")
        file.parent.mkdir(parents=True, exist_ok=True)
    return resolved


def claim_outputs(files: Sequence[Path]) -> ExitStack:
    """Claim all files, or none (see `claim`), until the end of the `with` block.

    Raises:
        InputError: another process writes one of them.
    """
    with ExitStack() as stack:
        for file in sorted(files):  # in one order everywhere
            if file != STANDARD_OUTPUT:
                stack.enter_context(claim(file))
        return stack.pop_all()
