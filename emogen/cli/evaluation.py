"""Commands that evaluate predictions, without a model: score, compare, report."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emogen.cli.shared import JsonOption, RunsArgument
from emogen.console import err, out

if TYPE_CHECKING:
    from emogen.task.rows import Rows

log = logging.getLogger("emogen")

DECISIONS = ("thresholds", "stack", "answer")
PICTURE_TYPES = (".svg", ".png", ".pdf")


def score(
    gold: Annotated[str, typer.Argument(help="A file with the true labels.")],
    pred: Annotated[list[str], typer.Argument(help="One or more files with predicted labels, matched by id.")],
    labels: Annotated[str, typer.Option(help="The label set: a shipped one, or a YAML file.")] = "semeval2018",
    id_column: Annotated[str | None, typer.Option(help="The id column of all files; detected by default.")] = None,
    labels_column: Annotated[
        str | None, typer.Option(help="The one column that holds all labels; detected by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score predicted labels against the true ones.

    The metrics are precision, recall and F1 by label, macro-F1, micro-F1, Jaccard, exact match and Hamming loss. A
    label without a positive gold row has an F1 of 0 in the macro average, and is named below the table. So are the
    labels that are predicted for every row or for none, and what constant predictions would score.
    """
    from emogen.evaluation.caveats import with_caveats
    from emogen.evaluation.metrics import score
    from emogen.evaluation.tables import print_scores
    from emogen.task.labels import LabelSet, load_label_set
    from emogen.task.readers import read_rows
    from emogen.task.rows import Rows, align, checked

    label_set = load_label_set(labels)

    def read(file: str, read_as: LabelSet) -> Rows:
        rows, problems = read_rows(
            file, read_as, id_column=id_column, labels_column=labels_column, need_labels=True, need_text=False
        )
        for problem in problems:
            if problem.level == "warning":
                log.warning(str(problem))
        return checked((rows, problems))

    gold_rows = read(gold, label_set)
    systems = []
    for file in pred:
        # Where each text has one label, predictions may lack it: an answer that cannot be read gives none.
        rows = read(file, label_set.model_copy(update={"exactly_one": False}))
        if label_set.exactly_one:
            _check_one_label(rows)
        rows = align(gold_rows, rows)
        metrics = score(gold_rows.truth, rows.truth, label_set.names, exactly_one=label_set.exactly_one)
        systems.append((file, metrics))
    if as_json:
        results = {file: with_caveats(metrics) for file, metrics in systems}
        print(json.dumps(results[pred[0]] if len(systems) == 1 else results, indent=2))
        return
    print_scores([(Path(file).stem if len(systems) > 1 else "", metrics) for file, metrics in systems])


def _check_one_label(rows: "Rows") -> None:
    """Warn of predictions without a label, for a label set with `exactly_one`; refuse those with several."""
    from emogen.errors import InputError
    from emogen.evaluation.caveats import count_rows

    n_labels = rows.truth.sum(axis=1).tolist()
    if several := [line for line, n in zip(rows.lines, n_labels, strict=True) if n > 1]:
        raise InputError(f"{rows.path}:{several[0]}: several labels, but the label set says exactly_one")
    if n := n_labels.count(0):
        log.warning(f"{rows.path}: {count_rows(n)} without a label, as where an answer cannot be read; counted wrong")


def compare(
    runs: RunsArgument,
    by: Annotated[
        str, typer.Option(help="How labels are decided: thresholds, stack (both nested) or answer.")
    ] = "thresholds",
    tune: Annotated[
        str, typer.Option(help="What thresholds are tuned for and runs are compared by: f1_macro or f1_micro.")
    ] = "f1_macro",
    ensemble: Annotated[bool, typer.Option("--ensemble", help="Add the ensemble of all runs.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Add published results on SemEval-2018 E-c.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Also draw the comparison: an .svg, .png or .pdf file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs on the same rows, with intervals.

    Differences are to the first run. "Not better" is the share of resamples in which a run does not beat the first.
    A reference is what constant predictions score on the same rows, without a model. Published results were scored by
    their authors on other rows; they are refused for other labels and for the sample posts.
    """
    from emogen.evaluation.caveats import caveats, with_caveats
    from emogen.evaluation.run_folder import label_set_of
    from emogen.evaluation.tables import print_notes
    from emogen.report.compare import (
        PUBLISHED_NOTE,
        TITLES,
        compare,
        decision_title,
        published_rows,
        rows_of,
        tables,
    )

    if figure and figure.suffix not in PICTURE_TYPES:
        raise typer.BadParameter(f"--figure {figure}: expected a file name that ends with {', '.join(PICTURE_TYPES)}")
    if by not in DECISIONS:
        raise typer.BadParameter(f"--by is one of {', '.join(DECISIONS)}, not {by}")
    if tune not in TITLES:
        raise typer.BadParameter(f"--tune is one of {', '.join(TITLES)}, not {tune}")
    if figure and tune != "f1_macro":
        raise typer.BadParameter("--figure draws macro-F1: leave out --tune, or the figure")
    label_set = label_set_of(runs[0])
    others = published_rows(runs, label_set) if published else []
    systems = compare(runs, label_set, by=by, ensemble=ensemble, objective=tune)
    if figure:
        from emogen.report.figures import draw_comparison, save

        save(draw_comparison(rows_of(systems, others)), figure)
    if as_json:
        results = [asdict(system) | {"metrics": with_caveats(system.metrics)} for system in systems]
        print(json.dumps(results, indent=2))
        return
    decided = decision_title(by, label_set)
    if by != "answer" and not label_set.exactly_one:
        decided += f", tuned for {TITLES[tune]}"
    out.print(f"{systems[0].metrics['n']:,} rows; labels decided by {decided}")
    for table in tables(systems, others):
        out.print(table)
        out.print()
    print_notes(caveats([(system.name, system.metrics) for system in systems]))
    if published:
        out.print(f"{PUBLISHED_NOTE} published_results.yaml lists the sources.")


def report(
    runs: RunsArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page. Default: RUN_DIR/report.html, or comparison.html for several runs."
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the pictures to this folder, as .svg and .png.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that emogen did not write.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Add published results on SemEval-2018 E-c.")] = False,
) -> None:
    """Write the report page and the model card of a run.

    The page shows metrics with intervals, curves, calibration, confusions, and every held-out row with its errors; for
    a cross-validation also the folds. Several runs are compared with each other, row by row.

    Training writes the report of its run. This command writes it again, without loading a model.
    """
    from emogen.report.page import report

    page, *others = report(runs, output, pictures=figures, overwrite=overwrite, published=published)
    out.print(f"The report is in {page}", soft_wrap=True)
    pictures = [path for path in others if path.suffix in PICTURE_TYPES]
    if len(others) > len(pictures):
        err.print(f"The model card is in {others[0]}", soft_wrap=True)
    if pictures:
        err.print(f"{len(pictures)} pictures are in {figures}", soft_wrap=True)
