"""Stacking: the probabilities of several systems -> one probability for each label.

Systems make different errors, and each is better on some labels than on others. A plain mean gives a weak system the
same weight as a strong one. So each label gets a logistic regression on the logits of the systems (Wolpert 1992). It is
fitted to out-of-fold probabilities: no system was trained on the rows. Pure numpy and scikit-learn.
"""

from dataclasses import dataclass

import numpy as np

from emogen.evaluation.metrics import Objective, apply_thresholds, check_prob, tune_thresholds


@dataclass(frozen=True)
class Stack:
    """L logistic regressions on the logits of M systems.

    Attributes:
        coef: float64 [L, M].
        intercept: float64 [L].
    """

    coef: np.ndarray
    intercept: np.ndarray

    def predict_proba(self, probs: np.ndarray) -> np.ndarray:
        """Combine the probabilities of M systems: [M, n, L] -> [n, L]."""
        from scipy.special import expit

        return expit(np.einsum("mnl,lm->nl", _logits(probs), self.coef) + self.intercept)


def fit_stack(gold: np.ndarray, probs: np.ndarray) -> Stack:
    """Fit the regressions to rows that were held out from all systems.

    Args:
        gold: 0/1, [n, L].
        probs: the probabilities of M systems, [M, n, L].

    Returns:
        The regressions. A label that no row has gets the probability 0, a label that every row has gets 1.
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
    """Predict the probabilities of each fold with regressions that were fitted to the other folds.

    Args:
        gold, probs: see `fit_stack`.
        folds: the fold of each row, [n].

    Returns:
        [n, L].
    """
    prob = np.zeros(gold.shape)
    for fold in np.unique(folds):
        held_out = folds == fold
        prob[held_out] = fit_stack(gold[~held_out], probs[:, ~held_out]).predict_proba(probs[:, held_out])
    return prob


def nested_stack(
    gold: np.ndarray, probs: np.ndarray, folds: np.ndarray, objective: Objective = "f1_macro"
) -> np.ndarray:
    """Predict the labels of each fold with a stack and thresholds from the other folds alone.

    The stack is fitted to all other folds. The thresholds are tuned on cross-fitted probabilities of these folds.

    Args:
        gold, probs, folds: see `cross_fit`.
        objective: see `tune_thresholds`.

    Returns:
        int8 [n, L].

    Raises:
        ValueError: there are fewer than three folds.
    """
    if len(np.unique(folds)) < 3:
        raise ValueError("nested stacking needs three folds or more")
    pred = np.zeros(gold.shape, dtype=np.int8)
    for fold in np.unique(folds):
        held_out = folds == fold
        other_gold, other_probs = gold[~held_out], probs[:, ~held_out]
        thresholds = tune_thresholds(other_gold, cross_fit(other_gold, other_probs, folds[~held_out]), objective)
        stack = fit_stack(other_gold, other_probs)
        pred[held_out] = apply_thresholds(stack.predict_proba(probs[:, held_out]), thresholds)
    return pred


def _logits(probs: np.ndarray) -> np.ndarray:
    """The logits of probabilities, which are clipped to 1e-4 from 0 and 1.

    Raises:
        ModelError: a probability is not a number.
    """
    from scipy.special import logit

    for prob in probs:
        check_prob(prob)
    return logit(np.clip(np.asarray(probs, dtype=np.float64), 1e-4, 1 - 1e-4))
