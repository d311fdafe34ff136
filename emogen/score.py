"""gold and pred -> metrics, and the tables that show them. Pure numpy and scikit-learn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

Metrics = dict[str, Any]

AGGREGATES = {
    "f1_macro": "macro-F1",
    "f1_micro": "micro-F1",
    "jaccard_samples": "Jaccard over samples",
    "exact_match": "exact match",
    "hamming_loss": "Hamming loss",
}


def score(gold: np.ndarray, pred: np.ndarray, names: Sequence[str]) -> Metrics:
    """The metrics of SemEval-2018 Task 1 E-c and of the competition.

    A label without a gold positive has an undefined recall; its F1 counts as 0 and stays in the macro average, as in
    scikit-learn and the competition. A row without labels, rightly predicted as such, has a Jaccard index of 1.

    Args:
        gold, pred: 0/1, [n, L].
        names: the L label names in canonical order.

    Returns:
        `n`, `f1_macro`, `f1_micro`, `precision_macro`, `recall_macro`, `jaccard_samples`, `exact_match`,
        `hamming_loss`, `per_label` (name -> `precision`, `recall`, `f1`, `support`, `predicted`), and `no_positives`
        (the labels that no gold row has). Plain numbers, ready for JSON.

    Raises:
        ValueError: no rows, shapes that differ, or values other than 0 and 1.
    """
    from sklearn import metrics  # takes a second

    gold, pred = np.asarray(gold), np.asarray(pred)
    if gold.shape != pred.shape or gold.ndim != 2 or gold.shape[1] != len(names):
        raise ValueError(f"gold {gold.shape} and pred {pred.shape} must both be [n, {len(names)}]")
    if not len(gold):
        raise ValueError("no rows to score")
    if not (np.isin(gold, (0, 1)).all() and np.isin(pred, (0, 1)).all()):
        raise ValueError("gold and pred may hold only 0 and 1")

    precision, recall, f1, support = metrics.precision_recall_fscore_support(gold, pred, average=None, zero_division=0)
    return {
        "n": len(gold),
        "f1_macro": float(f1.mean()),
        "f1_micro": float(metrics.f1_score(gold, pred, average="micro", zero_division=0)),
        "precision_macro": float(precision.mean()),
        "recall_macro": float(recall.mean()),
        "jaccard_samples": _jaccard_samples(gold, pred),
        "exact_match": float((gold == pred).all(axis=1).mean()),
        "hamming_loss": float((gold != pred).mean()),
        "per_label": {
            name: {
                "precision": float(precision[k]),
                "recall": float(recall[k]),
                "f1": float(f1[k]),
                "support": int(support[k]),
                "predicted": int(pred[:, k].sum()),
            }
            for k, name in enumerate(names)
        },
        "no_positives": [name for k, name in enumerate(names) if not support[k]],
    }


def _jaccard_samples(gold: np.ndarray, pred: np.ndarray) -> float:
    """Mean over rows of |gold and pred| / |gold or pred|; scikit-learn's, but for rows where both are empty."""
    either = (gold | pred).sum(axis=1)
    both = (gold & pred).sum(axis=1)
    return float(np.where(either == 0, 1.0, both / np.maximum(either, 1)).mean())


def table(systems: Sequence[tuple[str, Metrics]]) -> Table:
    """Per-label figures of one or several systems side by side, and the aggregates below them.

    One system: precision, recall, F1, support. Several: precision, recall, F1 of each; with two, the difference in F1.
    """
    first = systems[0][1]
    view = Table(box=None, pad_edge=False)
    view.add_column("label")
    view.add_column("rows", justify="right")
    for title, _ in systems:
        for column in (f"{title}\nP", "R", "F1"):
            view.add_column(column, justify="right", no_wrap=True)
    if len(systems) == 2:
        view.add_column("diff.", justify="right")

    def difference(values: Sequence[float]) -> list[str]:
        return [f"{values[1] - values[0]:+.3f}"] if len(systems) == 2 else []

    for name, label in first["per_label"].items():
        rows = [metrics["per_label"][name] for _, metrics in systems]
        cells = [f"{row[key]:.3f}" for row in rows for key in ("precision", "recall", "f1")]
        view.add_row(name, f"{label['support']:,}", *cells, *difference([row["f1"] for row in rows]))
    view.add_section()
    macro = [f"{m[key]:.3f}" for _, m in systems for key in ("precision_macro", "recall_macro", "f1_macro")]
    view.add_row("macro", f"{first['n']:,}", *macro, *difference([m["f1_macro"] for _, m in systems]), style="bold")
    for key, title in AGGREGATES.items():
        if key != "f1_macro":
            cells = [cell for _, metrics in systems for cell in ("", "", f"{metrics[key]:.3f}")]
            view.add_row(title, "", *cells, *difference([metrics[key] for _, metrics in systems]))
    return view


def footnote(metrics: Metrics) -> str | None:
    """What the table does with labels that have no positives, if there are any."""
    if not metrics["no_positives"]:
        return None
    return (
        f"No gold row has {', '.join(metrics['no_positives'])}: F1 counts as 0 there and stays in the macro average, "
        "as in scikit-learn and the competition."
    )
