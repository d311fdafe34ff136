"""Records of any origin -> rows: which column is the id, the text and the labels."""

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emogen.task.labels import LabelSet
from emogen.task.rows import Problem, Rows, at_lines

ID_NAMES = ("id", "tweet_id", "post_id", "text_id", "row_id")
TEXT_NAMES = ("text", "tweet", "post", "sentence", "content", "message", "comment")
LABELS_NAMES = ("labels", "emotions")  # one column that holds the names, as a list or separated by commas
_ON, _OFF = ("1", "1.0", "true"), ("0", "0.0", "false")
_UNLABELLED = ("none", "", "nan", "null")  # what test files put where a label would be


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
    """Records of any origin -> rows; see `read_rows`."""
    text_name = _find_column(where, columns, "text", text_column, TEXT_NAMES, problems, required=need_text)
    id_name = _find_column(where, columns, "id", id_column, ID_NAMES, problems, required=False)
    read_labels = _label_reader(where, columns, label_set, problems, need_labels, {text_name, id_name})
    if any(problem.level == "error" for problem in problems) and (text_name is None and need_text):
        return no_rows(Path(where)), problems

    ids, texts, lines, vectors = [], [], [], []
    bad: dict[str, list[int]] = defaultdict(
        list
    )  # message -> lines, so that one mistake made 5,000 times is one problem
    for number, record in records:
        value = record.get(text_name) if text_name else ""
        ids.append(str(record[id_name]).strip() if id_name else str(number))
        texts.append(str(value) if value is not None else "")
        lines.append(number)
        vectors.append(read_labels(number, record, bad))
    for message, numbers in bad.items():
        problems.append(Problem("error", at_lines(where, numbers), message))

    labelled = [vector is not None for vector in vectors]
    gold = None
    if any(labelled):
        if not all(labelled):
            missing = [line for line, known in zip(lines, labelled, strict=True) if not known]
            problems.append(Problem("error", at_lines(where, missing), "no labels here, though other rows have them"))
        gold = np.array([vector or (0,) * len(label_set) for vector in vectors], dtype=np.int8)
    elif need_labels and ids:
        problems.append(Problem("error", where, "no row has labels; this file cannot be used for training or scoring"))
    if not ids and not problems and not may_be_empty:
        problems.append(Problem("error", where, "no rows below the header"))
    return Rows(where, ids, texts, gold, lines, id_name or "ID", text_name or "Tweet"), problems


def no_rows(path: Path) -> Rows:
    return Rows(str(path), [], [], None, [])


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
    if given is not None:
        if given in columns:
            return given
        near = difflib.get_close_matches(given, columns, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        problems.append(
            Problem("error", where, f"{role}_column is {given!r}, but the columns are: {', '.join(columns)}{hint}")
        )
        return None
    lower = {column.casefold(): column for column in reversed(columns)}
    for name in known:
        if name in lower:
            return lower[name]
    if required:
        problems.append(
            Problem(
                "error",
                f"{where}:1",
                f"no {role} column; looked for {', '.join(known)} and found: {', '.join(columns)}; "
                f"name it with {role}_column",
            )
        )
    return None


def _label_reader(
    where: str,
    columns: list[str],
    label_set: LabelSet,
    problems: list[Problem],
    need_labels: bool,
    taken: set[str | None],
) -> Callable[[int, dict[str, Any], dict[str, list[int]]], tuple[int, ...] | None]:
    """A function (line, record, bad) -> 0/1 vector, or None for a row without labels."""
    lower = {column.casefold(): column for column in columns if column not in taken}
    of_name = {name: lower.get(name.casefold()) for name in label_set.names}
    missing = [name for name, column in of_name.items() if column is None]
    single = next((lower[name] for name in LABELS_NAMES if name in lower), None)
    if single is not None and len(missing) == len(of_name):
        return lambda line, record, bad: _names_to_vector(record.get(single), label_set, bad, line)
    if len(missing) < len(of_name):
        others = [column for column in lower.values() if column not in of_name.values()]
        for name in missing:
            near = difflib.get_close_matches(name, others, 1, cutoff=0.7)
            hint = f"; is {near[0]!r} misspelt?" if near else ""
            problems.append(Problem("error", f"{where}:1", f"no column for the label {name!r}{hint}"))
    elif need_labels:
        problems.append(
            Problem("error", f"{where}:1", f"no label columns; expected {', '.join(label_set.names)}, or one column "
                    f"'labels' with names; found: {', '.join(columns)}")
        )  # fmt: skip
    known = {name: column for name, column in of_name.items() if column is not None}

    def read(line: int, record: dict[str, Any], bad: dict[str, list[int]]) -> tuple[int, ...] | None:
        values = {name: str(record.get(column, "")).strip().casefold() for name, column in known.items()}
        if all(value in _UNLABELLED for value in values.values()):
            return None
        for name, value in values.items():
            if value not in _ON + _OFF:
                bad[f"label {name!r} is {value!r}; expected 0 or 1"].append(line)
        return tuple(int(values.get(name) in _ON) for name in label_set.names)

    return read


def _names_to_vector(value: Any, label_set: LabelSet, bad: dict[str, list[int]], line: int) -> tuple[int, ...] | None:
    """The value of a `labels` column: names as a list, a JSON list, or separated by commas; None if there is none."""
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        try:
            value = (
                json.loads(text) if text.startswith("[") else [part for part in re.split("[,;]", text) if part.strip()]
            )
        except json.JSONDecodeError:
            bad[f"labels is not valid JSON: {text[:60]!r}"].append(line)
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
            bad[f"{item!r} is not a label of {label_set.name!r}{hint}"].append(line)
    return label_set.vector(names)
