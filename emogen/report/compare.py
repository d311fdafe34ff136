"""Runs compared on the same rows: with each other, with their ensemble, and with published results."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich.table import Table

from emogen.errors import InputError
from emogen.evaluation.metrics import Metrics, bootstrap, interval, nested_pred, score
from emogen.evaluation.results import align_scored, read_scored
from emogen.evaluation.stack import nested_stack
from emogen.task.labels import LabelSet

PUBLISHED = Path(__file__).with_name("published_results.yaml")
LABELS_PER_TABLE = 11  # that fit in 80 columns


@dataclass(frozen=True)
class System:
    """One system of a comparison.

    Attributes:
        metrics: the result of `metrics.score`.
        interval: the 95 % interval of its macro-F1.
        difference: its macro-F1 minus that of the first system.
        difference_interval: the 95 % interval of the difference, paired.
        not_better: the share of resamples in which the system does not beat the first one.
    """

    name: str
    metrics: Metrics
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    not_better: float


class ComparisonRow(NamedTuple):
    """One row of a comparison: a system that was scored here, or a published one, which has no interval."""

    name: str
    f1_macro: float
    interval: tuple[float, float] | None
    f1_by_label: dict[str, float]


def compare(
    runs: Sequence[Path], label_set: LabelSet, *, by: str = "thresholds", ensemble: bool = False
) -> list[System]:
    """Score runs, cross-validations or baselines on the rows that all of them were scored on.

    Args:
        runs: their folders.
        by: how labels are decided: `answer`, `thresholds` (nested) or `stack` (nested).
        ensemble: add the ensemble of all runs: their stack, or else the mean of their probabilities.

    Returns:
        The systems in the order of the runs, then the ensemble. All systems are scored on the same resamples of the
        rows, so their differences are paired.

    Raises:
        InputError: a run has not been scored, the runs were scored on different rows or folds, or there are too few.
    """
    scored = align_scored([read_scored(run, label_set) for run in runs])
    gold, folds = scored[0].gold, scored[0].folds
    n_folds_needed = {"answer": 2 if ensemble else 1, "thresholds": 2, "stack": 3}[by]
    if len(np.unique(folds)) < n_folds_needed:
        raise InputError(f"{scored[0].path}: too few rows or folds to decide by {by}; compare with --by answer")
    preds = [rows.pred if by == "answer" else _decide(gold, rows.prob[None], folds, by) for rows in scored]
    names = names_of(runs)
    if ensemble:
        names.append(f"{'stack' if by == 'stack' else 'mean'} of {len(runs)}")
        preds.append(_decide(gold, np.stack([rows.prob for rows in scored]), folds, by))
    metrics = [score(gold, pred, label_set.names) for pred in preds]
    resampled = [values["f1_macro"] for values in bootstrap(gold, preds, label_set.names)]  # [n_resamples] each
    return [
        System(
            name=name,
            metrics=own,
            interval=interval(f1),
            difference=own["f1_macro"] - metrics[0]["f1_macro"],
            difference_interval=interval(f1 - resampled[0]),
            not_better=float(np.mean(f1 - resampled[0] <= 0)),
        )
        for name, own, f1 in zip(names, metrics, resampled, strict=True)
    ]


def _decide(gold: np.ndarray, probs: np.ndarray, folds: np.ndarray, by: str) -> np.ndarray:
    """The labels that M systems decide together, nested over the folds: probs [M, n, L] -> int8 [n, L]."""
    return nested_stack(gold, probs, folds) if by == "stack" else nested_pred(gold, probs.mean(axis=0), folds)


def names_of(runs: Sequence[Path]) -> list[str]:
    """Name runs by their folders, with as many parent folders as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    depth = next(d for d in range(1, max(map(len, parts)) + 1) if len({p[-d:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-depth:]) for p in parts]


@cache
def published() -> dict[str, Any]:
    """Load the published results on SemEval-2018 Task 1 E-c English, with their sources."""
    return yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))


def published_rows() -> list[ComparisonRow]:
    """The published systems. Their authors scored them on other rows, so they have no intervals or differences."""
    return [
        ComparisonRow(
            name=f"{system['id']} (published)",
            f1_macro=system["f1_macro"],
            interval=None,
            f1_by_label={name: metrics[-1] for name, metrics in system["per_label"].items()},
        )
        for system in published()["systems"]
    ]


def published_rows_for(names: Sequence[str]) -> list[ComparisonRow]:
    """The published systems if these are their labels, or else nothing."""
    return published_rows() if set(names) == set(published()["labels"]) else []


def rows_of(systems: Sequence[System], *, with_published: bool = False) -> list[ComparisonRow]:
    """The rows of a comparison: the systems, then the published ones if wanted."""
    rows = [
        ComparisonRow(system.name, system.metrics["f1_macro"], system.interval, f1_by_label(system.metrics))
        for system in systems
    ]
    return [*rows, *(published_rows() if with_published else [])]


def f1_by_label(metrics: Metrics) -> dict[str, float]:
    """The F1 of each label."""
    return {name: label["f1"] for name, label in metrics["per_label"].items()}


def tables(systems: Sequence[System], *, with_published: bool = False) -> list[Table]:
    """Show a comparison: macro-F1 with the differences, then the F1 of each label in tables that fit a terminal."""
    rows = rows_of(systems, with_published=with_published)
    total = Table(box=None, pad_edge=False)
    total.add_column("system", overflow="fold")
    for heading in ("macro-F1, 95 %", "micro-F1", "difference, 95 %", "not better"):
        total.add_column(heading, justify="right", no_wrap="95 %" not in heading)
    for k, system in enumerate(systems):
        f1_macro = with_interval(system.metrics["f1_macro"], system.interval)
        cells = [f1_macro, f"{system.metrics['f1_micro']:.3f}"]
        if k:
            difference = with_interval(system.difference, system.difference_interval, "+z")
            cells += [difference, f"{system.not_better:.1%}"]
        total.add_row(system.name, *cells)
    for row in rows[len(systems) :]:
        total.add_row(row.name, f"{row.f1_macro:.3f}")
    names = list(systems[0].metrics["per_label"])
    parts = [names[k : k + LABELS_PER_TABLE] for k in range(0, len(names), LABELS_PER_TABLE)]
    return [total, *(_f1_table(rows, part) for part in parts)]


def _f1_table(rows: Sequence[ComparisonRow], names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("F1", overflow="fold")
    for name in names:
        table.add_column(name[:5], justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row.f1_by_label[name]:.2f}" if name in row.f1_by_label else "" for name in names]
        table.add_row(row.name.removesuffix(" (published)"), *cells)
    return table


def with_interval(value: float, ends: tuple[float, float], sign: str = "") -> str:
    """Format a value and its interval for a table cell, which breaks between the two if it is narrow."""
    return f"{value:{sign}.3f} {ends[0]:{sign}.3f}..{ends[1]:{sign}.3f}"
