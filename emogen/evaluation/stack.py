"""Stacking: what several systems say of a label -> a better probability of it.

Systems err in different ways, and not all know each label equally well. So each label gets a logistic regression on the
logits that the systems give it (Wolpert 1992), which a plain mean, where a weak system drags along, does not match. It
learns from out-of-fold probabilities, never from those of rows that a system had learnt itself. Pure numpy and
scikit-learn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emogen.evaluation.metrics import apply_thresholds, tune_thresholds


@dataclass(frozen=True)
class Stack:
    """L logistic regressions over the logits of M systems: `coef` float64 [L, M], `intercept` float64 [L]."""

    coef: np.ndarray
    intercept: np.ndarray

    def predict_proba(self, probs: np.ndarray) -> np.ndarray:
        """What M systems say, [M, n, L] -> the probability of each label, [n, L]."""
        from scipy.special import expit

        return expit(np.einsum("mnl,lm->nl", _logits(probs), self.coef) + self.intercept)


def fit_stack(gold: np.ndarray, probs: np.ndarray) -> Stack:
    """Learn from rows that were held out from all systems.

    Args:
        gold: 0/1, [n, L].
        probs: of M systems, [M, n, L].

    Returns:
        The regressions. A label that no row has, or every row, goes on being said of none, or of every one.
    """
    from sklearn.linear_model import LogisticRegression

    coef, intercept = np.zeros((gold.shape[1], len(probs))), np.zeros(gold.shape[1])
    for k, (truth, logits) in enumerate(zip(gold.T, _logits(probs).T, strict=True)):  # [n], [n, M]
        if truth.min() == truth.max():
            intercept[k] = np.inf if truth.max() else -np.inf
            continue
        fitted = LogisticRegression().fit(logits, truth)
        coef[k], intercept[k] = fitted.coef_[0], fitted.intercept_[0]
    return Stack(coef, intercept)


def cross_fit(gold: np.ndarray, probs: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """The probability of each label in each row, by regressions that learnt from the other folds: [n, L].

    Args:
        gold, probs: see `fit_stack`.
        folds: the fold of each row, [n].
    """
    prob = np.zeros(gold.shape)
    for fold in np.unique(folds):
        held = folds == fold
        prob[held] = fit_stack(gold[~held], probs[:, ~held]).predict_proba(probs[:, held])
    return prob


def nested_stack(
    gold: np.ndarray,
    probs: np.ndarray,
    folds: np.ndarray,
    tune: Callable[[np.ndarray, np.ndarray], np.ndarray] = tune_thresholds,
) -> np.ndarray:
    """Labels by regressions and thresholds that never saw their row, int8 [n, L].

    For each fold both come from the others alone: the regressions from all of these, and the thresholds from what
    regressions without each of them in turn say of it.

    Args:
        gold, probs, folds: see `cross_fit`.
        tune: finds thresholds [L] for gold and prob, both [n, L].

    Raises:
        ValueError: there are fewer than three folds.
    """
    if len(np.unique(folds)) < 3:
        raise ValueError("nested stacking needs three folds or more")
    pred = np.zeros(gold.shape, dtype=np.int8)
    for fold in np.unique(folds):
        held = folds == fold
        seen = gold[~held], probs[:, ~held]
        thresholds = tune(seen[0], cross_fit(*seen, folds[~held]))
        pred[held] = apply_thresholds(fit_stack(*seen).predict_proba(probs[:, held]), thresholds)
    return pred


def _logits(probs: np.ndarray) -> np.ndarray:
    """Probabilities, kept 1e-4 from 0 and 1 -> logits."""
    from scipy.special import logit

    return logit(np.clip(np.asarray(probs, dtype=np.float64), 1e-4, 1 - 1e-4))
