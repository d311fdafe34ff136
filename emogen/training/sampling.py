"""Rare labels: a weight for each label, and rows that are seen more than once."""

import numpy as np

CAP = 10.0  # the most that a label weighs; beyond it a few rows would drown all others


def label_weights(gold: np.ndarray, how: str) -> np.ndarray:
    """How much the tokens that name a label count in the loss, where other tokens of an answer count 1.

    `within`: by each label's own balance, its negatives over its positives. `across`: by how rare it is among the
    labels, the mean number of positives of a label over its own. Both between 1/10 and 10.

    Args:
        gold: 0/1, [n, L].
        how: `none`, `within` or `across`.

    Returns:
        float64 [L].
    """
    positives = np.maximum(gold.sum(axis=0), 1)
    if how == "within":
        weights = (len(gold) - positives) / positives
    elif how == "across":
        weights = positives.mean() / positives
    else:
        weights = np.ones(gold.shape[1])
    return np.clip(weights, 1 / CAP, CAP)


def repeat_rare(gold: np.ndarray, seed: int) -> np.ndarray:
    """Positions of the rows of an epoch, those with rare labels more than once.

    Repeat factor sampling (Gupta, Dollar and Girshick 2019, arXiv 1908.03195): a label of share f is repeated
    max(1, sqrt(t / f)) times, with t the median share here, and a row as often as its rarest label. What is left over
    of a whole number is drawn.

    Args:
        gold: 0/1, [n, L].

    Returns:
        int64 [m], ascending, m >= n.
    """
    share = np.maximum(gold.mean(axis=0), 1 / len(gold))
    of_label = np.maximum(1.0, np.sqrt(np.median(share) / share))  # [L]
    factor = np.where(gold, of_label, 1.0).max(axis=1)  # [n]
    drawn = np.random.default_rng(seed).random(len(gold)) < factor % 1
    return np.repeat(np.arange(len(gold)), factor.astype(int) + drawn)
