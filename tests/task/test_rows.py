from dataclasses import replace

import numpy as np
import pytest

from emogen.task.rows import (
    DataError,
    Problem,
    Rows,
    align,
    at_lines,
    check_overlap,
    check_rows,
    checked,
    normalise_text,
)


def make_rows(texts, gold=None, ids=None, path="d.csv"):
    """Rows whose first stands on line 2; by default with one label, which is 0."""
    n = len(texts)
    gold = np.array(gold or [[0]] * n, dtype=np.int8).reshape(n, -1)
    return Rows(path, ids or [f"p{i}" for i in range(n)], list(texts), gold, list(range(2, n + 2)))


def test_take_keeps_ids_texts_labels_and_lines_together():
    rows = make_rows("abc", gold=[[0, 1], [1, 0], [1, 1]]).take(np.array([2, 0]))
    assert (rows.ids, rows.texts, rows.lines) == (["p2", "p0"], ["c", "a"], [4, 2])
    assert rows.gold.tolist() == [[1, 1], [0, 1]]
    assert len(rows) == 2
    unlabelled = replace(rows, gold=None).take([1])
    assert (unlabelled.ids, unlabelled.gold) == (["p0"], None)


def test_truth_is_gold_that_is_there():
    rows = make_rows("a")
    assert rows.truth is rows.gold
    with pytest.raises(AssertionError):
        _ = replace(rows, gold=None).truth


def test_checked_raises_every_error_and_no_warning():
    rows = make_rows("a")
    warning = Problem("warning", "d.csv:2", "odd")
    assert checked((rows, [warning])) is rows
    errors = [Problem("error", "d.csv:3", "wrong"), Problem("error", "d.csv", "worse")]
    with pytest.raises(DataError) as raised:
        checked((rows, [errors[0], warning, errors[1]]))
    assert raised.value.problems == errors
    assert str(raised.value) == "d.csv:3: wrong\nd.csv: worse"


@pytest.mark.parametrize(
    ("body", "level", "message"),
    [
        ([("p0", "a", 1), ("p1", "b", 1), ("p0", "c", 1)], "error", "d.csv:2, 4: the id 'p0' occurs 2 times"),
        ([("p0", "Hello", 1), ("p1", "x", 1), ("p2", " hello ", 0)], "warning", "d.csv:2, 4: the same text with different labels: 'hello'"),
        ([("p0", "Hello", 1), ("p1", "hello", 1), ("p2", "HELLO", 1)], "warning", "d.csv: 2 texts repeat an earlier one"),
        ([("p0", "a", 1), ("p1", " \t", 0), ("p2", "", 1)], "warning", "d.csv:3, 4: the text is empty"),
        ([("p0", "a", 1), ("p1", "itâ€™s", 0)], "warning", "d.csv:3: the text looks wrongly decoded (such as â€™ for ’); see `encoding`"),
        ([("p0", "a \ufffd", 1)], "warning", "d.csv:2: the text looks wrongly decoded (such as â€™ for ’); see `encoding`"),
    ],
)  # fmt: skip
def test_check_rows_finds_one_problem(body, level, message):
    ids, texts, gold = zip(*body, strict=True)
    (problem,) = check_rows(make_rows(texts, gold, list(ids)))
    assert (problem.level, str(problem)) == (level, message)


def test_check_rows_finds_several_problems():
    texts = ["hello", "other", "Hello ", "", "itâ€™s", "hello"]
    problems = check_rows(make_rows(texts, gold=[1, 1, 0, 0, 1, 1], ids=["1", "1", "3", "4", "5", "6"]))
    assert [(problem.level, problem.where) for problem in problems] == [
        ("error", "d.csv:2, 3"),
        ("warning", "d.csv:5"),
        ("warning", "d.csv:2, 4, 7"),
        ("warning", "d.csv:6"),
    ]


def test_check_rows_finds_nothing_in_good_rows():
    assert check_rows(make_rows(["a", "b", "café – ’"])) == []


def test_a_long_text_is_shortened_in_a_message():
    (problem,) = check_rows(make_rows(["a" * 70, "A" * 70], gold=[0, 1]))
    assert problem.message.endswith(f"{'a' * 57}...'")


def test_texts_shared_with_the_training_rows_are_named():
    train = make_rows(["hello", ""], path="train.csv")
    other = make_rows(["x", " HELLO", ""])
    (problem,) = check_overlap(train, other)
    assert (problem.level, str(problem)) == ("warning", "d.csv:3: 1 texts also occur in train.csv")
    assert not check_overlap(train, other.take([0, 2]))


def test_align_orders_rows_by_the_ids_of_the_gold_rows():
    gold = make_rows("abcd", path="gold.csv")
    pred = replace(gold.take([3, 1, 0, 2]), path="pred.csv")
    assert align(gold, pred).ids == gold.ids
    assert align(gold, pred).texts == gold.texts


@pytest.mark.parametrize(
    ("index", "messages"),
    [
        ([0, 1], "pred.csv: no row for 2 ids of gold.csv: p2, p3"),
        ([0, 1, 2, 3, 0], "pred.csv: ids that occur more than once: p0"),
        ([0, 1, 1], "pred.csv: ids that occur more than once: p1\npred.csv: no row for 2 ids of gold.csv: p2, p3"),
    ],
)
def test_align_refuses_missing_and_repeated_ids(index, messages):
    gold = make_rows("abcd", path="gold.csv")
    with pytest.raises(DataError) as raised:
        align(gold, replace(gold.take(index), path="pred.csv"))
    assert str(raised.value) == messages


def test_align_refuses_unknown_ids():
    gold = make_rows("abcd", path="gold.csv")
    with pytest.raises(DataError, match=r"^gold\.csv: 1 ids are not in gold\.csv: p3$"):
        align(gold.take([0, 1, 2]), gold)


def test_texts_are_the_same_in_any_case_and_spacing():
    assert normalise_text("  Große \n TEXTE ") == normalise_text("GROSSE texte") == "grosse texte"
    assert normalise_text("a b") != normalise_text("ab")


def test_a_message_names_five_lines_and_counts_the_others():
    assert at_lines("f", [3]) == "f:3"
    assert at_lines("f", [1, 2, 3, 4, 5]) == "f:1, 2, 3, 4, 5"
    assert at_lines("f", range(1, 1007)) == "f:1, 2, 3, 4, 5 and 1,001 more"
