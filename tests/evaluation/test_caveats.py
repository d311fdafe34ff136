"""What constant predictions score, and the sentences about figures that cannot be believed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from emogen.evaluation.caveats import (
    calibration_caveats,
    caveats,
    constant_labels_of,
    fold_caveats,
    footnote,
    is_collapsed,
    listed,
    needs_no_model,
    prediction_caveats,
    reference_line,
    references,
    row_caveats,
    with_caveats,
)
from emogen.evaluation.metrics import calibration, evaluate, score, score_nested

NAMES = ("a", "b", "c")


def rows(*counts: int, n: int = 40) -> np.ndarray:
    """n rows with labels; label k is that of the first `counts[k]` rows."""
    return np.array([[int(i < count) for count in counts] for i in range(n)], dtype=np.int8)


def test_references_by_hand():
    # Shares of 1/2, 1/4 and 1/10. F1 of a label that every row gets: 2p / (1 + p) = 2/3, 2/5, 2/11.
    metrics = score(rows(20, 10, 4), rows(20, 10, 4), NAMES)
    everything, most_frequent = references(metrics)
    assert everything.title == "all labels to every row"
    assert everything.f1_by_label == pytest.approx({"a": 2 / 3, "b": 2 / 5, "c": 2 / 11})
    assert everything.f1_macro == pytest.approx((2 / 3 + 2 / 5 + 2 / 11) / 3)
    assert everything.f1_micro == pytest.approx(2 * 34 / (120 + 34))
    # micro-F1 of the k most frequent labels: 2 * 20 / (40 + 34) = .541, 2 * 30 / (80 + 34) = .526, 68 / 154 = .442
    assert most_frequent.title == "a to every row"
    assert most_frequent.f1_by_label == pytest.approx({"a": 2 / 3, "b": 0, "c": 0})
    assert most_frequent.f1_macro == pytest.approx(2 / 9)
    assert most_frequent.f1_micro == pytest.approx(40 / 74)
    assert reference_line(metrics) == (
        "Without a model: all labels to every row: macro-F1 0.416, micro-F1 0.442; a to every row: macro-F1 0.222, "
        "micro-F1 0.541."
    )


def test_rows_with_one_label_each_are_held_against_one_label():
    """All labels to every row is no answer where the label set says `exactly_one`."""
    gold = np.eye(3, dtype=np.int8)[[0] * 20 + [1] * 12 + [2] * 8]
    pred = np.eye(3, dtype=np.int8)[[0] * 18 + [1] * 18 + [2] * 4]
    pred[0] = 0  # its answer could not be read
    metrics = score(gold, pred, NAMES, exactly_one=True)
    (most_frequent,) = references(metrics)
    assert most_frequent.title == "a to every row"
    assert most_frequent.f1_macro == pytest.approx(2 / 3 / 3)  # p = 1/2: 2p / (1 + p), of three labels
    assert most_frequent.f1_micro == pytest.approx(1 / 2)
    assert not needs_no_model(metrics)


def test_rows_that_happen_to_have_one_label_each_are_held_against_all_labels():
    """A model that may give several labels could have given all."""
    gold = np.eye(2, dtype=np.int8)[[0] * 20 + [1] * 20]
    metrics = score(gold, gold, ["a", "b"])
    assert references(metrics)[0].title == "all labels to every row"
    assert references(metrics)[0].f1_macro == pytest.approx(2 / 3)
    assert evaluate(gold, gold, gold.astype(float), None, ["a", "b"], exactly_one=True)["exactly_one"]


def test_a_model_that_gives_no_rare_label_still_tells_rows_apart():
    """Of ten labels, two are in 90 % of the rows, and right; eight are in 1 or 2 rows each, and never given."""
    gold = np.eye(10, dtype=np.int8)[[0] * 45 + [1] * 45 + [2, 3, 4, 5, 6, 7, 8, 9, 8, 9]]
    pred = gold.copy()
    pred[90:] = np.eye(10, dtype=np.int8)[0]
    metrics = score(gold, pred, [f"l{k}" for k in range(10)], exactly_one=True)
    assert not is_collapsed(metrics)
    assert not needs_no_model(metrics)
    assert prediction_caveats(metrics) == [
        "Labels that do not tell rows apart: no row has: l2, l3, l4, l5, l6, l7, l8, l9."
    ]
    pred[:] = np.eye(10, dtype=np.int8)[0]
    assert is_collapsed(score(gold, pred, [f"l{k}" for k in range(10)], exactly_one=True))


def test_labels_that_no_row_has_do_not_hide_that_rows_are_not_told_apart():
    gold = np.hstack([np.eye(3, dtype=np.int8)[np.arange(60) % 3], np.zeros((60, 97), dtype=np.int8)])
    metrics = score(gold, np.zeros_like(gold), [f"l{k}" for k in range(100)])
    assert is_collapsed(metrics)
    assert prediction_caveats(metrics)[0].startswith("3 of 3 labels are given to every row or to none")


def test_too_few_rows_for_any_interval_say_nothing_of_intervals():
    few = row_caveats(score(rows(3, 2, 9, n=12), rows(3, 2, 9, n=12), NAMES))
    assert few[1] == "Fewer than 5 positive rows: a (3), b (2). Their F1 is a matter of chance."


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.int8, st.tuples(st.integers(1, 12), st.integers(1, 5)), elements=st.sampled_from([0, 0, 1])))
def test_references_are_what_these_predictions_score(gold):
    names = [f"label{k}" for k in range(gold.shape[1])]
    for reference in references(score(gold, gold, names)):
        given = np.array([reference.title.startswith("all") or reference.f1_by_label[name] > 0 for name in names])
        if reference.title.startswith("all") or gold.any():
            found = score(gold, np.tile(given.astype(np.int8), (len(gold), 1)), names)
            assert found["f1_macro"] == pytest.approx(reference.f1_macro)
            if reference.f1_macro:  # without any positives the most frequent label is any of them
                assert found["f1_micro"] == pytest.approx(reference.f1_micro)


def test_labels_of_every_row_or_of_none_are_named_unless_they_are_right():
    gold = rows(40, 0, 10)  # a: every row, b: none
    metrics = score(gold, rows(40, 0, 40), NAMES)
    assert constant_labels_of(metrics) == (["c"], [])
    assert not is_collapsed(metrics)
    assert caveats([("x", metrics)])[0] == "x: Labels that do not tell rows apart: every row has: c."


@pytest.mark.parametrize("always", [True, False])
def test_predictions_that_do_not_tell_rows_apart(always):
    gold = rows(20, 10, 10)
    metrics = score(gold, rows(*[40 * always] * 2, 10), NAMES)  # the third label is right
    assert is_collapsed(metrics)
    assert needs_no_model(metrics)
    having = "every row has" if always else "no row has"
    assert caveats([("", metrics)])[0] == (
        f"2 of 3 labels are given to every row or to none, so the predictions hardly tell rows apart ({having}: a, b)."
    )


def test_a_figure_that_all_labels_to_every_row_reach_needs_no_model():
    gold = rows(20, 20, 20)
    almost = np.ones_like(gold)
    almost[0] = 0  # not constant, but worse than constant: 2 * 19 / (39 + 20) = .644 < 2/3
    metrics = score(gold, almost, NAMES)
    assert not is_collapsed(metrics)
    assert needs_no_model(metrics)
    (sentence,) = caveats([("", metrics)])
    assert sentence == "Macro-F1 0.644 is not above the 0.667 of all labels to every row, which needs no model."
    good = score(gold, rows(18, 18, 18), NAMES)
    assert not needs_no_model(good)
    assert caveats([("", good)]) == []


def test_few_rows_and_few_positives_are_named():
    metrics = score(rows(2, 4, 5, n=29), rows(2, 4, 5, n=29), NAMES)
    few_rows, few_positives = caveats([("", metrics), ("again", metrics)])
    assert few_rows.startswith("29 rows: too few for an interval (30 are needed).")
    assert few_positives.startswith("Fewer than 5 positive rows: a (2), b (4). Their F1 is a matter of chance.")
    assert caveats([("", score(rows(5, 5, 5, n=30), rows(5, 5, 5, n=30), NAMES))]) == []
    assert caveats([("", score(rows(1, n=1), rows(1, n=1), "a"))])[1].startswith("1 row: too few")


def test_the_footnote_names_labels_without_positives():
    gold = rows(20, 10, 0)
    assert footnote(score(gold, gold, NAMES)) == (
        "No gold positives for: c. Their F1 is 0.0, even where it is undefined, and counts in the macro average, "
        "as in scikit-learn and the competition."
    )
    assert footnote(score(gold[:, :2], gold[:, :2], NAMES[:2])) is None


def test_a_label_whose_positives_are_in_one_fold_cannot_be_tuned():
    gold, folds = rows(20, 6, 0), np.arange(40) // 10  # the positives of b are in fold 0
    metrics = score_nested(gold, gold, folds, NAMES)
    assert metrics["untuned"] == ["b"]
    assert caveats([("", metrics)])[0].startswith(
        "No threshold could be tuned for b: all positive rows are in one fold"
    )
    assert "untuned" not in score_nested(gold[:, ::2], gold[:, ::2], folds, "ac")


def test_folds_that_do_not_tell_rows_apart_are_named():
    metrics = {"folds": {"answer": {"f1_macro": [0.5, 0.1, 0.5]}}, "collapsed_folds": {"answer": [1]}}
    assert fold_caveats(metrics, {"answer": "answers"}) == [
        "answers: in 1 of 3 folds (1), most labels are given to every row or to none."
    ]
    assert fold_caveats({"folds": {}}, {}) == []  # written by an older emogen
    (absent,) = fold_caveats({"folds": {}, "absent_in_folds": ["a", "b"]}, {})
    assert absent.startswith("Some folds have no positive row of a, b. Their F1 counts as 0 there")


def test_a_calibration_error_of_few_rows_or_of_one_bin_says_little():
    gold = rows(20, 10)
    prob = np.column_stack([np.linspace(0, 1, 40), np.full(40, 0.25)])  # b: 1/4 of the rows, so the ECE is 0
    assert calibration_caveats(calibration(gold, prob, "ab"), 40) == [
        "All probabilities are in one bin: b. A small ECE there means that their mean is close to the share of "
        "positives, not that they tell rows apart."
    ]
    assert calibration_caveats(calibration(gold[:29], prob[:29], "ab"), 29)[0].startswith("29 rows are too few")
    assert calibration_caveats(calibration(gold[:, :1], prob[:, :1], "a"), 40) == []


def test_many_names_are_counted():
    assert listed([f"l{k}" for k in range(12)]).endswith("l10, l11")
    assert listed([f"l{k}" for k in range(28)]).endswith("l11 and 16 more")


def test_metrics_for_a_file_have_their_references_and_caveats():
    metrics = score(rows(20, 10), rows(0, 0), "ab")
    found = with_caveats(metrics)
    assert {key: found[key] for key in metrics} == metrics
    assert [reference["title"] for reference in found["references"]] == ["all labels to every row", "a to every row"]
    assert found["caveats"][0].startswith("2 of 2 labels")
