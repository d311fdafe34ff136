"""Prediction for files of any size: read, predicted and written in chunks, and resumable."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emogen import processes
from emogen.console import Bar
from emogen.evaluation import results
from emogen.evaluation.run_folder import content_hash
from emogen.prediction.ensemble import Ensemble
from emogen.prediction.output_files import (
    STANDARD_OUTPUT,
    ChunkWriter,
    ResumableWriter,
    StreamWriter,
    check_outputs,
    claim_outputs,
)
from emogen.prediction.weights import identity_of_base
from emogen.task.readers import stream_rows

N_SHOWN = 5  # texts that a summary shows
CHUNK = 1024  # rows that are predicted and written at once
CHUNK_OF_ENSEMBLE = 16_384  # larger, because the models of an ensemble are loaded again for each chunk


@dataclass
class Summary:
    """What `predict_file` did.

    Attributes:
        n_rows: rows of the file.
        first: the first texts that this call labelled, each with its labels.
        n_formulas: ids that a spreadsheet takes for a formula.
        n_cut: texts that were shortened to fit `max_length`.
        statuses: the number of answers by parse status.

    `n_cut` and `statuses` count the answers of this call alone, not of an earlier call that it resumed, and they stay 0
    for an ensemble and where probabilities decide.
    """

    n_rows: int = 0
    first: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    n_formulas: int = 0
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
    force: bool = False,
    bar: Bar,
) -> Summary:
    """Label the texts of a file in chunks. The same call resumes an interrupted one after its last complete chunk.

    Under `accelerate launch` the processes share the texts of each chunk, and the main process writes.

    Args:
        runs: run folders, cross-validations, baselines, or a recipe file.
        source: a CSV, TSV, JSONL or Parquet file with texts.
        csv_file, jsonl_file: the files to write, at least one of them. `-` is standard output.
        overwrite: replace existing files, and start again if they belong to another, interrupted call.
        force: predict with weights that are not those of the run; see `check_weights`.
        bar: makes a progress bar from a title and a number of rows.

    Raises:
        InputError: something is missing or wrong, or another process writes one of the files. Chunks that are already
            written stay.
    """
    files = check_outputs([file for file in (csv_file, jsonl_file) if file is not None])
    ensemble = Ensemble(runs, overrides, force=force)
    with claim_outputs(files) if processes.is_main_process() else nullcontext():
        writer: ChunkWriter = StreamWriter()
        if files != [STANDARD_OUTPUT]:
            writer = ResumableWriter(files, _job(runs, source, overrides), overwrite=overwrite)
        return _predict_chunks(ensemble, source, writer, csv_file, jsonl_file, batch_size, bar)


def _job(runs: Sequence[Path], source: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What the outputs are computed from. A model is identified by its content, since another may take its path."""
    return {
        "runs": [str(run.resolve()) for run in runs],
        "content of the runs": [content_hash(run) for run in runs],
        "base models": [identity_of_base(run, overrides) for run in runs],
        "input": str(source.resolve()),
        "overrides": list(overrides),
    }


def _predict_chunks(
    ensemble: Ensemble,
    source: Path,
    writer: ChunkWriter,
    csv_file: Path | None,
    jsonl_file: Path | None,
    batch_size: int,
    bar: Bar,
) -> Summary:
    recipe, label_set = ensemble.recipe, ensemble.label_set
    chunks = stream_rows(
        source,
        label_set,
        size=CHUNK if len(ensemble.folders) == 1 else CHUNK_OF_ENSEMBLE,
        text_column=recipe.text_column,
        id_column=recipe.id_column,
        labels_column=recipe.labels_column,
        **recipe.file_form,
    )
    summary = Summary()
    for rows in chunks:
        n_before, summary.n_rows = summary.n_rows, summary.n_rows + len(rows)
        summary.n_formulas += sum(row_id.startswith(("=", "+", "-", "@")) for row_id in rows.ids)
        if len(rows) and writer.has(rows, n_before):
            continue
        batch = ensemble.predict(rows, with_prob=jsonl_file is not None, batch_size=batch_size, bar=bar)
        for text, vector in list(zip(rows.texts, batch.pred, strict=True))[: N_SHOWN - len(summary.first)]:
            summary.first.append((text, label_set.names_of(vector)))
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
