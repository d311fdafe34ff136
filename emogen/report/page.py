"""Run folders -> what can be said of them -> one HTML page that needs nothing else, and the model card beside it.

Everything is read from the folders and scored again; no model is loaded. What thresholds are worth is always said by
nested ones, which never saw the row that they decide.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from emogen import paths
from emogen.distribution import __version__
from emogen.errors import InputError
from emogen.evaluation import results, run_folder
from emogen.evaluation.metrics import discordant, interval, row_log_loss
from emogen.evaluation.results import Scored
from emogen.evaluation.run_folder import CARD, PAGE, label_set_of, read_json
from emogen.evaluation.tables import SINGLES, footnote
from emogen.report import figures
from emogen.report.card import model_card
from emogen.report.compare import compare, names_of, rows_of
from emogen.report.pictures import Picture, draw_run, fold_rows
from emogen.report.runs import others, read_run

log = logging.getLogger(__name__)

COMPARISON = "comparison.html"
TEMPLATE = Path(__file__).with_name("page.html")


def report(
    runs: Sequence[Path], output: Path | None = None, *, pictures: Path | None = None, overwrite: bool = False
) -> list[Path]:
    """Write the report of a run, or of several beside each other.

    Args:
        runs: folders of runs, cross-validations or baselines. The report of one is in its folder, with its model card
            (a baseline has none); several must have been scored on the same rows.
        output: the page, if not `report.html` in the folder, or of several `comparison.html` in the current one.
        pictures: a folder for every picture of the page, as .svg and .png.
        overwrite: replace files that emogen did not write.

    Returns:
        The files that were written, the page first.

    Raises:
        InputError: a folder holds no run or cannot be read, or a file in the way is not emogen's.
    """
    page = output or (runs[0] / PAGE if len(runs) == 1 else Path(COMPARISON))
    if page != runs[0] / PAGE:
        _make_sure_of(page, overwrite)
    if len(runs) == 1:
        run = read_run(runs[0])
        context, drawn = page_of_run(run)
    else:
        run = None
        context, drawn = page_of_comparison(runs)
    files = [(p.figure, pictures / f"{p.name}.{kind}") for p in drawn for kind in ("svg", "png")] if pictures else []
    for _, path in files:
        _make_sure_of(path, overwrite)
    written = {page: render(context, drawn)}
    if run and run["kind"] != "baseline":
        written[runs[0] / CARD] = str(model_card(run, published=[row[:2] for row in others(run["label_set"].names)]))
    for path, text in written.items():
        with paths.writing(path) as file:
            file.write(text)
    for figure, path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        figures.save(figure, path)
    return [*written, *(path for _, path in files)]


def report_finished(folder: Path) -> None:
    """The report of what has just ended. A run is not lost by a report that cannot be written: that is only said."""
    try:
        report([folder])
    except Exception as error:
        log.warning(f"The report was not written: {error!r}. `emogen report {folder}` tries again")


def _make_sure_of(path: Path, overwrite: bool) -> None:
    if not overwrite and path.is_file() and figures.GENERATOR.encode() not in path.read_bytes()[:2000]:
        raise InputError(f"{path}: it exists, and emogen did not write it; add --overwrite to replace it")


def page_of_run(run: dict[str, Any]) -> tuple[dict[str, Any], list[Picture]]:
    """What the page of one folder says, and its pictures."""
    label_set, recipe = run["label_set"], run["recipe"]
    context = {
        "title": run["name"],
        "kind": run["kind"],
        "facts": [
            ("model", run["model"]),
            *([] if run["kind"] == "baseline" else [("answer", recipe.get("answer", "list"))]),
            ("labels", f"{len(label_set)} ({label_set.name})"),
        ],
        "missing": run["missing"],
        "resources": run["resources"],
        "files": run["files"],
        "folds": fold_rows(run),
    }
    drawn = draw_run(run)
    if "scored" not in run:
        return context, drawn
    scored, systems = run["scored"], run["systems"]
    context["facts"].append(("scored", f"{len(scored.ids):,} rows"))
    context |= {
        "systems": systems,
        "singles": {"precision_macro": "macro precision", "recall_macro": "macro recall"} | SINGLES,
        "narrow": len(label_set) <= figures.WRITTEN,
        "footnote": footnote(systems[0]["metrics"]),
        "calibration": run["calibration"],
        "audit": run["audit"],
        "thresholds": read_json(Path(run["folder"]) / run_folder.THRESHOLDS),
        "data": browser([run], scored),
    }
    if len(systems) > 1:
        difference = systems[1]["resampled"]["f1_macro"] - systems[0]["resampled"]["f1_macro"]
        context["gain"] = (
            systems[1]["metrics"]["f1_macro"] - systems[0]["metrics"]["f1_macro"],
            interval(difference),
        )
    return context, drawn


def page_of_comparison(folders: Sequence[Path]) -> tuple[dict[str, Any], list[Picture]]:
    """What the page of several folders says, and its pictures.

    Raises:
        InputError: they were not scored on the same rows and folds.
    """
    label_set = label_set_of(folders[0])
    names = label_set.names
    runs = [read_run(folder) | {"name": name} for folder, name in zip(folders, names_of(folders), strict=True)]
    for run in runs:
        if run["label_set"].names != names:
            raise InputError(f"{run['folder']}: its labels are not those of {folders[0]}")
        if "scored" not in run:
            raise InputError(f"{run['folder']}: nothing to compare. {' '.join(run['missing'])}")
    aligned = results.aligned([run["scored"] for run in runs])
    thresholds = len(np.unique(aligned[0].folds)) > 1
    decisions = [("nested thresholds", "thresholds")] * thresholds + [("answer", "answer")]
    compared = {title: compare(folders, label_set, by=by) for title, by in decisions}
    best = decisions[0][0]
    for run, scored in zip(runs, aligned, strict=True):
        where = {row_id: i for i, row_id in enumerate(run["scored"].ids)}
        order = [where[row_id] for row_id in scored.ids]
        run["scored"], run["records"] = scored, [run["records"][i] for i in order]
        for system in run["systems"]:
            system |= {key: system[key][order] for key in ("pred", "thresholds") if key in system}
    preds = [run["systems"][-1 if thresholds else 0]["pred"] for run in runs]
    keys = dict.fromkeys(key for run in runs for key in run["recipe"])
    whats = dict.fromkeys(what for run in runs for what, _ in run["resources"])
    context = {
        "title": " · ".join(run["name"] for run in runs),
        "kind": "comparison",
        "facts": [("rows", f"{len(aligned[0].ids):,}"), ("labels", f"{len(label_set)} ({label_set.name})")],
        "missing": [f"{run['name']}: {sentence}" for run in runs for sentence in run["missing"]],
        "compared": compared,
        "best": best,
        "names": names,
        "discordant": discordant(aligned[0].gold, preds).tolist(),
        "runs": runs,
        "resources_of": {what: [dict(run["resources"]).get(what, "") for run in runs] for what in whats},
        "differing": {
            key: [run["recipe"].get(key) for run in runs]
            for key in keys
            if len({str(run["recipe"].get(key)) for run in runs}) > 1 and key != "output_dir"
        },
        "data": browser(runs, aligned[0]),
    }
    caption = f"Macro-F1 with its 95 % interval, and F1 by label; by {best}."
    if beside := others(names):
        caption += " Grey: published figures, their authors' own, on rows of their own."
    rows = [*rows_of(compared[best]), *beside]
    return context, [Picture("comparison", "headline", caption, figures.draw_comparison(rows))]


def browser(runs: Sequence[dict[str, Any]], scored: Scored) -> dict[str, Any]:
    """What the error browser of a page knows of each row, as lists in the order of the rows.

    Args:
        runs: as `read_run` gives them, their rows in the order of `scored`.
    """

    def vectors(matrix: np.ndarray) -> list[str]:
        return ["".join(map(str, row)) for row in matrix.tolist()]

    folds, first = np.unique(scored.folds, return_index=True)
    several = len(runs) > 1
    return {
        "names": list(runs[0]["label_set"].names),
        "ids": [str(row_id) for row_id in scored.ids],
        "texts": [record["text"] for record in runs[0]["records"]],
        "gold": vectors(scored.gold),
        "folds": scored.folds.tolist() if len(folds) > 1 else None,
        "trained_in_folds": runs[0]["kind"] != "run",
        "runs": [
            {
                "name": run["name"],
                "prob": np.round(run["scored"].prob * 1000).astype(int).tolist(),  # per mille
                "loss": np.round(row_log_loss(scored.gold, run["scored"].prob), 3).tolist(),
                "raw": [record["raw"] for record in run["records"]] if run["audit"] else None,
                "status": [record["status"] for record in run["records"]] if run["audit"] else None,
            }
            for run in runs
        ],
        "systems": [
            {
                "title": f"{run['name']}: {system['title']}" if several else system["title"],
                "run": k,
                "pred": vectors(system["pred"]),
                "thresholds": {
                    int(fold): np.round(system["thresholds"][row] * 1000).astype(int).tolist()
                    for fold, row in zip(folds, first, strict=True)
                }
                if "thresholds" in system
                else None,
            }
            for k, run in enumerate(runs)
            for system in (reversed(run["systems"]) if several else run["systems"])
        ],
    }


def render(context: dict[str, Any], pictures: Sequence[Picture]) -> str:
    """The HTML page. The template escapes what comes from data; only pictures bring markup of their own."""
    drawn: dict[str, list[dict[str, Any]]] = {}
    for picture in pictures:
        svg = figures.inline_svg(picture.figure, picture.name, picture.caption)
        drawn.setdefault(picture.section, []).append({"caption": picture.caption, "svg": Markup(svg)})  # noqa: S704
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "f3": lambda value: f"{value:.3f}",
        "signed": lambda value: f"{value:+z.3f}",
        "percent": lambda value: f"{value:.1%}",
        "n": lambda value: f"{value:,}",
        "ends": lambda ends: f"{ends[0]:.3f}–{ends[1]:.3f}",
        "signed_ends": lambda ends: f"{ends[0]:+z.3f} to {ends[1]:+z.3f}",
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(context, pictures=drawn, generator=figures.GENERATOR, version=__version__)
