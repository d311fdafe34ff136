"""Runs compared on the same rows: with each other, with their ensemble, and with published results."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich.cells import cell_len
from rich.table import Table

from emogen import paths
from emogen.errors import InputError
from emogen.evaluation.caveats import references
from emogen.evaluation.metrics import (
    MIN_ROWS,
    Interval,
    Metrics,
    Objective,
    bootstrap,
    interval_of,
    most_probable,
    nested_pred,
    score,
    score_nested,
)
from emogen.evaluation.results import align_scored, read_records, read_scored
from emogen.evaluation.run_folder import PREDICTIONS
from emogen.evaluation.stack import cross_fit, nested_stack
from emogen.task.labels import LabelSet

PUBLISHED = Path(__file__).with_name("published_results.yaml")
TITLES: dict[Objective, str] = {"f1_macro": "macro-F1", "f1_micro": "micro-F1"}
PUBLISHED_NOTE = "Published results were scored by their authors on other rows."
SAMPLE_FILES = ("sample/train.csv", "sample/test.csv")
WIDTH = 80  # columns of a terminal
NAME_WIDTH = 30  # widest column of label names; a longer name folds
SYSTEM_WIDTH = 11  # of the column of a system, whose name folds


@dataclass(frozen=True)
class System:
    """One system of a comparison.

    Attributes:
        metrics: the result of `metrics.score`.
        objective: the metric that it is compared by, macro-F1 or micro-F1.
        interval: the 95 % interval of this metric; None if none can be given (see `metrics.interval_of`).
        difference: its value of this metric minus that of the first system.
        difference_interval: the 95 % interval of the difference, paired; None if none can be given.
        not_better: the share of resamples in which the system does not beat the first one; None for too few rows.
    """

    name: str
    metrics: Metrics
    objective: Objective
    interval: Interval
    difference: float
    difference_interval: Interval
    not_better: float | None


class ComparisonRow(NamedTuple):
    """One row of a comparison.

    Attributes:
        interval: the 95 % interval of the macro-F1, if there is one.
        kind: `run` for a system that was scored here, `reference` for a constant prediction, or `published`.
    """

    name: str
    f1_macro: float
    interval: Interval
    f1_by_label: dict[str, float]
    kind: str = "run"


def compare(
    runs: Sequence[Path],
    label_set: LabelSet,
    *,
    by: str = "thresholds",
    ensemble: bool = False,
    objective: Objective = "f1_macro",
) -> list[System]:
    """Score runs, cross-validations or baselines on the rows that all of them were scored on.

    Args:
        runs: their folders.
        by: how labels are decided: `answer`, `thresholds` (nested) or `stack` (nested). With `exactly_one` the most
            probable label takes the place of thresholds.
        ensemble: add the ensemble of all runs: their stack, or else the mean of their probabilities, which has no
            answer and is decided by thresholds.
        objective: what thresholds are tuned for, and what the runs are compared by.

    Returns:
        The systems in the order of the runs, then the ensemble. All systems are scored on the same resamples of the
        rows, so their differences are paired.

    Raises:
        InputError: a run has not been scored, the runs were scored on different rows or folds, or there are too few.
    """
    scored = align_scored([read_scored(run, label_set) for run in runs])
    gold, folds = scored[0].gold, scored[0].folds
    single = label_set.exactly_one
    n_folds_needed = {"answer": 2 if ensemble else 1, "thresholds": 2, "stack": 3}[by] - single  # no thresholds
    if len(np.unique(folds)) < n_folds_needed:
        raise InputError(f"{scored[0].path}: too few rows or folds to decide by {by}; compare with --by answer")

    def decide(probs: np.ndarray) -> np.ndarray:
        """The labels that M systems decide together, nested over the folds: [M, n, L] -> int8 [n, L]."""
        if single:
            return most_probable(cross_fit(gold, probs, folds) if by == "stack" else probs.mean(axis=0))
        if by == "stack":
            return nested_stack(gold, probs, folds, objective)
        return nested_pred(gold, probs.mean(axis=0), folds, objective)

    preds = [rows.pred if by == "answer" else decide(rows.prob[None]) for rows in scored]
    names, decisions = names_of(runs), [by] * len(runs)
    if ensemble:
        name = f"{'stack' if by == 'stack' else 'mean'} of {len(runs)}"
        names.append(name if by != "answer" else f"{name}, {decision_title('thresholds', label_set)}")
        decisions.append("stack" if by == "stack" else "thresholds")
        preds.append(decide(np.stack([rows.prob for rows in scored])))
    metrics = [
        score(gold, pred, label_set.names, exactly_one=single)
        if decision == "answer" or single
        else score_nested(gold, pred, folds, label_set.names)
        for pred, decision in zip(preds, decisions, strict=True)
    ]
    resampled = [values[objective] for values in bootstrap(gold, preds, label_set.names)]  # [n_resamples] each
    n = len(gold)
    return [
        System(
            name=name,
            metrics=own,
            objective=objective,
            interval=interval_of(f1, n),
            difference=own[objective] - metrics[0][objective],
            difference_interval=interval_of(f1 - resampled[0], n),
            not_better=None if n < MIN_ROWS else float(np.mean(f1 - resampled[0] <= 0)),
        )
        for name, own, f1 in zip(names, metrics, resampled, strict=True)
    ]


def decision_title(by: str, label_set: LabelSet) -> str:
    """How labels are decided, in words; `by` is that of `compare`."""
    if label_set.exactly_one and by != "answer":
        return "the most probable label" + (" of nested stacks" if by == "stack" else "")
    return {"answer": "answer", "thresholds": "nested thresholds", "stack": "nested stacks and thresholds"}[by]


def names_of(runs: Sequence[Path]) -> list[str]:
    """Name runs by their folders, with as many parent folders as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    depth = next(d for d in range(1, max(map(len, parts)) + 1) if len({p[-d:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-depth:]) for p in parts]


@cache
def published() -> dict[str, Any]:
    """Load the published results on SemEval-2018 Task 1 E-c English, with their sources."""
    return yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))


def published_rows(runs: Sequence[Path], label_set: LabelSet) -> list[ComparisonRow]:
    """The published systems, to be shown beside runs. Their authors scored them on other rows: they have no intervals.

    Args:
        runs: the folders of the runs.
        label_set: their labels.

    Raises:
        InputError: the systems have other labels, or the runs were scored on the sample posts that ship with emogen.
    """
    labels = published()["labels"]
    if set(label_set.names) != set(labels):
        raise InputError(
            f"{runs[0]}: the published results are for the labels {', '.join(labels)}; those of {label_set.name!r} are "
            "others. Leave out --published"
        )
    if sample := next((run for run in runs if _has_sample_rows(run)), None):
        raise InputError(
            f"{sample}: scored on sample posts that were written for emogen. Published results on real posts say "
            "nothing about them. Leave out --published"
        )
    return [
        ComparisonRow(
            name=f"{system['id']} (published)",
            f1_macro=system["f1_macro"],
            interval=None,
            f1_by_label={name: metrics[-1] for name, metrics in system["per_label"].items()},
            kind="published",
        )
        for system in published()["systems"]
    ]


def _has_sample_rows(run: Path) -> bool:
    """Whether a run was scored on a post of the shipped sample."""
    path = run / PREDICTIONS
    texts = {record.get("text") for record in read_records(path)} if path.is_file() else set()
    for file in SAMPLE_FILES:
        with paths.shipped(file).open(encoding="utf-8", newline="") as lines:
            if not texts.isdisjoint(row["Tweet"] for row in csv.DictReader(lines)):
                return True
    return False


def rows_of(systems: Sequence[System], published: Sequence[ComparisonRow] = ()) -> list[ComparisonRow]:
    """The rows of a comparison: the systems, what constant predictions score on their rows, and published systems."""
    rows = [
        ComparisonRow(system.name, system.metrics["f1_macro"], system.interval, f1_by_label(system.metrics))
        for system in systems
    ]
    return [*rows, *reference_rows(systems[0].metrics), *published]


def reference_rows(metrics: Metrics) -> list[ComparisonRow]:
    """What constant predictions score on the rows of some metrics."""
    return [
        ComparisonRow(f"{reference.title} (reference)", reference.f1_macro, None, reference.f1_by_label, "reference")
        for reference in references(metrics)
    ]


def f1_by_label(metrics: Metrics) -> dict[str, float]:
    """The F1 of each label."""
    return {name: label["f1"] for name, label in metrics["per_label"].items()}


def tables(systems: Sequence[System], published: Sequence[ComparisonRow] = ()) -> list[Table]:
    """Show a comparison: the metric that decides with the differences, and the other one; then the F1 of each label in
    tables that fit a terminal.
    """
    first: Objective = systems[0].objective
    second: Objective = "f1_micro" if first == "f1_macro" else "f1_macro"
    total = Table(box=None, pad_edge=False)
    total.add_column("system", overflow="fold")
    for heading in (f"{TITLES[first]}, 95 %", TITLES[second], "difference, 95 %", "not better"):
        total.add_column(heading, justify="right", no_wrap="95 %" not in heading)
    for k, system in enumerate(systems):
        cells = [with_interval(system.metrics[first], system.interval), f"{system.metrics[second]:.3f}"]
        if k:
            difference = with_interval(system.difference, system.difference_interval, "+z")
            cells += [difference, share(system.not_better)]
        total.add_row(system.name, *cells)
    for reference in references(systems[0].metrics):
        name = f"{reference.title} (reference)"
        total.add_row(name, *(f"{getattr(reference, metric):.3f}" for metric in (first, second)), style="dim")
    for row in published:
        total.add_row(row.name, *(f"{row.f1_macro:.3f}" if metric == "f1_macro" else "" for metric in (first, second)))
    support = {name: label["support"] for name, label in systems[0].metrics["per_label"].items()}
    return [total, *_f1_tables(rows_of(systems, published), support)]


def _f1_tables(rows: Sequence[ComparisonRow], support: dict[str, int]) -> list[Table]:
    """The F1 of each label, one line for each label, and as many systems in a table as fit a terminal."""
    counts = [f"{n:,}" for n in support.values()]
    width = min(max(map(cell_len, support)), NAME_WIDTH) + 1 + max(len("rows"), *map(len, counts))
    n_systems = (WIDTH - width) // (SYSTEM_WIDTH + 1)
    found = []
    for k in range(0, len(rows), n_systems):
        part = rows[k : k + n_systems]
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        table.add_column("F1", overflow="fold", max_width=NAME_WIDTH, vertical="bottom")
        table.add_column("rows", justify="right", no_wrap=True, vertical="bottom")
        for row in part:
            table.add_column(row.name, justify="right", overflow="fold", width=SYSTEM_WIDTH, vertical="bottom")
        for name, count in zip(support, counts, strict=True):
            cells = [f"{row.f1_by_label[name]:.2f}" if name in row.f1_by_label else "" for row in part]
            table.add_row(name, count, *cells)
        found.append(table)
    return found


def with_interval(value: float, ends: Interval, sign: str = "") -> str:
    """Format a value and its interval for a table cell, which breaks between the two if it is narrow."""
    return f"{value:{sign}.3f} " + (f"{ends[0]:{sign}.3f}..{ends[1]:{sign}.3f}" if ends else "(no interval)")


def share(value: float | None) -> str:
    """Format a share of resamples. That none of 2,000 did not beat a system does not make it impossible."""
    if value is None:
        return "too few rows"
    return "<0.1%" if value < 0.0005 else f"{value:.1%}"
