"""CSV, TSV, JSONL and Parquet files and Hub datasets -> rows. Format, separator and encoding are detected."""

import difflib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from emogen import paths
from emogen.task.columns import Record, find_columns, no_rows, read_records, rows_from_records
from emogen.task.delimited import LOOK_AHEAD, read_delimited
from emogen.task.json_files import read_json
from emogen.task.labels import LabelSet
from emogen.task.rows import DataError, Mistakes, Problem, Rows, checked
from emogen.task.text_files import UNREADABLE, check_kind, read_lines

log = logging.getLogger(__name__)

_JSON = (".jsonl", ".ndjson", ".json")
_DELIMITED = (".csv", ".tsv", ".tab", ".txt")
_PARQUET = ".parquet"


@dataclass
class _Table:
    """An open file.

    Attributes:
        columns: the column names, in which a name may be repeated.
        records: line number and values of each record, read lazily.
        mistakes: of the records so far.
        classes: for columns of class numbers, the names of the classes.
    """

    columns: list[str]
    records: Iterator[tuple[int, Record]]
    mistakes: Mistakes
    classes: Mapping[str, Sequence[str]]


def read_rows(
    source: str | Path,
    label_set: LabelSet,
    *,
    text_column: str | None = None,
    id_column: str | None = None,
    labels_column: str | None = None,
    separator: str | None = None,
    quoting: str | None = None,
    encoding: str | None = None,
    need_labels: bool = False,
    need_text: bool = True,
    need_ids: bool = True,
    soft_labels: bool = False,
) -> tuple[Rows, list[Problem]]:
    """Read a data file.

    Args:
        source: a .csv, .tsv, .tab, .txt, .jsonl, .ndjson or .json file, also with .gz after that; or a .parquet file.
        text_column, id_column, labels_column, separator, quoting, encoding: detected by default.
        need_labels: report missing labels as an error.
        need_text: report a missing text column as an error. (A file of predictions has none.)
        need_ids: report a missing id column as a warning.
        soft_labels: read probabilities in place of 0 and 1, in label columns or in objects.

    Returns:
        The rows that could be read, and every problem. `checked` raises the errors among them.
    """
    path = paths.find(source)
    problems: list[Problem] = []
    try:
        table = _open_table(path, separator, quoting, encoding, problems, None)
        records = list(table.records)
        if not table.columns:
            return no_rows(str(source)), problems + (table.mistakes.take(str(source)) or [_no_rows_problem(source)])
        columns = find_columns(
            str(source), table.columns, [record for _, record in records], label_set, problems,
            text_column=text_column, id_column=id_column, labels_column=labels_column, classes=table.classes,
            need_labels=need_labels, need_text=need_text, need_ids=need_ids, soft_labels=soft_labels,
        )  # fmt: skip
        if columns is None:
            return no_rows(str(source)), problems + table.mistakes.take(str(source))
        rows = read_records(
            str(source), columns, records, label_set, problems, table.mistakes,
            need_labels=need_labels, need_text=need_text, soft_labels=soft_labels,
        )  # fmt: skip
        return rows, problems
    except UNREADABLE as error:
        return no_rows(str(path)), [*problems, _unreadable(source, path, error)]


def stream_rows(
    source: str | Path,
    label_set: LabelSet,
    *,
    size: int,
    text_column: str | None = None,
    id_column: str | None = None,
    labels_column: str | None = None,
    separator: str | None = None,
    quoting: str | None = None,
    encoding: str | None = None,
) -> Iterator[Rows]:
    """Read a data file of any size in chunks. Each warning is logged once.

    Args:
        source, text_column, id_column, labels_column, separator, quoting, encoding: see `read_rows`.
        size: maximum number of rows in a chunk.

    Yields:
        Chunks of rows. A file without rows yields one empty chunk.

    Raises:
        DataError: every error in the next chunk. All chunks before it have been yielded.
    """
    path, where = paths.find(source), str(source)
    problems: list[Problem] = []
    said: set[str] = set()
    n_rows = 0
    try:
        table = _open_table(path, separator, quoting, encoding, problems, LOOK_AHEAD)
        sample = list(islice(table.records, LOOK_AHEAD))
        if not table.columns:
            raise DataError(table.mistakes.take(where) or [_no_rows_problem(source)])
        columns = find_columns(
            where, table.columns, [record for _, record in sample], label_set, problems,
            text_column=text_column, id_column=id_column, labels_column=labels_column, classes=table.classes,
        )  # fmt: skip
        if columns is None:
            raise DataError([problem for problem in problems if problem.level == "error"])
        records = chain(sample, table.records)
        while True:
            chunk = islice(records, size)
            rows = read_records(where, columns, chunk, label_set, problems, table.mistakes, may_be_empty=True)
            rows = checked((rows, problems))
            _log_new(problems, said)
            problems.clear()
            if not n_rows and not len(rows):
                log.warning(f"{source}: no rows below the header")
            if len(rows) or not n_rows:
                yield rows
            n_rows += len(rows)
            if not len(rows):
                return
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError([_unreadable(source, path, error)]) from None


def _log_new(problems: Sequence[Problem], said: set[str]) -> None:
    """Log the warnings whose message was not logged before."""
    for problem in problems:
        if problem.message not in said:
            said.add(problem.message)
            log.warning(str(problem))


def read_hub(
    name: str, config: str | None, split: str, label_set: LabelSet, **columns: Any
) -> tuple[Rows, list[Problem]]:
    """Read a split of a dataset on the Hugging Face Hub, or of a local folder that `datasets.load_dataset` reads.

    Args:
        name: name of the dataset, or path of the folder.
        config: configuration of the dataset.
        split: name of the split, such as `train`.
        columns: `text_column`, `id_column`, `labels_column`, `need_labels` and `soft_labels`, as in `read_rows`.

    Returns:
        As `read_rows`. Lines are row numbers from 1.
    """
    import datasets

    where = f"{name}[{split}]"
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # load_dataset documents no common class of its many errors
        return no_rows(where), [Problem("error", where, f"cannot be loaded: {error}")]
    records = ((i, dict(record)) for i, record in enumerate(dataset, start=1))
    classes = _class_names(dataset.features.to_dict())
    return rows_from_records(where, list(dataset.column_names), records, label_set, [], classes=classes, **columns)


def _no_rows_problem(source: str | Path) -> Problem:
    return Problem("error", str(source), "no rows")


def _unreadable(source: str | Path, path: Path, error: Exception) -> Problem:
    message = f"cannot be read: {error}"
    if isinstance(error, FileNotFoundError):
        message = _no_such_file(path)
    elif isinstance(error, IsADirectoryError):
        message = "a folder; name a file in it"
    return Problem("error", str(source), message)


def _no_such_file(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
    return "no such file" + (f"; did you mean {path.with_name(near[0])}?" if near else "")


def _open_table(
    path: Path,
    separator: str | None,
    quoting: str | None,
    encoding: str | None,
    problems: list[Problem],
    ahead: int | None,
) -> _Table:
    """Open a file as a table.

    Args:
        problems: a warning about the encoding is appended.
        ahead: number of records of a JSONL file to search for columns; None for all.
    """
    ending = path.suffix.lower()
    is_packed = ending == ".gz"
    if is_packed:
        ending = Path(path.stem).suffix.lower()
    is_known = ending in (*_JSON, *_DELIMITED) or (ending == _PARQUET and not is_packed)
    if path.is_file() or not path.exists():
        check_kind(path, parquet=ending == _PARQUET)
    if not is_known:
        known = ", ".join((*_DELIMITED, *_JSON, _PARQUET))
        shown = "".join(path.suffixes[-2:]) if is_packed else path.suffix
        raise ValueError(f"the ending {shown!r} is unknown; expected {known}, or .gz after a text format")
    mistakes = Mistakes()
    if ending == _PARQUET:
        return _open_parquet(path, mistakes)
    lines = read_lines(path, encoding, problems)
    if ending in _JSON:
        return _Table(*read_json(lines, mistakes, ahead), mistakes, {})
    return _Table(*read_delimited(path, lines, separator, quoting, mistakes), mistakes, {})


def _open_parquet(path: Path, mistakes: Mistakes) -> _Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None

    def records() -> Iterator[tuple[int, Record]]:
        try:
            rows = (record for batch in file.iter_batches(1024) for record in batch.to_pylist())
            yield from enumerate(rows, start=1)
        except pyarrow.ArrowException as error:
            raise ValueError(str(error)) from None

    return _Table(file.schema_arrow.names, records(), mistakes, _parquet_classes(file.schema_arrow.metadata or {}))


def _parquet_classes(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names of class numbers, which the library datasets keeps in the schema of a Parquet file."""
    try:
        return _class_names(json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"])
    except (ValueError, KeyError, TypeError):
        return {}


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the classes of each column of class numbers, or of lists of them."""
    names = {}
    for column, feature in features.items():
        if isinstance(feature, list) and feature:
            feature = feature[0]
        if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            names[column] = [str(name) for name in feature["names"]]
    return names
