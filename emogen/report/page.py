"""Run folders -> a report page: one HTML file that needs nothing else. A run also gets a model card.

Everything is read from the run folders and scored again; no model is loaded. Metrics of thresholds are always those of
nested thresholds, which are tuned on other folds than the rows they decide.
"""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import numpy as np
from markupsafe import Markup

from emogen import paths
from emogen.distribution import __version__
from emogen.errors import InputError
from emogen.evaluation.caveats import calibration_caveats, caveats, references
from emogen.evaluation.metrics import Interval, discordant, interval_of, row_log_loss
from emogen.evaluation.results import align_scored, as_strings
from emogen.evaluation.run_folder import BASELINE, CARD, PAGE, RUN, THRESHOLDS, label_set_of, read_json
from emogen.evaluation.tables import AGGREGATES
from emogen.report import figures
from emogen.report.card import model_card
from emogen.report.compare import (
    PUBLISHED_NOTE,
    ComparisonRow,
    System,
    compare,
    names_of,
    published_rows,
    rows_of,
    share,
)
from emogen.report.label_errors import label_errors
from emogen.report.pictures import Picture, draw_run
from emogen.report.runs import Decision, Run, Scores, decision_titles, fold_table, notes, read_run, resources
from emogen.report.templates import load_template

log = logging.getLogger(__name__)

COMPARISON = "comparison.html"
TEMPLATE = Path(__file__).with_name("page.html")


def report(
    folders: Sequence[Path],
    output: Path | None = None,
    *,
    pictures: Path | None = None,
    overwrite: bool = False,
    published: bool = False,
) -> list[Path]:
    """Write the report of a run, or a comparison of several runs.

    Args:
        folders: runs, cross-validations or baselines. Several must have been scored on the same rows.
        output: the page. By default `report.html` in the folder, or `comparison.html` in the current folder.
        pictures: a folder for all pictures of the page, as .svg and .png.
        overwrite: replace files that emogen did not write.
        published: show published results beside the runs.

    Returns:
        The files that were written: the page, the model card (of a single run or cross-validation) and the pictures.

    Raises:
        InputError: a folder cannot be reported, a file exists that emogen did not write, or published results are for
            other labels or rows.
    """
    page = output or (folders[0] / PAGE if len(folders) == 1 else Path(COMPARISON))
    if page != folders[0] / PAGE:
        _check_replaceable(page, overwrite)
    texts = {}
    published_systems = published_rows(folders, label_set_of(folders[0])) if published else []
    if len(folders) == 1:
        run = read_run(folders[0])
        context, drawn = run_page(run, published_systems)
        if run.kind != BASELINE:
            texts[folders[0] / CARD] = str(model_card(run, published=published_systems))
    else:
        context, drawn = comparison_page(folders, published_systems)
    files = {pictures / f"{p.name}.{kind}": p.figure for p in drawn for kind in ("svg", "png")} if pictures else {}
    for path in files:
        _check_replaceable(path, overwrite)
    texts = {page: render(context, drawn)} | texts
    for path, text in texts.items():
        with paths.writing(path) as file:
            file.write(text)
    for path, figure in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        figures.save(figure, path)
    return [*texts, *files]


def report_finished(folder: Path) -> None:
    """Write the report of a run that has just finished. If that fails, only log a warning: the run is complete."""
    try:
        report([folder])
    except Exception as error:
        log.warning(f"The report was not written: {error!r}. To try again: emogen report {shlex.quote(str(folder))}")


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not overwrite and path.is_file() and figures.GENERATOR.encode() not in path.read_bytes()[:2000]:
        raise InputError(f"{path}: the file exists and emogen did not write it; add --overwrite to replace it")


def run_page(run: Run, published: Sequence[ComparisonRow] = ()) -> tuple[dict[str, Any], list[Picture]]:
    """Prepare the page of a run, a cross-validation or a baseline.

    Args:
        published: published systems to show beside it.

    Returns:
        The variables of the template, and the pictures.
    """
    scores = run.scores
    facts = [("model", run.model)]
    if run.kind != BASELINE:
        facts.append(("answer", run.recipe.get("answer", "list")))
    facts.append(("labels", f"{len(run.label_set)} ({run.label_set.name})"))
    if scores:
        facts.append(("held-out rows", f"{len(scores.rows.ids):,}"))
    context: dict[str, Any] = {
        "title": run.name,
        "kind": run.kind,
        "facts": facts,
        "notes": notes(run),
        "folds": fold_table(run),
        "scores": scores,
        "resources": resources(run),
        "files": run.files,
    }
    if scores:
        found = label_errors(run)
        context |= {
            "aggregates": {"precision_macro": "macro precision", "recall_macro": "macro recall"} | AGGREGATES,
            "gain": _gain(scores.decisions),
            "references": references(scores.decisions[0].metrics),
            "calibration_caveats": calibration_caveats(scores.calibration, len(scores.rows.ids)),
            "thresholds": read_json(run.folder / THRESHOLDS),
            "is_narrow": len(run.label_set) <= figures.MAX_WRITTEN,
            "label_errors": found,
            "data": browser_data([run], [scores], audit=found.data if found else None),
        }
    return context, draw_run(run, published)


def _gain(decisions: Sequence[Decision]) -> tuple[float, Interval] | None:
    """The change of macro-F1 by nested thresholds and its 95 % interval; None without nested thresholds."""
    if len(decisions) < 2:
        return None
    answer, nested = decisions
    change = nested.metrics["f1_macro"] - answer.metrics["f1_macro"]
    return change, interval_of(nested.resampled["f1_macro"] - answer.resampled["f1_macro"], nested.metrics["n"])


def comparison_page(
    folders: Sequence[Path], published: Sequence[ComparisonRow] = ()
) -> tuple[dict[str, Any], list[Picture]]:
    """Prepare the page that compares several runs.

    Args:
        published: published systems to show beside them.

    Returns:
        The variables of the template, and the pictures.

    Raises:
        InputError: the runs have different labels, or were not scored on the same rows and folds.
    """
    runs, scores = _read_comparable(folders)
    label_set, rows = runs[0].label_set, scores[0].rows
    decisions = {"answer": "answer"}
    if len(np.unique(rows.folds)) > 1 and not label_set.exactly_one:
        decisions = {"nested thresholds": "thresholds"} | decisions
    compared = {title: compare(folders, label_set, by=by) for title, by in decisions.items()}
    best = max(compared, key=lambda title: _highest(compared[title]))
    measured = [dict(resources(run)) for run in runs]
    titles = dict.fromkeys(title for values in measured for title in values)
    context = {
        "title": " · ".join(run.name for run in runs),
        "kind": "comparison",
        "facts": [("rows", f"{len(rows.ids):,}"), ("labels", f"{len(label_set)} ({label_set.name})")],
        "notes": [f"{run.name}: {note}" for run in runs for note in notes(run)],
        "runs": runs,
        "without_answers": decision_titles(generates=False, label_set=label_set)["answer"],
        "compared": dict(sorted(compared.items(), key=lambda pair: pair[0] != best)),
        "choice": _choice(compared, best),
        "caveats": caveats(
            [
                (f"{system.name}, {title}" if len(compared) > 1 else system.name, system.metrics)
                for title, systems in compared.items()
                for system in systems
            ]
        ),
        "references": references(compared[best][0].metrics),
        "best": best,
        "best_titles": [_title_among(run, _decision_of(own, best)) for run, own in zip(runs, scores, strict=True)],
        "discordant": discordant(rows.gold, [_decision_of(own, best).pred for own in scores]).tolist(),
        "resources_of_runs": {title: [values.get(title, "") for values in measured] for title in titles},
        "recipe_differences": _recipe_differences(runs),
        "data": browser_data(runs, scores, nested_first=best == "nested thresholds"),
    }
    caption = f"Macro-F1 with its 95 % interval, and F1 by label ({best}). Dashed: the highest that needs no model."
    if published:
        caption += f" Grey: {PUBLISHED_NOTE[0].lower()}{PUBLISHED_NOTE[1:]}"
    figure = figures.draw_comparison(rows_of(compared[best], published))
    return context, [Picture("comparison", "headline", caption, figure)]


def _highest(systems: Sequence[System]) -> float:
    return max(system.metrics["f1_macro"] for system in systems)


def _choice(compared: dict[str, list[System]], best: str) -> str:
    """Which decision comes first in a comparison, and why."""
    if len(compared) < 2:
        return ""
    values = ", ".join(f"{title} {_highest(systems):.3f}" for title, systems in compared.items())
    return f"Shown first: labels decided by {best}, with the highest macro-F1 of any run on these rows ({values})."


def _title_among(run: Run, decision: Decision) -> str:
    """The title of a decision among those of several runs."""
    return f"{run.name}: {decision.title}"


def _decision_of(scores: Scores, title: str) -> Decision:
    """The decision by `nested thresholds`, or else the answer, which is threshold 0.5 for some runs."""
    return scores.decisions[-1 if title == "nested thresholds" else 0]


def _read_comparable(folders: Sequence[Path]) -> tuple[list[Run], list[Scores]]:
    """Read runs that were scored on the same rows, and put the rows of all into the order of the first."""
    names = names_of(folders)
    # They are compared by macro-F1, so thresholds are tuned for it, whatever the recipes say.
    runs = [replace(read_run(folder, "f1_macro"), name=name) for folder, name in zip(folders, names, strict=True)]
    scores = []
    for run in runs:
        if run.label_set.names != runs[0].label_set.names:
            raise InputError(f"{run.folder}: its labels are not those of {folders[0]}")
        if run.scores is None:
            raise InputError(f"{run.folder}: nothing to compare. {' '.join(notes(run))}")
        scores.append(run.scores)
    align_scored([own.rows for own in scores])
    return runs, [own.in_order_of(scores[0].rows.ids) for own in scores]


def _recipe_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The recipe keys that differ, with the value of each run."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe if key != "output_dir")
    values = {key: [run.recipe.get(key) for run in runs] for key in keys}
    return {key: of_runs for key, of_runs in values.items() if len({str(value) for value in of_runs}) > 1}


def browser_data(
    runs: Sequence[Run],
    scores: Sequence[Scores],
    *,
    nested_first: bool = True,
    audit: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The data of the row browser, as lists over the n rows. The script in the template reads it.

    Args:
        runs: one run, or several that are compared.
        scores: the scores of each run, with the rows in the same order.
        nested_first: of each of several runs, nested thresholds come first. Of a single run the best decision does.
        audit: what `emogen audit` said about the rows of a single run.

    Returns:
        `names` of the labels, the `empty` answer, and whether each row has `exactly_one` label; `ids`, `texts`, `gold`
        (strings of 0 and 1) and `folds` (None if there are none) of the rows; `runs` (see `_run_data`); `decisions`
        (see `_decision_data`), which are the ways to decide labels; and `audit`.
    """
    rows = scores[0].rows
    decisions = []
    for k, (run, own) in enumerate(zip(runs, scores, strict=True)):
        if len(runs) == 1:
            decisions += [_decision_data(decision, decision.title, k, rows.folds) for decision in own.best_first]
        else:
            decisions += [
                _decision_data(decision, _title_among(run, decision), k, rows.folds)
                for decision in sorted(own.decisions, key=lambda one: (one.thresholds is None) is nested_first)
            ]
    return {
        "names": list(runs[0].label_set.names),
        "empty": runs[0].label_set.empty,
        "exactly_one": runs[0].label_set.exactly_one,
        "ids": [str(row_id) for row_id in rows.ids],
        "texts": [record["text"] for record in scores[0].records],
        "gold": as_strings(rows.gold),
        "folds": rows.folds.tolist() if len(np.unique(rows.folds)) > 1 else None,
        "trained_in_folds": runs[0].kind != RUN,
        "runs": [_run_data(run, own) for run, own in zip(runs, scores, strict=True)],
        "decisions": decisions,
        "audit": audit,
    }


def _run_data(run: Run, scores: Scores) -> dict[str, Any]:
    """The probabilities in per mille, the log losses, and the answers with their parse status, if there are answers."""
    has_answers = scores.audit is not None
    return {
        "name": run.name,
        "prob": _per_mille(scores.rows.prob),
        "loss": np.round(row_log_loss(scores.rows.gold, scores.rows.prob), 3).tolist(),
        "raw": [record["raw"] for record in scores.records] if has_answers else None,
        "status": [record["status"] for record in scores.records] if has_answers else None,
    }


def _decision_data(decision: Decision, title: str, run: int, folds: np.ndarray) -> dict[str, Any]:
    """The labels that a decision predicts and, for nested thresholds, the thresholds of each fold in per mille."""
    thresholds = None
    if decision.thresholds is not None:
        numbers, first_rows = np.unique(folds, return_index=True)
        of_folds = _per_mille(decision.thresholds[first_rows])
        thresholds = dict(zip(numbers.tolist(), of_folds, strict=True))
    return {"title": title, "run": run, "pred": as_strings(decision.pred), "thresholds": thresholds}


def _per_mille(values: np.ndarray) -> list[list[int]]:
    return np.round(values * 1000).astype(int).tolist()


def render(context: dict[str, Any], pictures: Sequence[Picture]) -> str:
    """Render the HTML page. The template escapes all data; only the pictures bring their own markup."""
    drawn: dict[str, list[dict[str, Any]]] = {}
    for picture in pictures:
        svg = figures.inline_svg(picture.figure, picture.name, picture.caption)
        drawn.setdefault(picture.section, []).append({"caption": picture.caption, "svg": Markup(svg)})  # noqa: S704
    template = load_template(
        TEMPLATE,
        f3=lambda value: f"{value:.3f}",
        signed=lambda value: f"{value:+z.3f}",
        percent=lambda value: f"{value:.1%}",
        n=lambda value: f"{value:,}",
        share=share,
        encoded=quote_plus,
        ends=lambda ends: f"{ends[0]:.3f}–{ends[1]:.3f}" if ends else "no interval",
        signed_ends=lambda ends: f"{ends[0]:+z.3f} to {ends[1]:+z.3f}" if ends else "no interval",
    )
    return template.render(context, pictures=drawn, generator=figures.GENERATOR, version=__version__)
