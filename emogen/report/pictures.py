"""A run -> the pictures of its page."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from emogen.evaluation.metrics import confusions, cooccurrence
from emogen.report import figures
from emogen.report.runs import others, titles_of

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


def fold_rows(run: dict[str, Any]) -> dict[str, Any] | None:
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
    titles = titles_of(run)
    named = {key: {titles[system]: of for system, of in metrics.get(key, {}).items()} for key in ("mean", "sd")}
    return {"numbers": numbers, "by_system": {titles[system]: of for system, of in by_system.items()}} | named


def draw_run(run: dict[str, Any]) -> list[Picture]:
    """The pictures of one folder."""
    pictures = []
    folds = fold_rows(run)
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
