"""CSV, TSV, JSONL and Parquet files and Hub datasets -> rows. Format, separator and encoding are detected."""

import codecs
import csv
import difflib
import json
import logging
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from emogen import paths
from emogen.task.columns import no_rows, rows_from_records
from emogen.task.labels import LabelSet
from emogen.task.rows import DataError, Problem, Rows, checked

log = logging.getLogger(__name__)

Records = Iterator[tuple[int, dict[str, Any]]]  # each with the line on which it begins
_UNREADABLE = (OSError, ValueError, csv.Error, LookupError)
_LOOK_AHEAD = 1000  # records of a streamed JSONL file that are searched for columns


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
        source: a .csv, .tsv, .txt, .jsonl, .ndjson, .json or .parquet file.
        text_column, id_column, separator, encoding: detected by default.
        need_labels: report missing labels as an error.
        need_text: report a missing text column as an error. (A file of predictions has none.)

    Returns:
        The rows that could be read, and every problem. `checked` raises the errors among them.
    """
    path = paths.find(source)
    problems: list[Problem] = []
    try:
        columns, records = _read_table(path, separator, encoding, problems, None)
        return rows_from_records(
            str(source), columns, records, label_set, problems,
            text_column=text_column, id_column=id_column, need_labels=need_labels, need_text=need_text,
        )  # fmt: skip
    except _UNREADABLE as error:
        return no_rows(str(path)), [*problems, _unreadable(source, path, error)]


def stream_rows(
    source: str | Path,
    label_set: LabelSet,
    *,
    size: int,
    text_column: str | None = None,
    id_column: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
) -> Iterator[Rows]:
    """Read a data file of any size in chunks. Warnings are logged.

    Args:
        source, text_column, id_column, separator, encoding: see `read_rows`.
        size: maximum number of rows in a chunk.

    Yields:
        Chunks of rows. A file without rows yields one empty chunk.

    Raises:
        DataError: every error in the next chunk. All chunks before it have been yielded.
    """
    path = paths.find(source)
    problems: list[Problem] = []
    n_rows = 0
    try:
        columns, records = _read_table(path, separator, encoding, problems, _LOOK_AHEAD)
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
    except _UNREADABLE as error:
        raise DataError([_unreadable(source, path, error)]) from None


def read_hub(
    name: str, config: str | None, split: str, label_set: LabelSet, **columns: Any
) -> tuple[Rows, list[Problem]]:
    """Read a split of a dataset on the Hugging Face Hub, or of a local folder that `datasets.load_dataset` reads.

    Args:
        name: name of the dataset, or path of the folder.
        config: configuration of the dataset.
        split: name of the split, such as `train`.
        columns: `text_column`, `id_column` and `need_labels`, as in `read_rows`.

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
    return rows_from_records(where, list(dataset.column_names), records, label_set, [], **columns)


def _unreadable(source: str | Path, path: Path, error: Exception) -> Problem:
    message = _no_such_file(path) if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
    return Problem("error", str(source), message)


def _no_such_file(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
    return "no such file" + (f"; did you mean {path.with_name(near[0])}?" if near else "")


def _read_table(
    path: Path, separator: str | None, encoding: str | None, problems: list[Problem], ahead: int | None
) -> tuple[list[str], Records]:
    """Open a file as a table.

    Args:
        problems: new problems are appended, also later, while the records are read.
        ahead: number of records of a JSONL file to search for columns; None for all.

    Returns:
        The column names, and the records, which are read lazily.
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
    """The lines of a text file with their line ends. Only a newline ends a line, unlike in `str.splitlines`."""
    encoding = encoding or _detect_encoding(path, problems)
    if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):  # where a newline is more than one byte
        with path.open(encoding=encoding, newline="\n") as file:
            yield from file
        return
    with path.open("rb") as raw:
        for number, line in enumerate(raw, start=1):
            try:
                yield line.decode(encoding, "replace" if encoding == "cp1252" else "strict")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not {encoding}: {error.reason}") from None


def _detect_encoding(path: Path, problems: list[Problem]) -> str:
    """UTF-16 if the file begins with its byte order mark, UTF-8 if all lines are; else Windows-1252, with a warning."""
    with path.open("rb") as raw:
        for number, line in enumerate(raw, start=1):
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return "utf-16"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                message = "not UTF-8; read as Windows-1252 (set `encoding` in the recipe to choose another)"
                problems.append(Problem("warning", f"{path}:{number}", message))
                return "cp1252"
    return "utf-8-sig"


def _read_json(
    path: Path, lines: Iterator[str], problems: list[Problem], ahead: int | None
) -> tuple[list[str], Records]:
    """One JSON object per line, or one array of objects."""

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
    """A header line, then one record per line, or per several lines if a quoted cell contains newlines."""
    header = next(lines, "")
    if not header.strip():
        empty = not any(line.strip() for line in lines)
        raise ValueError("the file is empty" if empty else "the first line is empty; it must name the columns")
    separator = separator or max("\t,;|", key=header.count)
    # SemEval's TSV has no quoting: a tweet may begin with a quotation mark that is never closed. CSV has.
    quoting: Any = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(chain([header], lines), delimiter=separator, quoting=quoting)
    csv.field_size_limit(10_000_000)
    columns = [name.strip() for name in next(reader)]

    def records() -> Records:
        begin = reader.line_num + 1
        for cells in reader:
            if cells and any(cell.strip() for cell in cells):
                if len(cells) == len(columns):
                    yield begin, dict(zip(columns, cells, strict=True))
                else:
                    message = f"{len(cells)} columns where the header has {len(columns)}"
                    if reader.line_num - begin > 20:
                        message += f"; a quotation mark opened here is closed only on line {reader.line_num}"
                    problems.append(Problem("error", f"{path}:{begin}", message))
            begin = reader.line_num + 1

    return columns, records()
