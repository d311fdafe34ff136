"""Prediction for files of any size: read, predicted and written a chunk at a time, and resumable."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emogen import paths, processes
from emogen.console import Bar
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.prediction.ensemble import Ensemble
from emogen.task.readers import stream_rows
from emogen.task.rows import Rows

CHUNK = 1024  # texts that are labelled, written and forgotten at once
CHUNK_OF_SEVERAL = 16_384  # with several runs, which are loaded anew for each


@dataclass
class Summary:
    """What came of a file: how many rows it has, how many of its texts were cut, and how the answers were read (of
    those that were read in this call, and by one model alone)."""

    n_rows: int = 0
    n_cut: int = 0
    statuses: Counter[str] = field(default_factory=Counter)


def predict_file(
    runs: Sequence[Path],
    source: Path,
    overrides: Sequence[str] = (),
    *,
    csv_file: Path | None = None,
    jsonl_file: Path | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
    bar: Bar,
) -> Summary:
    """Label the texts of a file of any size, a chunk at a time; interrupted, the same call goes on after the last one.

    Under `accelerate launch` the texts of each chunk are spread over the processes, and the main one writes.

    Args:
        runs: run folders, cross-validations, or a recipe.
        source: a CSV, TSV, JSONL or Parquet file with texts.
        csv_file, jsonl_file: what to write; one of them at least.
        overwrite: begin anew where other work was broken off.

    Raises:
        InputError: what is missing or wrong, and where; what has been labelled before is kept.
    """
    ensemble = Ensemble(runs, overrides)
    recipe, label_set = ensemble.recipe, ensemble.label_set
    job = {"runs": [str(run.resolve()) for run in runs], "input": str(source.resolve()), "overrides": list(overrides)}
    files = [file for file in (csv_file, jsonl_file) if file is not None]
    writer = ResumableWriter(files, job, overwrite=overwrite)
    chunks = stream_rows(
        source,
        label_set,
        size=CHUNK if len(ensemble.folders) == 1 else CHUNK_OF_SEVERAL,
        text_column=recipe.text_column,
        id_column=recipe.id_column,
        separator=recipe.separator,
        encoding=recipe.encoding,
    )
    summary = Summary()
    for rows in chunks:
        n_before, summary.n_rows = summary.n_rows, summary.n_rows + len(rows)
        if len(rows) and writer.has(rows, n_before):
            continue
        done = ensemble.predict(rows, with_prob=jsonl_file is not None, batch_size=batch_size, bar=bar)
        for prediction in done.predictions or ():
            summary.statuses[prediction.parsed.status] += 1
            summary.n_cut += prediction.n_cut > 0
        if not processes.is_main_process():
            continue
        texts = []
        if csv_file:
            texts.append(results.csv_lines(rows, done.pred, label_set, header=not n_before))
        if jsonl_file:
            texts.append(results.json_lines(rows, done.pred, done.prob, label_set, done.predictions))
        writer.add(texts, len(rows))
    if processes.is_main_process():
        writer.finish(summary.n_rows)
    return summary


class ResumableWriter:
    """Files that grow piece by piece, and get their names when they are complete. A kill costs at most one piece.

    Until then each is beside its place, as `NAME.partial`, and a note in `NAME.partial.json` of the first one says how
    far all of them are: what was written after the note is cut off before the work goes on.

    Args:
        files: what is to be written.
        job: what it is written of, ready for JSON. Another job does not go on with these files.
        overwrite: begin anew where another job left them.

    Raises:
        InputError: another job left them.
    """

    def __init__(self, files: Sequence[Path], job: Any, *, overwrite: bool = False):
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        self.partial = {file: file.with_name(f"{file.name}.partial") for file in files}
        self.note = files[0].with_name(f"{files[0].name}.partial.json")
        self.job, self.digest = job, hashlib.sha256()
        self.n_rows = 0  # that are written
        if not self.note.is_file():
            return
        note = json.loads(self.note.read_text(encoding="utf-8"))
        if note["job"] == job:
            self.n_rows, self.expected, self.sizes = note["n_rows"], note["sha256"], note["sizes"]
        elif not overwrite:
            raise InputError(
                f"{self.note}: of other work that was broken off ({', '.join(map(str, note['job'].values()))}); go on "
                "with that, or add --overwrite to begin anew"
            )

    def has(self, rows: Rows, n_before: int) -> bool:
        """Whether these rows, before which there are so many, are written already.

        Raises:
            InputError: the rows that are written were others: the input has changed.
        """
        said = "".join(f"{i}\n{text}\n" for i, text in zip(rows.ids, rows.texts, strict=True))
        self.digest.update(said.encode("utf-8", "surrogatepass"))
        n_after = n_before + len(rows)
        changed = n_after == self.n_rows and self.digest.hexdigest() != self.expected
        if changed or n_before < self.n_rows < n_after:
            raise self._changed()
        return n_after <= self.n_rows

    def _changed(self) -> InputError:
        return InputError(
            f"{self.note}: the first {self.n_rows:,} rows of the input are not those that were labelled; remove this "
            "file to begin anew"
        )

    def add(self, texts: Sequence[str], n_rows: int) -> None:
        """Write a text to each file, which brings so many rows."""
        sizes = []
        for k, (partial, text) in enumerate(zip(self.partial.values(), texts, strict=True)):
            with partial.open("r+b" if self.n_rows else "wb") as file:
                file.truncate(self.sizes[k] if self.n_rows else 0)
                file.seek(0, os.SEEK_END)
                file.write(text.encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
                sizes.append(file.tell())
        self.n_rows, self.sizes = self.n_rows + n_rows, sizes
        paths.write_json(
            self.note, {"job": self.job, "n_rows": self.n_rows, "sha256": self.digest.hexdigest(), "sizes": sizes}
        )

    def finish(self, n_rows: int) -> None:
        """Give the files their names. Raises InputError if not so many rows are written: the input has changed."""
        if n_rows != self.n_rows:
            raise self._changed()
        for file, partial in self.partial.items():
            partial.replace(file)
        self.note.unlink()
