"""Text files of any encoding, gzipped or not -> lines. Files of other kinds are refused by their first bytes."""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from emogen.task.rows import Problem

# What opening and reading a text file raises.
UNREADABLE = (OSError, EOFError, ValueError, LookupError, zlib.error)

_BLOCK = 65_536  # bytes from which the kind of a file and its line ends are told
# The first bytes of files that bear the name of a data file by mistake.
_OTHER_KINDS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; run `git lfs pull`"),
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook; save the sheet as CSV"),
    (b"\x1f\x8b", "compressed by gzip; give it a name that ends with .gz, such as rows.csv.gz"),
    (b"BZh", "compressed by bzip2; unpack it, or compress it by gzip"),
    (b"\xfd7zXZ", "compressed by xz; unpack it, or compress it by gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it, or compress it by gzip"),
    (b"PAR1", "a Parquet file; give it a name that ends with .parquet"),
    (b"ARROW1", "an Arrow file; save it as Parquet or CSV"),
    (b"%PDF", "a PDF file; save the table as CSV"),
    (b"SQLite format 3", "an SQLite database; export the table as CSV"),
    (b"\x89PNG", "a picture"),
    (b"{\\rtf", "an RTF document; save it as plain text"),
)
_HTML = re.compile(rb"\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading its bytes; if its name ends with .gz, unpacked."""
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def check_kind(path: Path, *, parquet: bool = False) -> None:
    """Refuse a file that is not what its name says.

    Raises:
        ValueError: the file is of another kind; the message says which, and what to do.
    """
    with open_bytes(path) as raw:
        begin = raw.read(_BLOCK)
    for magic, kind in _OTHER_KINDS:
        if begin.startswith(magic) and not (parquet and magic == b"PAR1"):
            raise ValueError(f"it is {kind}")
    if _HTML.match(begin.removeprefix(codecs.BOM_UTF8)):
        raise ValueError("it is a web page or XML, such as the page of a failed download; download the file itself")
    if parquet and begin and not begin.startswith(b"PAR1"):
        raise ValueError("it is not a Parquet file")


def read_lines(path: Path, encoding: str | None, problems: list[Problem]) -> Iterator[str]:
    """The lines of a text file with their line ends.

    Only a newline ends a line, unlike in `str.splitlines`, or only a carriage return in a file without newlines.

    Args:
        encoding: detected by default.
        problems: a warning is appended if the file is not Unicode.

    Raises:
        ValueError: a line cannot be decoded, or contains NUL characters.
    """
    encoding = encoding or _detect_encoding(path, problems)
    if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):  # where a newline is more than one byte
        lines = _wide_lines(path, encoding)
    else:
        lines = _narrow_lines(path, encoding)
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise ValueError(
                f"line {number} contains NUL characters: the file is damaged, no text, or text in another encoding; "
                "UTF-16 without a byte order mark needs `encoding: utf-16-le`"
            )
        yield line.removeprefix("\ufeff") if number == 1 else line


def _wide_lines(path: Path, encoding: str) -> Iterator[str]:
    with io.TextIOWrapper(open_bytes(path), encoding=encoding, newline="") as file:
        begin = file.read(_BLOCK)
    end = "\r" if "\r" in begin and "\n" not in begin else "\n"
    with io.TextIOWrapper(open_bytes(path), encoding=encoding, newline=end) as file:
        yield from (line[:-1] + "\n" if line.endswith("\r") else line for line in file)


def _narrow_lines(path: Path, encoding: str) -> Iterator[str]:
    with open_bytes(path) as raw:
        for number, line in enumerate(_byte_lines(raw), start=1):
            try:
                yield line.decode(encoding, "replace" if encoding == "cp1252" else "strict")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not {encoding}: {error.reason}") from None


def _byte_lines(raw: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, which end with a newline, or with a carriage return if the first block has no newline."""
    begin = raw.read(_BLOCK)
    raw.seek(0)
    if b"\r" not in begin or b"\n" in begin:
        yield from raw
        return
    rest = b""
    while block := raw.read(_BLOCK):
        *lines, rest = (rest + block).split(b"\r")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _detect_encoding(path: Path, problems: list[Problem]) -> str:
    """UTF-16 or UTF-32 if the file begins with its byte order mark, UTF-8 if all lines are; else Windows-1252.

    The last appends a warning to the problems.
    """
    with open_bytes(path) as raw:
        for number, line in enumerate(raw, start=1):
            if number == 1 and line.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
                return "utf-32"
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return "utf-16"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                message = "not UTF-8; read as Windows-1252 (set `encoding` in the recipe to choose another)"
                problems.append(Problem("warning", f"{path}:{number}", message))
                return "cp1252"
    return "utf-8-sig"
