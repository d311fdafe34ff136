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


def test_each_label_is_taken_from_the_system_that_knows_it(gold):
    knows, guesses = blurred(gold, 0.55, seed=1), np.random.default_rng(2).random((2, N, 3))
    probs = np.stack([guesses[0], guesses[1]])
    probs[0, :, 0], probs[1, :, 1:] = knows[:, 0], knows[:, 1:]
    of_mean = np.mean(f1(gold, nested_pred(gold, probs.mean(axis=0), FOLDS)))
    assert np.mean(f1(gold, nested_stack(gold, probs, FOLDS))) > of_mean + 0.1


def test_a_row_never_tells_of_itself(gold):
    probs = np.stack([blurred(gold, 0.9, seed=k) for k in range(2)])
    pred = nested_stack(gold, probs, FOLDS)
    lied = gold.copy()
    lied[FOLDS == 2] = 1 - lied[FOLDS == 2]
    told = nested_stack(lied, probs, FOLDS)
    assert (told[FOLDS == 2] == pred[FOLDS == 2]).all()
    assert (told[FOLDS != 2] != pred[FOLDS != 2]).any()
    assert (cross_fit(lied, probs, FOLDS)[FOLDS == 2] == cross_fit(gold, probs, FOLDS)[FOLDS == 2]).all()


def test_a_system_that_says_the_opposite_is_understood(gold):
    prob = blurred(gold, 0.7, seed=1)
    stacked = nested_stack(gold, np.stack([prob, 1 - prob]), FOLDS)
    assert f1(gold, stacked) == pytest.approx(f1(gold, nested_pred(gold, prob, FOLDS)), abs=0.05)


def test_what_carries_no_news_gives_the_share_of_positives(gold):
    same = np.full((1, N, 3), 0.5)
    assert fit_stack(gold, same).predict_proba(same[:, :2]) == pytest.approx(
        np.tile(gold.mean(axis=0), (2, 1)), abs=1e-3
    )


def test_labels_of_no_row_and_of_every_row_stay_so(gold):
    gold[:, 0], gold[:, 1] = 0, 1
    probs = blurred(gold, 0.9, seed=3)[None]
    prob = fit_stack(gold, probs).predict_proba(probs)
    assert (prob[:, 0] == 0).all()
    assert (prob[:, 1] == 1).all()
    pred = nested_stack(gold, probs, FOLDS)
    assert not pred[:, 0].any()
    assert pred[:, 1].all()
    assert tune_thresholds(gold, prob)[0] == 1


def test_two_folds_are_too_few(gold):
    with pytest.raises(ValueError, match="three folds"):
        nested_stack(gold, blurred(gold, 0.5, seed=1)[None], FOLDS % 2)
