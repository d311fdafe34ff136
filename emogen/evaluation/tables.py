"""Metrics -> the tables that a terminal shows."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from emogen.console import out
from emogen.evaluation.metrics import Metrics

FIGURES = ("precision", "recall", "f1")  # F1 last: its difference is shown
SINGLES = {  # one figure for a system, below the macro average
    "f1_micro": "micro-F1",
    "jaccard_samples": "Jaccard (samples)",
    "exact_match": "exact match",
    "hamming_loss": "Hamming loss",
}


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


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print the table of what `score.evaluate` returned: the answers, and the thresholds beside them."""

    nested = metrics.get("by_thresholds")
    out.print(table([("answer", metrics), ("thresholds, nested", nested)] if nested else metrics))
    if note := footnote(metrics):
        out.print(note)


def print_spread(metrics: dict[str, Any]) -> None:
    """Print how the figures of a cross-validation vary, over the folds and by the bootstrap."""
    for system, title in (("answer", "answers"), ("thresholds", "thresholds, nested")):
        for key, name in (("f1_macro", "macro-F1"), ("f1_micro", "micro-F1")):
            low, high = metrics["interval"][system][key]
            spread = f"{metrics['mean'][system][key]:.3f} ± {metrics['sd'][system][key]:.3f} over the folds"
            out.print(f"{name} by {title}: {spread}; pooled, 95 %: {low:.3f} to {high:.3f}", highlight=False)
