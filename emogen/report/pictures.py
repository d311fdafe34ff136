"""The pictures of the page of a run."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from emogen.evaluation.caveats import f1_of_every_row
from emogen.evaluation.metrics import confusions, cooccurrence
from emogen.report import figures
from emogen.report.compare import PUBLISHED_NOTE, ComparisonRow, f1_by_label, reference_rows
from emogen.report.runs import Run, Scores, fold_table


class Picture(NamedTuple):
    """A picture, the section of the page that contains it, and its caption."""

    name: str
    section: str
    caption: str
    figure: Figure


class Curves(NamedTuple):
    """The curves of a training log that share a picture; `keys` are pairs of a key of the log and its title."""

    name: str
    caption: str
    y_title: str
    y_top: float | None
    keys: Sequence[tuple[str, str]]


CURVES = (
    Curves("loss", "Loss by step.", "loss", None, (("loss", "training rows"), ("eval_loss", "validation rows"))),
    Curves(
        "f1",
        "F1 of the answers to the validation rows during training.",
        "F1",
        1.0,
        (("eval_f1_macro", "macro-F1"), ("eval_f1_micro", "micro-F1")),
    ),
)


def draw_run(run: Run, published: Sequence[ComparisonRow] = ()) -> list[Picture]:
    """Draw the pictures of a run, a cross-validation or a baseline; beside published systems if there are any."""
    scores = _draw_scores(run, run.scores, published) if run.scores else ()
    return [*_draw_folds(run), *_draw_learning(run), *scores]


def _draw_folds(run: Run) -> list[Picture]:
    folds = fold_table(run)
    if folds is None or len(folds.numbers) < 2:
        return []
    caption = "Macro-F1 and micro-F1 of each fold."
    caption += (
        " The lines are the means." if folds.mean else f" {len(folds.numbers)} of {run.n_folds} folds are finished."
    )
    return [Picture("folds", "folds", caption, figures.draw_folds(folds.values, folds.mean))]


def _draw_learning(run: Run) -> list[Picture]:
    logged = {key for entries in run.logs for entry in entries for key in entry}
    each = " One line for each fold." if len(run.logs) > 1 else ""
    return [
        Picture(
            f"learning-{curves.name}",
            "learning",
            curves.caption + each,
            figures.draw_curves(run.logs, curves.keys, curves.y_title, curves.y_top),
        )
        for curves in CURVES
        if logged & {key for key, _ in curves.keys}
    ]


def _draw_scores(run: Run, scores: Scores, published: Sequence[ComparisonRow]) -> list[Picture]:
    gold, prob, names = scores.rows.gold, scores.rows.prob, run.label_set.names
    decided = [(decision.title, decision.pred) for decision in scores.decisions]
    pictures = [_draw_published(run, scores, published)] if published else []
    constant = f1_of_every_row(scores.decisions[0].metrics)
    for decision, color in zip(scores.decisions, figures.COLORS, strict=False):
        caption = (
            f"{decision.title.capitalize()}: F1 of each label (bar) with 95 % interval (line), precision, recall. "
            "Dotted: the F1 if every row gets the label."
        )
        figure = figures.draw_labels(decision.metrics["per_label"], decision.intervals, constant, color)
        pictures.append(Picture(f"labels-{_slug(decision.title)}", "labels", caption, figure))
    caption = (
        "Precision and recall at every threshold (line), and of the decided labels (marks). Dotted: the precision if "
        "every row gets the label."
    )
    figure = figures.draw_precision_recall(gold, prob, names, decided)
    pictures.append(Picture("precision-recall", "curves", caption, figure))
    caption = "The share of positives among rows of similar probability. On the dotted line it equals the probability."
    pictures.append(Picture("reliability", "calibration", caption, figures.draw_reliability(scores.calibration)))
    pictures += [_draw_cooccurrence(title, labels, names) for title, labels in [("gold", gold), *decided]]
    return pictures + [_draw_confusions(title, gold, pred, names) for title, pred in decided]


def _draw_published(run: Run, scores: Scores, published: Sequence[ComparisonRow]) -> Picture:
    """The run beside the published systems."""
    own = [
        ComparisonRow(
            name=f"{run.name}, {decision.title}",
            f1_macro=decision.metrics["f1_macro"],
            interval=decision.intervals["f1_macro"],
            f1_by_label=f1_by_label(decision.metrics),
        )
        for decision in scores.best_first
    ]
    caption = (
        "Macro-F1 with its 95 % interval, and F1 by label. Dashed: the highest that needs no model. Grey: "
        f"{PUBLISHED_NOTE[0].lower()}{PUBLISHED_NOTE[1:]}"
    )
    rows = [*own, *reference_rows(scores.decisions[0].metrics), *published]
    return Picture("published", "headline", caption, figures.draw_comparison(rows))


def _draw_cooccurrence(title: str, labels: np.ndarray, names: Sequence[str]) -> Picture:
    """Which of the `labels` [n, L] occur together."""
    counts = cooccurrence(labels)
    share = counts / np.maximum(np.diag(counts), 1)[:, None]
    texts = [[f"{100 * value:.0f}" for value in row] for row in share]
    for k in range(len(names)):
        if not counts[k, k]:
            share[k], texts[k] = np.nan, [""] * len(names)  # a share of no rows is not 0
        share[k, k], texts[k][k] = np.nan, f"{counts[k, k]:,}"
    caption = f"{title.capitalize()}: of the rows with the label on the left, the share with the label below"
    caption += ", in percent. The diagonal counts rows." if len(names) <= figures.MAX_WRITTEN else "."
    figure = figures.draw_matrix(share, texts, names, f"with this label ({title})", "share that also has")
    return Picture(f"cooccurrence-{_slug(title)}", "cooccurrence", caption, figure)


def _draw_confusions(title: str, gold: np.ndarray, pred: np.ndarray, names: Sequence[str]) -> Picture:
    """Which labels are predicted in place of which; gold and pred are [n, L]."""
    counts = confusions(gold, pred)
    share = counts / np.maximum((gold * (1 - pred)).sum(axis=0), 1)[:, None]  # of the rows that miss the label
    share /= max(share.max(), 1e-9)
    np.fill_diagonal(share, np.nan)
    texts = [[str(n) if n else "" for n in row] for row in counts.tolist()]
    caption = (
        f"{title.capitalize()}: number of rows that miss the label on the left and have the label below as a false "
        "positive. A deeper colour is a larger share of the rows that miss the label."
    )
    figure = figures.draw_matrix(share, texts, names, "missed", "false positive")
    return Picture(f"confusion-{_slug(title)}", "confusion", caption, figure)


def _slug(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title)
