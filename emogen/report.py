"""Run folders -> what can be said of them -> one HTML page that needs nothing else, and the model card beside it.

Everything is read from the folders and scored again; no model is loaded. What thresholds are worth is always said by
nested ones, which never saw the row that they decide.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

import emogen
from emogen import figures, paths, results
from emogen.card import model_card
from emogen.compare import Row, compare, label_set_of, names_of, published, rows_of
from emogen.errors import InputError
from emogen.parse import FAILED
from emogen.predict import LABELS, PROMPT, RECIPE
from emogen.results import Scored
from emogen.score import (
    SINGLES,
    apply_thresholds,
    bootstrap,
    calibration,
    confusions,
    cooccurrence,
    discordant,
    footnote,
    interval,
    nested_thresholds,
    row_log_loss,
    score,
)

log = logging.getLogger(__name__)

PAGE, CARD, COMPARISON = "report.html", "README.md", "comparison.html"
TEMPLATE = Path(__file__).with_name("page.html")
MANIFEST = "manifest.json"
BASELINE = "TF-IDF and logistic regression"
# The pictures of learning: name, caption, what is on the vertical axis, where that ends, and the keys of the log.
CURVES = (
    ("loss", "Loss by step.", "loss", None, (("loss", "training rows"), ("eval_loss", "watched rows"))),
    (
        "f1",
        "F1 of what was generated for the rows that were watched during training.",
        "F1",
        1.0,
        (("eval_f1_macro", "macro-F1"), ("eval_f1_micro", "micro-F1")),
    ),
)


class Picture(NamedTuple):
    """A picture: its name, the section of the page that it stands in, and in words what it shows."""

    name: str
    section: str
    caption: str
    figure: Figure


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


# ---------------------------------------------------------------------------------------------- reading


def read_run(folder: Path) -> dict[str, Any]:
    """What is in the folder of a run, of a cross-validation or of a baseline, scored again.

    Returns:
        `name`; `kind` (run, cross-validation or baseline); `model`; `label_set`; `recipe` (the keys of its YAML file);
        `files` (what makes the run, name -> text); `manifest` and `metrics` (of these JSON files; empty without them);
        `folds` (the metrics of each fold of a cross-validation that is finished) of `n_folds`; `logs` (one for each
        training); `resources` (see there); `missing` (sentences: what is not there, and how to come by it).
        Where rows were scored, also `scored` (`results.Scored`), `records` (the lines of the predictions file), `audit`
        (see there; None where no answer is generated), `calibration`, and `systems`: what decides the labels, first the
        answer and then nested thresholds, each with `title`, `pred` [n, L], `metrics` (of `score.score`), `resampled`
        and `interval` (figure -> what the bootstrap found, and its 95 %), and `thresholds` [n, L] of the latter.

    Raises:
        InputError: it is no such folder, or a file in it cannot be read.
    """
    label_set = label_set_of(folder)
    files = {name: text for name in (RECIPE, PROMPT, LABELS, MANIFEST) if (text := _text(folder / name))}
    recipe = yaml.safe_load(files.get(RECIPE, "{}")) or {}
    fold_folders = sorted(folder.glob("fold-*/"))
    kind = "cross-validation" if (folder / results.FOLDS).is_file() else "run"
    if results.is_baseline(folder):
        kind = "baseline"
    folds = {int(f.name[5:]): _json(f / results.METRICS) for f in fold_folders if (f / results.METRICS).is_file()}
    run: dict[str, Any] = {
        "name": folder.resolve().name,
        "folder": str(folder),
        "kind": kind,
        "model": BASELINE if kind == "baseline" else recipe.get("model_name_or_path", "a model that is not named"),
        "label_set": label_set,
        "recipe": recipe,
        "files": files,
        "manifest": _json(folder / MANIFEST),
        "metrics": _json(folder / results.METRICS),
        "folds": folds,
        "n_folds": _n_folds(folder),
        "logs": [entries for f in fold_folders or [folder] if (entries := results.read_log(f))],
        "missing": [],
    }
    if not run["metrics"]:
        run["missing"].append(_unfinished(run))
    if (folder / results.PREDICTIONS).is_file():
        run |= _scored_again(folder, run)
    elif run["metrics"]:
        run["missing"].append(
            "No rows were scored, for the recipe names none: eval_file=FILE or eval_fraction=0.1 holds rows out and "
            "scores them at the end of a run; emogen cv scores all."
        )
    return run | {"resources": resources(run)}


def _n_folds(folder: Path) -> int:
    """How many folds the rows of a cross-validation are in."""
    lines = (_text(folder / results.FOLDS) or "").split("\n")[1:]
    return len({line.rpartition(",")[2] for line in lines if line})


def _unfinished(run: dict[str, Any]) -> str:
    said = f"It has not ended: there is no {results.METRICS}. The command that began it goes on with it"
    if run["kind"] == "run":
        return f"{said}, with resume_from_checkpoint=true."
    return f"{said}; {len(run['folds'])} of {run['n_folds']} folds are finished."


def _scored_again(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What `read_run` says of the rows that were scored."""
    names = run["label_set"].names
    scored = results.read_scored(folder, run["label_set"])
    records = results.read_records(scored.path)
    systems: list[dict[str, Any]] = [{"title": _titles(run)["answer"], "pred": scored.pred}]
    if len(np.unique(scored.folds)) > 1:
        thresholds = nested_thresholds(scored.gold, scored.prob, scored.folds)
        pred = apply_thresholds(scored.prob, thresholds)
        systems.append({"title": _titles(run)["thresholds"], "pred": pred, "thresholds": thresholds})
    resampled = bootstrap(scored.gold, [system["pred"] for system in systems], names)
    for system, values in zip(systems, resampled, strict=True):
        system["metrics"] = score(scored.gold, system["pred"], names)
        system["resampled"] = values
        system["interval"] = {key: interval(of) for key, of in values.items()}
    return {
        "scored": scored,
        "records": records,
        "audit": audit(records) if _generates(run) else None,
        "systems": systems,
        "calibration": calibration(scored.gold, scored.prob, names),
    }


def _generates(run: dict[str, Any]) -> bool:
    """Whether there are answers, and not probabilities alone."""
    return run["kind"] != "baseline" and run["recipe"].get("answer") != "head"


def _titles(run: dict[str, Any]) -> dict[str, str]:
    """What decides the labels, in words, by its name in metrics.json."""
    return {"answer": "answer" if _generates(run) else "threshold 0.5", "thresholds": "nested thresholds"}


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file. Raises InputError."""
    try:
        return json.loads(_text(path) or "{}")
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}; was the file changed?") from None


def audit(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How answers were read: `statuses` (status, rows, whether it is a failure), the commonest `unknown` words with
    their rows, and how many texts were `cut`."""
    statuses = Counter(record["status"] for record in records)
    unknown = Counter(word for record in records for word in record["unknown"])
    return {
        "n": len(records),
        "statuses": [(status, n, status in FAILED) for status, n in statuses.most_common()],
        "failed": sum(statuses[status] for status in FAILED),
        "unknown": unknown.most_common(20),
        "cut": sum("tokens_cut" in record for record in records),
    }


def resources(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Time, speed and memory of a run, as far as they are known: what, and how much with its unit."""
    parts = list(run["folds"].values()) or [run["metrics"]]
    over = f" of {len(parts)} folds" if len(parts) > 1 else ""
    rows: list[tuple[str, str]] = []

    def total(key: str) -> float:
        return sum(part.get(key, 0) for part in parts)

    def last(key: str) -> list[float]:
        return [entries[-1][key] for entries in run["logs"] if key in entries[-1]]

    if seconds := total("train_seconds"):
        rows.append((f"training{over}", _duration(seconds)))
    if trained := parts[0].get("train_rows"):
        rows.append(("training rows" + (" of a fold" if over else ""), f"{trained:,}"))
    if speed := last("train_samples_per_second"):
        rows.append(("training speed", f"{np.mean(speed):.1f} rows/s"))
    for key, what in (("answer_seconds", "answers"), ("prob_seconds", "probabilities")):
        if seconds := total(key):
            rows.append((f"{what}{over}", f"{_duration(seconds)}, {total('n') / seconds:.1f} rows/s"))
    if memory := max((part.get("peak_memory_bytes", 0) for part in parts), default=0):
        rows.append(("peak memory", f"{memory / 2**30:.1f} GiB"))
    if hardware := run["manifest"].get("hardware"):
        gpus = ", ".join(f"{n} × {gpu}" for gpu, n in Counter(hardware["gpus"]).items())
        rows.append(("hardware", gpus or f"{hardware['threads']} threads of a CPU ({hardware['machine']})"))
    return rows


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def others(names: Sequence[str]) -> list[Row]:
    """The published systems, if these are their labels."""
    return rows_of([], with_published=True) if set(names) == set(published()["labels"]) else []


# ---------------------------------------------------------------------------------------------- pages


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
        "folds": _fold_rows(run),
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
        "thresholds": _json(Path(run["folder"]) / results.THRESHOLDS),
        "data": browser([run], scored),
    }
    if len(systems) > 1:
        difference = systems[1]["resampled"]["f1_macro"] - systems[0]["resampled"]["f1_macro"]
        context["gain"] = (
            systems[1]["metrics"]["f1_macro"] - systems[0]["metrics"]["f1_macro"],
            interval(difference),
        )
    return context, drawn


def _fold_rows(run: dict[str, Any]) -> dict[str, Any] | None:
    """The table of the folds: by what decides the macro-F1 and micro-F1 of each, their mean and standard deviation; of
    a cross-validation that has not ended, what is known of the folds that have."""
    if run["kind"] == "run":
        return None
    metrics = run["metrics"]
    if "folds" in metrics:
        by_system = metrics["folds"]
        numbers = list(range(len(by_system["answer"]["f1_macro"])))
    else:
        numbers = sorted(run["folds"])
        by_system = {
            "answer": {
                key: [run["folds"][k].get(key, float("nan")) for k in numbers] for key in ("f1_macro", "f1_micro")
            }
        }
    if not numbers:
        return None
    titles = _titles(run)
    named = {key: {titles[system]: of for system, of in metrics.get(key, {}).items()} for key in ("mean", "sd")}
    return {"numbers": numbers, "by_system": {titles[system]: of for system, of in by_system.items()}} | named


def draw_run(run: dict[str, Any]) -> list[Picture]:
    """The pictures of one folder."""
    pictures = []
    folds = _fold_rows(run)
    if folds and len(folds["numbers"]) > 1:
        caption = "Macro-F1 and micro-F1 of each fold; the lines are their means."
        pictures.append(Picture("folds", "folds", caption, figures.draw_folds(folds["by_system"])))
    logged = {key for entries in run["logs"] for entry in entries for key in entry}
    each = " One line for each fold." if len(run["logs"]) > 1 else ""
    for name, caption, title, top, curves in CURVES:
        if logged & {key for key, _ in curves}:
            figure = figures.draw_curves(run["logs"], curves, title, top)
            pictures.append(Picture(f"learning-{name}", "learning", caption + each, figure))
    return pictures + (_draw_scored(run) if "scored" in run else [])


def _draw_scored(run: dict[str, Any]) -> list[Picture]:
    """The pictures of rows that were scored."""
    gold, prob, systems, names = run["scored"].gold, run["scored"].prob, run["systems"], run["label_set"].names
    pictures = []
    if beside := others(names):
        own = [
            (
                f"{run['name']}, {of['title']}",
                of["metrics"]["f1_macro"],
                of["interval"]["f1_macro"],
                {name: label["f1"] for name, label in of["metrics"]["per_label"].items()},
            )
            for of in systems
        ]
        caption = (
            "Macro-F1 with its 95 % interval, and F1 by label, beside nine published systems (grey). Theirs are their "
            "authors' own figures, on rows of their own."
        )
        pictures.append(Picture("published", "headline", caption, figures.draw_comparison([*own, *beside])))
    for of, color in zip(systems, figures.COLORS, strict=False):
        caption = f"By {of['title']}: F1 of each label (bar) with its 95 % interval (line), precision and recall."
        figure = figures.draw_labels(of["metrics"]["per_label"], of["interval"], color)
        pictures.append(Picture(f"labels-{_slug(of['title'])}", "labels", caption, figure))
    decided = [(of["title"], of["pred"]) for of in systems]
    caption = "Precision against recall for every threshold, and where the labels are decided."
    figure = figures.draw_precision_recall(gold, prob, names, decided)
    pictures.append(Picture("precision-recall", "curves", caption, figure))
    caption = "Of the rows that were given a probability, the share that has the label: on the dotted line, as many."
    pictures.append(Picture("reliability", "calibration", caption, figures.draw_reliability(run["calibration"])))
    pictures += [_draw_cooccurrence(title, labels, names) for title, labels in [("gold", gold), *decided]]
    return pictures + [_draw_confusions(title, gold, pred, names) for title, pred in decided]


def _draw_cooccurrence(title: str, labels: np.ndarray, names: Sequence[str]) -> Picture:
    """Which of the `labels` [n, L] go together."""
    counts = cooccurrence(labels)
    share = counts / np.maximum(np.diag(counts), 1)[:, None]
    shown = [[f"{100 * value:.0f}" for value in row] for row in share]
    for k in range(len(names)):
        share[k, k], shown[k][k] = np.nan, f"{counts[k, k]:,}"
    caption = f"{title.capitalize()}: of the rows with the label on the left, the share that has the other one too"
    caption += ", in percent; on the diagonal, rows." if len(names) <= figures.WRITTEN else "."
    figure = figures.draw_matrix(share, shown, names, f"with this label ({title})", "also has")
    return Picture(f"cooccurrence-{_slug(title)}", "cooccurrence", caption, figure)


def _draw_confusions(title: str, gold: np.ndarray, pred: np.ndarray, names: Sequence[str]) -> Picture:
    """Which labels are given in place of which, gold and pred [n, L]."""
    counts = confusions(gold, pred)
    share = counts / np.maximum((gold * (1 - pred)).sum(axis=0), 1)[:, None]  # of the rows that miss a label
    share /= max(share.max(), 1e-9)
    np.fill_diagonal(share, np.nan)
    shown = [[str(n) if n else "" for n in row] for row in counts.tolist()]
    caption = (
        f"{title.capitalize()}: in how many rows the label on the left was missed and the other one falsely given; "
        "the deeper, the larger their share of the rows that miss it."
    )
    figure = figures.draw_matrix(share, shown, names, "missed", "falsely given")
    return Picture(f"confusion-{_slug(title)}", "confusion", caption, figure)


def _slug(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title)


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
    return template.render(context, pictures=drawn, generator=figures.GENERATOR, version=emogen.__version__)
