"""Compensation for rare labels: loss weights of the labels, and repeated rows."""

import numpy as np

CAP = 10.0  # the highest weight of a label; a higher one would let a few rows dominate the loss


def label_weights(gold: np.ndarray, how: str) -> np.ndarray:
    """The weight in the loss of the tokens that name each label. All other tokens of an answer have weight 1.

    `within`: a label's number of negatives over its number of positives. `across`: the mean number of positives of all
    labels over the label's own. Both are limited to between 1/10 and 10.

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
    """The rows of an epoch, with rows of rare labels repeated.

    This is repeat factor sampling (Gupta, Dollár and Girshick 2019, arXiv 1908.03195): a label that a share f of the
    rows have is repeated max(1, sqrt(t / f)) times, where t is the median share. A row is repeated as often as its
    rarest label. The fractional part of that number is the probability of one repetition more.

    Args:
        gold: 0/1, [n, L].

    Returns:
        int64 [m], positions of rows, ascending, m >= n.
    """
    share = np.maximum(gold.mean(axis=0), 1 / len(gold))
    label_factor = np.maximum(1.0, np.sqrt(np.median(share) / share))  # [L]
    row_factor = np.where(gold, label_factor, 1.0).max(axis=1)  # [n]
    is_repeated_once_more = np.random.default_rng(seed).random(len(gold)) < row_factor % 1
    return np.repeat(np.arange(len(gold)), row_factor.astype(int) + is_repeated_once_more)
