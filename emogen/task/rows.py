"""Rows of ids, texts and labels, and checks of their contents."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import numpy as np

from emogen.errors import InputError

_MOJIBAKE = re.compile(r"â€|Ã[\x80-\xbf©¨¼¶¤]|ðŸ")
_SHOWN = 5  # number of lines or ids that a message names before "and n more"

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """A problem in the input. An `error` makes the input unusable; a `warning` does not."""

    level: Level
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Mistakes:
    """Problems of single rows, collected by kind, so that a mistake in 5,000 rows is one problem."""

    def __init__(self) -> None:
        # (level, before, after) -> the lines and the different values, each in the order in which it was found
        self._kinds: dict[tuple[Level, str, str], tuple[dict[int, None], dict[str, None]]] = {}

    def add(self, line: int, before: str, value: str = "", after: str = "", level: Level = "error") -> None:
        """Note a problem of a row. Problems that differ in their value alone are of the same kind."""
        lines, values = self._kinds.setdefault((level, before, after), ({}, {}))
        lines[line] = None
        values[value] = None

    def take(self, where: str) -> list[Problem]:
        """The problems of a file, one for each kind, with its first lines and values; they are removed from here."""
        problems = [
            Problem(level, at_lines(where, list(lines)), before + shorten_list(list(values)) + after)
            for (level, before, after), (lines, values) in self._kinds.items()
        ]
        self._kinds.clear()
        return problems


class DataError(InputError):
    """Unusable data. `problems` holds every error; the message lists them."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(map(str, problems)))


@dataclass(frozen=True)
class Rows:
    """The n rows of a file.

    Attributes:
        path: the file, for messages.
        ids: n ids; row numbers if the file has no ids.
        texts: n texts, unchanged from the file.
        gold: int8 [n, L] in canonical label order, or None if the file has no labels.
        prob: float32 [n, L], the probability of each label, if the file has these instead of certain labels.
        lines: the line on which each row begins (row numbers for Parquet and Hub data).
        id_column, text_column: names of these columns, for writing files with the same columns.
        has_ids: whether the file has an id column; otherwise the ids are line numbers.
        others: names of the columns that were not read.
    """

    path: str
    ids: list[str]
    texts: list[str]
    gold: np.ndarray | None
    lines: list[int]
    id_column: str = "ID"
    text_column: str = "Tweet"
    has_ids: bool = True
    others: tuple[str, ...] = ()
    prob: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def truth(self) -> np.ndarray:
        """`gold` of rows that are known to have labels, such as those read with `need_labels`."""
        assert self.gold is not None
        return self.gold

    @property
    def targets(self) -> np.ndarray:
        """What a loss compares its output with: the probabilities of the file, or else its labels; float32 [n, L]."""
        return (self.truth if self.prob is None else self.prob).astype(np.float32)

    def take(self, index: Sequence[int] | np.ndarray) -> "Rows":
        """The rows at the given positions."""
        index = [int(i) for i in index]
        return replace(
            self,
            ids=[self.ids[i] for i in index],
            texts=[self.texts[i] for i in index],
            gold=None if self.gold is None else self.gold[index],
            prob=None if self.prob is None else self.prob[index],
            lines=[self.lines[i] for i in index],
        )


def has_errors(problems: Sequence[Problem]) -> bool:
    """Whether one of the problems is an error."""
    return any(problem.level == "error" for problem in problems)


def data_error(problems: Sequence[Problem]) -> DataError:
    """An exception with the errors among the problems."""
    return DataError([problem for problem in problems if problem.level == "error"])


def checked(result: tuple[Rows, list[Problem]]) -> Rows:
    """The rows of a read result.

    Raises:
        DataError: there is an error among the problems.
    """
    rows, problems = result
    if has_errors(problems):
        raise data_error(problems)
    return rows


def align(gold: Rows, pred: Rows) -> Rows:
    """The rows of `pred` in the order of `gold`, matched by id; by line number if no file has ids.

    Raises:
        DataError: an id is repeated, or occurs in only one of the two; only one of the two has ids; or neither has
            ids, and the texts are not the same.
    """
    if gold.has_ids != pred.has_ids:
        without, other = (gold, pred) if pred.has_ids else (pred, gold)
        message = f"no id column, but {other.path} has {other.id_column!r}: rows cannot be matched; set the id column"
        raise DataError([Problem("error", without.path, message)])
    if not gold.has_ids and gold.texts != pred.texts and any(gold.texts) and any(pred.texts):
        message = f"no id column, and other texts (or another order) than {gold.path}: rows cannot be matched"
        raise DataError([Problem("error", pred.path, message)])
    problems = repeated_ids(gold) + repeated_ids(pred)
    positions = {row_id: i for i, row_id in enumerate(pred.ids)}
    if missing := [row_id for row_id in gold.ids if row_id not in positions]:
        message = f"no row for {len(missing):,} ids of {gold.path}: {shorten_list(missing)}"
        problems.append(Problem("error", pred.path, message))
    if extra := positions.keys() - set(gold.ids):
        message = f"{len(extra):,} ids are not in {gold.path}: {shorten_list(sorted(extra))}"
        problems.append(Problem("error", pred.path, message))
    if problems:
        raise DataError(problems)
    return pred.take([positions[row_id] for row_id in gold.ids])


def repeated_ids(rows: Rows) -> list[Problem]:
    """An error if ids occur more than once: rows cannot be matched by them."""
    repeated = [row_id for row_id, count in Counter(rows.ids).items() if count > 1]
    return [Problem("error", rows.path, f"ids that occur more than once: {shorten_list(repeated)}")] if repeated else []


def normalise_text(text: str) -> str:
    """The text in lower case with single spaces. Texts that normalise to the same string count as the same text."""
    return " ".join(text.casefold().split())


def check_rows(rows: Rows) -> list[Problem]:
    """Find problems within one file: repeated ids, empty, repeated or wrongly decoded texts, contradictory labels."""
    problems: list[Problem] = []
    by_id: dict[str, list[int]] = defaultdict(list)
    by_text: dict[str, list[int]] = defaultdict(list)
    for i, (row_id, text) in enumerate(zip(rows.ids, rows.texts, strict=True)):
        by_id[row_id].append(i)
        by_text[normalise_text(text)].append(i)

    def add(level: Level, index: Sequence[int], message: str) -> None:
        problems.append(Problem(level, at_lines(rows.path, [rows.lines[i] for i in index]), message))

    repeated = {row_id: index for row_id, index in by_id.items() if len(index) > 1}
    if len(repeated) == 1:
        ((row_id, index),) = repeated.items()
        add("error", index, f"the id {row_id!r} occurs {len(index)} times")
    elif repeated:
        message = f"{len(repeated):,} ids occur more than once: {shorten_list([repr(row_id) for row_id in repeated])}"
        add("error", sorted(chain.from_iterable(repeated.values())), message)
    if empty := by_text.pop("", []):
        add("warning", empty, "the text is empty")
    n_repeated = 0
    contradictory: dict[str, list[int]] = {}
    for text, index in by_text.items():
        if len(index) > 1 and rows.gold is not None and len({rows.gold[i].tobytes() for i in index}) > 1:
            contradictory.setdefault(_short(text), []).extend(index)
        else:
            n_repeated += len(index) - 1
    if contradictory:
        index = sorted(chain.from_iterable(contradictory.values()))
        add("warning", index, f"the same text with different labels: {shorten_list(list(contradictory))}")
    if n_repeated:
        problems.append(Problem("warning", rows.path, f"{n_repeated:,} texts repeat an earlier one"))
    if broken := [i for i, text in enumerate(rows.texts) if "\ufffd" in text or _MOJIBAKE.search(text)]:
        add("warning", broken, "the text looks wrongly decoded (such as â€™ for ’); see `encoding`")
    return problems


def check_overlap(train: Rows, other: Rows) -> list[Problem]:
    """Warn about texts that are in both files: metrics on them measure memorisation."""
    known = {normalise_text(text) for text in train.texts} - {""}
    shared = [line for line, text in zip(other.lines, other.texts, strict=True) if normalise_text(text) in known]
    if not shared:
        return []
    return [Problem("warning", at_lines(other.path, shared), f"{len(shared):,} texts also occur in {train.path}")]


def shorten_list(items: Sequence[str | int]) -> str:
    """The first five items, and the number of the others."""
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(map(str, items[:_SHOWN])) + more


def at_lines(where: str, lines: Sequence[int]) -> str:
    """`file:3`, or `file:3, 8, 12, 13, 20 and 40 more`."""
    return f"{where}:{shorten_list(lines)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
