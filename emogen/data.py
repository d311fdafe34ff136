"""CSV, TSV, JSONL, Parquet or Hub dataset -> rows of id, text and labels; checks of what is in them; hold-out splits.

Formats, columns, separator and encoding are detected; a recipe can name what is not. Everything that is wrong with
a file is collected as `Problem`s, so that a user sees all of it at once, with file and line.
"""

import codecs
import csv
import difflib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emogen import paths
from emogen.errors import InputError
from emogen.labels import LabelSet

if TYPE_CHECKING:
    from emogen.recipe import Recipe

log = logging.getLogger(__name__)

ID_NAMES = ("id", "tweet_id", "post_id", "text_id", "row_id")
TEXT_NAMES = ("text", "tweet", "post", "sentence", "content", "message", "comment")
LABELS_NAMES = ("labels", "emotions")  # one column that holds the names, as a list or separated by commas
_ON, _OFF = ("1", "1.0", "true"), ("0", "0.0", "false")
_UNLABELLED = ("none", "", "nan", "null")  # what test files put where a label would be
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


def read_rows(
    source: str | Path,
    label_set: LabelSet,
    *,
    text_column: str | None = None,
    id_column: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    need_labels: bool = False,
    need_text: bool = True,
) -> tuple[Rows, list[Problem]]:
    """Read a data file.

    Args:
        source: a .csv, .tsv, .txt, .jsonl, .json or .parquet file.
        text_column, id_column, separator, encoding: given instead of detected.
        need_labels: a file without labels is an error.
        need_text: a file without a text column is an error (a file of predictions has none).

    Returns:
        The rows that could be read, and every problem. If a problem is an error, use `checked`, which raises.
    """
    path = paths.find(source)
    problems: list[Problem] = []
    try:
        columns, records = _read_table(path, separator, encoding, problems, None)
        return rows_from_records(
            str(source), columns, records, label_set, problems,
            text_column=text_column, id_column=id_column, need_labels=need_labels, need_text=need_text,
        )  # fmt: skip
    except UNREADABLE as error:
        return _no_rows(path), [*problems, _unreadable(source, path, error)]


def stream_rows(
    source: str | Path,
    label_set: LabelSet,
    *,
    size: int,
    skip: int = 0,
    text_column: str | None = None,
    id_column: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
) -> Iterator[Rows]:
    """Read a data file of any size, so many rows at a time; see `read_rows`. Warnings are logged. A file without rows
    makes one chunk without rows.

    Args:
        size: the most rows at once.
        skip: how many of the first rows are passed over.

    Raises:
        DataError: everything that is wrong with the rows that come next. The ones before them have been given.
    """
    path = paths.find(source)
    problems: list[Problem] = []
    n_rows = 0
    try:
        columns, records = _read_table(path, separator, encoding, problems, 1000)
        n_rows = sum(1 for _ in islice(records, skip))
        while True:
            rows = checked(
                rows_from_records(
                    str(source), columns, islice(records, size), label_set, problems,
                    text_column=text_column, id_column=id_column, may_be_empty=True,
                )
            )  # fmt: skip
            for problem in problems:
                log.warning(str(problem))
            problems.clear()
            if not n_rows and not len(rows):
                log.warning(f"{source}: no rows below the header")
            if len(rows) or not n_rows:
                yield rows
            n_rows += len(rows)
            if not len(rows):
                return
    except UNREADABLE as error:
        raise DataError([_unreadable(source, path, error)]) from None


def read_hub(
    name: str, config: str | None, split: str, label_set: LabelSet, **columns: Any
) -> tuple[Rows, list[Problem]]:
    """Read a split of a dataset on the Hugging Face Hub, or of a local folder that `datasets.load_dataset` knows."""
    import datasets

    where = f"{name}[{split}]"
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the Hub fails in many ways; each is the user's to read
        return _no_rows(Path(where)), [Problem("error", where, f"cannot be loaded: {error}")]
    records = ((i, dict(record)) for i, record in enumerate(dataset, start=1))
    return rows_from_records(where, list(dataset.column_names), records, label_set, [], **columns)


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
            problems.append(Problem("error", rows.path, f"ids that occur more than once: {_some(twice)}"))
    where = {row_id: i for i, row_id in enumerate(pred.ids)}
    if missing := [row_id for row_id in gold.ids if row_id not in where]:
        problems.append(
            Problem("error", pred.path, f"no row for {len(missing):,} ids of {gold.path}: {_some(missing)}")
        )
    if extra := where.keys() - set(gold.ids):
        problems.append(
            Problem("error", pred.path, f"{len(extra):,} ids that {gold.path} has not: {_some(sorted(extra))}")
        )
    if problems:
        raise DataError(problems)
    return pred.take([where[row_id] for row_id in gold.ids])


# ---------------------------------------------------------------------------------------------- reading


UNREADABLE = (OSError, ValueError, csv.Error, LookupError)


def _unreadable(source: str | Path, path: Path, error: Exception) -> Problem:
    message = _no_such_file(path) if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
    return Problem("error", str(source), message)


def _no_rows(path: Path) -> Rows:
    return Rows(str(path), [], [], None, [])


def _no_such_file(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
    return "no such file" + (f"; did you mean {path.with_name(near[0])}?" if near else "")


Records = Iterator[tuple[int, dict[str, Any]]]  # each with the line that it begins on


def _read_table(
    path: Path, separator: str | None, encoding: str | None, problems: list[Problem], ahead: int | None
) -> tuple[list[str], Records]:
    """A file -> its column names and its records, which are read as they are asked for.

    Args:
        ahead: how many records of a JSONL file are looked at for its columns; None for all.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        records = (record for batch in file.iter_batches(1024) for record in batch.to_pylist())
        return file.schema_arrow.names, enumerate(records, start=1)
    lines = _lines(path, encoding, problems)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return _read_json(path, lines, problems, ahead)
    return _read_delimited(path, lines, separator, problems)


def _lines(path: Path, encoding: str | None, problems: list[Problem]) -> Iterator[str]:
    """The lines of a text file, each with the newline that ends it; nothing else ends one."""
    encoding = encoding or _encoding_of(path, problems)
    if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):  # where a newline is no single byte
        with path.open(encoding=encoding, newline="\n") as file:
            yield from file
        return
    with path.open("rb") as raw:
        for number, line in enumerate(raw, start=1):
            try:
                yield line.decode(encoding, "replace" if encoding == "cp1252" else "strict")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not {encoding}: {error.reason}") from None


def _encoding_of(path: Path, problems: list[Problem]) -> str:
    """UTF-8 if all of the file is, else Windows-1252, which is said; UTF-16 if it begins like that."""
    with path.open("rb") as raw:
        for number, line in enumerate(raw, start=1):
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return "utf-16"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                message = "not UTF-8; read as Windows-1252 (set `encoding` in the recipe to choose)"
                problems.append(Problem("warning", f"{path}:{number}", message))
                return "cp1252"
    return "utf-8-sig"


def _read_json(
    path: Path, lines: Iterator[str], problems: list[Problem], ahead: int | None
) -> tuple[list[str], Records]:
    def parsed(first: str) -> Iterator[tuple[int, Any]]:
        if first.lstrip().startswith("["):
            yield from enumerate(json.loads("".join([first, *lines])), start=1)
            return
        for number, line in enumerate(chain([first], lines), start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    problems.append(Problem("error", f"{path}:{number}", f"not valid JSON: {error}"))

    def records() -> Records:
        for number, record in parsed(next(lines, "")):
            if isinstance(record, dict):
                yield number, record
            else:
                problems.append(Problem("error", f"{path}:{number}", "not a JSON object"))

    rest = records()
    seen = list(islice(rest, ahead))
    return list(dict.fromkeys(key for _, record in seen for key in record)), chain(seen, rest)


def _read_delimited(
    path: Path, lines: Iterator[str], separator: str | None, problems: list[Problem]
) -> tuple[list[str], Records]:
    header = next(lines, "")
    if not header.strip():
        empty = not any(line.strip() for line in lines)
        raise ValueError("the file is empty" if empty else "the first line is empty; it must name the columns")
    separator = separator or max("\t,;|", key=header.count)
    # SemEval's TSV knows no quoting: a tweet may begin with a quotation mark that is never closed. CSV does.
    quoting: Any = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(chain([header], lines), delimiter=separator, quoting=quoting)
    csv.field_size_limit(10_000_000)
    columns = [name.strip() for name in next(reader)]

    def records() -> Records:
        begins = reader.line_num + 1
        for cells in reader:
            if cells and any(cell.strip() for cell in cells):
                if len(cells) != len(columns):
                    message = f"{len(cells)} columns where the header has {len(columns)}"
                    if reader.line_num - begins > 20:
                        message += f"; a quotation mark opened here is closed only on line {reader.line_num}"
                    problems.append(Problem("error", f"{path}:{begins}", message))
                else:
                    yield begins, dict(zip(columns, cells, strict=True))
            begins = reader.line_num + 1

    return columns, records()


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
        return _no_rows(Path(where)), problems

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
        problems.append(Problem("error", _at(where, numbers), message))

    labelled = [vector is not None for vector in vectors]
    gold = None
    if any(labelled):
        if not all(labelled):
            missing = [line for line, known in zip(lines, labelled, strict=True) if not known]
            problems.append(Problem("error", _at(where, missing), "no labels here, though other rows have them"))
        gold = np.array([vector or (0,) * len(label_set) for vector in vectors], dtype=np.int8)
    elif need_labels and ids:
        problems.append(Problem("error", where, "no row has labels; this file cannot be used for training or scoring"))
    if not ids and not problems and not may_be_empty:
        problems.append(Problem("error", where, "no rows below the header"))
    return Rows(where, ids, texts, gold, lines, id_name or "ID", text_name or "Tweet"), problems


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


def _some(items: Sequence[str | int]) -> str:
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(map(str, items[:_SHOWN])) + more


def _at(where: str, lines: Sequence[int]) -> str:
    """`file:3`, or `file:3, 8, 12 and 40 more`."""
    return f"{where}:{_some(lines)}"


# ---------------------------------------------------------------------------------------------- checks


def normalised(text: str) -> str:
    """What two texts have in common when they are the same to a reader: case and white space do not count."""
    return " ".join(text.casefold().split())


def check_rows(rows: Rows) -> list[Problem]:
    """What is wrong within one file: duplicate ids, conflicting or repeated texts, empty texts, broken encoding."""
    problems = []
    by_id, by_text = defaultdict(list), defaultdict(list)
    for i, (row_id, text) in enumerate(zip(rows.ids, rows.texts, strict=True)):
        by_id[row_id].append(i)
        by_text[normalised(text)].append(i)
    for row_id, index in by_id.items():
        if len(index) > 1:
            problems.append(
                Problem(
                    "error",
                    _at(rows.path, [rows.lines[i] for i in index]),
                    f"the id {row_id!r} occurs {len(index)} times",
                )
            )
    empty = by_text.pop("", [])
    if empty:
        problems.append(Problem("warning", _at(rows.path, [rows.lines[i] for i in empty]), "the text is empty"))
    repeated = 0
    for text, index in by_text.items():
        if len(index) == 1:
            continue
        if rows.gold is not None and len({rows.gold[i].tobytes() for i in index}) > 1:
            where = _at(rows.path, [rows.lines[i] for i in index])
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
                "warning", _at(rows.path, broken), "the text looks wrongly decoded (such as â€™ for ’); see `encoding`"
            )
        )
    return problems


def check_overlap(train: Rows, other: Rows) -> list[Problem]:
    """Texts that stand in both files: figures on them say how well they were learnt by heart."""
    known = {normalised(text) for text in train.texts}
    shared = [line for line, text in zip(other.lines, other.texts, strict=True) if normalised(text) in known - {""}]
    if not shared:
        return []
    return [Problem("warning", _at(other.path, shared), f"{len(shared):,} texts stand in {train.path} too")]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


# ---------------------------------------------------------------------------------------------- splits


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of (kept, held-out) rows, stratified over the labels; the same text never stands on both sides.

    Uses iterative stratification (Sechidis et al. 2011). Needs gold labels.

    Raises:
        ValueError: fewer than two different texts, or no labels.
    """
    from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit

    members, gold = _same_texts(rows)
    if len(members) < 2:
        raise ValueError(f"{rows.path}: cannot hold out rows: fewer than two different texts")
    splitter = MultilabelStratifiedShuffleSplit(n_splits=1, test_size=fraction, random_state=seed)
    kept, held = next(splitter.split(np.zeros(len(members)), gold))
    return tuple(np.sort([i for g in part for i in members[g]]) for part in (kept, held))  # type: ignore[return-value]


def make_folds(rows: Rows, n_folds: int, seed: int) -> np.ndarray:
    """The fold of each row, int64 [n], stratified over the labels; rows with the same text are in the same fold.

    Uses iterative stratification (Sechidis et al. 2011). Needs gold labels.

    Raises:
        ValueError: fewer different texts than folds, or no labels.
    """
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

    members, gold = _same_texts(rows)
    if len(members) < n_folds:
        raise ValueError(f"{rows.path}: cannot make {n_folds} folds of {len(members)} different texts")
    splitter = MultilabelStratifiedKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    folds = np.empty(len(rows), dtype=np.int64)
    for k, (_, held) in enumerate(splitter.split(np.zeros(len(members)), gold)):
        folds[[i for g in held for i in members[g]]] = k
    return folds


def _same_texts(rows: Rows) -> tuple[list[list[int]], np.ndarray]:
    """The positions of the rows of each different text, and the gold labels [groups, L] of its first row."""
    if rows.gold is None:
        raise ValueError(f"{rows.path}: no labels to stratify by")
    groups: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(rows.texts):
        groups[normalised(text)].append(i)
    members = list(groups.values())
    return members, rows.gold[[group[0] for group in members]]


def sample_rows(rows: Rows, n: int, seed: int) -> Rows:
    """A fixed stratified subset of n rows, or all of them if there are no more than n."""
    if n >= len(rows):
        return rows
    if rows.gold is None:
        index = np.sort(np.random.default_rng(seed).permutation(len(rows))[:n])
    else:
        index = hold_out(rows, n / len(rows), seed)[1]
    return rows.take(index)


# ---------------------------------------------------------------------------------------------- a recipe's rows


@dataclass(frozen=True)
class Splits:
    """A recipe's rows: to learn from, to score on (if any), and those that the prompt shows as examples.

    Rows that stand in the prompt are not among the training rows: the model would be asked what it is shown.
    """

    train: Rows
    eval: Rows | None
    examples: Rows


def load_splits(recipe: "Recipe", label_set: LabelSet) -> tuple[Splits | None, list[Problem]]:
    """Read a recipe's data, check it, and split it. The splits are None if an error makes them impossible."""
    columns: dict[str, Any] = {"text_column": recipe.text_column, "id_column": recipe.id_column, "need_labels": True}
    form: dict[str, Any] = {"separator": recipe.separator, "encoding": recipe.encoding}

    def read(file: str | None, split: str | None) -> tuple[Rows, list[Problem]]:
        if file is not None:
            return read_rows(recipe.find(file), label_set, **columns, **form)
        return read_hub(str(recipe.dataset_name), recipe.dataset_config, str(split), label_set, **columns)

    train, problems = read(recipe.train_file, recipe.dataset_train_split)
    problems = problems + check_rows(train)
    held = None
    if recipe.eval_file or recipe.dataset_test_split:
        held, more = read(recipe.eval_file, recipe.dataset_test_split)
        problems += more + check_rows(held) + check_overlap(train, held)
    if any(problem.level == "error" for problem in problems):
        return None, problems
    if recipe.eval_fraction:
        try:
            kept, out = hold_out(train, recipe.eval_fraction, recipe.seed)
        except ValueError as error:
            return None, [*problems, Problem("error", train.path, str(error))]
        train, held = train.take(kept), train.take(out)
    shown = np.sort(np.random.default_rng(recipe.seed).permutation(len(train))[: recipe.examples])
    examples = train.take(shown)
    train = train.take(np.setdiff1d(np.arange(len(train)), shown))
    if not len(train):
        problems.append(Problem("error", train.path, "no rows are left to learn from"))
    return Splits(train, held, examples), problems
