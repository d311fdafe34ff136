"""Metrics of labels, thresholds and calibration of probabilities, and bootstrap intervals.

Pure numpy, as scikit-learn takes seconds to import; its metrics are the same. Arrays have n rows and L columns, one for
each label in canonical order: `gold` and `pred` are 0/1, `prob` holds probabilities.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from emogen.errors import ModelError

Metrics = dict[str, Any]
Objective = Literal["f1_macro", "f1_micro"]  # what thresholds are tuned for


def score(gold: np.ndarray, pred: np.ndarray, names: Sequence[str], *, exactly_one: bool = False) -> Metrics:
    """Compute the metrics of SemEval-2018 Task 1 E-c and of the competition.

    The F1 of a label without gold positives is 0.0, even where it is undefined, and counts in the macro average, as in
    scikit-learn and the competition. A row with neither gold nor predicted labels has a Jaccard index of 1.0.

    Args:
        gold: the true labels, 0/1, [n, L].
        pred: the predicted labels, 0/1, [n, L].
        names: the L label names.
        exactly_one: whether the label set says it. A row without a predicted label is an answer that could not be read.

    Returns:
        `n`, `f1_macro`, `f1_micro`, `precision_macro`, `recall_macro`, `jaccard_samples`, `exact_match`,
        `hamming_loss`, `per_label` (name -> `precision`, `recall`, `f1`, `support`, `predicted`), and `no_positives`
        (the labels without gold positives). `exactly_one` is there, and true, if the label set says it. All values are
        plain numbers, ready for JSON.

    Raises:
        ValueError: the shapes differ or are not [n, L], there are no rows, or a value is neither 0 nor 1.
    """
    gold, pred = _matrix("gold", gold, names), _matrix("pred", pred, names)
    if gold.shape != pred.shape:
        raise ValueError(f"gold has {len(gold)} rows and pred has {len(pred)}; they must be the same rows")

    hits, support, predicted = (gold & pred).sum(0), gold.sum(0), pred.sum(0)  # [L]
    precision, recall = _ratio(hits, predicted, 0.0), _ratio(hits, support, 0.0)
    f1 = _ratio(2 * hits, support + predicted, 0.0)
    return {
        "n": len(gold),
        "f1_macro": float(f1.mean()),
        "f1_micro": float(_ratio(2 * hits.sum(), support.sum() + predicted.sum(), 0.0)),
        "precision_macro": float(precision.mean()),
        "recall_macro": float(recall.mean()),
        "jaccard_samples": float(row_jaccard(gold, pred).mean()),
        "exact_match": float((gold == pred).all(axis=1).mean()),
        "hamming_loss": float((gold != pred).mean()),
        "per_label": {
            name: {
                "precision": float(precision[k]),
                "recall": float(recall[k]),
                "f1": float(f1[k]),
                "support": int(support[k]),
                "predicted": int(predicted[k]),
            }
            for k, name in enumerate(names)
        },
        "no_positives": [name for name, n in zip(names, support, strict=True) if not n],
    } | ({"exactly_one": True} if exactly_one else {})


def row_jaccard(gold: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """The Jaccard index of each row, 1.0 for one with neither gold nor predicted labels: gold, pred [n, L] -> [n]."""
    return _ratio((gold & pred).sum(1), (gold | pred).sum(1), 1.0)


def _ratio(part: np.ndarray, whole: np.ndarray, undefined: float) -> np.ndarray:
    """`part / whole`, and `undefined` where `whole` is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), undefined)


def score_nested(gold: np.ndarray, pred: np.ndarray, folds: np.ndarray, names: Sequence[str]) -> Metrics:
    """Score labels that were decided by nested thresholds or stacks.

    Args:
        gold, pred: [n, L].
        folds: the fold of each row, [n].

    Returns:
        The metrics of `score`, and `untuned` if there are any: labels whose positives are all in one fold. The other
        folds have no positives to tune on, so these labels are never predicted in their fold.
    """
    n_folds = [len(np.unique(folds[gold[:, k] == 1])) for k in range(len(names))]
    untuned = [name for name, n in zip(names, n_folds, strict=True) if n == 1]
    return score(gold, pred, names) | ({"untuned": untuned} if untuned else {})


def _matrix(title: str, values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Convert the values to int8 [n, L].

    Raises:
        ValueError: the values are not 0/1, or not of this shape.
    """
    values = np.asarray(values)
    if values.ndim != 2:
        raise ValueError(f"{title} must be 2-D, [n, L], not of shape {values.shape}")
    if values.shape[1] != len(names):
        raise ValueError(f"{title} has {values.shape[1]} columns for {len(names)} label names")
    if not len(values) or not len(names):
        raise ValueError(f"{title} is empty: no rows or no labels to score")
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"{title} may hold only 0 and 1")
    return values.astype(np.int8)


def check_prob(prob: np.ndarray) -> None:
    """Refuse probabilities that a model cannot mean.

    Args:
        prob: [n, L].

    Raises:
        ModelError: a value is NaN, infinite, or outside 0 to 1 by more than rounding.
    """
    prob = np.asarray(prob)
    is_wrong = np.logical_not((prob >= -1e-3) & (prob <= 1 + 1e-3))  # NaN compares as false
    if is_wrong.any():
        rows = is_wrong.reshape(len(prob), -1).any(axis=1)
        raise ModelError(
            f"{rows.sum():,} of {len(prob):,} rows have probabilities that are not numbers from 0 to 1; the first is "
            f"row {rows.argmax() + 1}, with {prob[is_wrong][0]}. The model computes no valid output: was its training "
            "unstable (lower learning_rate), or does its dtype overflow (dtype: float32)?"
        )


# The number of positives at which a tuned threshold has the same weight as F1*/2.
SHRINK_POSITIVES = 50


def tune_thresholds(gold: np.ndarray, prob: np.ndarray, objective: Objective = "f1_macro") -> np.ndarray:
    """Tune thresholds for macro-F1, one for the F1 of each label, or for micro-F1, one for all labels together.

    With calibrated probabilities the best threshold is half of the best F1 (Lipton et al. 2014, arXiv 1402.1892). A
    threshold tuned on few positives fits their noise, so it is shrunk towards that half: with n positives,
    t = (n t* + k F1*/2) / (n + k), where t* is the tuned threshold and k = 50. Micro-F1 is the F1 of all decisions,
    whatever their label, so the same holds for one threshold on the probabilities of all labels.

    Args:
        gold: the true labels, 0/1, [n, L].
        prob: the probabilities, [n, L]. The rows must not be the ones that the thresholds will be scored on.
        objective: the metric to maximise.

    Returns:
        The thresholds, [L]. A label without positives gets 1.0, which no probability exceeds.

    Raises:
        ModelError: a probability is not a number.
    """
    check_prob(prob)
    has_positives = np.asarray(gold).any(axis=0)
    thresholds = np.ones(prob.shape[1])
    if objective == "f1_micro":
        if has_positives.any():
            thresholds[has_positives] = _best_threshold(gold.ravel(), prob.ravel())
        return thresholds
    for k in np.flatnonzero(has_positives):
        thresholds[k] = _best_threshold(gold[:, k], prob[:, k])
    return thresholds


def _best_threshold(gold: np.ndarray, prob: np.ndarray) -> float:
    """The threshold with the highest F1, shrunk; see `tune_thresholds`.

    Args:
        gold, prob: [n], with a positive.
    """
    candidates, f1 = _f1_by_threshold(gold, prob)
    best, positives = int(f1.argmax()), int(gold.sum())
    # Halfway to the next lower probability: at the value itself, rounding would decide about the last row.
    tuned = (candidates[best] + (candidates[best - 1] if best else 0.0)) / 2
    return float((positives * tuned + SHRINK_POSITIVES * f1[best] / 2) / (positives + SHRINK_POSITIVES))


def _f1_by_threshold(gold: np.ndarray, prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each different probability of a label, ascending, and the F1 of predicting the rows that reach it.

    Args:
        gold, prob: [n].
    """
    order = np.argsort(prob, kind="stable")
    candidates, first = np.unique(prob[order], return_index=True)
    n_hits = np.cumsum(gold[order][::-1])[::-1][first]  # positives among the rows that reach a candidate
    n_predicted = len(prob) - first
    return candidates, 2 * n_hits / (gold.sum() + n_predicted)


def apply_thresholds(prob: np.ndarray, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
    """Assign the labels with a probability above their threshold.

    Args:
        prob: [n, L].
        thresholds: [L] or [n, L].

    Returns:
        int8 [n, L].

    Raises:
        ModelError: a probability is not a number: no threshold could decide about it.
    """
    check_prob(prob)
    return (np.asarray(prob) > np.asarray(thresholds)).astype(np.int8)


def most_probable(prob: np.ndarray) -> np.ndarray:
    """Assign the most probable label of each row and no other, for label sets with `exactly_one`: int8 [n, L].

    Args:
        prob: [n, L]. Of equal probabilities the first one counts. A row of zeros, as an endpoint has whose answer could
            not be read, stays without a label.
    """
    prob = np.asarray(prob)
    is_best = np.arange(prob.shape[1]) == prob.argmax(axis=1)[:, None]
    return (is_best & (prob > 0)).astype(np.int8)


def nested_thresholds(
    gold: np.ndarray, prob: np.ndarray, folds: np.ndarray, objective: Objective = "f1_macro"
) -> np.ndarray:
    """The thresholds of each row, tuned on the rows of all other folds.

    Args:
        gold, prob: [n, L].
        folds: the fold of each row, [n].
        objective: see `tune_thresholds`.

    Returns:
        [n, L]; all rows of a fold have the same thresholds.

    Raises:
        ValueError: there is only one fold.
    """
    if len(np.unique(folds)) < 2:
        raise ValueError("nested thresholds need two folds or more")
    thresholds = np.zeros(prob.shape)
    for fold in np.unique(folds):
        held_out = folds == fold
        thresholds[held_out] = tune_thresholds(gold[~held_out], prob[~held_out], objective)
    return thresholds


def nested_pred(gold: np.ndarray, prob: np.ndarray, folds: np.ndarray, objective: Objective = "f1_macro") -> np.ndarray:
    """Assign labels by nested thresholds: int8 [n, L]. Arguments and errors are those of `nested_thresholds`."""
    return apply_thresholds(prob, nested_thresholds(gold, prob, folds, objective))


def calibration(gold: np.ndarray, prob: np.ndarray, names: Sequence[str], n_bins: int = 10) -> dict[str, Any]:
    """Measure the calibration of probabilities.

    Args:
        gold, prob: [n, L].
        n_bins: number of bins of equal width over 0..1.

    Returns:
        `brier` (mean squared error) and `ece` (expected calibration error: the distance between the mean probability
        of a bin and its share of positives, averaged over the bins by their rows), both as means over the labels.
        `per_label` holds both for each label, and `bins`: `n`, `prob` (mean) and `positive` (share of positives) of
        each bin that is not empty. All values are plain numbers.

    Raises:
        ValueError: there are no rows.
        ModelError: a probability is not a number.
    """
    if not len(prob):
        raise ValueError("no rows to measure the calibration on")
    check_prob(prob)
    per_label = {}
    for k, name in enumerate(names):
        bin_of_row = np.minimum((prob[:, k] * n_bins).astype(int), n_bins - 1)
        count = np.bincount(bin_of_row, minlength=n_bins)
        occupied = count > 0
        mean_prob = np.bincount(bin_of_row, weights=prob[:, k], minlength=n_bins)[occupied] / count[occupied]
        positive = np.bincount(bin_of_row, weights=gold[:, k], minlength=n_bins)[occupied] / count[occupied]
        per_label[name] = {
            "brier": float(np.mean((prob[:, k] - gold[:, k]) ** 2)),
            "ece": float(np.sum(count[occupied] * np.abs(mean_prob - positive)) / len(prob)),
            "bins": [
                {"n": int(n), "prob": float(p), "positive": float(share)}
                for n, p, share in zip(count[occupied], mean_prob, positive, strict=True)
            ],
        }
    means = {key: float(np.mean([label[key] for label in per_label.values()])) for key in ("brier", "ece")}
    return means | {"per_label": per_label}


def evaluate(
    gold: np.ndarray,
    pred: np.ndarray,
    prob: np.ndarray,
    folds: np.ndarray | None,
    names: Sequence[str],
    objective: Objective = "f1_macro",
    *,
    exactly_one: bool = False,
) -> Metrics:
    """Compute all metrics of held-out rows.

    Args:
        gold, pred, prob: [n, L].
        folds: the fold of each row, [n]; None if there are too few rows for nested thresholds.
        objective: see `tune_thresholds`.
        exactly_one: whether the label set says it. There is nothing to tune then.

    Returns:
        The metrics of `pred` (see `score`), those of nested thresholds under `by_thresholds` (see `score_nested`), and
        `calibration`.
    """
    metrics = score(gold, pred, names, exactly_one=exactly_one)
    if folds is not None and not exactly_one:
        metrics["by_thresholds"] = score_nested(gold, nested_pred(gold, prob, folds, objective), folds, names)
    return metrics | {"calibration": calibration(gold, prob, names)}


def row_log_loss(gold: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """The log loss of each row: -ln of the probability of the truth, summed over the labels.

    Args:
        gold, prob: [n, L]. Probabilities are clipped to 1e-6 from 0 and 1, the precision of a predictions file.

    Returns:
        [n], in nats.

    Raises:
        ModelError: a probability is not a number.
    """
    check_prob(prob)
    prob = np.clip(np.asarray(prob, dtype=np.float64), 1e-6, 1 - 1e-6)
    return -np.where(np.asarray(gold) == 1, np.log(prob), np.log1p(-prob)).sum(axis=1)


def cooccurrence(labels: np.ndarray) -> np.ndarray:
    """Count the rows that have both of two labels: `labels` [n, L] -> int64 [L, L].

    The diagonal counts the rows that have a label.
    """
    labels = np.asarray(labels, dtype=np.int64)
    return labels.T @ labels


def confusions(gold: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Count the confusions of two labels: gold, pred [n, L] -> int64 [L, L].

    The cell [i, j] counts the rows with a false negative of i and a false positive of j. A row with two false negatives
    and one false positive counts in two cells. The diagonal is 0.
    """
    gold, pred = np.asarray(gold, dtype=np.int64), np.asarray(pred, dtype=np.int64)
    return (gold * (1 - pred)).T @ ((1 - gold) * pred)


def discordant(gold: np.ndarray, preds: Sequence[np.ndarray]) -> np.ndarray:
    """Count the rows that one system predicts exactly and another one does not.

    Args:
        gold: [n, L].
        preds: the predictions of S systems, each [n, L].

    Returns:
        int64 [S, S]; the cell [a, b] counts the rows that a has right and b has wrong.
    """
    is_right = np.array([(gold == pred).all(axis=1) for pred in preds], dtype=np.int64)  # [S, n]
    return is_right @ (1 - is_right).T


INTERVAL = (2.5, 97.5)  # percentiles of a 95 % interval
Interval = tuple[float, float] | None  # None: no interval can be given

# The bootstrap draws from the rows that there are. With fewer rows, or fewer positive rows of a label, they are too few
# to stand for all others, and the interval would be too narrow. With 5 positives, 1 resample in 150 has none.
MIN_ROWS, MIN_POSITIVES = 30, 5


def bootstrap(
    gold: np.ndarray,
    preds: Sequence[np.ndarray],
    names: Sequence[str],
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, np.ndarray]]:
    """Bootstrap the F1 of several systems over the rows (Efron 1979).

    All systems are scored on the same resamples, so their differences are paired. Each resample is scored as `score`
    scores its rows: a label without gold positives in it has an F1 of 0 and counts in the macro average.

    Args:
        gold: [n, L].
        preds: the predictions of each system, [n, L].

    Returns:
        For each system `f1_macro`, `f1_micro` and `f1/<label>`, each [n_resamples]; `interval` takes one of them.
    """
    rng = np.random.default_rng(seed)
    gold = np.asarray(gold, dtype=np.float32)
    # How often each resample draws each row. The counts of all resamples are then one matrix product.
    drawn = rng.multinomial(len(gold), np.full(len(gold), 1 / len(gold)), size=n_resamples).astype(np.float32)
    results = []
    for pred in preds:
        pred = np.asarray(pred, dtype=np.float32)
        hits, total = drawn @ (gold * pred), drawn @ (gold + pred)  # [n_resamples, L]: TP, and 2 TP + FP + FN
        f1 = 2 * hits / np.maximum(total, 1)
        micro = 2 * hits.sum(1) / np.maximum(total.sum(1), 1)
        by_label = {f"f1/{name}": f1[:, k].astype(np.float64) for k, name in enumerate(names)}
        results.append({"f1_macro": f1.mean(1, dtype=np.float64), "f1_micro": micro.astype(np.float64)} | by_label)
    return results


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrapped values."""
    low, high = np.percentile(values, INTERVAL)
    return float(low), float(high)


def interval_of(values: np.ndarray, n_rows: int, n_positives: int = MIN_POSITIVES) -> Interval:
    """The 95 % interval of bootstrapped values, if it can be believed.

    Args:
        values: [n_resamples], from `bootstrap`, or the differences of two of its results.
        n_rows: the number of rows that were resampled.
        n_positives: the number of positive rows of the label that the values are about.

    Returns:
        None for fewer than `MIN_ROWS` rows or `MIN_POSITIVES` positives, and for an interval of width 0: all resamples
        have the same value, so they do not show how it varies (1.0 on 30 rows is not 1.0 for certain).
    """
    low, high = interval(values)
    return None if n_rows < MIN_ROWS or n_positives < MIN_POSITIVES or low == high else (low, high)


def intervals(resampled: dict[str, np.ndarray], metrics: Metrics) -> dict[str, Interval]:
    """The interval of each value of a system (see `interval_of`).

    Args:
        resampled: the result of `bootstrap` for the system.
        metrics: the result of `score` for the system.
    """
    support = {f"f1/{name}": label["support"] for name, label in metrics["per_label"].items()}
    return {
        key: interval_of(values, metrics["n"], support.get(key, MIN_POSITIVES)) for key, values in resampled.items()
    }
