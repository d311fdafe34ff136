import pytest

from emogen.errors import InputError
from emogen.task.answer import answer_text
from emogen.task.labels import Label, LabelSet, load_label_set

SEMEVAL = [
    "anger",
    "anticipation",
    "disgust",
    "fear",
    "joy",
    "love",
    "optimism",
    "pessimism",
    "sadness",
    "surprise",
    "trust",
]


def test_shipped_set_has_the_columns_of_the_task_in_order(labels):
    assert list(labels.names) == SEMEVAL
    assert all(label.definition and label.aliases for label in labels.labels)


def test_vector_and_names_are_inverse(labels):
    assert labels.vector(["joy", "anger"]) == (1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    assert labels.names_of(labels.vector(["joy", "anger"])) == ("anger", "joy")
    assert labels.names_of((0,) * 11) == ()


def test_unknown_name_and_wrong_length_are_refused(labels):
    with pytest.raises(ValueError, match="rage"):
        labels.vector(["rage"])
    with pytest.raises(ValueError, match="3 values for 11 labels"):
        labels.names_of((1, 0, 1))


def test_any_other_set_is_a_file_away(tmp_path):
    path = tmp_path / "de.yaml"
    path.write_text("name: de\nempty: keine\nlabels:\n  - name: Ärger\n  - name: Freude\n    aliases: [froh]\n")
    assert load_label_set(path).names == ("Ärger", "Freude")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nlabels: []\n", "labels"),
        ("name: x\nlabels:\n  - nam: joy\n", "labels.0.nam"),
        ("name: x\nlabels:\n  - {name: joy}\n  - {name: Joy}\n", "stands for both"),
        ("name: x\nempty: joy\nlabels:\n  - {name: joy}\n", "stands for both"),
        ("name: x\nlabels:\n  - {name: 'joy, love'}\n", "labels.0.name"),
        ("name: [x\n", "not valid YAML"),
    ],
)
def test_broken_file_names_itself_and_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        load_label_set(path)
    assert "broken.yaml" in str(error.value)


def test_missing_set_lists_the_shipped_ones():
    with pytest.raises(InputError, match="semeval2018"):
        load_label_set("semeval2019")


def test_names_with_commas_never_pass():
    with pytest.raises(ValueError, match="pattern"):
        LabelSet.model_validate({"name": "x", "labels": [{"name": "a,b"}]})


def test_the_order_of_answers_leaves_the_canonical_one_alone():
    labels = LabelSet(name="x", labels=tuple(Label(name=n) for n in ("a", "b", "c")), order=("c", "a", "b"))
    assert labels.answer_order == (2, 0, 1)
    assert labels.vector(["c", "a"]) == (1, 0, 1)
    assert answer_text(["a", "b", "c"], labels, "list") == "c, a, b"
    assert answer_text(["b", "c"], labels, "json") == '["c", "b"]'
    for order in (("a", "b"), ("a", "b", "b"), ("a", "b", "d")):
        with pytest.raises(ValueError, match="each label once"):
            LabelSet(name="x", labels=labels.labels, order=order)
