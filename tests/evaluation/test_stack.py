"""Stacking: which labels each system contributes to, and that no row influences its own prediction."""

import numpy as np
import pytest

from emogen.evaluation.metrics import nested_pred, score, tune_thresholds
from emogen.evaluation.stack import cross_fit, fit_stack, nested_stack

N = 400
FOLDS = np.arange(N) % 4


@pytest.fixture
def gold():
    return (np.random.default_rng(0).random((N, 3)) < 0.4).astype(np.int8)


def blurred(gold, noise, seed):
    return gold * (1 - noise) + np.random.default_rng(seed).random(gold.shape) * noise


def f1(gold, pred):
    return [label["f1"] for label in score(gold, pred, "abc")["per_label"].values()]


def test_each_label_follows_the_system_that_predicts_it_well(gold):
    good, probs = blurred(gold, 0.55, seed=1), np.random.default_rng(2).random((2, N, 3))
    probs[0, :, 0], probs[1, :, 1:] = good[:, 0], good[:, 1:]
    of_mean = np.mean(f1(gold, nested_pred(gold, probs.mean(axis=0), FOLDS)))
    assert np.mean(f1(gold, nested_stack(gold, probs, FOLDS))) > of_mean + 0.1


def test_gold_labels_of_a_fold_do_not_change_its_own_predictions(gold):
    probs = np.stack([blurred(gold, 0.9, seed=k) for k in range(2)])
    pred = nested_stack(gold, probs, FOLDS)
    flipped = gold.copy()
    flipped[FOLDS == 2] = 1 - flipped[FOLDS == 2]
    after = nested_stack(flipped, probs, FOLDS)
    assert (after[FOLDS == 2] == pred[FOLDS == 2]).all()
    assert (after[FOLDS != 2] != pred[FOLDS != 2]).any()
    assert (cross_fit(flipped, probs, FOLDS)[FOLDS == 2] == cross_fit(gold, probs, FOLDS)[FOLDS == 2]).all()


def test_a_system_with_inverted_probabilities_does_no_harm(gold):
    prob = blurred(gold, 0.7, seed=1)
    stacked = nested_stack(gold, np.stack([prob, 1 - prob]), FOLDS)
    assert f1(gold, stacked) == pytest.approx(f1(gold, nested_pred(gold, prob, FOLDS)), abs=0.05)


def test_constant_probabilities_give_the_share_of_positives(gold):
    same = np.full((1, N, 3), 0.5)
    assert fit_stack(gold, same).predict_proba(same[:, :2]) == pytest.approx(
        np.tile(gold.mean(axis=0), (2, 1)), abs=1e-3
    )


def test_labels_of_no_row_or_of_every_row_are_predicted_so(gold):
    gold[:, 0], gold[:, 1] = 0, 1
    probs = blurred(gold, 0.9, seed=3)[None]
    prob = fit_stack(gold, probs).predict_proba(probs)
    assert (prob[:, 0] == 0).all()
    assert (prob[:, 1] == 1).all()
    pred = nested_stack(gold, probs, FOLDS)
    assert not pred[:, 0].any()
    assert pred[:, 1].all()
    assert tune_thresholds(gold, prob)[0] == 1


def test_two_folds_are_refused(gold):
    with pytest.raises(ValueError, match="three folds"):
        nested_stack(gold, blurred(gold, 0.5, seed=1)[None], FOLDS % 2)
