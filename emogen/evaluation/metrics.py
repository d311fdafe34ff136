"""gold and pred -> metrics, and the table that shows them; gold and prob -> thresholds and calibration; intervals.

Pure numpy and scikit-learn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Metrics = dict[str, Any]


def score(gold: np.ndarray, pred: np.ndarray, names: Sequence[str]) -> Metrics:
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


def constant_labels(pred: np.ndarray, names: Sequence[str]) -> list[str]:
    """The labels that are given to every row of `pred` [n, L], or to none of them."""
    share = np.asarray(pred).mean(axis=0)
    return [name for name, value in zip(names, share, strict=True) if value in (0.0, 1.0)]


def _matrix(what: str, values: np.ndarray, names: Sequence[str]) -> np.ndarray:
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


# A threshold's weight grows with the positives that it was tuned on; at this many it counts as much as F1*/2.
SHRINK_POSITIVES = 50


def tune_thresholds(gold: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """The threshold of each label that gives the best F1 on these rows, shrunk where it rests on few positives.

    With calibrated probabilities the best threshold is half of the best F1 (Lipton et al. 2014, arXiv 1402.1892). A
    threshold tuned on few positives fits their noise, so it is drawn towards that half: with n positives,
    t = (n t* + k F1*/2) / (n + k), where t* is the tuned one and k = 50.

    Args:
        gold: the true labels, 0/1, [n, L].
        prob: the probabilities, [n, L]. They must not be of the rows that the thresholds will be judged by.

    Returns:
        [L]. A label without a positive gets 1.0, which no probability passes.
    """
    from sklearn.metrics import precision_recall_curve

    thresholds = np.ones(prob.shape[1])
    for k in range(prob.shape[1]):
        positives = int(gold[:, k].sum())
        if not positives:
            continue
        precision, recall, at = precision_recall_curve(gold[:, k], prob[:, k])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(f1[:-1].argmax())
        # Halfway to the next probability below: at the value itself, the last row would pass by rounding alone.
        tuned = (at[best] + (at[best - 1] if best else 0.0)) / 2
        thresholds[k] = (positives * tuned + SHRINK_POSITIVES * f1[best] / 2) / (positives + SHRINK_POSITIVES)
    return thresholds


def apply_thresholds(prob: np.ndarray, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
    """The labels whose probability is above their threshold: prob [n, L], thresholds [L] or [n, L] -> int8 [n, L]."""
    return (np.asarray(prob) > np.asarray(thresholds)).astype(np.int8)


def nested_thresholds(gold: np.ndarray, prob: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """For each row, thresholds that never saw it: those of a fold are tuned on all the others.

    Args:
        gold, prob: [n, L].
        folds: the fold of each row, [n].

    Returns:
        [n, L]; rows of one fold have the same.

    Raises:
        ValueError: there is one fold only.
    """
    if len(np.unique(folds)) < 2:
        raise ValueError("nested thresholds need two folds or more")
    thresholds = np.zeros(prob.shape)
    for fold in np.unique(folds):
        held = folds == fold
        thresholds[held] = tune_thresholds(gold[~held], prob[~held])
    return thresholds


def nested_pred(gold: np.ndarray, prob: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Labels by thresholds that never saw their row, int8 [n, L]; arguments and errors as `nested_thresholds`."""
    return apply_thresholds(prob, nested_thresholds(gold, prob, folds))


def calibration(gold: np.ndarray, prob: np.ndarray, names: Sequence[str], n_bins: int = 10) -> dict[str, Any]:
    """How far probabilities can be taken at their word.

    Args:
        gold, prob: [n, L].
        n_bins: of equal width over 0..1.

    Returns:
        `brier` (mean squared error) and `ece` (expected calibration error: the mean distance between the mean
        probability of a bin and the share of positives in it, weighted by the rows of the bin), as means over the
        labels and by label under `per_label`, there with `bins`: of each bin that is not empty its rows, mean
        probability and share of positives. Plain numbers.
    """
    per_label = {}
    for k, name in enumerate(names):
        which = np.minimum((prob[:, k] * n_bins).astype(int), n_bins - 1)
        count = np.bincount(which, minlength=n_bins)
        full = count > 0
        mean_prob = np.bincount(which, weights=prob[:, k], minlength=n_bins)[full] / count[full]
        positive = np.bincount(which, weights=gold[:, k], minlength=n_bins)[full] / count[full]
        per_label[name] = {
            "brier": float(np.mean((prob[:, k] - gold[:, k]) ** 2)),
            "ece": float(np.sum(count[full] * np.abs(mean_prob - positive)) / len(prob)),
            "bins": [
                {"n": int(n), "prob": float(p), "positive": float(s)}
                for n, p, s in zip(count[full], mean_prob, positive, strict=True)
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
) -> Metrics:
    """All that is said of held-out rows: `score` of the answers, of nested thresholds, and calibration.

    Args:
        gold, pred, prob: [n, L].
        folds: the fold of each row, [n], for the nested thresholds; None leaves them out.

    Returns:
        What `score` says of `pred`; under `by_thresholds`, what it says of `nested_pred`; and `calibration`.
    """
    metrics = score(gold, pred, names)
    if folds is not None:
        metrics["by_thresholds"] = score(gold, nested_pred(gold, prob, folds), names)
    return metrics | {"calibration": calibration(gold, prob, names)}


def row_log_loss(gold: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """How wrong the probabilities of each row are: -ln of what they give to the truth, summed over the labels.

    gold, prob [n, L] -> [n], in nats. Probabilities are kept 1e-6 from 0 and 1, as exact as files have them.
    """
    prob = np.clip(np.asarray(prob, dtype=np.float64), 1e-6, 1 - 1e-6)
    return -np.where(np.asarray(gold) == 1, np.log(prob), np.log1p(-prob)).sum(axis=1)


def cooccurrence(labels: np.ndarray) -> np.ndarray:
    """How many rows have both of two labels, int64 [L, L] of `labels` [n, L]; on the diagonal, how many have one."""
    wide = np.asarray(labels, dtype=np.int64)
    return wide.T @ wide


def confusions(gold: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Which labels are given in place of which: gold, pred [n, L] -> int64 [L, L].

    The cell [i, j] counts the rows in which i was missed (gold, not predicted) and j falsely given (predicted, not
    gold). A row that misses two and falsely gives one counts in two cells. The diagonal is 0.
    """
    gold, pred = np.asarray(gold, dtype=np.int64), np.asarray(pred, dtype=np.int64)
    return (gold * (1 - pred)).T @ ((1 - gold) * pred)


def discordant(gold: np.ndarray, preds: Sequence[np.ndarray]) -> np.ndarray:
    """How many rows one system has exactly right and another one wrong: gold and S preds [n, L] -> int64 [S, S].

    The cell [a, b] counts the rows that a has right and b wrong.
    """
    right = np.array([(gold == pred).all(axis=1) for pred in preds], dtype=np.int64)  # [S, n]
    return right @ (1 - right).T


INTERVAL = (2.5, 97.5)  # percentiles: 95 %


def bootstrap(
    gold: np.ndarray,
    preds: Sequence[np.ndarray],
    names: Sequence[str],
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, np.ndarray]]:
    """F1 of each system on the same resamples of the rows (Efron 1979), so that differences are paired.

    Args:
        gold: [n, L].
        preds: each system's labels, [n, L].

    Returns:
        For each system: `f1_macro`, `f1_micro` and `f1/<label>`, each [n_resamples]. `interval` reads them.
    """
    rng = np.random.default_rng(seed)
    gold = np.asarray(gold, dtype=np.float32)
    # How often each row is drawn; the counts of a resample are then a matrix product.
    drawn = rng.multinomial(len(gold), np.full(len(gold), 1 / len(gold)), size=n_resamples).astype(np.float32)
    results = []
    for pred in preds:
        pred = np.asarray(pred, dtype=np.float32)
        hits, both = drawn @ (gold * pred), drawn @ (gold + pred)  # [n_resamples, L]: TP, and 2 TP + FP + FN
        f1 = 2 * hits / np.maximum(both, 1)
        micro = 2 * hits.sum(1) / np.maximum(both.sum(1), 1)
        by_label = {f"f1/{name}": f1[:, k].astype(np.float64) for k, name in enumerate(names)}
        results.append({"f1_macro": f1.mean(1, dtype=np.float64), "f1_micro": micro.astype(np.float64)} | by_label)
    return results


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrapped figures."""
    low, high = np.percentile(values, INTERVAL)
    return float(low), float(high)
