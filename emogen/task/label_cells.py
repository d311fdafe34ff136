"""The labels of a row in one cell -> a 0/1 vector.

A cell holds a list of names, of class numbers whose names the file knows, or of one 0 or 1 for each label; an object
`{"anger": 1, "joy": 0, ...}` with a value for each label; or text: names separated by commas, semicolons or `|`, or a
list as JSON, Python or numpy write it. An empty list and the empty answer of the label set mean no labels. An empty
cell means that the row is unlabelled. Everything else is a mistake. With `soft`, an object has probabilities.
"""

import difflib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from emogen.task.labels import LabelSet, key_of
from emogen.task.rows import Mistakes

Vector = tuple[float, ...]  # 0 or 1 for each label, or its probability
ON, OFF = ("1", "1.0", "true"), ("0", "0.0", "false")
UNLABELLED = ("none", "", "nan", "null")  # how test files write that a row is unlabelled

_LIMIT = 100_000  # characters of a list
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_QUOTED_LIST = re.compile(rf"\s*(?:{_QUOTED})(?:(?:\s*,\s*|\s+)(?:{_QUOTED}))*\s*,?\s*")
_QUOTED_PAIRS = re.compile(rf"\s*(?:{_QUOTED})\s*:\s*[\w.]+(?:\s*,\s*(?:{_QUOTED})\s*:\s*[\w.]+)*\s*,?\s*")


class _Unreadable(Exception):
    """A cell that is no list."""


def read_value(cell: str, *, soft: bool) -> float | None:
    """The value of one label in a cell, in lower case: 0 or 1.

    Args:
        soft: a probability from 0 to 1 is a value, too.

    Returns:
        None for anything else.
    """
    if cell in ON + OFF:
        return int(cell in ON)
    try:
        value = float(cell) if soft else math.nan
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def expected(cell: str, *, soft: bool) -> str:
    """The end of the message about a cell that has no value."""
    if soft:
        return "; expected a probability from 0 to 1"
    is_prob = read_value(cell, soft=True) is not None
    return "; expected 0 or 1" + (" (probabilities to train on need soft_labels: true)" if is_prob else "")


class LabelCells:
    """Reads the cells of one column that holds all labels.

    Args:
        label_set: the labels.
        classes: names of the class numbers, if the file has them.
        soft: see `read_value`.
    """

    def __init__(self, label_set: LabelSet, classes: Sequence[str] | None = None, *, soft: bool = False):
        self.label_set, self.classes, self.soft = label_set, classes, soft
        self.known = {key_of(name): name for name in label_set.names}
        self.empty = key_of(label_set.empty)
        self.zeros = (0,) * len(label_set)
        self.first_of: dict[str, int] = {}  # form of the cells so far -> line of its first cell

    def read(self, value: Any, line: int, mistakes: Mistakes) -> Vector | None:
        """The vector of a row, or None if it is unlabelled. A cell that is a mistake gives zeros."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if isinstance(value, str):
            key = key_of(value)
            if key in self.known or key == self.empty:
                value = [value]
            elif key in UNLABELLED:
                return None
            else:
                try:
                    value = _parse(value.strip(), self.known)
                except _Unreadable:
                    mistakes.add(line, "labels that are no list of names: ", _short(value))
                    return self.zeros
        if isinstance(value, dict):
            return self._read_dict(value, line, mistakes)
        if isinstance(value, (bool, int, float)) and self.classes is not None and value == -1:
            return None  # how datasets mark an unlabelled row
        return self._read_list(value if isinstance(value, (list, tuple, set)) else [value], line, mistakes)

    def _read_dict(self, value: dict[Any, Any], line: int, mistakes: Mistakes) -> Vector:
        values = {key_of(str(name)): (name, str(v).strip().casefold()) for name, v in value.items()}
        wrong = len(values) < len(value)
        if wrong:
            mistakes.add(line, "an object that names a label twice: ", _short(value))
        for key, (name, on) in values.items():
            if key not in self.known:
                wrong = True
                self._note_unknown(name, line, mistakes)
            elif read_value(on, soft=self.soft) is None:
                wrong = True
                mistakes.add(line, "", f"label {self.known[key]!r} is {_short(on)}", expected(on, soft=self.soft))
        for key, name in self.known.items():
            if key not in values:
                wrong = True
                mistakes.add(line, "an object without a value for ", repr(name))
        if wrong:
            return self.zeros
        return tuple(read_value(values[key][1], soft=self.soft) or 0 for key in self.known)

    def _read_list(self, items: Sequence[Any] | set[Any], line: int, mistakes: Mistakes) -> Vector:
        items = list(items)
        names = [self._name(item) for item in items]
        is_binary = bool(items) and len(items) == len(self.known) and all(_is_binary(item) for item in items)
        if is_binary and self.classes is None:
            if None not in names:
                message = (
                    ": either the names of labels or a 0 or 1 for each; use label columns, or names without digits"
                )
                mistakes.add(line, "", _short(items), message)
                return self.zeros
            if self._has_form("a list of 0 and 1", "names", line, mistakes):
                return tuple(int(str(item).casefold() in ON) for item in items)
            return self.zeros
        if not self._has_form("names", "a list of 0 and 1", line, mistakes):
            return self.zeros
        wrong = False
        for item, name in zip(items, names, strict=True):
            if name is None and not (isinstance(item, str) and key_of(item) == self.empty):
                wrong = True
                self._note_unknown(item, line, mistakes)
        if not wrong and None in names and len(items) > 1:
            wrong = True
            mistakes.add(line, f"{self.label_set.empty!r} beside labels: ", _short(items))
        return self.zeros if wrong else self.label_set.vector([name for name in names if name is not None])

    def _has_form(self, form: str, other: str, line: int, mistakes: Mistakes) -> bool:
        """Whether no earlier cell has the other form."""
        self.first_of.setdefault(form, line)
        if other not in self.first_of:
            return True
        mistakes.add(line, f"labels in another form than on line {self.first_of[other]}: {form}, and {other} there")
        return False

    def _name(self, item: Any) -> str | None:
        """The label that an item of a list names."""
        if isinstance(item, int) and not isinstance(item, bool) and self.classes is not None:
            return self.known.get(key_of(self.classes[item])) if 0 <= item < len(self.classes) else None
        if isinstance(item, (str, int)) and not isinstance(item, bool):
            return self.known.get(key_of(str(item)))
        return None

    def _note_unknown(self, item: Any, line: int, mistakes: Mistakes) -> None:
        """Note an item that names no label."""
        if self.classes is not None and isinstance(item, int) and 0 <= item < len(self.classes):
            item = self.classes[item]
        elif isinstance(item, (int, float)) or (isinstance(item, str) and re.fullmatch(r"[\d.]+", item.strip())):
            mistakes.add(
                line, "labels as numbers, and the file does not say which labels they stand for: ", str(item)[:60],
                "; write names, or a 0/1 column for each label",
            )  # fmt: skip
            return
        near = difflib.get_close_matches(key_of(str(item)[:100]), list(self.known), 1)
        hint = f" (did you mean {self.known[near[0]]!r}?)" if near else ""
        mistakes.add(line, f"not a label of {self.label_set.name!r}: ", _short(item) + hint)


def _is_binary(item: Any) -> bool:
    return str(item).strip().casefold() in ON + OFF and not isinstance(item, (list, dict))


def _short(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 60 else text[:57] + "..."


def _parse(text: str, known: dict[str, str]) -> Any:
    """The list or the object that a text contains.

    Raises:
        _Unreadable: it contains none.
    """
    if len(text) > _LIMIT:
        raise _Unreadable
    if text == "set()":
        return []
    parts = [part.strip() for part in re.split("[,;]", text)]
    are_names = all(key_of(part) in known for part in parts)
    if text[0] in "[{(" and not are_names:  # a name may begin with a bracket, too: "(other), joy"
        return _parse_brackets(text)
    if "|" in text and not are_names:
        parts = [part.strip() for part in re.split("[,;|]", text)]
    if len(parts) == 1 and re.fullmatch(r"\d+(\s+\d+)+", text):
        parts = text.split()
    if parts and not parts[-1]:
        del parts[-1]  # after a separator at the end
    if not parts or not all(parts):
        raise _Unreadable
    return parts


def _parse_brackets(text: str) -> Any:
    """The list or the object of a text in brackets: JSON, or flat as Python and numpy write it."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise _Unreadable from None
    except ValueError:
        pass
    if {"[": "]", "{": "}", "(": ")"}[text[0]] != text[-1]:
        raise _Unreadable
    inner = text[1:-1]
    if not inner.strip():
        return []
    if _QUOTED_LIST.fullmatch(inner):
        return [_unquote(item) for item in re.findall(_QUOTED, inner)]
    if text[0] == "{" and _QUOTED_PAIRS.fullmatch(inner):
        pairs = re.findall(rf"({_QUOTED})\s*:\s*([\w.]+)", inner)
        return _without_repeats([(_unquote(name), value) for name, value in pairs])
    if re.search(r"[\[\](){}:'\"]", inner):
        raise _Unreadable
    if re.fullmatch(r"\s*(?:[\d.]+|True|False)(?:\s+(?:[\d.]+|True|False))*\s*", inner):
        return [item.removesuffix(".") for item in inner.split()]
    items = [part.strip() for part in inner.split(",")]
    if len(items) > 1 and not items[-1]:
        del items[-1]
    if not all(items):
        raise _Unreadable
    return items


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _Unreadable
    return values


def _unquote(item: str) -> str:
    return re.sub(r"\\(.)", r"\1", item[1:-1])
