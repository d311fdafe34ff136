import pytest

from emogen.task.answer import STYLES, answer_text, counted, pieces
from emogen.task.labels import Label, LabelSet

ABC = LabelSet(name="abc", empty="nothing", labels=tuple(Label(name=name) for name in ("a", "b", "c")))
CAB = LabelSet(name="cab", empty="nothing", labels=ABC.labels, order=("c", "a", "b"))


@pytest.mark.parametrize(
    ("style", "names", "answer"),
    [
        ("list", ["a"], "a"),
        ("list", ["a", "c"], "a, c"),
        ("list", [], "nothing"),
        ("count", ["b"], "1: b"),
        ("count", ["a", "b", "c"], "3: a, b, c"),
        ("count", [], "nothing"),
        ("json", ["b"], '["b"]'),
        ("json", ["a", "c"], '["a", "c"]'),
        ("json", [], "[]"),
        ("yes_no", ["a", "c"], "a: yes\nb: no\nc: yes"),
        ("yes_no", [], "a: no\nb: no\nc: no"),
    ],
)
def test_the_answer_of_each_style(style, names, answer):
    assert answer_text(names, ABC, style) == answer


@pytest.mark.parametrize("style", STYLES)
def test_names_may_come_in_any_order_and_more_than_once(style):
    assert answer_text(["c", "a", "c"], ABC, style) == answer_text(["a", "c"], ABC, style)


@pytest.mark.parametrize(
    ("style", "answer"),
    [
        ("list", "c, a"),
        ("count", "2: c, a"),
        ("json", '["c", "a"]'),
        ("yes_no", "a: yes\nb: no\nc: yes"),  # one line per question, in canonical order
    ],
)
def test_answers_follow_the_order_of_the_label_set(style, answer):
    assert answer_text(["a", "c"], CAB, style) == answer


@pytest.mark.parametrize("style", STYLES)
def test_an_unknown_label_is_an_error(style):
    with pytest.raises(ValueError, match="not in the label set 'abc': d, e"):
        answer_text(["a", "e", "d"], ABC, style)


@pytest.mark.parametrize("style", ["", "xml", "head"])
@pytest.mark.parametrize("names", [[], ["a"]])
def test_an_unknown_style_is_an_error(style, names):
    with pytest.raises(ValueError, match=f"a '{style}' answer is not built from pieces"):
        answer_text(names, ABC, style)


@pytest.mark.parametrize("style", ["list", "json"])
def test_an_answer_is_the_sum_of_its_pieces(style):
    parts = pieces(ABC, style)
    assert parts.first[0] + parts.following[2] + parts.close == answer_text(["a", "c"], ABC, style)
    assert parts.empty == answer_text([], ABC, style)


def test_pieces_are_in_canonical_order_whatever_the_answer_order():
    assert pieces(CAB, "list") == pieces(ABC, "list")
    assert pieces(ABC, "list").first == ("a", "b", "c")
    assert pieces(ABC, "json").first == ('["a', '["b', '["c')
    assert pieces(ABC, "json").following == ('", "a', '", "b', '", "c')


def test_count_and_yes_no_answers_have_no_pieces_of_their_own():
    for style in ("count", "yes_no"):
        with pytest.raises(ValueError, match="use list or json"):
            pieces(ABC, style)
    assert counted(2, "a") == "2: a"
