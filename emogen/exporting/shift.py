"""What an export has changed: the held-out rows again, by the exported model in the program that will run it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from emogen.errors import ModelError
from emogen.evaluation.metrics import bootstrap, interval_of, score

TOLERANCE = 0.005  # of macro-F1


@dataclass(frozen=True)
class Labelled:
    """What a model says about n rows: its labels, int8 [n, L], and probabilities, [n, L], where they are computed."""

    pred: np.ndarray
    prob: np.ndarray | None


def measure_shift(gold: np.ndarray, names: tuple[str, ...], before: Labelled, after: Labelled) -> dict[str, Any]:
    """Compare the exported model with the run.

    Args:
        gold: int8 [n, L].
        before, after: the run, and what was exported.

    Returns:
        `rows`; `changed`, the rows with other labels; `f1_macro_before` and `f1_macro_after`; `f1_macro_change` and its
        95 % `interval` over the rows (None for too few); `prob_change_max` and `prob_change_mean`, if both have
        probabilities. All values are plain numbers.
    """
    scores = [score(gold, labelled.pred, names)["f1_macro"] for labelled in (before, after)]
    first, second = bootstrap(gold, [before.pred, after.pred], names)
    ends = interval_of(second["f1_macro"] - first["f1_macro"], len(gold))
    found: dict[str, Any] = {
        "rows": len(gold),
        "changed": int((before.pred != after.pred).any(1).sum()),
        "f1_macro_before": scores[0],
        "f1_macro_after": scores[1],
        "f1_macro_change": scores[1] - scores[0],
        "interval": None if ends is None else list(ends),
    }
    if before.prob is not None and after.prob is not None:
        change = np.abs(after.prob.astype(np.float64) - before.prob)
        found |= {"prob_change_max": float(change.max()), "prob_change_mean": float(change.mean())}
    return found


def describe(shift: dict[str, Any]) -> str:
    """A shift in one line."""
    ends = shift["interval"]
    text = (
        f"{shift['changed']:,} of {shift['rows']:,} answers changed; macro-F1 {shift['f1_macro_before']:.4f} -> "
        f"{shift['f1_macro_after']:.4f} ({shift['f1_macro_change']:+.4f}"
        + (f", 95 %: {ends[0]:+.4f} to {ends[1]:+.4f})" if ends else ")")
    )
    if "prob_change_max" in shift:
        text += f"; probabilities: {shift['prob_change_max']:.4f} at most, {shift['prob_change_mean']:.5f} on average"
    return text


def require_small(shift: dict[str, Any], what: str) -> None:
    """Refuse an export that scores otherwise than its run.

    Raises:
        ModelError: macro-F1 changes by more than 0.005.
    """
    if abs(shift["f1_macro_change"]) > TOLERANCE:
        raise ModelError(
            f"{what} does not score as the run: {describe(shift)}. More than {TOLERANCE} is not accepted; --force "
            "keeps it all the same"
        )
