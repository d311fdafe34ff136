"""JSON files -> records: one object per line, an array of objects, or a table as pandas writes it."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from emogen.task.rows import Mistakes

Numbered = Iterator[tuple[int, Any]]  # values with the line on which each begins
_SPLIT = {"columns", "data"}  # DataFrame.to_json(orient="split")
_SHAPES = "one object per line, an array of objects, or a table as pandas writes it"


def read_json(
    lines: Iterator[str], mistakes: Mistakes, ahead: int | None
) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    """Read the records of a JSON file.

    Args:
        mistakes: receives the mistakes of single records, also later, while the records are read.
        ahead: number of records to search for columns; None for all.

    Returns:
        The keys of the records, and the records with the line on which each begins, which are read lazily.

    Raises:
        ValueError: the file is one JSON value, and that is no table.
    """
    rest = _objects(_values(lines, mistakes), mistakes)
    seen = list(islice(rest, ahead))
    return list(dict.fromkeys(key for _, record in seen for key in record)), chain(seen, rest)


def _objects(values: Numbered, mistakes: Mistakes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, value in values:
        if isinstance(value, dict):
            yield number, value
        else:
            mistakes.add(number, "not a JSON object")


def _values(lines: Iterator[str], mistakes: Mistakes) -> Numbered:
    """The values of a file with one value per line, or of a file that is one array or one table."""
    number, first = next(((n, line) for n, line in enumerate(lines, start=1) if line.strip()), (1, ""))
    if first.lstrip().startswith("["):
        yield from _elements("\n" * (number - 1) + "".join([first, *lines]), mistakes)
    elif first.rstrip()[-1:] in ("{", "[", ",", ":"):  # one value over several lines
        text = "\n" * (number - 1) + "".join([first, *lines])
        try:
            value = _parse(text)
        except ValueError as error:
            mistakes.add(_line_of(error, number), "not valid JSON: ", _reason(error))
            return
        yield from _table(value, number)
    else:
        second = next(((n, line) for n, line in enumerate(lines, start=number + 1) if line.strip()), None)
        if second is None:
            for _, value in _line(number, first, mistakes):
                yield from _table(value, number)
            return
        yield from _line(number, first, mistakes)
        for number, line in chain([second], enumerate(lines, start=second[0] + 1)):
            if line.strip():
                yield from _line(number, line, mistakes)


def _line(number: int, line: str, mistakes: Mistakes) -> Numbered:
    try:
        yield number, _parse(line)
    except ValueError as error:
        mistakes.add(number, "not valid JSON: ", _reason(error))


def _elements(text: str, mistakes: Mistakes) -> Numbered:
    """The elements of an array, each with its line."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats)
    number, counted = 1, 0
    at = _skip(text, text.index("[") + 1)
    while not text.startswith("]", at):
        number, counted = number + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            mistakes.add(_line_of(error, number), "not valid JSON: ", _reason(error))
            return
        yield number, value
        at = _skip(text, at)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            mistakes.add(1 + text.count("\n", 0, at), "not valid JSON: ", "expected a comma or ] after an element")
            return
    if text[at + 1 :].strip():
        mistakes.add(
            1 + text.count("\n", 0, _skip(text, at + 1)), "not valid JSON: ", "text after the end of the array"
        )


def _skip(text: str, at: int) -> int:
    """The position of the next character that is no space."""
    while text[at : at + 1].isspace():
        at += 1
    return at


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some keys and values.

    Raises:
        ValueError: a key is repeated.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return values


def _line_of(error: Exception, default: int) -> int:
    return error.lineno if isinstance(error, json.JSONDecodeError) else default


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number of too many digits" if "integer string conversion" in str(error) else str(error)


def _table(value: Any, line: int) -> Numbered:
    """The records of a file that is one JSON value, each with the line or the number of its row.

    Raises:
        ValueError: the value is neither a record nor a table.
    """
    if not isinstance(value, dict) or not value:
        yield line, value
        return
    if value.keys() >= _SPLIT and all(isinstance(value[key], list) for key in _SPLIT):
        yield from enumerate(_rows_of_split(value), start=1)
    elif isinstance(data := value.get("data"), list) and all(isinstance(row, dict) for row in data):
        yield from enumerate(data, start=1)
    elif all(isinstance(column, dict) for column in value.values()):
        yield from enumerate(_rows_of_dicts(value), start=1)
    elif all(isinstance(column, list) for column in value.values()):
        columns = list(value.values())
        if len({len(column) for column in columns}) > 1:
            raise ValueError("its lists have different lengths")
        yield from enumerate((dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)), start=1)
    elif any(isinstance(v, list) and v and all(isinstance(row, dict) for row in v) for v in value.values()):
        key = next(k for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict))
        raise ValueError(f"it is one JSON object, whose rows may be in {key!r}; expected {_SHAPES}")
    else:
        yield line, value


def _rows_of_split(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of `{"columns": [...], "index": [...], "data": [[...], ...]}`."""
    columns, rows = [str(column) for column in value["columns"]], value["data"]
    if len(set(columns)) < len(columns):
        raise ValueError("a name in 'columns' is given twice")
    if not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        raise ValueError("a row of 'data' has not one value for each of the 'columns'")
    index = value.get("index")
    if index is not None and (not isinstance(index, list) or len(index) != len(rows)):
        raise ValueError("'index' has not one value for each row of 'data'")
    yield from _with_index(index or range(len(rows)), [dict(zip(columns, row, strict=True)) for row in rows])


def _rows_of_dicts(value: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of `{"text": {"0": ..., "1": ...}, ...}`, or of `{"0": {"text": ..., ...}, ...}`."""
    outer, inner = list(value), list(next(iter(value.values())))
    if any(list(part) != inner for part in value.values()):
        raise ValueError(f"it is one JSON object of objects with different keys; expected {_SHAPES}")
    is_by_column, is_by_row = _are_numbers(inner), _are_numbers(outer)
    if is_by_column == is_by_row:
        raise ValueError(
            f"it is one JSON object of objects, and rows and columns cannot be told apart; expected {_SHAPES}"
        )
    if is_by_column:
        yield from _with_index(inner, [{column: value[column][key] for column in outer} for key in inner])
    else:
        yield from _with_index(outer, list(value.values()))


def _are_numbers(keys: Sequence[str]) -> bool:
    return all(key.isdecimal() for key in keys)


def _with_index(index: Sequence[Any], rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, each with its index; without it if the index only numbers them."""
    if [str(i) for i in index] == [str(i) for i in range(len(rows))]:
        return iter(rows)
    return iter({"index": i} | row for i, row in zip(index, rows, strict=True))
