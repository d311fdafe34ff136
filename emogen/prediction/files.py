"""Prediction for files of any size: read, predicted and written in chunks, and resumable."""

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

CHUNK = 1024  # rows that are predicted and written at once
CHUNK_OF_ENSEMBLE = 16_384  # larger, because the models of an ensemble are loaded again for each chunk


@dataclass
class Summary:
    """What `predict_file` did.

    Attributes:
        n_rows: rows of the file.
        n_cut: texts that were shortened to fit `max_length`.
        statuses: the number of answers by parse status.

    The last two count the answers of this call alone, not of an earlier call that it resumed, and they stay 0 for an
    ensemble and where probabilities decide.
    """

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
    """Label the texts of a file in chunks. The same call resumes an interrupted one after its last complete chunk.

    Under `accelerate launch` the processes share the texts of each chunk, and the main process writes.

    Args:
        runs: run folders, cross-validations, baselines, or a recipe file.
        source: a CSV, TSV, JSONL or Parquet file with texts.
        csv_file, jsonl_file: the files to write, at least one of them.
        overwrite: start again if the files belong to another, interrupted call.
        bar: makes a progress bar from a title and a number of rows.

    Raises:
        InputError: something is missing or wrong. Chunks that are already written stay.
    """
    ensemble = Ensemble(runs, overrides)
    recipe, label_set = ensemble.recipe, ensemble.label_set
    job = {"runs": [str(run.resolve()) for run in runs], "input": str(source.resolve()), "overrides": list(overrides)}
    files = [file for file in (csv_file, jsonl_file) if file is not None]
    writer = ResumableWriter(files, job, overwrite=overwrite)
    chunks = stream_rows(
        source,
        label_set,
        size=CHUNK if len(ensemble.folders) == 1 else CHUNK_OF_ENSEMBLE,
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
        batch = ensemble.predict(rows, with_prob=jsonl_file is not None, batch_size=batch_size, bar=bar)
        for prediction in batch.predictions or ():
            summary.statuses[prediction.parsed.status] += 1
            summary.n_cut += prediction.n_cut > 0
        if not processes.is_main_process():
            continue
        texts = []
        if csv_file:
            texts.append(results.csv_lines(rows, batch.pred, label_set, header=not n_before))
        if jsonl_file:
            texts.append(results.json_lines(rows, batch.pred, batch.prob, label_set, batch.predictions))
        writer.add(texts, len(rows))
    if processes.is_main_process():
        writer.finish(summary.n_rows)
    return summary


class ResumableWriter:
    """Files that are written in chunks and get their names when they are complete. A kill costs at most one chunk.

    Until then each file is beside its final place, as `NAME.partial`. `NAME.partial.json` of the first file says how
    many rows and bytes are complete; everything after them is truncated before the work resumes.

    Args:
        files: the files to write.
        job: what the files are computed from, as JSON values. A different job does not resume them.
        overwrite: start again if a different job left the files.

    Raises:
        InputError: a different job left the files, and `overwrite` is not set.
    """

    def __init__(self, files: Sequence[Path], job: dict[str, Any], *, overwrite: bool = False):
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        self.partial = {file: file.with_name(f"{file.name}.partial") for file in files}
        self.note = files[0].with_name(f"{files[0].name}.partial.json")
        self.job, self.digest = job, hashlib.sha256()
        self.n_rows = 0  # rows that are written
        if not self.note.is_file():
            return
        note = json.loads(self.note.read_text(encoding="utf-8"))
        if note["job"] == job:
            self.n_rows, self.expected, self.sizes = note["n_rows"], note["sha256"], note["sizes"]
        elif not overwrite:
            raise InputError(
                f"{self.note}: belongs to other, interrupted work ({', '.join(map(str, note['job'].values()))}); "
                "resume that, or add --overwrite to start again"
            )

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
        """Append a text to each file. Together they hold the next `n_rows` rows."""
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
        """Give the files their names.

        Raises:
            InputError: the files do not hold `n_rows` rows: the input has changed.
        """
        if n_rows != self.n_rows:
            raise self._input_changed()
        for file, partial in self.partial.items():
            partial.replace(file)
        self.note.unlink()

    def _input_changed(self) -> InputError:
        return InputError(
            f"{self.note}: the first {self.n_rows:,} rows of the input are not the rows that were labelled; remove "
            "this file to start again"
        )
