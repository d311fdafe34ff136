"""Metrics -> tables for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from emogen.console import message, out
from emogen.evaluation.caveats import caveats, fold_caveats, reference_line
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
        difference in F1. Three systems fit in 80 columns. `print_scores` adds what a reader has to know.

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
        heading = f"{title}\nP     R    F1" if title else "P     R    F1"
        table.add_column(heading, justify="right", vertical="bottom", overflow="fold", width=len("0.000 0.000 0.000"))
    if len(systems) == 2:
        table.add_column("ΔF1", justify="right", vertical="bottom", no_wrap=True)

    def add(title: str, rows: list[list[float]], support: str = "", is_f1: bool = True, style: str = "") -> None:
        cells = [" ".join(f"{value:.3f}" for value in row) for row in rows]
        if len(systems) == 2 and is_f1:
            cells.append(f"{rows[1][-1] - rows[0][-1]:+z.3f}")  # z: no -0.000
        table.add_row(title, support, *cells, style=style)

    for name, count in support.items():
        add(name, [[m["per_label"][name][key] for key in LABEL_METRICS] for _, m in systems], support=f"{count:,}")
    table.add_row()
    add("macro average", [[m[f"{key}_macro"] for key in LABEL_METRICS] for _, m in systems], style="bold")
    for key, title in AGGREGATES.items():
        add(title, [[m[key]] for _, m in systems], is_f1=key == "f1_micro")
    return table


def print_scores(systems: Sequence[tuple[str, Metrics]]) -> None:
    """Print the table of one system or several, what constant predictions score, and the caveats.

    Args:
        systems: (title, result of `score`), on the same gold rows.
    """
    out.print(metrics_table(systems))
    out.print(reference_line(systems[0][1]))
    print_notes(caveats(systems))


def print_notes(sentences: Sequence[str]) -> None:
    """Print the sentences of `caveats`, each as a note."""
    for sentence in sentences:
        out.print(message("note", "yellow", sentence), soft_wrap=True)


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print the result of `metrics.evaluate`: the metrics of the answers beside those of nested thresholds."""
    nested = metrics.get("by_thresholds")
    print_scores([("answer", metrics), ("nested thresholds", nested)] if nested else [("", metrics)])


def print_spread(metrics: dict[str, Any]) -> None:
    """Print the spread of a cross-validation's metrics: standard deviation over the folds and bootstrap interval."""
    titles = {"answer": "answers", "thresholds": "nested thresholds"}
    for decision in metrics["mean"]:
        title = titles[decision]
        for key, name in (("f1_macro", "macro-F1"), ("f1_micro", "micro-F1")):
            mean, sd, ends = (metrics[of][decision][key] for of in ("mean", "sd", "interval"))
            # A deviation of 0 is not certainty: most often it means that no fold has learned anything.
            spread = f"{mean:.3f} ± {sd:.3f} over the folds" if sd else f"{mean:.3f} in every fold"
            pooled = f"95 %: {ends[0]:.3f} to {ends[1]:.3f}" if ends else "no interval"
            out.print(f"{name}, {title}: {spread}; pooled, {pooled}", soft_wrap=True)
    print_notes(fold_caveats(metrics, titles))
