"""Metrics against hand-computed values and scikit-learn, thresholds, calibration and intervals."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from emogen.errors import ModelError
from emogen.evaluation.metrics import (
    SHRINK_POSITIVES,
    apply_thresholds,
    bootstrap,
    calibration,
    check_prob,
    confusions,
    cooccurrence,
    discordant,
    interval,
    interval_of,
    intervals,
    nested_pred,
    nested_thresholds,
    row_log_loss,
    score,
    tune_thresholds,
)

NAMES = ["a", "b", "c"]
GOLD = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=np.int8)
PRED = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]], dtype=np.int8)
# gold and pred, two [n, L] matrices at once. L = 1 and empty rows and columns are frequent.
PAIRS = hnp.arrays(
    np.int8, st.tuples(st.just(2), st.integers(1, 12), st.integers(1, 6)), elements=st.sampled_from([0, 0, 1])
)


def names_for(matrix: np.ndarray) -> list[str]:
    return [f"label{k}" for k in range(matrix.shape[1])]


def test_thresholds_come_from_the_points_of_scikit_learns_curve():
    rng = np.random.default_rng(0)
    for n in range(2, 60):
        gold = (rng.random((n, 1)) < 0.3).astype(np.int8)
        gold[0] = 1
        prob = np.round(rng.random((n, 1)), 1)  # many ties
        precision, recall, candidates = sk.precision_recall_curve(gold[:, 0], prob[:, 0])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(f1[:-1].argmax())
        tuned = (candidates[best] + (candidates[best - 1] if best else 0.0)) / 2
        positives = int(gold.sum())
        expected = (positives * tuned + SHRINK_POSITIVES * f1[best] / 2) / (positives + SHRINK_POSITIVES)
        assert tune_thresholds(gold, prob) == pytest.approx([expected])


def test_score_by_hand():
    # a: tp 1, fp 1, fn 1 -> P R F1 = 1/2.   b: tp 2 -> 1.   c: fp 1, no positives -> F1 0, and it counts.
    # macro: (1/2 + 1 + 0) / 3 = 1/2 for P, R and F1; micro: tp 3, fp 2, fn 1 -> 6 / (6 + 2 + 1) = 2/3
    # Jaccard: 1/1, 1/3, 1 (both empty), 1/2; exact: rows 1 and 3; Hamming: 3 of 12 cells differ
    result = score(GOLD, PRED, NAMES)
    assert result == {
        "n": 4,
        "f1_macro": pytest.approx(1 / 2),
        "f1_micro": pytest.approx(2 / 3),
        "precision_macro": pytest.approx(1 / 2),
        "recall_macro": pytest.approx(1 / 2),
        "jaccard_samples": pytest.approx((1 + 1 / 3 + 1 + 1 / 2) / 4),
        "exact_match": 0.5,
        "hamming_loss": 0.25,
        "per_label": {
            "a": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2, "predicted": 2},
            "b": {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2, "predicted": 2},
            "c": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0, "predicted": 1},
        },
        "no_positives": ["c"],
    }
    assert json.loads(json.dumps(result)) == result


@settings(deadline=None)  # a busy machine is not an error
@given(PAIRS)
def test_score_equals_scikit_learn(pair):
    gold, pred = pair
    n_labels = gold.shape[1]
    result = score(gold, pred, names_for(gold))
    # Label by label, as binary problems: scikit-learn's multi-label macro average is the mean of these.
    columns = [(gold[:, k], pred[:, k]) for k in range(n_labels)]
    for key, metric in (("f1", sk.f1_score), ("precision", sk.precision_score), ("recall", sk.recall_score)):
        expected = [metric(*column, zero_division=0) for column in columns]
        assert [label[key] for label in result["per_label"].values()] == pytest.approx(expected)
        assert result[f"{key}_macro"] == pytest.approx(np.mean(expected))
        if n_labels > 1:
            assert result[f"{key}_macro"] == pytest.approx(metric(gold, pred, average="macro", zero_division=0))
    assert result["f1_micro"] == pytest.approx(sk.f1_score(gold.ravel(), pred.ravel(), zero_division=0))
    assert result["hamming_loss"] == pytest.approx(sk.hamming_loss(gold.ravel(), pred.ravel()))
    if n_labels > 1:
        assert result["exact_match"] == pytest.approx(sk.accuracy_score(gold, pred))


@settings(deadline=None)
@given(PAIRS)
def test_jaccard_of_two_empty_sets_is_1_as_in_semeval(pair):
    gold, pred = pair
    rows = [({*np.flatnonzero(g)}, {*np.flatnonzero(p)}) for g, p in zip(gold, pred, strict=True)]
    expected = np.mean([len(g & p) / len(g | p) if g | p else 1.0 for g, p in rows])
    assert score(gold, pred, names_for(gold))["jaccard_samples"] == pytest.approx(expected)


@settings(deadline=None)
@given(PAIRS, st.randoms())
def test_the_order_of_rows_does_not_matter(pair, random):
    gold, pred = pair
    order = random.sample(range(len(gold)), len(gold))
    before, after = (score(g, p, names_for(gold)) for g, p in ((gold, pred), (gold[order], pred[order])))
    assert after.pop("jaccard_samples") == pytest.approx(before.pop("jaccard_samples"))  # a sum in another order
    assert after == before


def test_a_single_label_is_scored_on_its_positives():
    # scikit-learn takes one column for a binary problem and would report class 0 under the name of the label.
    result = score(np.array([[0], [0], [0], [1]]), np.array([[0], [0], [1], [1]]), ["spam"])
    assert result["per_label"]["spam"] == {
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "support": 1,
        "predicted": 2,
    }
    assert result["f1_macro"] == result["f1_micro"] == pytest.approx(2 / 3)
    assert result["jaccard_samples"] == 0.75


def test_perfect_predictions():
    result = score(GOLD[:, :2], GOLD[:, :2], NAMES[:2])
    ones = ("f1_macro", "f1_micro", "precision_macro", "recall_macro", "jaccard_samples", "exact_match")
    assert [result[key] for key in ones] == [1.0] * len(ones)
    assert result["hamming_loss"] == 0.0
    assert all(label[key] == 1.0 for label in result["per_label"].values() for key in ("precision", "recall", "f1"))
    assert result["no_positives"] == []


def test_predictions_without_labels():
    result = score(GOLD, np.zeros_like(GOLD), NAMES)
    assert [result[key] for key in ("f1_macro", "f1_micro", "precision_macro", "recall_macro")] == [0.0] * 4
    assert result["jaccard_samples"] == result["exact_match"] == 0.25  # the row without gold labels
    assert result["hamming_loss"] == pytest.approx(4 / 12)
    assert all(label["predicted"] == 0 for label in result["per_label"].values())


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32])
def test_any_dtype_is_scored_if_its_values_are_0_and_1(dtype):
    assert score(GOLD.astype(dtype), PRED.astype(dtype), NAMES) == score(GOLD, PRED, NAMES)


@pytest.mark.parametrize(
    ("gold", "pred", "message"),
    [
        (GOLD, PRED[:3], "gold has 4 rows and pred has 3"),
        (GOLD, PRED[:, :2], "pred has 2 columns for 3 label names"),
        (GOLD[:, :2], PRED[:, :2], "gold has 2 columns for 3 label names"),
        (GOLD[0], PRED[0], r"gold must be 2-D, \[n, L\], not of shape \(3,\)"),
        (GOLD[:0], PRED[:0], "gold is empty"),
        (GOLD * 2, PRED, "gold may hold only 0 and 1"),
        (GOLD, PRED - 1, "pred may hold only 0 and 1"),
        (GOLD, np.where(PRED, 0.5, np.nan), "pred may hold only 0 and 1"),
    ],
)
def test_bad_matrices_are_refused(gold, pred, message):
    with pytest.raises(ValueError, match=message):
        score(gold, pred, NAMES)


# ---------------------------------------------------------------------------------------------- thresholds


def test_thresholds_are_tuned_for_f1_and_shrunk_if_there_are_few_positives():
    # Positives at 0.9, 0.8 and 0.6, a negative at 0.7. Above 0.65: 2 of 3 correct, F1 .667. Above 0.5: 3 of 4, F1 .857.
    gold = np.array([[1], [1], [0], [1], [0], [0]])
    prob = np.array([[0.9], [0.8], [0.7], [0.6], [0.4], [0.1]])
    best, f1, k = 0.5, 6 / 7, SHRINK_POSITIVES  # halfway between 0.6 and 0.4
    assert tune_thresholds(gold, prob) == pytest.approx((3 * best + k * f1 / 2) / (3 + k))
    many = 1000
    assert tune_thresholds(np.tile(gold, (many, 1)), np.tile(prob, (many, 1))) == pytest.approx(best, abs=0.002)


def test_a_label_without_positives_is_never_predicted():
    gold, prob = np.array([[0, 1], [0, 0]]), np.array([[1.0, 0.6], [0.3, 0.1]])
    thresholds = tune_thresholds(gold, prob)
    assert thresholds[0] == 1.0
    assert apply_thresholds(prob, thresholds).tolist() == [[0, 1], [0, 0]]


def test_micro_f1_has_one_threshold_for_all_labels():
    # The decisions of both labels in one order: 1 at 0.9, 0 at 0.8, 1 at 0.6, 1 at 0.5, 0 at 0.2; the third label has no
    # positive. Above 0.35: 3 of 4 correct, F1 .857. Macro-F1 would have 0.7 for the first and 0.35 for the second.
    gold = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    prob = np.array([[0.9, 0.6, 0.1], [0.8, 0.5, 0.3], [0.2, 0.1, 0.2]])
    gold, prob = np.tile(gold, (1000, 1)), np.tile(prob, (1000, 1))
    assert tune_thresholds(gold, prob, "f1_micro") == pytest.approx([0.4, 0.4, 1.0], abs=0.003)
    assert tune_thresholds(gold, prob) == pytest.approx([0.85, 0.3, 1.0], abs=0.02)
    assert tune_thresholds(0 * gold, prob, "f1_micro").tolist() == [1, 1, 1]


def test_nested_thresholds_for_micro_f1_raise_it():
    rng = np.random.default_rng(1)
    prob = rng.beta([1, 1, 0.3, 0.2], [1, 1, 1.5, 2], (3000, 4))
    gold = (rng.random(prob.shape) < prob).astype(int)  # calibrated: of the rows with 0.2, a fifth are positive
    folds, names = np.arange(3000) % 5, list("abcd")
    by = {goal: score(gold, nested_pred(gold, prob, folds, goal), names) for goal in ("f1_macro", "f1_micro")}
    for goal, other in (("f1_macro", "f1_micro"), ("f1_micro", "f1_macro")):
        assert by[goal][goal] > by[other][goal]


def test_nested_thresholds_never_see_their_row():
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 2, (60, 3))
    prob = np.clip(gold * 0.3 + rng.random((60, 3)) * 0.7, 0, 1)
    folds = np.arange(60) % 4
    pred = nested_pred(gold, prob, folds)
    for fold in range(4):
        held = folds == fold
        expected = apply_thresholds(prob[held], tune_thresholds(gold[~held], prob[~held]))
        assert (pred[held] == expected).all()
        other = gold.copy()
        other[held] = 1 - other[held]  # the gold labels of a fold do not change the predictions for it
        assert (nested_pred(other, prob, folds)[held] == pred[held]).all()
    with pytest.raises(ValueError, match="two folds"):
        nested_pred(gold, prob, np.zeros(60, dtype=int))


def test_nested_thresholds_gain_nothing_from_noise():
    """Thresholds that are tuned and scored on the same rows beat chance on random probabilities; nested ones may not."""
    rng = np.random.default_rng(1)
    gold = (rng.random((2000, 5)) < 0.05).astype(int)
    prob = rng.random((2000, 5))
    pred = nested_pred(gold, prob, np.arange(2000) % 5)
    assert score(gold, pred, list("abcde"))["f1_macro"] < 2 * 0.05 / 1.05 + 0.01  # the F1 of predicting every label


# ---------------------------------------------------------------------------------------------- calibration


def test_calibration_by_hand():
    gold = np.array([[1], [0], [1], [1]])
    prob = np.array([[0.95], [0.25], [0.25], [1.0]])
    found = calibration(gold, prob, ["x"])
    assert found["brier"] == pytest.approx((0.05**2 + 0.25**2 + 0.75**2) / 4)
    bins = found["per_label"]["x"]["bins"]
    assert bins == [{"n": 2, "prob": 0.25, "positive": 0.5}, {"n": 2, "prob": pytest.approx(0.975), "positive": 1.0}]
    assert found["ece"] == pytest.approx(0.5 * 0.25 + 0.5 * 0.025)


# ---------------------------------------------------------------------------------------------- intervals


def test_the_bootstrap_is_paired_and_its_interval_contains_the_metric():
    rng = np.random.default_rng(2)
    gold = rng.integers(0, 2, (300, 3))
    good, bad = (
        np.where(rng.random((300, 3)) < 0.2, 1 - gold, gold),
        np.where(rng.random((300, 3)) < 0.4, 1 - gold, gold),
    )
    first, again, worse = bootstrap(gold, [good, good, bad], list("abc"))
    assert (first["f1_macro"] == again["f1_macro"]).all()
    for pred, found in ((good, first), (bad, worse)):
        metrics = score(gold, pred, list("abc"))
        low, high = interval(found["f1_macro"])
        assert low < metrics["f1_macro"] < high
        assert high - low < 0.12
        assert found["f1_macro"].mean() == pytest.approx(metrics["f1_macro"], abs=0.01)
        assert found["f1_micro"].mean() == pytest.approx(metrics["f1_micro"], abs=0.01)
        assert found["f1/b"].mean() == pytest.approx(metrics["per_label"]["b"]["f1"], abs=0.01)
    assert interval(first["f1_macro"] - worse["f1_macro"])[0] > 0


def test_the_bootstrap_of_a_perfect_system_and_of_a_single_row():
    gold = np.array([[1, 0], [1, 1], [0, 1]] * 30)
    (perfect,) = bootstrap(gold, [gold], ["a", "b"])
    assert (perfect["f1_macro"] == 1).all()
    (single,) = bootstrap(np.array([[1, 1]]), [np.array([[1, 0]])], ["a", "b"])
    assert (single["f1_macro"] == 0.5).all()


def test_an_interval_is_given_only_where_it_can_be_believed():
    values = np.linspace(0.2, 0.4, 2000)
    ends = (pytest.approx(0.205), pytest.approx(0.395))
    assert interval_of(values, 30) == ends
    assert interval_of(values, 29) is None
    assert interval_of(values, 30, n_positives=5) == ends
    assert interval_of(values, 30, n_positives=4) is None
    assert interval_of(np.ones(2000), 3000) is None  # all resamples are equal


def test_intervals_of_a_system_by_the_support_of_each_label():
    gold = np.zeros((60, 3), dtype=np.int8)
    gold[:20, 0], gold[:4, 1] = 1, 1
    pred = gold.copy()
    pred[15:25] = 1
    (resampled,) = bootstrap(gold, [pred], NAMES)
    found = intervals(resampled, score(gold, pred, NAMES))
    assert [key for key, ends in found.items() if ends] == ["f1_macro", "f1_micro", "f1/a"]
    few = intervals(bootstrap(gold[:29], [pred[:29]], NAMES)[0], score(gold[:29], pred[:29], NAMES))
    assert set(few.values()) == {None}


def test_a_resample_without_positives_of_a_label_scores_0_as_such_rows_do():
    # One positive of 3 rows: a resample lacks it with a probability of (2/3)^3 = 8/27, and its F1 is 0 then, else 1.
    gold = np.array([[1], [0], [0]])
    (resampled,) = bootstrap(gold, [gold], ["a"], n_resamples=20000)
    assert set(resampled["f1_macro"]) == {0.0, 1.0}
    assert (resampled["f1_macro"] == 0).mean() == pytest.approx(8 / 27, abs=0.01)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.5])
def test_probabilities_that_are_no_numbers_are_an_error_and_never_a_figure(value):
    gold, prob = np.array([[1, 0], [0, 1], [1, 1]]), np.full((3, 2), 0.5)
    check_prob(prob)
    check_prob(prob + 0.5 + 1e-6)  # a sum that is rounded
    prob[1, 1] = value
    for use in (
        lambda: check_prob(prob),
        lambda: tune_thresholds(gold, prob),
        lambda: apply_thresholds(prob, [0.5, 0.5]),
        lambda: calibration(gold, prob, ["a", "b"]),
        lambda: row_log_loss(gold, prob),
    ):
        with pytest.raises(ModelError, match=r"1 of 3 rows have probabilities .* the first is row 2, with"):
            use()


def test_the_calibration_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        calibration(np.zeros((0, 1)), np.zeros((0, 1)), ["a"])


def test_confusions_cooccurrence_and_discordant_rows_by_hand():
    # Row 2 misses a and has the false positive c; row 4 has the false positive a and misses nothing.
    assert confusions(GOLD, PRED).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert confusions(GOLD, GOLD).sum() == 0
    # Misses a and b, false positive c: two cells.
    assert confusions(np.array([[1, 1, 0]]), np.array([[0, 0, 1]])).tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert cooccurrence(GOLD).tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert cooccurrence(PRED).tolist() == [[2, 1, 0], [1, 2, 1], [0, 1, 1]]
    assert cooccurrence(np.ones((300, 1), dtype=np.int8)).tolist() == [[300]]  # more than int8 holds
    # GOLD has all four rows right, PRED the rows 1 and 3, zeros row 3.
    assert discordant(GOLD, [GOLD, PRED, np.zeros_like(GOLD)]).tolist() == [[0, 2, 3], [0, 0, 1], [0, 0, 0]]


def test_row_log_loss_by_hand():
    gold, prob = np.array([[1, 0], [1, 1]]), np.array([[0.5, 0.2], [1.0, 0.0]])
    assert row_log_loss(gold, prob)[0] == pytest.approx(-np.log(0.5) - np.log(0.8))
    assert row_log_loss(gold, prob)[1] == pytest.approx(-np.log(1e-6), rel=1e-5)  # certain and wrong, but finite
    assert np.argsort(row_log_loss(gold, prob)).tolist() == [0, 1]


def test_nested_thresholds_of_a_fold_are_tuned_on_the_others():
    rng = np.random.default_rng(0)
    gold = (rng.random((60, 2)) < 0.4).astype(np.int8)
    prob, folds = rng.random((60, 2)) * 0.5 + gold * 0.3, np.arange(60) % 3
    thresholds = nested_thresholds(gold, prob, folds)
    for fold in range(3):
        expected = tune_thresholds(gold[folds != fold], prob[folds != fold])
        assert (thresholds[folds == fold] == expected).all()
    assert (nested_pred(gold, prob, folds) == (prob > thresholds)).all()
    with pytest.raises(ValueError, match="two folds or more"):
        nested_thresholds(gold, prob, np.zeros(60, dtype=int))
