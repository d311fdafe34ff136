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
        return no_rows(path), [*problems, _unreadable(source, path, error)]


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
        return no_rows(Path(where)), [Problem("error", where, f"cannot be loaded: {error}")]
    records = ((i, dict(record)) for i, record in enumerate(dataset, start=1))
    return rows_from_records(where, list(dataset.column_names), records, label_set, [], **columns)


UNREADABLE = (OSError, ValueError, csv.Error, LookupError)


def _unreadable(source: str | Path, path: Path, error: Exception) -> Problem:
    message = _no_such_file(path) if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
    return Problem("error", str(source), message)


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
