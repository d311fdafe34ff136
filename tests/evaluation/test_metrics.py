import io
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console
from sklearn import metrics as sk

from emogen.evaluation.metrics import (
    SHRINK_POSITIVES,
    apply_thresholds,
    bootstrap,
    calibration,
    confusions,
    cooccurrence,
    discordant,
    interval,
    nested_pred,
    nested_thresholds,
    row_log_loss,
    score,
    tune_thresholds,
)
from emogen.evaluation.tables import footnote, table
from emogen.task.labels import LabelSet

NAMES = ["a", "b", "c"]
GOLD = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=np.int8)
PRED = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]], dtype=np.int8)
# gold and pred, two [n, L] matrices at once: L = 1 and empty rows and columns come up often
PAIRS = hnp.arrays(
    np.int8, st.tuples(st.just(2), st.integers(1, 12), st.integers(1, 6)), elements=st.sampled_from([0, 0, 1])
)


def names_for(matrix: np.ndarray) -> list[str]:
    return [f"label{k}" for k in range(matrix.shape[1])]


def test_by_hand():
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


@given(PAIRS)
def test_equals_scikit_learn(pair):
    gold, pred = pair
    n_labels = gold.shape[1]
    result = score(gold, pred, names_for(gold))
    # label by label, as binary problems: what scikit-learn's multi-label macro average is the mean of
    columns = [(gold[:, k], pred[:, k]) for k in range(n_labels)]
    for key, of in (("f1", sk.f1_score), ("precision", sk.precision_score), ("recall", sk.recall_score)):
        expected = [of(*column, zero_division=0) for column in columns]
        assert [label[key] for label in result["per_label"].values()] == pytest.approx(expected)
        assert result[f"{key}_macro"] == pytest.approx(np.mean(expected))
        if n_labels > 1:
            assert result[f"{key}_macro"] == pytest.approx(of(gold, pred, average="macro", zero_division=0))
    assert result["f1_micro"] == pytest.approx(sk.f1_score(gold.ravel(), pred.ravel(), zero_division=0))
    assert result["hamming_loss"] == pytest.approx(sk.hamming_loss(gold.ravel(), pred.ravel()))
    if n_labels > 1:
        assert result["exact_match"] == pytest.approx(sk.accuracy_score(gold, pred))


@given(PAIRS)
def test_jaccard_follows_the_rule_of_semeval(pair):
    gold, pred = pair
    rows = [({*np.flatnonzero(g)}, {*np.flatnonzero(p)}) for g, p in zip(gold, pred, strict=True)]
    expected = np.mean([len(g & p) / len(g | p) if g | p else 1.0 for g, p in rows])
    assert score(gold, pred, names_for(gold))["jaccard_samples"] == pytest.approx(expected)


@given(PAIRS, st.randoms())
def test_the_order_of_rows_does_not_matter(pair, random):
    gold, pred = pair
    order = random.sample(range(len(gold)), len(gold))
    before, after = (score(g, p, names_for(gold)) for g, p in ((gold, pred), (gold[order], pred[order])))
    assert after.pop("jaccard_samples") == pytest.approx(before.pop("jaccard_samples"))  # a sum in another order
    assert after == before


def test_a_single_label_is_scored_on_its_positives():
    # scikit-learn alone takes one column for a binary problem, and would give class 0 the name of the label
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


def test_perfect():
    result = score(GOLD[:, :2], GOLD[:, :2], NAMES[:2])
    ones = ("f1_macro", "f1_micro", "precision_macro", "recall_macro", "jaccard_samples", "exact_match")
    assert [result[key] for key in ones] == [1.0] * len(ones)
    assert result["hamming_loss"] == 0.0
    assert all(label[key] == 1.0 for label in result["per_label"].values() for key in ("precision", "recall", "f1"))
    assert result["no_positives"] == []


def test_nothing_predicted():
    result = score(GOLD, np.zeros_like(GOLD), NAMES)
    assert [result[key] for key in ("f1_macro", "f1_micro", "precision_macro", "recall_macro")] == [0.0] * 4
    assert result["jaccard_samples"] == result["exact_match"] == 0.25  # the one row without labels
    assert result["hamming_loss"] == pytest.approx(4 / 12)
    assert all(label["predicted"] == 0 for label in result["per_label"].values())


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32])
def test_other_dtypes_that_hold_0_and_1(dtype):
    assert score(GOLD.astype(dtype), PRED.astype(dtype), NAMES) == score(GOLD, PRED, NAMES)


@pytest.mark.parametrize(
    ("gold", "pred", "said"),
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
def test_what_cannot_be_scored(gold, pred, said):
    with pytest.raises(ValueError, match=said):
        score(gold, pred, NAMES)


def shown(*args) -> list[str]:
    console = Console(width=80, file=io.StringIO())
    console.print(table(*args))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    return [line.rstrip() for line in lines]


def test_table_of_one_system():
    result = score(GOLD, PRED, NAMES)
    lines = shown(result)
    assert shown([("", result)]) == lines
    assert [line.split() for line in lines] == [
        ["label", "support", "P", "R", "F1"],
        ["a", "2", "0.500", "0.500", "0.500"],
        ["b", "2", "1.000", "1.000", "1.000"],
        ["c", "0", "0.000", "0.000", "0.000"],
        [],
        ["macro", "average", "0.500", "0.500", "0.500"],
        ["micro-F1", "0.667"],
        ["Jaccard", "(samples)", "0.708"],
        ["exact", "match", "0.500"],
        ["Hamming", "loss", "0.250"],
        ["4", "rows"],
    ]
    assert len({len(line) for line in lines[:-1] if line}) == 1  # right-aligned


def test_table_of_two_systems_shows_the_difference():
    lines = shown([("zero-shot", score(GOLD, PRED, NAMES)), ("fine-tuned", score(GOLD, GOLD, NAMES))])
    cells = [line.split() for line in lines]
    assert cells[0] == ["zero-shot", "fine-tuned"]
    assert cells[1] == ["label", "support", *["P", "R", "F1"] * 2, "ΔF1"]
    assert cells[2] == ["a", "2", *["0.500"] * 3, *["1.000"] * 3, "+0.500"]
    assert ["macro", "average", *["0.500"] * 3, *["0.667"] * 3, "+0.167"] in cells
    assert ["micro-F1", "0.667", "1.000", "+0.333"] in cells
    assert ["Hamming", "loss", "0.250", "0.000"] in cells  # not an F1: no difference


def test_no_difference_has_no_minus_sign():
    result = score(GOLD, PRED, NAMES)
    lines = shown([("one", result), ("other", result | {"f1_micro": result["f1_micro"] - 1e-6})])
    assert not any("-0.000" in line for line in lines)


@pytest.mark.parametrize("n_systems", [1, 2, 3])
@pytest.mark.parametrize("title", ["tuned", "runs/qwen14b/predictions.csv", "odd [red] one"])
def test_the_table_fits_a_terminal_and_cuts_nothing(labels: LabelSet, n_systems: int, title: str):
    rng = np.random.default_rng(0)
    gold, *preds = (rng.random((n_systems + 1, 8000, len(labels))) < 0.25).astype(np.int8)
    results = [score(gold, pred, labels.names) for pred in preds]
    lines = shown([(f"{title} {k}", result) for k, result in enumerate(results)])
    for name in labels.names:
        [cells] = [line.split() for line in lines if line.startswith(f"{name} ")]
        figures = [
            f"{result['per_label'][name][key]:.3f}" for result in results for key in ("precision", "recall", "f1")
        ]
        assert cells[1] == f"{results[0]['per_label'][name]['support']:,}"
        assert cells[2 : 2 + len(figures)] == figures
        assert len(cells) == 2 + len(figures) + (n_systems == 2)
    assert "…" not in "".join(lines)
    assert ("[red]" in "".join(lines)) == ("[red]" in title)


def test_table_refuses_systems_that_cannot_be_compared():
    result = score(GOLD, PRED, NAMES)
    for other in (score(GOLD, PRED, ["a", "b", "d"]), score(GOLD[:3], PRED[:3], NAMES), score(PRED, PRED, NAMES)):
        with pytest.raises(ValueError, match="same gold rows and labels"):
            table([("one", result), ("other", other)])
    with pytest.raises(ValueError, match="no metrics"):
        table([])


def test_footnote_only_where_it_is_needed():
    assert footnote(score(GOLD, PRED, NAMES)) == (
        "No gold positives for: c. F1 is 0.0 there, also where it is undefined, and counts in the macro average, "
        "as in scikit-learn and the competition."
    )
    assert footnote(score(GOLD[:, :2], PRED[:, :2], NAMES[:2])) is None


@pytest.mark.parametrize("module", ["emogen.evaluation.metrics", "emogen.task.parse"])
def test_scoring_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers', 'sklearn'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------- thresholds


def test_a_threshold_with_many_positives_is_the_best_one_and_with_few_is_drawn_to_half_of_the_best_f1():
    # 0.9 0.8 | 0.6 are positive, 0.7 is not: above 0.65 there are 3 of which 2 hit (F1 .667), above 0.55 4 with 3 (.857).
    gold = np.array([[1], [1], [0], [1], [0], [0]])
    prob = np.array([[0.9], [0.8], [0.7], [0.6], [0.4], [0.1]])
    best, f1, k = 0.5, 6 / 7, SHRINK_POSITIVES  # halfway between 0.6 and 0.4
    assert tune_thresholds(gold, prob) == pytest.approx((3 * best + k * f1 / 2) / (3 + k))
    many = 1000
    assert tune_thresholds(np.tile(gold, (many, 1)), np.tile(prob, (many, 1))) == pytest.approx(best, abs=0.002)


def test_a_label_without_positives_is_never_given():
    gold, prob = np.array([[0, 1], [0, 0]]), np.array([[1.0, 0.6], [0.3, 0.1]])
    thresholds = tune_thresholds(gold, prob)
    assert thresholds[0] == 1.0
    assert apply_thresholds(prob, thresholds).tolist() == [[0, 1], [0, 0]]


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
        other[held] = 1 - other[held]  # whatever the gold labels of a fold are, what it is said to be stays the same
        assert (nested_pred(other, prob, folds)[held] == pred[held]).all()
    with pytest.raises(ValueError, match="two folds"):
        nested_pred(gold, prob, np.zeros(60, dtype=int))


def test_nested_thresholds_gain_nothing_from_noise():
    """In-sample thresholds of probabilities that say nothing beat chance; nested ones may not."""
    rng = np.random.default_rng(1)
    gold = (rng.random((2000, 5)) < 0.05).astype(int)
    prob = rng.random((2000, 5))
    pred = nested_pred(gold, prob, np.arange(2000) % 5)
    assert score(gold, pred, list("abcde"))["f1_macro"] < 2 * 0.05 / 1.05 + 0.01  # what saying yes always gives


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


def test_the_bootstrap_draws_the_same_rows_for_all_systems_and_brackets_the_figure():
    rng = np.random.default_rng(2)
    gold = rng.integers(0, 2, (300, 3))
    good, bad = (
        np.where(rng.random((300, 3)) < 0.2, 1 - gold, gold),
        np.where(rng.random((300, 3)) < 0.4, 1 - gold, gold),
    )
    first, again, worse = bootstrap(gold, [good, good, bad], list("abc"))
    assert (first["f1_macro"] == again["f1_macro"]).all()
    for pred, found in ((good, first), (bad, worse)):
        figures = score(gold, pred, list("abc"))
        low, high = interval(found["f1_macro"])
        assert low < figures["f1_macro"] < high
        assert high - low < 0.12
        assert found["f1_macro"].mean() == pytest.approx(figures["f1_macro"], abs=0.01)
        assert found["f1_micro"].mean() == pytest.approx(figures["f1_micro"], abs=0.01)
        assert found["f1/b"].mean() == pytest.approx(figures["per_label"]["b"]["f1"], abs=0.01)
    assert interval(first["f1_macro"] - worse["f1_macro"])[0] > 0


def test_the_bootstrap_of_a_perfect_system_is_1_and_of_one_row_is_that_row():
    gold = np.array([[1, 0], [1, 1], [0, 1]] * 30)
    (perfect,) = bootstrap(gold, [gold], ["a", "b"])
    assert (perfect["f1_macro"] == 1).all()
    (single,) = bootstrap(np.array([[1, 1]]), [np.array([[1, 0]])], ["a", "b"])
    assert (single["f1_macro"] == 0.5).all()


def test_errors_by_hand():
    # Row 2 misses a and falsely gives c; row 4 falsely gives a and misses nothing.
    assert confusions(GOLD, PRED).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert confusions(GOLD, GOLD).sum() == 0
    # Misses a and b, gives c: two cells.
    assert confusions(np.array([[1, 1, 0]]), np.array([[0, 0, 1]])).tolist() == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert cooccurrence(GOLD).tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert cooccurrence(PRED).tolist() == [[2, 1, 0], [1, 2, 1], [0, 1, 1]]
    assert cooccurrence(np.ones((300, 1), dtype=np.int8)).tolist() == [[300]]  # more than int8 holds
    # GOLD has all four rows right, PRED the rows 1 and 3, zeros row 3.
    assert discordant(GOLD, [GOLD, PRED, np.zeros_like(GOLD)]).tolist() == [[0, 2, 3], [0, 0, 1], [0, 0, 0]]


def test_log_loss_of_a_row_by_hand():
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
