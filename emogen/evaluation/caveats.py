"""What a reader has to know before a figure can be believed, in sentences; and what constant predictions score.

Everything is computed from the result of `metrics.score` alone, so it applies to any metrics.json.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from emogen.evaluation.metrics import MIN_POSITIVES, MIN_ROWS, Metrics

MAX_NAMED = 12  # labels that a sentence names


class Reference(NamedTuple):
    """What a constant prediction scores: the same labels for every row. It needs no model."""

    title: str
    f1_macro: float
    f1_micro: float
    f1_by_label: dict[str, float]


def f1_of_every_row(metrics: Metrics) -> dict[str, float]:
    """The F1 of each label if every row gets it: 2p/(1 + p), where a share p of the rows has it."""
    n = metrics["n"]
    return {name: 2 * row["support"] / (n + row["support"]) for name, row in metrics["per_label"].items()}


def references(metrics: Metrics) -> list[Reference]:
    """What constant predictions score on the rows of some metrics.

    Returns:
        All labels to every row, the constant prediction with the highest macro-F1; and, unless that is the same, the
        most frequent labels to every row, as many as give the highest micro-F1. With `exactly_one` only the most
        frequent label to every row, which is the best answer for both.
    """
    n, per_label = metrics["n"], metrics["per_label"]
    by_frequency = sorted(per_label, key=lambda name: -per_label[name]["support"])
    support = np.array([per_label[name]["support"] for name in by_frequency])
    # F1 = 2 TP / (predicted + gold), of the k most frequent labels together
    micro = 2 * support.cumsum() / np.maximum(n * np.arange(1, len(support) + 1) + support.sum(), 1)
    best = int(micro.argmax()) + 1

    def constant(title: str, k: int) -> Reference:
        given = set(by_frequency[:k])
        f1 = {name: own if name in given else 0.0 for name, own in f1_of_every_row(metrics).items()}
        return Reference(title, float(np.mean(list(f1.values()))), float(micro[k - 1]), f1)

    if metrics.get("exactly_one"):
        return [constant(f"{by_frequency[0]} to every row", 1)]
    found = [constant("all labels to every row", len(support))]
    if best < len(support):
        some = f"{by_frequency[0]} to every row" if best == 1 else f"the {best} most frequent labels to every row"
        found.append(constant(some, best))
    return found


def reference_line(metrics: Metrics) -> str:
    """The references in a sentence."""
    scores = [
        f"{reference.title}: macro-F1 {reference.f1_macro:.3f}, micro-F1 {reference.f1_micro:.3f}"
        for reference in references(metrics)
    ]
    return f"Without a model: {'; '.join(scores)}."


def constant_labels_of(metrics: Metrics) -> tuple[list[str], list[str]]:
    """The labels that are given to every row, and those that are given to no row; without those that rightly are."""
    n, rows = metrics["n"], metrics["per_label"].items()
    always = [name for name, row in rows if row["predicted"] == n and row["support"] < n]
    return always, [name for name, row in rows if row["predicted"] == 0 and row["support"] > 0]


def is_collapsed(metrics: Metrics) -> bool:
    """Whether more than half of the labels are given to every row or to no row, and wrongly so.

    Labels that occur neither in the gold labels nor in the predictions do not count. The constant ones must make up
    half of all gold labels, too: of very many labels most may be rare, and a model that gives none of the rare ones can
    be right about nearly all rows.
    """
    constant = [name for names in constant_labels_of(metrics) for name in names]
    support = {name: metrics["per_label"][name]["support"] for name in _occurring(metrics)}
    weight = sum(support[name] for name in constant)
    return len(constant) > len(support) / 2 and weight >= sum(support.values()) / 2


def _occurring(metrics: Metrics) -> list[str]:
    """The labels that a row has, or is given."""
    return [name for name, row in metrics["per_label"].items() if row["support"] or row["predicted"]]


def needs_no_model(metrics: Metrics) -> bool:
    """Whether the predictions hardly tell rows apart, or score no higher macro-F1 than constant ones."""
    return is_collapsed(metrics) or _is_not_above(metrics, references(metrics)[0])


def _is_not_above(metrics: Metrics, reference: Reference) -> bool:
    return round(metrics["f1_macro"], 3) <= round(reference.f1_macro, 3)  # as they are shown


def prediction_caveats(metrics: Metrics) -> list[str]:
    """What is wrong with the predictions that were scored: constant labels, and figures that need no model."""
    found = []
    always, never = constant_labels_of(metrics)
    where = [
        f"{title}: {listed(names)}" for title, names in (("every row has", always), ("no row has", never)) if names
    ]
    if where and is_collapsed(metrics):
        found.append(
            f"{len(always) + len(never)} of {len(_occurring(metrics))} labels are given to every row or to none, so "
            f"the predictions hardly tell rows apart ({'; '.join(where)})."
        )
    elif where:
        found.append(f"Labels that do not tell rows apart: {'; '.join(where)}.")
    constant = references(metrics)[0]
    if _is_not_above(metrics, constant):
        found.append(
            f"Macro-F1 {metrics['f1_macro']:.3f} is not above the {constant.f1_macro:.3f} of {constant.title}, which "
            "needs no model."
        )
    if untuned := metrics.get("untuned"):
        found.append(
            f"No threshold could be tuned for {listed(untuned)}: all positive rows are in one fold, where the label is "
            "never predicted."
        )
    return found


def row_caveats(metrics: Metrics) -> list[str]:
    """Whether there are too few rows for the figures, or too few positive rows of a label."""
    found = []
    if metrics["n"] < MIN_ROWS:
        found.append(
            f"{count_rows(metrics['n'])}: too few for an interval ({MIN_ROWS} are needed). These figures say little "
            "about other rows."
        )
    support = {name: row["support"] for name, row in metrics["per_label"].items()}
    if few := [f"{name} ({n})" for name, n in support.items() if 0 < n < MIN_POSITIVES]:
        intervals = (
            " They have no intervals, and the interval of the macro average reaches too low: a resample without such a "
            "label counts its F1 as 0."
        )
        found.append(
            f"Fewer than {MIN_POSITIVES} positive rows: {listed(few)}. Their F1 is a matter of chance."
            + (intervals if metrics["n"] >= MIN_ROWS else "")
        )
    if note := footnote(metrics):
        found.append(note)
    return found


def caveats(systems: Sequence[tuple[str, Metrics]]) -> list[str]:
    """All caveats of systems that were scored on the same rows.

    Args:
        systems: (title, metrics); the titles may be empty.

    Returns:
        Sentences: about the predictions of each system, with its title, then about the rows.
    """
    own = [f"{title}: {caveat}" if title else caveat for title, m in systems for caveat in prediction_caveats(m)]
    return own + row_caveats(systems[0][1])


def with_caveats(metrics: Metrics) -> Metrics:
    """Metrics for a JSON file: with the `references` and the `caveats` of one system."""
    found = [reference._asdict() for reference in references(metrics)]
    return metrics | {"references": found, "caveats": caveats([("", metrics)])}


def footnote(metrics: Metrics) -> str | None:
    """A note on the labels without gold positives, or None if there are no such labels."""
    if not metrics["no_positives"]:
        return None
    return (
        f"No gold positives for: {listed(metrics['no_positives'])}. Their F1 is 0.0, even where it is undefined, "
        "and counts in the macro average, as in scikit-learn and the competition."
    )


def fold_caveats(metrics: Metrics, titles: dict[str, str]) -> list[str]:
    """Why the figures of folds differ from the pooled ones.

    A model does not tell rows apart in a fold, which the pooled figures hide; or a fold has no positive row of a label.

    Args:
        metrics: the metrics of a cross-validation, see `crossval.sum_up`.
        titles: the titles of its decisions.
    """
    found = []
    if absent := metrics.get("absent_in_folds"):
        found.append(
            f"Some folds have no positive row of {listed(absent)}. Their F1 counts as 0 there, which lowers the "
            "macro-F1 of these folds and the mean over the folds, but not the pooled macro-F1."
        )
    return found + [
        f"{titles[decision]}: in {len(folds)} of {len(metrics['folds'][decision]['f1_macro'])} folds "
        f"({', '.join(map(str, folds))}), most labels are given to every row or to none."
        for decision, folds in metrics.get("collapsed_folds", {}).items()
    ]


def calibration_caveats(calibration: dict[str, Any], n_rows: int) -> list[str]:
    """Why an expected calibration error may say little.

    Args:
        calibration: the result of `metrics.calibration`.
        n_rows: the number of rows.
    """
    found = []
    if n_rows < MIN_ROWS:
        found.append(f"{count_rows(n_rows)} are too few to measure calibration: the ECE is mostly chance.")
    if single := [name for name, label in calibration["per_label"].items() if len(label["bins"]) == 1]:
        found.append(
            f"All probabilities are in one bin: {listed(single)}. A small ECE there means that their mean is close to "
            "the share of positives, not that they tell rows apart."
        )
    return found


def listed(names: Sequence[str]) -> str:
    """Names in a sentence; of very many the first ones, with the number of the others."""
    shown = ", ".join(names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"


def count_rows(n: int) -> str:
    """`1 row`, `2 rows`."""
    return f"{n:,} row" if n == 1 else f"{n:,} rows"
