"""Runs against each other on the same rows, against their ensemble, and against what others have published."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.table import Table

from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.metrics import Metrics, bootstrap, interval, nested_pred, score
from emogen.evaluation.stack import nested_stack
from emogen.task.labels import LabelSet

PUBLISHED = Path(__file__).with_name("published_results.yaml")


@dataclass(frozen=True)
class System:
    """One system: its figures; the 95 % intervals of macro-F1 and of its difference to the first system; and how often,
    of the bootstrap's resamples, it was not better than that one."""

    name: str
    metrics: Metrics
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    not_better: float


def compare(
    runs: Sequence[Path], label_set: LabelSet, *, by: str = "thresholds", ensemble: bool = False
) -> list[System]:
    """Score runs (or cross-validations, or baselines) on the rows that all of them were scored on.

    Args:
        runs: their folders.
        by: `answer`, `thresholds` (nested over the folds) or `stack` (nested, too).
        ensemble: add all runs together: their stack, or else the average of their probabilities by thresholds.

    Returns:
        The systems in the order of the runs, the ensemble last. Differences are paired: all systems are scored on the
        same resamples of the rows.

    Raises:
        InputError: a run has not been scored, or on other rows or folds, or there are too few of these.
    """
    scored = results.aligned([results.read_scored(run, label_set) for run in runs])
    gold, folds = scored[0].gold, scored[0].folds
    needed = {"answer": 2 if ensemble else 1, "thresholds": 2, "stack": 3}[by]
    if len(np.unique(folds)) < needed:
        raise InputError(f"{scored[0].path}: too few rows or folds for this; compare with --by answer")
    preds = [of.pred if by == "answer" else _decide(gold, of.prob[None], folds, by) for of in scored]
    names = names_of(runs)
    if ensemble:
        names.append(f"{'stack' if by == 'stack' else 'mean'} of {len(runs)}")
        preds.append(_decide(gold, np.stack([of.prob for of in scored]), folds, by))
    resampled = [figures["f1_macro"] for figures in bootstrap(gold, preds, label_set.names)]
    systems: list[System] = []
    for name, pred, f1 in zip(names, preds, resampled, strict=True):
        metrics, difference = score(gold, pred, label_set.names), f1 - resampled[0]
        base = systems[0].metrics["f1_macro"] if systems else metrics["f1_macro"]
        systems.append(
            System(
                name,
                metrics,
                interval(f1),
                metrics["f1_macro"] - base,
                interval(difference),
                float(np.mean(difference <= 0)),
            )
        )
    return systems


def _decide(gold: np.ndarray, probs: np.ndarray, folds: np.ndarray, by: str) -> np.ndarray:
    """The labels that systems come to together, nested over the folds: probs [M, n, L] -> int8 [n, L]."""
    return nested_stack(gold, probs, folds) if by == "stack" else nested_pred(gold, probs.mean(axis=0), folds)


def names_of(runs: Sequence[Path]) -> list[str]:
    """What to call runs: by their folders, with as much of the path as tells each from the others."""
    parts = [run.resolve().parts for run in runs]
    depth = next(d for d in range(1, max(map(len, parts)) + 1) if len({p[-d:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-depth:]) for p in parts]


@cache
def published() -> dict[str, Any]:
    """What others report on SemEval-2018 Task 1 E-c English, as `published_results.yaml` has it, with sources."""
    return yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))


Row = tuple[str, float, tuple[float, float] | None, dict[str, float]]  # name, macro-F1, 95 % interval, F1 by label


def rows_of(systems: Sequence[System], *, with_published: bool = False) -> list[Row]:
    """What is shown of each system, and of the published ones.

    Those were scored by their authors, on other rows: their figures stand beside, without intervals or differences.
    """
    rows: list[Row] = []
    for of in systems:
        f1 = {name: label["f1"] for name, label in of.metrics["per_label"].items()}
        rows.append((of.name, of.metrics["f1_macro"], of.interval, f1))
    if with_published:
        for theirs in published()["systems"]:
            f1 = {name: figures[-1] for name, figures in theirs["per_label"].items()}
            rows.append((f"{theirs['id']} (published)", theirs["f1_macro"], None, f1))
    return rows


def tables(systems: Sequence[System], *, with_published: bool = False) -> list[Table]:
    """Macro-F1 of the systems with their differences; and the F1 of each label, of so many at a time that they fit."""
    rows = rows_of(systems, with_published=with_published)
    total = Table(box=None, pad_edge=False)
    total.add_column("system", overflow="fold")
    for heading in ("macro-F1, 95 %", "micro-F1", "difference, 95 %", "not better"):
        total.add_column(heading, justify="right", no_wrap="95 %" not in heading)
    for k, (name, f1_macro, ends, _) in enumerate(rows):
        cells = [f"{f1_macro:.3f}"]
        if ends is not None:
            cells = [with_interval(f1_macro, ends), f"{systems[k].metrics['f1_micro']:.3f}"]
        if ends is not None and k:
            of = systems[k]
            cells += [with_interval(of.difference, of.difference_interval, "+z"), f"{of.not_better:.1%}"]
        total.add_row(name, *cells)
    names = list(systems[0].metrics["per_label"])
    return [total, *(_by_label(rows, names[k : k + 11]) for k in range(0, len(names), 11))]


def _by_label(rows: Sequence[Row], names: Sequence[str]) -> Table:
    view = Table(box=None, pad_edge=False, collapse_padding=True)
    view.add_column("F1", overflow="fold")
    for name in names:
        view.add_column(name[:5], justify="right", no_wrap=True)
    for name, _, _, f1 in rows:
        view.add_row(name.removesuffix(" (published)"), *(f"{f1[label]:.2f}" if label in f1 else "" for label in names))
    return view


def with_interval(value: float, ends: tuple[float, float], sign: str = "") -> str:
    """A figure and its interval for a table's cell: on two lines where there is no room for one."""
    return f"{value:{sign}.3f} {ends[0]:{sign}.3f}..{ends[1]:{sign}.3f}"
