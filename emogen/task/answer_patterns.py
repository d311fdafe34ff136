"""All valid answers in the languages of other programs: a regular expression, and a GBNF grammar of llama.cpp."""

import json
import re

from emogen.errors import InputError
from emogen.task.answer import Pieces, pieces
from emogen.task.labels import LabelSet


def answer_regex(label_set: LabelSet, style: str) -> str:
    """A regular expression that matches the valid answers and nothing else.

    A `count` answer has any number of at most L before its labels.

    Raises:
        InputError: the style is `yes_no`, whose answers are single words.
    """
    alternatives = [
        re.escape(first) + "".join(f"({re.escape(piece)})?" for piece in rest) + re.escape(close)
        for first, rest, close in _alternatives(label_set, style)
    ]
    body = "|".join(alternatives)
    if style == "count":
        numbers = "|".join(str(n) for n in range(1, len(label_set) + 1))
        body = f"({numbers}): ({body})"
    empty = [] if label_set.exactly_one else [re.escape(_parts(label_set, style).empty)]
    return f"({'|'.join([*empty, body])})"


def answer_gbnf(label_set: LabelSet, style: str, lead: str = "") -> str:
    """A GBNF grammar of the valid answers; see `answer_regex`.

    Args:
        lead: what the chat template writes before an answer and is generated with it, such as a space.
    """
    alternatives = [
        " ".join([_quoted(first), *(f"({_quoted(piece)})?" for piece in rest), *([_quoted(close)] if close else [])])
        for first, rest, close in _alternatives(label_set, style)
    ]
    body = " | ".join(alternatives)
    if style == "count":
        numbers = " | ".join(_quoted(str(n)) for n in range(1, len(label_set) + 1))
        body = f'({numbers}) ": " ({body})'
    empty = [] if label_set.exactly_one else [_quoted(_parts(label_set, style).empty)]
    return f"root ::= {_quoted(lead) + ' ' if lead else ''}({' | '.join([*empty, body])})\n"


def _parts(label_set: LabelSet, style: str) -> Pieces:
    if style == "yes_no":
        raise InputError("`answer: yes_no` asks a model once for each label; other programs ask once for a text")
    return pieces(label_set, "list" if style == "count" else style)


def _alternatives(label_set: LabelSet, style: str) -> list[tuple[str, list[str], str]]:
    """For each label that an answer can begin with: its piece, those that may follow, and the end."""
    parts, order = _parts(label_set, style), label_set.answer_order
    return [
        (parts.first[i], [] if label_set.exactly_one else [parts.following[j] for j in order[k + 1 :]], parts.close)
        for k, i in enumerate(order)
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
