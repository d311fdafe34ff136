"""Delimited text (CSV, TSV) -> records. Separator and quoting are detected, and quoted cells are read strictly.

A quotation mark at the beginning of a cell means one of two things. In CSV it quotes the cell (RFC 4180). In the TSV
files of SemEval it is a plain character: a tweet may begin with a quotation mark that is never closed. Files without
tabs are CSV. For files with tabs, both readings of the first lines are compared.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from emogen.task.rows import Mistakes

LOOK_AHEAD = 1000  # lines from which the form is detected
_FIELD_LIMIT = 10_000_000  # characters of a cell
_TWICE = "within a quoted cell a quotation mark is written twice"
_SET_NONE = "if quotation marks are plain text in this file, set quoting: none"
_SET_CSV = "if quotation marks quote cells in this file, set quoting: csv"


@dataclass(frozen=True)
class Form:
    """How the cells of a file are separated.

    Attributes:
        separator: the character between cells.
        is_quoted: whether a quotation mark at the beginning of a cell quotes it.
        is_open: whether no cell of the first lines begins with a quotation mark, so that `is_quoted` is a guess.
    """

    separator: str
    is_quoted: bool
    is_open: bool = False


class _Record(NamedTuple):
    line: int  # on which it begins
    lines: list[str]
    cells: list[str]

    @property
    def is_blank(self) -> bool:
        return not any(cell.strip() for cell in self.cells) and (len(self.cells) > 1 or not self.lines[0].strip())


class _CellError(Exception):
    """A record that cannot be split into cells."""

    def __init__(self, line: int, message: str, *, is_unfinished: bool):
        super().__init__(message)
        self.line, self.is_unfinished = line, is_unfinished


class _Trial(NamedTuple):
    """A reading of the first lines: the records that are not blank, and what is wrong with it."""

    records: list[_Record]
    n_wrong: int  # records with another number of cells than the header, and 1 for a quoting error
    is_unfinished: bool  # whether a quoted cell goes on after the first lines

    @property
    def n_columns(self) -> int:
        return len(self.records[0].cells) if self.records else 0


def read_delimited(
    path: Path, lines: Iterator[str], separator: str | None, quoting: str | None, mistakes: Mistakes
) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    """A header line, then one record per line, or per several lines if a quoted cell contains newlines.

    Args:
        separator, quoting: detected by default; quoting is `csv` or `none`.
        mistakes: receives the mistakes of single records, also later, while the records are read.

    Returns:
        The column names, and the records with the line on which each begins, which are read lazily.

    Raises:
        ValueError: there is no header, or the form cannot be told.
    """
    separator = _checked_separator(separator)
    sample = list(islice(lines, LOOK_AHEAD))
    first = 1
    if sample and (named := re.fullmatch(r'"?sep=(.)"?[\r\n]*', sample[0])):  # written by and for Excel
        separator, first = separator or named[1], 2
        del sample[0]
    if not sample or not sample[0].strip():
        empty = not any(line.strip() for line in chain(sample, lines))
        raise ValueError("the file is empty" if empty else "the first line is empty; it must name the columns")
    if re.match(r'\s*(\{\s*"|\[\s*[\[{"])', sample[0]):
        raise ValueError("the first line is JSON and no header; give the file a name that ends with .jsonl or .json")
    is_whole = len(sample) < LOOK_AHEAD - 1
    csv.field_size_limit(_FIELD_LIMIT)
    form = _detect(path, sample, separator, quoting, is_whole)
    records = _split(chain(sample, lines), form.separator, form.is_quoted, first)
    try:
        columns = [name.strip() for name in next(records).cells]
    except _CellError as error:
        mistakes.add(error.line, str(error))
        return [], iter(())
    shapes = _shapes(_try(sample, form.separator, form.is_quoted, is_whole).records) if form.is_quoted else {}
    return columns, _checked_records(records, form, len(columns), columns, shapes, mistakes)


def csv_text(records: Iterable[Sequence[Any]]) -> str:
    """Cells as a CSV file that `read_delimited` reads.

    A carriage return ends a line for readers, but csv does not quote it where lines end otherwise.
    """
    text = io.StringIO()
    usual, quoted = (csv.writer(text, lineterminator="\n", quoting=how) for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    for cells in records:
        (quoted if any("\r" in str(cell) for cell in cells) else usual).writerow(cells)
    return text.getvalue()


def _checked_separator(separator: str | None) -> str | None:
    if separator == "\\t":
        return "\t"
    if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
        raise ValueError(f"separator is {separator!r}; expected one character, or \\t for a tab")
    return separator


def _checked_records(
    records: Iterator[_Record],
    form: Form,
    n_columns: int,
    columns: Sequence[str],
    shapes: dict[int, str],
    mistakes: Mistakes,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records that have a cell for each column. After a record that cannot be split nothing can be trusted."""
    is_open = form.is_open
    try:
        for record in records:
            if record.is_blank:
                continue
            if is_open:
                is_open = _stays_open(record)
            if len(record.cells) != n_columns:
                _note_number_of_cells(record, form, n_columns, mistakes)
            elif (
                len(record.lines) > 1
                and shapes
                and all(_is_a_row(line, form, n_columns, shapes) for line in record.lines)
            ):
                message = f"a quotation mark opens a cell here, and whole rows up to line {_last(record)} are within it"
                raise _CellError(record.line, f"{message}; {_TWICE}; {_SET_NONE}", is_unfinished=False)
            elif form.is_quoted and _has_quotes_after_spaces(record, form):
                mistakes.add(
                    record.line, f"a space before the quotation mark of a quoted cell; remove it, or {_SET_NONE}"
                )
            else:
                yield record.line, dict(zip(columns, record.cells, strict=True))
    except _CellError as error:
        mistakes.add(error.line, str(error))


def _note_number_of_cells(record: _Record, form: Form, n_columns: int, mistakes: Mistakes) -> None:
    after = f" columns where the header has {n_columns}"
    if len(record.lines) > 1:
        after += f"; a quotation mark opened here is closed only on line {_last(record)}"
    elif not form.is_quoted and any(cell.startswith('"') for cell in record.cells):
        after += f"; {_SET_CSV}"
    mistakes.add(record.line, "", str(len(record.cells)), after)


def _last(record: _Record) -> int:
    return record.line + len(record.lines) - 1


def _split(lines: Iterable[str], separator: str, is_quoted: bool, first: int = 1) -> Iterator[_Record]:
    """The records of lines, of which the first has the number `first`.

    Raises:
        _CellError: a record cannot be split into cells.
    """
    held: list[str] = []

    def hold() -> Iterator[str]:
        for line in lines:
            held.append(line)
            yield line

    quoting: Any = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    reader = csv.reader(hold(), delimiter=separator, quoting=quoting, strict=is_quoted)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _cell_error(held, first, separator, str(error)) from None
        yield _Record(first, held[:], cells)
        first += len(held)
        held.clear()


def _cell_error(lines: Sequence[str], first: int, separator: str, reason: str) -> _CellError:
    """The error for the lines of a record that csv cannot read, with the line on which the faulty cell begins."""
    if "new-line" in reason:
        message = "a carriage return within a line; save the file with the line ends of Linux or Windows"
        return _CellError(first, message, is_unfinished=False)
    text = "".join(lines)
    line = first + text.count("\n", 0, _opening(text, separator))
    last = first + len(lines) - 1
    is_unfinished = reason == "unexpected end of data"
    if is_unfinished:
        message = "a quotation mark opens a cell here and is never closed"
    elif "limit" in reason:
        message = f"a quotation mark opens a cell here and is not closed within {_FIELD_LIMIT:,} characters"
    elif line == last:
        message = "text follows the quotation mark that closes a cell"
    else:
        message = (
            f"a quotation mark opens a cell here and is not closed; the next one, on line {last}, is within a text"
        )
    return _CellError(line, f"{message}; {_TWICE}; {_SET_NONE}", is_unfinished=is_unfinished)


def _opening(text: str, separator: str) -> int:
    """The position of the quotation mark that opens the first cell of a record that is not closed properly."""
    at = 0
    while True:
        if text.startswith('"', at):
            opened, at = at, at + 1
            while (at := text.find('"', at)) >= 0 and text.startswith('""', at):
                at += 2
            if at < 0 or text[at + 1 : at + 2] not in ("", separator, "\r", "\n"):
                return opened
        at = text.find(separator, at) + 1
        if at == 0:
            return 0


def _try(sample: Sequence[str], separator: str, is_quoted: bool, is_whole: bool) -> _Trial:
    """Read the first lines in one way.

    Args:
        is_whole: whether the file has no more lines.
    """
    records: list[_Record] = []
    n_wrong, is_unfinished = 0, False
    try:
        records.extend(record for record in _split(sample, separator, is_quoted) if not record.is_blank)
    except _CellError as error:
        is_unfinished = error.is_unfinished and not is_whole
        n_wrong = int(not is_unfinished)
    return _Trial(records, n_wrong + sum(len(r.cells) != len(records[0].cells) for r in records), is_unfinished)


def _detect(path: Path, sample: Sequence[str], separator: str | None, quoting: str | None, is_whole: bool) -> Form:
    """The form of a file: of the separators in the header, that which fits most rows, and then gives most columns."""
    separators = [separator] if separator else [s for s in "\t,;|" if s in sample[0]]
    forms = [_form(path, sample, s, quoting, is_whole) for s in separators]
    tried = [(_try(sample, form.separator, form.is_quoted, is_whole), form) for form in forms]
    if not separator:
        tried = [(trial, form) for trial, form in tried if trial.n_columns > 1]
    if not tried:
        return _form_of_one_column(path, sample, quoting, is_whole)
    ranks = [(trial.n_wrong / max(1, len(trial.records)), -trial.n_columns) for trial, _ in tried]
    best = min(ranks)
    if ranks.count(best) > 1:
        shown = " and ".join(repr(form.separator) for rank, (_, form) in zip(ranks, tried, strict=True) if rank == best)
        raise ValueError(f"the columns may be separated by {shown}; set separator")
    return tried[ranks.index(best)][1]


def _form(path: Path, sample: Sequence[str], separator: str, quoting: str | None, is_whole: bool) -> Form:
    """The form of a file with the given separator."""
    if quoting is not None or separator != "\t":
        return Form(separator, quoting != "none")
    plain, strict = (_try(sample, separator, is_quoted, is_whole) for is_quoted in (False, True))
    if plain.n_wrong:
        return Form(separator, not strict.n_wrong)
    if strict.n_wrong or strict.is_unfinished:
        return Form(separator, False)
    return _form_by_quotes(path, plain.records, separator, separator)


def _form_of_one_column(path: Path, sample: Sequence[str], quoting: str | None, is_whole: bool) -> Form:
    """The form of a file whose header has no separator. Its cells may contain commas, quoted or as plain lines."""
    if quoting is not None:
        return Form("," if quoting == "csv" else "\t", quoting == "csv")
    plain, strict = _try(sample, "\t", False, is_whole), _try(sample, ",", True, is_whole)
    if not strict.n_wrong:
        if plain.n_wrong or any(len(record.lines) > 1 for record in strict.records):
            return Form(",", True)
        form = _form_by_quotes(path, plain.records, "\t", ",")
        return Form(",", True) if form.is_quoted or form.is_open else form
    if plain.n_wrong or (path.suffix.lower() == ".csv" and any(line.startswith('"') for line in sample)):
        return Form(",", True)
    return Form("\t", False)


def _form_by_quotes(path: Path, records: Sequence[_Record], separator: str, needs_quotes: str) -> Form:
    """The form of a file that can be read both ways, from the cells in quotation marks.

    A program that writes CSV quotes the cells that need it, or whole columns with their names. A writer of texts puts
    single texts into quotation marks.

    Args:
        records: as they are without quoting, the header first.
        needs_quotes: the separator for which a program would quote a cell.

    Raises:
        ValueError: the cells do not tell.
    """
    header, *body = [record.cells for record in records]
    quoted = [(k, cell) for cells in body for k, cell in enumerate(cells) if cell.startswith('"')]
    if any(cell.startswith('"') for cell in header):
        return Form(separator, True)
    if not quoted:
        return Form(separator, False, is_open=True)
    if path.name.lower().removesuffix(".gz").endswith(".csv"):
        return Form(separator, True)
    if any('""' in cell[1:-1] or needs_quotes in cell for _, cell in quoted):
        return Form(separator, True)
    columns = [[cells[k] for cells in body if cells[k]] for k in {k for k, _ in quoted}]
    if any(all(cell.startswith('"') for cell in column) for column in columns):
        if len(body) == 1:
            raise ValueError(
                f"it cannot be told if the quotation marks on line {records[1].line} quote the cell or are part of it; "
                "set quoting: csv or quoting: none"
            )
        return Form(separator, True)
    return Form(separator, False)


def _stays_open(record: _Record) -> bool:
    """Whether it is still open if quotation marks quote cells, after a record without quoting.

    Raises:
        _CellError: the record suggests that they do.
    """
    for cell in record.cells:
        if cell.startswith('"'):
            if not re.fullmatch(r'"(?:[^"]|"")*"', cell):
                return False
            if '""' in cell[1:-1]:
                message = f"the first quoted cell; the {LOOK_AHEAD:,} lines before it do not tell if cells are quoted"
                raise _CellError(record.line, f"{message}; set quoting: csv or quoting: none", is_unfinished=False)
    return True


def _has_quotes_after_spaces(record: _Record, form: Form) -> bool:
    """Whether a cell is in quotation marks that do not quote it, as a space precedes them."""
    cells = record.lines[0].rstrip("\r\n").split(form.separator)
    if '"' not in record.lines[0] or any(cell.startswith('"') for cell in cells):
        return False
    return any(len(cell.strip()) > 1 and cell.strip()[0] == cell.strip()[-1] == '"' for cell in cells)


def _shape(cell: str) -> str:
    """`p12` -> `a9`: letters and digits as kinds."""
    return re.sub(r"\d+", "9", re.sub(r"[^\W\d_]+", "a", cell))


def _shapes(records: Sequence[_Record]) -> dict[int, str]:
    """The columns whose cells have the same shape, with digits, in all records of one line: ids and 0/1 columns."""
    header, *others = records
    body = [r.cells for r in others if len(r.lines) == 1 and len(r.cells) == len(header.cells)]
    if not body:
        return {}
    shapes = [{_shape(cell) for cell in column} for column in zip(*body, strict=True)]
    return {k: shape for k, (shape, *more) in enumerate(shapes) if not more and "9" in shape}


def _is_a_row(line: str, form: Form, n_columns: int, shapes: dict[int, str]) -> bool:
    """Whether a line of a record looks like a row of its own."""
    cells = line.rstrip("\r\n").split(form.separator)
    return len(cells) == n_columns and all(_shape(cells[k]) == shape for k, shape in shapes.items())
