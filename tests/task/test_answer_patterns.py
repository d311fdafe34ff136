"""The languages of other programs accept the valid answers and nothing else."""

import itertools
import re

import pytest

from emogen.errors import InputError
from emogen.task.answer import answer_text
from emogen.task.answer_patterns import answer_gbnf, answer_regex
from emogen.task.labels import Label, LabelSet

NAMES = ("red", "a.b", "to+o")
COLOURS = LabelSet(name="colours", labels=tuple(Label(name=name) for name in NAMES))
CHOICE = LabelSet(name="choice", exactly_one=True, labels=COLOURS.labels)


@pytest.mark.parametrize("style", ["list", "json", "count"])
def test_the_regular_expression_matches_every_valid_answer_and_no_other(style):
    pattern = re.compile(answer_regex(COLOURS, style))
    for n in range(len(NAMES) + 1):
        for names in itertools.combinations(NAMES, n):
            assert pattern.fullmatch(answer_text(names, COLOURS, style))
    for wrong in ("", "blue", "red, red", "a.b, red", "axb", "red,a.b", "0: red", "red, none", "[red]"):
        assert not pattern.fullmatch(wrong)


def test_with_exactly_one_label_there_is_one():
    pattern = re.compile(answer_regex(CHOICE, "list"))
    assert all(pattern.fullmatch(name) for name in NAMES)
    assert not any(pattern.fullmatch(wrong) for wrong in ("none", "red, a.b", ""))
    assert answer_gbnf(CHOICE, "list") == 'root ::= ("red" | "a.b" | "to+o")\n'


def test_the_grammar_of_llama_cpp():
    assert answer_gbnf(COLOURS, "list") == (
        'root ::= ("none" | "red" (", a.b")? (", to+o")? | "a.b" (", to+o")? | "to+o")\n'
    )
    assert answer_gbnf(CHOICE, "json", " ") == (
        'root ::= " " ("[\\"red" "\\"]" | "[\\"a.b" "\\"]" | "[\\"to+o" "\\"]")\n'
    )
    assert answer_gbnf(CHOICE, "count").startswith('root ::= (("1" | "2" | "3") ": " ("red" |')


def test_one_question_for_each_label_is_refused():
    with pytest.raises(InputError, match="yes_no"):
        answer_regex(COLOURS, "yes_no")
