"""Rows of id, text and labels, and the checks of what is in them."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from emogen.errors import InputError

_MOJIBAKE = re.compile(r"â€|Ã[\x80-\xbf©¨¼¶¤]|ðŸ")
_SHOWN = 5  # how many lines a problem names before it says "and n more"


@dataclass(frozen=True)
class Problem:
    """Something wrong with an input: `error` stops the work, `warning` does not."""

    level: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class DataError(InputError):
    """Input that cannot be used; `problems` holds every error, and the message names them all."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(map(str, problems)))


@dataclass(frozen=True)
class Rows:
    """n rows of one file.

    Attributes:
        path: the file, for messages.
        ids: n ids; the row's number if the file has none.
        texts: n texts as they stand in the file.
        gold: int8 [n, L] in canonical label order, or None if the file has no labels.
        lines: the line each row begins on (its number, for Parquet and Hub data).
        id_column, text_column: the names of these columns, for writing files of the same form.
    """

    path: str
    ids: list[str]
    texts: list[str]
    gold: np.ndarray | None
    lines: list[int]
    id_column: str = "ID"
    text_column: str = "Tweet"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def truth(self) -> np.ndarray:
        """`gold`, where it is known that the rows have labels."""
        assert self.gold is not None
        return self.gold

    def take(self, index: Sequence[int] | np.ndarray) -> "Rows":
        """The rows at these positions."""
        index = [int(i) for i in index]
        return replace(
            self,
            ids=[self.ids[i] for i in index],
            texts=[self.texts[i] for i in index],
            gold=None if self.gold is None else self.gold[index],
            lines=[self.lines[i] for i in index],
        )


def checked(result: tuple[Rows, list[Problem]]) -> Rows:
    """The rows of a read, or DataError if there was an error among its problems."""
    rows, problems = result
    if any(problem.level == "error" for problem in problems):
        raise errors_of(problems)
    return rows


def errors_of(problems: Sequence[Problem]) -> DataError:
    """The errors among problems, to raise."""
    return DataError([problem for problem in problems if problem.level == "error"])


def align(gold: Rows, pred: Rows) -> Rows:
    """The rows of `pred` in the order of `gold`, matched by id.

    Raises:
        DataError: an id that stands twice, or only in one of the two.
    """
    problems = []
    for rows in (gold, pred):
        twice = [row_id for row_id, count in Counter(rows.ids).items() if count > 1]
        if twice:
            problems.append(Problem("error", rows.path, f"ids that occur more than once: {shorten_list(twice)}"))
    where = {row_id: i for i, row_id in enumerate(pred.ids)}
    if missing := [row_id for row_id in gold.ids if row_id not in where]:
        problems.append(
            Problem("error", pred.path, f"no row for {len(missing):,} ids of {gold.path}: {shorten_list(missing)}")
        )
    if extra := where.keys() - set(gold.ids):
        problems.append(
            Problem("error", pred.path, f"{len(extra):,} ids that {gold.path} has not: {shorten_list(sorted(extra))}")
        )
    if problems:
        raise DataError(problems)
    return pred.take([where[row_id] for row_id in gold.ids])


def normalise_text(text: str) -> str:
    """What two texts have in common when they are the same to a reader: case and white space do not count."""
    return " ".join(text.casefold().split())


def check_rows(rows: Rows) -> list[Problem]:
    """What is wrong within one file: duplicate ids, conflicting or repeated texts, empty texts, broken encoding."""
    problems = []
    by_id, by_text = defaultdict(list), defaultdict(list)
    for i, (row_id, text) in enumerate(zip(rows.ids, rows.texts, strict=True)):
        by_id[row_id].append(i)
        by_text[normalise_text(text)].append(i)
    for row_id, index in by_id.items():
        if len(index) > 1:
            problems.append(
                Problem(
                    "error",
                    at_lines(rows.path, [rows.lines[i] for i in index]),
                    f"the id {row_id!r} occurs {len(index)} times",
                )
            )
    empty = by_text.pop("", [])
    if empty:
        problems.append(Problem("warning", at_lines(rows.path, [rows.lines[i] for i in empty]), "the text is empty"))
    repeated = 0
    for text, index in by_text.items():
        if len(index) == 1:
            continue
        if rows.gold is not None and len({rows.gold[i].tobytes() for i in index}) > 1:
            where = at_lines(rows.path, [rows.lines[i] for i in index])
            problems.append(Problem("warning", where, f"the same text with different labels: {_short(text)}"))
        else:
            repeated += len(index) - 1
    if repeated:
        problems.append(Problem("warning", rows.path, f"{repeated:,} texts are repeats of another"))
    broken = [
        line for line, text in zip(rows.lines, rows.texts, strict=True) if "\ufffd" in text or _MOJIBAKE.search(text)
    ]
    if broken:
        problems.append(
            Problem(
                "warning",
                at_lines(rows.path, broken),
                "the text looks wrongly decoded (such as â€™ for ’); see `encoding`",
            )
        )
    return problems


def check_overlap(train: Rows, other: Rows) -> list[Problem]:
    """Texts that stand in both files: figures on them say how well they were learnt by heart."""
    known = {normalise_text(text) for text in train.texts}
    shared = [line for line, text in zip(other.lines, other.texts, strict=True) if normalise_text(text) in known - {""}]
    if not shared:
        return []
    return [Problem("warning", at_lines(other.path, shared), f"{len(shared):,} texts stand in {train.path} too")]


def shorten_list(items: Sequence[str | int]) -> str:
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(map(str, items[:_SHOWN])) + more


def at_lines(where: str, lines: Sequence[int]) -> str:
    """`file:3`, or `file:3, 8, 12 and 40 more`."""
    return f"{where}:{shorten_list(lines)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
