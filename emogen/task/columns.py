"""Records -> rows: find the columns of the id, the text and the labels, and read them."""

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from emogen.task.labels import LabelSet
from emogen.task.rows import Problem, Rows, at_lines

ID_NAMES = ("id", "tweet_id", "post_id", "text_id", "row_id")
TEXT_NAMES = ("text", "tweet", "post", "sentence", "content", "message", "comment")
LABELS_NAMES = ("labels", "emotions")  # one column with label names, as a list or separated by commas
_ON, _OFF = ("1", "1.0", "true"), ("0", "0.0", "false")
_UNLABELLED = ("none", "", "nan", "null")  # values of the label columns in unlabelled test files

Vector = tuple[int, ...]
# Message -> line numbers, so that a mistake in 5,000 rows is reported once.
Mistakes = dict[str, list[int]]
# (record, line number, mistakes) -> the 0/1 vector of a row, or None if the row has no labels.
LabelReader = Callable[[dict[str, Any], int, Mistakes], Vector | None]


def rows_from_records(
    where: str,
    columns: list[str],
    records: Iterator[tuple[int, dict[str, Any]]],
    label_set: LabelSet,
    problems: list[Problem],
    *,
    text_column: str | None = None,
    id_column: str | None = None,
    need_labels: bool = False,
    need_text: bool = True,
    may_be_empty: bool = False,
) -> tuple[Rows, list[Problem]]:
    """Convert records from any source to rows.

    Args:
        where: the source, for messages.
        columns: names of the columns.
        records: line number and values of each record.
        problems: problems found so far; new ones are appended.
        text_column, id_column: column names; detected by default.
        need_labels: report missing labels as an error.
        need_text: report a missing text column as an error.
        may_be_empty: accept a source without records.

    Returns:
        The rows that could be read, and `problems`.
    """
    text_name = _find_column(where, columns, "text", text_column, TEXT_NAMES, problems, required=need_text)
    id_name = _find_column(where, columns, "id", id_column, ID_NAMES, problems, required=False)
    read_labels = _label_reader(where, columns, label_set, problems, need_labels, {text_name, id_name})
    if text_name is None and need_text:
        return no_rows(where), problems

    ids, texts, lines = [], [], []
    vectors: list[Vector | None] = []
    mistakes: Mistakes = defaultdict(list)
    for line, record in records:
        text = record.get(text_name) if text_name else None
        ids.append(str(record[id_name]).strip() if id_name else str(line))
        texts.append("" if text is None else str(text))
        lines.append(line)
        vectors.append(read_labels(record, line, mistakes))
    problems += [Problem("error", at_lines(where, at), message) for message, at in mistakes.items()]
    if not ids and not problems and not may_be_empty:
        problems.append(Problem("error", where, "no rows below the header"))
    gold = _stack_labels(where, vectors, lines, len(label_set), problems, need_labels)
    return Rows(where, ids, texts, gold, lines, id_name or "ID", text_name or "Tweet"), problems


def no_rows(where: str) -> Rows:
    """Rows of a source that could not be read."""
    return Rows(where, [], [], None, [])


def _find_column(
    where: str,
    columns: list[str],
    role: str,
    given: str | None,
    known: Sequence[str],
    problems: list[Problem],
    *,
    required: bool,
) -> str | None:
    """The column of a role (`text` or `id`): the given name, or the first known name that occurs in any case."""
    if given is not None:
        if given in columns:
            return given
        message = f"{role}_column is {given!r}, but the columns are: {', '.join(columns)}"
        if near := difflib.get_close_matches(given, columns, 1):
            message += f"; did you mean {near[0]!r}?"
        problems.append(Problem("error", where, message))
        return None
    lower = {column.casefold(): column for column in reversed(columns)}
    for name in known:
        if name in lower:
            return lower[name]
    if required:
        message = f"no {role} column; expected one of {', '.join(known)}, found: {', '.join(columns)}; "
        problems.append(Problem("error", f"{where}:1", f"{message}name the column with {role}_column"))
    return None


def _label_reader(
    where: str,
    columns: list[str],
    label_set: LabelSet,
    problems: list[Problem],
    need_labels: bool,
    taken: set[str | None],
) -> LabelReader:
    """A function that reads the labels of a record: from one column per label, or from one column of names."""
    lower = {column.casefold(): column for column in columns if column not in taken}
    column_of = {name: lower[name.casefold()] for name in label_set.names if name.casefold() in lower}
    names_column = next((lower[name] for name in LABELS_NAMES if name in lower), None)
    if names_column is not None and not column_of:
        return lambda record, line, mistakes: _read_names(record.get(names_column), label_set, line, mistakes)
    if column_of:
        others = [column for column in lower.values() if column not in column_of.values()]
        for name in label_set.names:
            if name not in column_of:
                near = difflib.get_close_matches(name, others, 1, cutoff=0.7)
                hint = f"; is {near[0]!r} misspelt?" if near else ""
                problems.append(Problem("error", f"{where}:1", f"no column for the label {name!r}{hint}"))
    elif need_labels:
        message = f"no label columns; expected {', '.join(label_set.names)}, or one column 'labels' with names"
        problems.append(Problem("error", f"{where}:1", f"{message}; found: {', '.join(columns)}"))

    def read(record: dict[str, Any], line: int, mistakes: Mistakes) -> Vector | None:
        values = {name: str(record.get(column, "")).strip().casefold() for name, column in column_of.items()}
        if all(value in _UNLABELLED for value in values.values()):
            return None
        for name, value in values.items():
            if value not in _ON + _OFF:
                mistakes[f"label {name!r} is {value!r}; expected 0 or 1"].append(line)
        return tuple(int(values.get(name) in _ON) for name in label_set.names)

    return read


def _read_names(value: Any, label_set: LabelSet, line: int, mistakes: Mistakes) -> Vector | None:
    """Read the value of a `labels` column: a list, a JSON list, or names separated by commas or semicolons."""
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text) if text.startswith("[") else list(filter(str.strip, re.split("[,;]", text)))
        except json.JSONDecodeError:
            mistakes[f"labels is not valid JSON: {text[:60]!r}"].append(line)
            return (0,) * len(label_set)
    known = {name.casefold(): name for name in label_set.names}
    names = []
    for item in value:
        word = str(item).strip().casefold()
        if word in known:
            names.append(known[word])
        elif word != label_set.empty.casefold():
            near = difflib.get_close_matches(word, list(known), 1)
            hint = f"; did you mean {known[near[0]]!r}?" if near else ""
            mistakes[f"{item!r} is not a label of {label_set.name!r}{hint}"].append(line)
    return label_set.vector(names)


def _stack_labels(
    where: str,
    vectors: Sequence[Vector | None],
    lines: Sequence[int],
    n_labels: int,
    problems: list[Problem],
    need_labels: bool,
) -> np.ndarray | None:
    """The gold labels, int8 [n, L], or None if no row has labels."""
    missing = [line for line, vector in zip(lines, vectors, strict=True) if vector is None]
    if len(missing) == len(vectors):
        if need_labels and vectors:
            message = "no row has labels; this file cannot be used for training or scoring"
            problems.append(Problem("error", where, message))
        return None
    if missing:
        problems.append(Problem("error", at_lines(where, missing), "no labels here, though other rows have them"))
    return np.array([vector or (0,) * n_labels for vector in vectors], dtype=np.int8)
