"""Metrics -> tables for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from emogen.console import out
from emogen.evaluation.metrics import Metrics

LABEL_METRICS = ("precision", "recall", "f1")  # F1 last: its difference is shown
AGGREGATES = {  # metrics of a system that have no value for each label; shown below the macro average
    "f1_micro": "micro-F1",
    "jaccard_samples": "Jaccard (samples)",
    "exact_match": "exact match",
    "hamming_loss": "Hamming loss",
}


def metrics_table(metrics: Metrics | Sequence[tuple[str, Metrics]]) -> Table:
    """Show the metrics of one system, or of several side by side: by label, with the aggregates below.

    Args:
        metrics: the result of `score`, or several (title, result) on the same gold rows.

    Returns:
        A table with the support of each label, and precision, recall and F1 of each system; for two systems also the
        difference in F1. Three systems fit in 80 columns. Print `footnote` below the table.

    Raises:
        ValueError: there is no system, or the systems were scored on different labels or gold rows.
    """
    systems = [("", metrics)] if isinstance(metrics, dict) else list(metrics)
    if not systems:
        raise ValueError("no metrics to show")
    (n, support), *others = [
        (m["n"], {name: row["support"] for name, row in m["per_label"].items()}) for _, m in systems
    ]
    if any(other != (n, support) for other in others):
        raise ValueError("the systems were not scored on the same gold rows and labels")

    # The three metrics of a system share one column of fixed width, so that a long title folds instead of taking the
    # width of the label names.
    table = Table(box=None, pad_edge=False, caption=f"{n:,} rows", caption_justify="left")
    table.add_column("label", vertical="bottom", overflow="fold")
    table.add_column("support", justify="right", vertical="bottom", no_wrap=True)
    for title, _ in systems:
        heading = f"{escape(title)}\nP     R    F1" if title else "P     R    F1"
        table.add_column(heading, justify="right", vertical="bottom", overflow="fold", width=len("0.000 0.000 0.000"))
    if len(systems) == 2:
        table.add_column("ΔF1", justify="right", vertical="bottom", no_wrap=True)

    def add(title: str, rows: list[list[float]], support: str = "", is_f1: bool = True, style: str = "") -> None:
        cells = [" ".join(f"{value:.3f}" for value in row) for row in rows]
        if len(systems) == 2 and is_f1:
            cells.append(f"{rows[1][-1] - rows[0][-1]:+z.3f}")  # z: no -0.000
        table.add_row(escape(title), support, *cells, style=style)

    for name, count in support.items():
        add(name, [[m["per_label"][name][key] for key in LABEL_METRICS] for _, m in systems], support=f"{count:,}")
    table.add_row()
    add("macro average", [[m[f"{key}_macro"] for key in LABEL_METRICS] for _, m in systems], style="bold")
    for key, title in AGGREGATES.items():
        add(title, [[m[key]] for _, m in systems], is_f1=key == "f1_micro")
    return table


def footnote(metrics: Metrics) -> str | None:
    """A note on the labels without gold positives, or None if there are no such labels."""
    if not metrics["no_positives"]:
        return None
    return (
        f"No gold positives for: {', '.join(metrics['no_positives'])}. Their F1 is 0.0, even where it is undefined, "
        "and counts in the macro average, as in scikit-learn and the competition."
    )


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print the result of `metrics.evaluate`: the metrics of the answers beside those of nested thresholds."""
    nested = metrics.get("by_thresholds")
    out.print(metrics_table([("answer", metrics), ("nested thresholds", nested)] if nested else metrics))
    if note := footnote(metrics):
        out.print(note)


def print_spread(metrics: dict[str, Any]) -> None:
    """Print the spread of a cross-validation's metrics: standard deviation over the folds and bootstrap interval."""
    for decision, title in (("answer", "answers"), ("thresholds", "nested thresholds")):
        for key, name in (("f1_macro", "macro-F1"), ("f1_micro", "micro-F1")):
            low, high = metrics["interval"][decision][key]
            spread = f"{metrics['mean'][decision][key]:.3f} ± {metrics['sd'][decision][key]:.3f} over the folds"
            out.print(
                f"{name}, {title}: {spread}; pooled, 95 %: {low:.3f} to {high:.3f}", highlight=False, soft_wrap=True
            )
