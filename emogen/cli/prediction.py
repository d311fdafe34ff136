"""The command that labels texts: predict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from emogen import processes
from emogen.cli.shared import split_overrides
from emogen.console import err, progress_bar

ENGINES = ("here", "ray")


def predict(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_DIR... FILE [KEY=VALUE]...",
            help="Run folders, then a CSV, TSV, JSONL or Parquet file with texts. A word that begins with a key and an "
            "equals sign (batch=8) is an override; any other word is a path.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="CSV file: ids and 0/1 columns, ready to submit. - is standard output."),
    ] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="JSONL file: text, raw answer, parse status, labels, probabilities.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per batch.")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output files.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Predict although the weights are not those that the run was scored with.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="here, or ray: FILE is a Parquet file or folder, -o a folder, on a Ray cluster.")
    ] = "here",
) -> None:
    """Label the texts of a file with one or several runs.

    A recipe in place of RUN_DIR uses its untuned model. The folder of a cross-validation uses all its folds, and that
    of a baseline a model that is fitted to all its rows.

    predict_by=answer uses the generated labels; several models vote. predict_by=thresholds averages the probabilities
    and compares them with thresholds tuned on held-out rows. predict_by=stack weighs the runs by a regression that was
    fitted on held-out rows.

    The file can have any size: it is read, labelled and written in chunks. The same command continues an interrupted
    one. On several processes: accelerate launch -m emogen.cli predict ...
    """
    outputs = [path for path in (output, jsonl) if path is not None]
    if not outputs:
        raise typer.BadParameter("give -o OUT.csv, --jsonl OUT.jsonl, or both")
    if engine not in ENGINES:
        raise typer.BadParameter(f"--engine is one of {', '.join(ENGINES)}, not {engine}")
    named, overrides = split_overrides(words)
    if len(named) < 2:
        raise typer.BadParameter("name a run folder (or a recipe), and then a file of texts")
    *runs, source = map(Path, named)
    if engine == "ray":
        _predict_on_ray(runs, source, output, jsonl, overrides, batch_size, force)
    else:
        _predict_file(runs, source, output, jsonl, overrides, batch_size, overwrite, force)


def _predict_on_ray(
    runs: Sequence[Path],
    source: Path,
    output: Path | None,
    jsonl: Path | None,
    overrides: list[str],
    batch_size: int,
    force: bool,
) -> None:
    from emogen.prediction.ray_files import predict_on_ray

    if output is None or jsonl:
        raise typer.BadParameter("--engine ray writes Parquet: give -o FOLDER, and no --jsonl")
    n_rows = predict_on_ray(list(runs), source, output, overrides, batch_size=batch_size, force=force)
    err.print(f"{n_rows:,} texts -> {output}", soft_wrap=True)


def _predict_file(
    runs: Sequence[Path],
    source: Path,
    output: Path | None,
    jsonl: Path | None,
    overrides: list[str],
    batch_size: int,
    overwrite: bool,
    force: bool,
) -> None:
    from emogen.prediction.files import predict_file

    summary = predict_file(
        runs, source, overrides,
        csv_file=output, jsonl_file=jsonl, batch_size=batch_size, overwrite=overwrite, force=force,
        bar=progress_bar,
    )  # fmt: skip
    if not processes.is_main_process():
        return
    outputs = ", ".join(str(path) for path in (output, jsonl) if path)
    for text, labels in summary.first:
        err.print(f"  {', '.join(labels) or '(none)'}: {text}", no_wrap=True, overflow="ellipsis", style="dim")
    err.print(f"{summary.n_rows:,} texts -> {outputs}", soft_wrap=True)
    if n_parsed := summary.statuses.total():
        shares = ", ".join(f"{status} {count / n_parsed:.1%}" for status, count in summary.statuses.most_common())
        err.print(f"{n_parsed:,} answers: {shares}")
    if summary.n_formulas and output:
        err.print(
            f"{summary.n_formulas:,} ids begin with =, +, - or @: a spreadsheet takes them for formulas; "
            "import the id column as text",
            highlight=False,
        )
    if summary.n_cut:
        err.print(f"{summary.n_cut:,} texts were shortened to fit max_length")
