import re
from itertools import combinations

import pytest

from emogen.errors import InputError
from emogen.task.answer import STYLES, answer_text
from emogen.task.labels import Label, LabelSet, load_label_set
from emogen.task.parse import parse_answer

SEMEVAL = ["anger", "anticipation", "disgust", "fear", "joy", "love", "optimism", "pessimism", "sadness", "surprise", "trust"]  # fmt: skip


def test_the_shipped_label_set_has_the_columns_of_the_competition_in_order(labels):
    assert list(labels.names) == SEMEVAL
    assert all(label.definition and label.aliases for label in labels.labels)


def test_names_and_vectors_convert_both_ways(labels):
    assert labels.vector(["joy", "anger"]) == (1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    assert labels.names_of(labels.vector(["joy", "anger"])) == ("anger", "joy")
    assert labels.names_of((0,) * 11) == ()


def test_unknown_names_and_vectors_of_wrong_length_are_errors(labels):
    with pytest.raises(ValueError, match="rage"):
        labels.vector(["rage"])
    with pytest.raises(ValueError, match="3 values for 11 labels"):
        labels.names_of((1, 0, 1))


def test_a_label_set_is_the_same_after_writing_and_reading(tmp_path, labels):
    path = tmp_path / "labels.yaml"
    path.write_text(labels.to_yaml(), encoding="utf-8")
    assert load_label_set(path) == labels


def test_a_label_set_is_loaded_from_a_file(tmp_path):
    path = tmp_path / "de.yaml"
    path.write_text("name: de\nempty: keine\nlabels:\n  - name: Ärger\n  - name: Freude\n    aliases: [froh]\n")
    assert load_label_set(path).names == ("Ärger", "Freude")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nlabels: []\n", "labels"),
        ("name: x\nlabels:\n  - nam: joy\n", "labels.0.nam"),
        ("name: x\nlabels:\n  - {name: joy}\n  - {name: Joy}\n", "stands for both"),
        ("name: x\nlabels:\n  - {name: caf\u00e9}\n  - {name: cafe\u0301}\n", "stands for both"),
        ('name: x\nlabels:\n  - {name: joy}\n  - {name: "j\\u200boy"}\n', "stands for both"),
        ('name: x\nlabels:\n  - {name: "\\u200b"}\n', "has no visible character"),
        ("name: x\nempty: joy\nlabels:\n  - {name: joy}\n", "stands for both"),
        ("name: x\nlabels:\n  - {name: 'joy, love'}\n", "labels.0.name"),
        ("name: [x\n", "not valid YAML"),
    ],
)
def test_an_invalid_file_is_an_error_that_names_the_file_and_the_key(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_label_set(path)
    assert "broken.yaml" in str(error.value)


def test_a_missing_label_set_lists_the_shipped_ones():
    with pytest.raises(InputError, match="semeval2018"):
        load_label_set("semeval2019")


@pytest.mark.parametrize("character", ',;"[]\n\r\t\x1c\x85\u2028\u2029')
@pytest.mark.parametrize("end", ["b", ""])
def test_a_name_that_could_not_be_read_back_is_an_error(character, end):
    if character.isspace() and character != "\x1c" and not end:
        assert Label(name=f"a{character}").name == "a"  # space at the ends does not belong to a name
        return
    reason = f"contains {character!r}, which separates" if character in ',;"[]' else "an answer is one line"
    for key in ({"name": "x"}, {"name": "x", "aliases": ["y"]}):
        words = {k: f"a{character}{end}" if k == list(key)[-1] else v for k, v in key.items()}
        words |= {"aliases": [words["aliases"]]} if "aliases" in words else {}
        with pytest.raises(ValueError, match=re.escape(reason)):
            Label.model_validate(words)


ODD = (
    "love and care", "R&D", "e.g. other", "C++", "yes/no question", "1. price", "this or that", "what?", "a: b", "2",
    "(other)", "don't know", "self-love", "and", "no", "none of it", "- dash", "#1", "<b>", "{{ x }}", "Spaß", "クレーム",
    "क्रोध", "非常に良い",
)  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_every_other_name_is_read_back_exactly(style):
    labels = LabelSet(name="odd", labels=tuple(Label(name=name) for name in ODD))
    for n in (0, 1, 2, len(ODD)):
        for names in combinations(ODD, n):
            parsed = parse_answer(answer_text(names, labels, style), labels, style=style)
            assert (parsed.labels, parsed.status) == (names, "exact")


def test_the_task_is_a_sentence_that_is_kept(tmp_path):
    path = tmp_path / "labels.yaml"
    path.write_text("name: x\ntask: >\n  Find the aspects\n  of a review.\nlabels:\n  - name: price\n")
    labels = load_label_set(path)
    assert labels.task == labels.task_sentence == "Find the aspects of a review."
    path.write_text(labels.to_yaml())
    assert load_label_set(path) == labels
    assert LabelSet(name="x", labels=labels.labels).task_sentence == "Label the text."


def test_the_order_of_answers_does_not_change_the_canonical_order():
    labels = LabelSet(name="x", labels=tuple(Label(name=n) for n in ("a", "b", "c")), order=("c", "a", "b"))
    assert labels.answer_order == (2, 0, 1)
    assert labels.vector(["c", "a"]) == (1, 0, 1)
    assert answer_text(["a", "b", "c"], labels, "list") == "c, a, b"
    assert answer_text(["b", "c"], labels, "json") == '["c", "b"]'
    for order in (("a", "b"), ("a", "b", "b"), ("a", "b", "d")):
        with pytest.raises(ValueError, match="each label once"):
            LabelSet(name="x", labels=labels.labels, order=order)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nlabels:\n  - name: 401.9\n", r"x\.yaml:3: labels\.0\.name: 401\.9 is no text in YAML; write it in quotes"),
        ("name: x\nlabels:\n  - name: a\n  - name: null\n", r"x\.yaml:4: labels\.1\.name: null is no text in YAML"),
        ("name: x\nlabels:\n  - name: true\n", r"x\.yaml:3: labels\.0\.name: True is no text in YAML"),
        ("name: x\nlabels:\n  - name: 2020-01-01\n", r"x\.yaml:3: labels\.0\.name: 2020-01-01 is no text in YAML"),
        ("name: x\nlabels: [a, b]\n", r"x\.yaml:2: labels\.0: expected a label, such as `- name: joy`"),
        ("name: x\nlabels: {a: b}\n", r"x\.yaml:2: labels: expected a list"),
        ("name: x\nlabels: []\n", r"x\.yaml:2: labels: expected at least one label"),
        ("labels: [{name: a}]\n", r"x\.yaml:1: name: is missing"),
        ("name: x\nlabels:\n  - name: a\n    colour: red\n", r"x\.yaml:4: labels\.0\.colour: no such key; the keys are: name, definition, aliases"),
    ],
)  # fmt: skip
def test_problems_of_a_label_set_are_named_with_their_lines(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_label_set(tmp_path / "x.yaml")


def test_yes_and_no_are_names(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "name: x\nlabels:\n  - name: no\n  - name: yes\n  - name: off\n", encoding="utf-8-sig"
    )
    assert load_label_set(tmp_path / "x.yaml").names == ("no", "yes", "off")
