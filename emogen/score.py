"""gold and pred -> metrics, and the table that shows them. Pure numpy and scikit-learn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.markup import escape
from rich.table import Table

Metrics = dict[str, Any]

FIGURES = ("precision", "recall", "f1")  # F1 last: its difference is shown
SINGLES = {  # one figure for a system, below the macro average
    "f1_micro": "micro-F1",
    "jaccard_samples": "Jaccard (samples)",
    "exact_match": "exact match",
    "hamming_loss": "Hamming loss",
}


def score(gold: npt.NDArray[Any], pred: npt.NDArray[Any], names: Sequence[str]) -> Metrics:
    """The metrics of SemEval-2018 Task 1 E-c and of the competition.

    The F1 of a label without a gold positive is 0.0, also where it is undefined, and counts in the macro average, as
    in scikit-learn and the competition. A row with neither gold nor predicted labels has a Jaccard index of 1.0.

    Args:
        gold: the true labels, 0/1, [n, L].
        pred: the predicted labels, 0/1, [n, L].
        names: the L label names in canonical order.

    Returns:
        `n`, `f1_macro`, `f1_micro`, `precision_macro`, `recall_macro`, `jaccard_samples`, `exact_match`,
        `hamming_loss`, `per_label` (name -> `precision`, `recall`, `f1`, `support`, `predicted`), and `no_positives`
        (the labels that no gold row has). Plain numbers, ready for JSON.

    Raises:
        ValueError: shapes that differ or are not [n, L], no rows, or values other than 0 and 1.
    """
    gold, pred = _matrix("gold", gold, names), _matrix("pred", pred, names)
    if gold.shape != pred.shape:
        raise ValueError(f"gold has {len(gold)} rows and pred has {len(pred)}; they must be the same rows")

    from sklearn import metrics  # takes a second or two

    # scikit-learn takes a single column for a binary problem and would score the 0s as a class of their own. An empty
    # column at the end keeps it multi-label; it is not among `labels`, and changes no row's Jaccard index.
    padded = [np.pad(matrix, ((0, 0), (0, 1))) for matrix in (gold, pred)]
    labels = range(len(names))
    by_label = metrics.precision_recall_fscore_support(*padded, labels=labels, average=None, zero_division=0)
    precision, recall, f1, support = (column.tolist() for column in by_label)
    return {
        "n": len(gold),
        "f1_macro": float(np.mean(f1)),
        "f1_micro": float(metrics.f1_score(*padded, labels=labels, average="micro", zero_division=0)),
        "precision_macro": float(np.mean(precision)),
        "recall_macro": float(np.mean(recall)),
        "jaccard_samples": float(metrics.jaccard_score(*padded, average="samples", zero_division=1.0)),
        "exact_match": float((gold == pred).all(axis=1).mean()),
        "hamming_loss": float((gold != pred).mean()),
        "per_label": {
            name: {"precision": p, "recall": r, "f1": f, "support": int(s), "predicted": int(predicted)}
            for name, p, r, f, s, predicted in zip(names, precision, recall, f1, support, pred.sum(axis=0), strict=True)
        },
        "no_positives": [name for name, s in zip(names, support, strict=True) if not s],
    }


def _matrix(what: str, values: npt.NDArray[Any], names: Sequence[str]) -> npt.NDArray[np.int8]:
    """The values as int8, [n, L]. Raises ValueError if they are not 0/1 of that shape."""
    values = np.asarray(values)
    if values.ndim != 2:
        raise ValueError(f"{what} must be 2-D, [n, L], not of shape {values.shape}")
    if values.shape[1] != len(names):
        raise ValueError(f"{what} has {values.shape[1]} columns for {len(names)} label names")
    if not len(values) or not len(names):
        raise ValueError(f"{what} is empty: no rows or no labels to score")
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"{what} may hold only 0 and 1")
    return values.astype(np.int8)


def table(metrics: Metrics | Sequence[tuple[str, Metrics]]) -> Table:
    """Per-label figures of one system, or of several side by side, with the aggregates below them.

    Args:
        metrics: what `score` returned; or several (title, metrics), all on the same gold rows.

    Returns:
        Precision, recall and F1 for each system, the support once; with exactly two systems, also the difference in F1.
        80 columns hold three systems. Print `footnote` below it.

    Raises:
        ValueError: no system, or systems that were scored on other labels or other gold rows.
    """
    systems = [("", metrics)] if isinstance(metrics, dict) else list(metrics)
    if not systems:
        raise ValueError("no metrics to show")
    (n, support), *others = [
        (m["n"], {name: row["support"] for name, row in m["per_label"].items()}) for _, m in systems
    ]
    if any(other != (n, support) for other in others):
        raise ValueError("the systems were not scored on the same gold rows and labels")

    # The three figures of a system are one column of fixed width: a long title folds above them, and never takes the
    # width of the label names.
    view = Table(box=None, pad_edge=False, caption=f"{n:,} rows", caption_justify="left")
    view.add_column("label", vertical="bottom", overflow="fold")
    view.add_column("support", justify="right", vertical="bottom", no_wrap=True)
    for title, _ in systems:
        heading = f"{escape(title)}\nP     R    F1" if title else "P     R    F1"
        view.add_column(heading, justify="right", vertical="bottom", overflow="fold", width=len("0.000 0.000 0.000"))
    if len(systems) == 2:
        view.add_column("ΔF1", justify="right", vertical="bottom", no_wrap=True)

    def add(title: str, rows: list[list[float]], support: str = "", is_f1: bool = True, style: str = "") -> None:
        cells = [" ".join(f"{value:.3f}" for value in row) for row in rows]
        if len(systems) == 2 and is_f1:
            cells.append(f"{rows[1][-1] - rows[0][-1]:+z.3f}")  # z: no -0.000
        view.add_row(escape(title), support, *cells, style=style)

    for name, count in support.items():
        add(name, [[m["per_label"][name][key] for key in FIGURES] for _, m in systems], support=f"{count:,}")
    view.add_row()
    add("macro average", [[m[f"{key}_macro"] for key in FIGURES] for _, m in systems], style="bold")
    for key, title in SINGLES.items():
        add(title, [[m[key]] for _, m in systems], is_f1=key == "f1_micro")
    return view


def footnote(metrics: Metrics) -> str | None:
    """What the table does with labels that have no gold positives; None if every label has some."""
    if not metrics["no_positives"]:
        return None
    return (
        f"No gold positives for: {', '.join(metrics['no_positives'])}. F1 is 0.0 there, also where it is undefined, "
        "and counts in the macro average, as in scikit-learn and the competition."
    )
