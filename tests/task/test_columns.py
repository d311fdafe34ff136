import json

import numpy as np
import pytest

from emogen.task.columns import rows_from_records
from emogen.task.labels import Label, LabelSet
from emogen.task.rows import DataError, checked

MOODS = LabelSet(name="moods", labels=(Label(name="joy"), Label(name="Anger"), Label(name="surprise")))


def read(*records, label_set=MOODS, columns=None, **options):
    """The records of a file d.csv, whose header is on line 1."""
    columns = columns or list(records[0])
    return rows_from_records("d.csv", columns, enumerate(records, start=2), label_set, [], **options)


def errors_in(result):
    return [str(problem) for problem in result[1] if problem.level == "error"]


def record(text="hello", joy="0", anger="0", surprise="0", **others):
    return {"id": "1", "text": text, "joy": joy, "anger": anger, "surprise": surprise} | others


def test_roles_are_found_by_the_usual_names_in_any_case():
    rows = checked(read({"Tweet": "x", "TWEET_ID": " 7 ", "JOY": "1", "anger": 0, "Surprise": 1.0}))
    assert (rows.ids, rows.texts, rows.lines) == (["7"], ["x"], [2])
    assert (rows.id_column, rows.text_column) == ("TWEET_ID", "Tweet")
    assert rows.gold.tolist() == [[1, 0, 1]]
    assert rows.gold.dtype == np.int8


def test_the_first_usual_name_wins():
    assert checked(read({"comment": "b", "text": "a"})).texts == ["a"]


def test_without_ids_the_line_is_the_id():
    rows = checked(read({"text": "a"}, {"text": "b"}))
    assert (rows.ids, rows.id_column, rows.gold) == (["2", "3"], "ID", None)


def test_given_columns_replace_detection():
    rows = checked(read({"text": "a", "id": "1", "title": "b", "key": "k"}, text_column="title", id_column="key"))
    assert (rows.ids, rows.texts) == (["k"], ["b"])


def test_a_text_is_a_string_and_null_is_an_empty_one():
    assert checked(read({"text": None}, {"text": "7"})).texts == ["", "7"]
    result = read({"text": 7}, {"id": 1}, {"text": ["so", "happy"]}, {"text": float("nan")}, columns=["text"])
    assert errors_in(result) == [
        "d.csv:2, 4, 5: the text is no string: 7, a list, nan",
        "d.csv:3: no text (text)",
    ]


def test_a_wrong_column_name_lists_the_columns():
    (message,) = errors_in(read({"Tweet": "x", "ID": 1}, text_column="tweet"))
    assert message == "d.csv: text_column is 'tweet', but the columns are: Tweet, ID; did you mean 'Tweet'?"
    (message,) = errors_in(read({"Tweet": "x", "ID": 1}, id_column="number"))
    assert message == "d.csv: id_column is 'number', but the columns are: Tweet, ID"


def test_a_file_without_a_text_column_needs_one_unless_it_holds_predictions():
    result = read({"stuff": "x", "joy": 1, "anger": 0, "surprise": 0})
    assert "d.csv:1: no text column; expected one of text, tweet, post" in errors_in(result)[0]
    assert "found: stuff, joy, anger, surprise; name the column with text_column" in errors_in(result)[0]
    assert len(result[0]) == 0
    predictions = read({"id": "1", "joy": 1, "anger": 0, "surprise": 0}, need_text=False)
    assert checked(predictions).gold.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(("value", "gold"), [("1", 1), ("1.0", 1), ("True", 1), (True, 1), ("0", 0), ("0.0", 0), (" false ", 0), (0, 0)])  # fmt: skip
def test_a_label_is_0_or_1_in_several_spellings(value, gold):
    assert checked(read(record(joy=value))).gold.tolist() == [[gold, 0, 0]]


@pytest.mark.parametrize(("value", "shown"), [("2", "2"), ("yes", "yes"), ("-0.5", "-0.5"), ("None", "none"), ("", "")])
def test_any_other_label_value_is_an_error(value, shown):
    (message,) = errors_in(read(record(joy=value)))
    assert message == f"d.csv:2: label 'joy' is {shown!r}; expected 0 or 1"


@pytest.mark.parametrize("form", ["columns", "object", "text"])
def test_soft_labels_are_probabilities(form):
    """A teacher's probabilities: in label columns, or as `predict --jsonl` writes them."""
    values = [{"joy": 0.75, "anger": "0.25", "surprise": 1}, {"joy": 0, "anger": 0.5, "surprise": 1e-06}]
    if form == "columns":
        records, options = [record(**row) for row in values], {}
    else:
        cells = values if form == "object" else [json.dumps(row) for row in values]
        records = [{"id": "1", "text": "x", "labels": ["joy"], "prob": cell} for cell in cells]
        options = {"labels_column": "prob"}
    rows = checked(read(*records, soft_labels=True, **options))
    np.testing.assert_allclose(rows.prob, [[0.75, 0.25, 1], [0, 0.5, 1e-6]])
    assert rows.gold.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert (rows.prob.dtype, rows.gold.dtype) == (np.float32, np.int8)
    assert rows.take([1]).targets.tolist() == rows.prob[[1]].tolist()

    (message,) = errors_in(read(*records, **options))
    assert "label 'joy' is '0.75', label 'Anger' is '0.25'" in message
    assert message.endswith("; expected 0 or 1 (probabilities to train on need soft_labels: true)")


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "inf", "many"])
def test_a_soft_label_outside_0_to_1_is_an_error(value):
    expected = f"label 'joy' is {value!r}; expected a probability from 0 to 1"
    (message,) = errors_in(read(record(joy=value), soft_labels=True))
    assert message == f"d.csv:2: {expected}"
    (message,) = errors_in(
        read({"id": "1", "text": "x", "labels": {"joy": value, "anger": 0, "surprise": 0}}, soft_labels=True)
    )
    assert message == f"d.csv:2: {expected}"


def test_one_mistake_in_many_rows_is_reported_once():
    (message,) = errors_in(read(*[record(joy="2")] * 40))
    assert message == "d.csv:2, 3, 4, 5, 6 and 35 more: label 'joy' is '2'; expected 0 or 1"


@pytest.mark.parametrize("value", ["NONE", "", "nan", None])
def test_test_files_with_no_value_for_any_label_have_no_gold(value):
    unlabelled = record(joy=value, anger=value, surprise=value)
    assert checked(read(unlabelled)).gold is None
    with pytest.raises(DataError, match="no row has labels"):
        checked(read(unlabelled, need_labels=True))


def test_labels_in_some_rows_only_are_an_error():
    result = read(record(), record(joy="NONE", anger="NONE", surprise="NONE"), record())
    assert errors_in(result) == [
        "d.csv:3: no labels here, though other rows have them; write 0 for a text without labels"
    ]


def test_a_missing_label_column_is_an_error_that_suggests_a_misspelt_one():
    result = read({"text": "x", "joy": 1, "anger": 0, "suprise": 0})
    assert errors_in(result) == ["d.csv:1: no column for the label 'surprise'; is 'suprise' misspelt?"]
    result = read({"text": "x", "joy": 1})
    assert errors_in(result) == ["d.csv:1: no column for 2 labels: 'Anger', 'surprise'"]


def test_a_file_without_label_columns_has_no_gold():
    assert checked(read({"text": "x"})).gold is None
    messages = errors_in(read({"text": "x"}, need_labels=True))
    assert messages[0].startswith("d.csv:1: no label columns; expected joy, Anger, surprise, or one column 'labels'")


def test_the_text_column_is_no_label_column():
    label_set = LabelSet(name="x", labels=(Label(name="text"), Label(name="image")))
    result = read({"text": "1", "image": "0"}, label_set=label_set)
    assert errors_in(result) == ["d.csv:1: no column for the label 'text'"]


def test_a_file_without_rows_is_an_error_unless_it_may_be_empty():
    assert errors_in(read(columns=["text"])) == ["d.csv: no rows below the header"]
    assert len(checked(read(columns=["text"], may_be_empty=True))) == 0


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (["surprise", "joy"], ("joy", "surprise")),
        ([], ()),
        ("anger", ("Anger",)),
        ("Surprise, JOY", ("joy", "surprise")),
        ("joy;anger;", ("joy", "Anger")),
        ('["joy"]', ("joy",)),
        ("[]", ()),
        ("none", ()),
        ("['joy', 'anger']", ("joy", "Anger")),
        ("['joy' 'anger']", ("joy", "Anger")),
        ("joy|anger", ("joy", "Anger")),
        ("{'joy': 1, 'Anger': 0, 'surprise': 1}", ("joy", "surprise")),
        ({"joy": True, "anger": 0, "surprise": "1"}, ("joy", "surprise")),
        ([1, 0, 1], ("joy", "surprise")),
        ("[1. 0. 1.]", ("joy", "surprise")),
        ("[True, False, True]", ("joy", "surprise")),
    ],
)
@pytest.mark.parametrize("column", ["labels", "Emotions"])
def test_a_column_of_names(column, value, names):
    assert checked(read({"text": "x", column: value})).gold.tolist() == [list(MOODS.vector(names))]


@pytest.mark.parametrize("value", [None, "", "nan", float("nan")])
def test_a_column_of_names_without_a_value_is_unlabelled(value):
    assert checked(read({"text": "x", "labels": value})).gold is None
    (message,) = errors_in(read({"text": "x", "labels": value}, {"text": "y", "labels": ["joy"]}))
    assert message.startswith("d.csv:2: no labels here, though other rows have them; write 'none' or []")


def test_label_columns_take_precedence_over_a_column_of_names():
    assert checked(read(record(joy="1", labels="anger"))).gold.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("joyy", "d.csv:2: not a label of 'moods': 'joyy' (did you mean 'joy'?)"),
        (["calm"], "d.csv:2: not a label of 'moods': 'calm'"),
        ('["joy"', "d.csv:2: labels that are no list of names: '[\"joy\"'"),
        (["joy", "none"], "d.csv:2: 'none' beside labels: ['joy', 'none']"),
        ({"joy": 1}, "d.csv:2: an object without a value for 'Anger', 'surprise'"),
        ({"joy": 1, "Anger": 2, "surprise": 0}, "d.csv:2: label 'Anger' is '2'; expected 0 or 1"),
        (
            17,
            "d.csv:2: labels as numbers, and the file does not say which labels they stand for: 17; write names, or a "
            "0/1 column for each label",
        ),
    ],
)
def test_a_wrong_value_in_a_column_of_names_is_an_error(value, message):
    assert errors_in(read({"text": "x", "labels": value})) == [message]


@pytest.mark.parametrize(
    "names", [["(other)", "A=B"], ["{x}", "(other)"], ["A=B", "pop|rock"], ["pop|rock"], ["(other)"]]
)
def test_the_cell_that_emogen_writes_is_read_back(names):
    odd = LabelSet(name="odd", labels=tuple(Label(name=name) for name in ("{x}", "(other)", "A=B", "pop|rock")))
    rows, problems = read({"id": "1", "text": "x", "labels": odd.cell(odd.vector(names))}, label_set=odd)
    assert not problems
    assert odd.names_of(rows.truth[0].tolist()) == odd.sort(names)
