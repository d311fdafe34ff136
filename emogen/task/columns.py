"""Records -> rows: find the columns of the id, the text and the labels, and read them."""

import difflib
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emogen.task.label_cells import OFF, ON, UNLABELLED, LabelCells, Vector, expected, read_value
from emogen.task.labels import LabelSet, key_of
from emogen.task.rows import Mistakes, Problem, Rows, at_lines

ID_NAMES = ("id", "tweet_id", "post_id", "text_id", "row_id")
TEXT_NAMES = ("text", "tweet", "post", "sentence", "content", "message", "comment")
LABELS_NAMES = ("labels", "emotions")  # one column with all labels
_LABEL_NAMES = ("label", "emotion")  # the same, where labels are needed: other files use these words for other things

# Names of columns that are ids if their values are different: `comment_id`, `tweetID`, `id_str`; and of pandas' index.
_ID_WORD = re.compile(
    "(.* )?(id|ids|uid|uuid|guid|identifier)|ids? .*|"
    "(tweet|post|text|row|doc|document|comment|sample|message|msg|review|sentence|item|record|example|instance)id"
)
_INDEX_NAME = re.compile(
    r"|index|idx|unnamed \d+|index level \d+|level \d+|key|number|num|nr|no|(row|line)( (number|no|nr))?|row ?names?|"
    "serial( (number|no|nr))?"
)
_ID_VALUE = re.compile(r"(?=\S*\d)(?=\S*[^\W\d_])[\w.:#-]+")  # x9, emo-0012: letters and digits
_ROUNDED = re.compile(r"\d(\.\d+)?[eE]\+\d\d+")  # 1.23457E+17: an id of which a spreadsheet has cut the digits
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 20  # columns that a message names

Record = Mapping[str, Any]
# (record, line number, mistakes) -> the 0/1 vector of a row, or None if the row has no labels.
LabelReader = Callable[[Record, int, Mistakes], Vector | None]


@dataclass(frozen=True)
class Columns:
    """The columns of a source.

    Attributes:
        text, id: names of these columns, or None.
        labels: reads the labels of a record.
        empty: what a user writes for a text without labels, for messages.
        others: the columns that are not read.
    """

    text: str | None
    id: str | None
    labels: LabelReader
    empty: str
    others: tuple[str, ...]


def rows_from_records(
    where: str,
    columns: Sequence[str],
    records: Iterable[tuple[int, Record]],
    label_set: LabelSet,
    problems: list[Problem],
    *,
    classes: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> tuple[Rows, list[Problem]]:
    """Convert records from any source to rows.

    Args:
        where: the source, for messages.
        columns: names of the columns.
        records: line number and values of each record.
        problems: problems found so far; new ones are appended.
        classes, options: as for `find_columns`, and `may_be_empty` as for `read_records`.

    Returns:
        The rows that could be read, and `problems`.
    """
    may_be_empty = options.pop("may_be_empty", False)
    records = list(records)
    sample = [record for _, record in records]
    found = find_columns(where, columns, sample, label_set, problems, classes=classes, **options)
    if found is None:
        return no_rows(where), problems
    need = {"need_labels": options.get("need_labels", False), "need_text": options.get("need_text", True)}
    need["soft_labels"] = options.get("soft_labels", False)
    rows = read_records(where, found, records, label_set, problems, Mistakes(), may_be_empty=may_be_empty, **need)
    return rows, problems


def no_rows(where: str) -> Rows:
    """Rows of a source that could not be read."""
    return Rows(where, [], [], None, [])


def find_columns(
    where: str,
    columns: Sequence[str],
    sample: Sequence[Record],
    label_set: LabelSet,
    problems: list[Problem],
    *,
    text_column: str | None = None,
    id_column: str | None = None,
    labels_column: str | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    need_labels: bool = False,
    need_text: bool = True,
    need_ids: bool = True,
    soft_labels: bool = False,
) -> Columns | None:
    """Find the columns of the id, the text and the labels.

    Args:
        where: the source, for messages.
        columns: names of the columns.
        sample: records by which ids and 0/1 columns are recognised.
        problems: problems found so far; new ones are appended.
        text_column, id_column, labels_column: column names; detected by default.
        classes: for columns of class numbers, the names of the classes.
        need_labels: report missing labels as an error.
        need_text: report a missing text column as an error.
        need_ids: report a missing id column as a warning.
        soft_labels: read probabilities in place of 0 and 1.

    Returns:
        The columns, or None if there is no text column where one is needed.
    """
    finder = _Finder(where, list(columns), sample, label_set, problems, soft_labels)
    text = finder.role("text", text_column, TEXT_NAMES)
    if text is None and need_text and text_column is None:
        message = f"no text column; expected one of {', '.join(TEXT_NAMES)}, found: {listed(columns)}"
        problems.append(Problem("error", f"{where}:1", f"{message}; name the column with text_column"))
    row_id = finder.id(id_column, text, need_ids and (text is not None or not need_text))
    labels, read, empty = finder.labels(labels_column, {text, row_id}, need_labels, classes or {})
    finder.warn_of_choices(text_column, labels_column, text, labels)
    if text is None and need_text:
        return None
    taken = {text, row_id, *labels}
    return Columns(text, row_id, read, empty, tuple(column for column in columns if column not in taken))


def read_records(
    where: str,
    columns: Columns,
    records: Iterable[tuple[int, Record]],
    label_set: LabelSet,
    problems: list[Problem],
    mistakes: Mistakes,
    *,
    need_labels: bool = False,
    need_text: bool = True,
    soft_labels: bool = False,
    may_be_empty: bool = False,
) -> Rows:
    """Read records as rows.

    Args:
        where: the source, for messages.
        records: line number and values of each record.
        problems: problems found so far; new ones, and those among the mistakes, are appended.
        mistakes: of the records so far.
        need_labels: report missing labels as an error.
        need_text: report a text that is no string as an error.
        soft_labels: the labels are probabilities. Those above a half are the row's labels.
        may_be_empty: accept a source without records.
    """
    ids, texts, lines = [], [], []
    vectors: list[Vector | None] = []
    for line, record in records:
        lines.append(line)
        ids.append(_id_of(record, columns.id, line, mistakes) if columns.id is not None else str(line))
        texts.append(_text_of(record, columns.text, line, mistakes if need_text else Mistakes()))
        vectors.append(columns.labels(record, line, mistakes))
    problems += mistakes.take(where)
    if not ids and not may_be_empty and not any(problem.level == "error" for problem in problems):
        problems.append(Problem("error", where, "no rows below the header"))
    values = _stack_labels(where, vectors, lines, label_set, columns.empty, problems, need_labels)
    gold, prob = None if values is None else (values > 0.5).astype(np.int8), values if soft_labels else None
    return Rows(
        where, ids, texts, gold, lines,
        "ID" if columns.id is None else columns.id, columns.text or "Tweet", columns.id is not None, columns.others,
        prob,
    )  # fmt: skip


def listed(columns: Sequence[str]) -> str:
    """Column names for a message; one that cannot be printed is escaped."""
    shown = [name if name and name.isprintable() else ascii(name) for name in columns[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(columns) - _SHOWN:,} more" if len(columns) > _SHOWN else "")


class _Finder:
    """Finds the columns of one source, and appends what is wrong with them to its problems."""

    def __init__(
        self,
        where: str,
        columns: list[str],
        sample: Sequence[Record],
        label_set: LabelSet,
        problems: list[Problem],
        soft: bool,
    ):
        self.where, self.columns, self.sample = where, columns, sample
        self.label_set, self.problems, self.soft = label_set, problems, soft
        self.by_key: dict[str, list[str]] = defaultdict(list)  # columns that look the same
        for column in columns:
            self.by_key[_wide(column)].append(column)

    def error(self, message: str, line: str = ":1") -> None:
        self.problems.append(Problem("error", self.where + line, message))

    def only(self, key: str) -> str:
        """The column of a key; an error if several look the same."""
        same = self.by_key[key]
        if len(same) > 1:
            names = " and ".join(name if name.isascii() else ascii(name) for name in map(repr, same))
            self.error(f"{len(same)} columns have the same name: {names}; rename or remove all but one")
        return same[0]

    def given(self, role: str, name: str, *, required: bool = True) -> str | None:
        """The column that the user names."""
        if name in self.columns:
            if self.columns.count(name) > 1:
                self.only(_wide(name))
            return name
        wanted = _clean(name)
        if same := [column for column in self.columns if _clean(column) == wanted]:
            return same[0] if len(same) == 1 else self.only(_wide(name))
        if required:
            message = f"{role}_column is {name!r}, but the columns are: {listed(self.columns)}"
            if near := difflib.get_close_matches(name, self.columns, 1):
                message += f"; did you mean {near[0]!r}?"
            self.error(message, "")
        return None

    def role(self, role: str, given: str | None, known: Sequence[str]) -> str | None:
        """The column of a role: the given name, or the first known name that occurs in any case."""
        if given is not None:
            return self.given(role, given)
        return next((self.only(name) for name in known if name in self.by_key), None)

    def id(self, given: str | None, text: str | None, is_needed: bool) -> str | None:
        """The id column: the given one, one with a known name, or one that is named or filled like an id."""
        if given is not None or any(name in self.by_key for name in ID_NAMES):
            return self.role("id", given, ID_NAMES)
        labels = {_wide(name) for name in self.label_set.names} | {*LABELS_NAMES, *_LABEL_NAMES}
        free = [c for c in self.columns if c != text and _wide(c) not in labels and len(self.by_key[_wide(c)]) == 1]
        for pattern in (_ID_WORD, _INDEX_NAME):
            named = [c for c in free if pattern.fullmatch(_words(c)) and self.has_different_values(c)]
            if named:
                if len(named) > 1 and is_needed and pattern is _ID_WORD:
                    self.warn(f"several columns could be the id: {listed(named)}; {named[0]!r} is used; set id_column")
                return named[0]
        if not is_needed:
            return None
        filled = [c for c in free if self.sample and self.has_different_values(c, _ID_VALUE)]
        if len(filled) == 1:
            message = f"no column is named like an id; {filled[0]!r} is used, which differs in every row"
            self.warn(f"{message}; set id_column to use another")
            return filled[0]
        self.warn(
            f"no id column; expected a name such as {', '.join(ID_NAMES[:2])}, found: {listed(self.columns)}; the ids "
            "are the line numbers; name the column with id_column"
        )
        return None

    def has_different_values(self, column: str, pattern: re.Pattern[str] | None = None) -> bool:
        """Whether a column has a different value, not empty, in each record of the sample."""
        values = {_id_string(record.get(column)) for record in self.sample}
        if None in values or len(values) < len(self.sample):
            return False
        return pattern is None or all(pattern.fullmatch(str(value)) for value in values)

    def warn(self, message: str) -> None:
        self.problems.append(Problem("warning", self.where, message))

    def labels(
        self,
        given: str | None,
        taken: set[str | None],
        need_labels: bool,
        classes: Mapping[str, Sequence[str]],
    ) -> tuple[set[str], LabelReader, str]:
        """The columns of the labels, a function that reads them, and what a user writes for a text without labels."""
        empty = f"{self.label_set.empty!r} or []"
        if given is not None:
            name = self.given("labels", given, required=need_labels)
            return ({name}, self.cells(name, classes), empty) if name is not None else (set(), _no_labels, empty)
        column_of = self.columns_of_labels(taken)
        known = LABELS_NAMES + (_LABEL_NAMES if need_labels else ())
        names_column = next((key for key in known if key in self.by_key and self.by_key[key][0] not in taken), None)
        if names_column is not None and not column_of:
            name = self.only(names_column)
            return {name}, self.cells(name, classes), empty
        if column_of:
            self.check_label_columns(column_of, taken)
        elif need_labels:
            message = f"no label columns; expected {', '.join(self.label_set.names)}, or one column 'labels' with names"
            self.error(
                f"{message}; found: {listed(self.columns)}; name a column that holds all labels with labels_column"
            )
        return set(column_of.values()), _label_columns_reader(column_of, self.label_set, classes, soft=self.soft), "0"

    def cells(self, name: str, classes: Mapping[str, Sequence[str]]) -> LabelReader:
        reader = LabelCells(self.label_set, classes.get(name), soft=self.soft)
        return lambda record, line, mistakes: reader.read(record.get(name), line, mistakes)

    def columns_of_labels(self, taken: set[str | None]) -> dict[str, str]:
        """Label -> its column. Names are compared without case, Unicode form, width and invisible characters."""
        keys = [_wide(name) for name in self.label_set.names]
        column_of = {}
        for name, key in zip(self.label_set.names, keys, strict=True):
            if keys.count(key) > 1:  # labels that differ in width alone
                same = [column for column in self.columns if key_of(column) == key_of(name)]
            else:
                same = self.by_key.get(key, [])
            if same := [column for column in same if column not in taken]:
                column_of[name] = same[0] if keys.count(key) > 1 else self.only(key)
        return column_of

    def check_label_columns(self, column_of: dict[str, str], taken: set[str | None]) -> None:
        """Errors for labels without a column, and a warning about 0/1 columns that are no labels."""
        others = [c for c in self.columns if c not in taken and c not in column_of.values()]
        missing = [name for name in self.label_set.names if name not in column_of]
        by_key = {_wide(other): other for other in others}
        misspelt = {}
        for name in missing:
            if near := difflib.get_close_matches(_wide(name), list(by_key), 1, cutoff=0.7):
                misspelt[name] = by_key[near[0]]
        hints = {
            name: f"is {repr(other) if other.isascii() or not name.isascii() else ascii(other)} misspelt?"
            for name, other in misspelt.items()
        }
        if len(missing) == 1:
            self.error("; ".join([f"no column for the label {missing[0]!r}", *hints.values()]))
        elif missing:
            shown = [repr(name) + (f" ({hints[name]})" if name in hints else "") for name in missing]
            self.error(f"no column for {len(missing)} labels: {', '.join(shown)}")
        unknown = [column for column in others if column not in misspelt.values() and self.is_binary(column)]
        if unknown:
            self.warn(
                f"columns of 0 and 1 that are no labels of {self.label_set.name!r} are ignored: {listed(unknown)}"
            )

    def is_binary(self, column: str) -> bool:
        values = {str(record.get(column, "")).strip().casefold() for record in self.sample} - {*UNLABELLED}
        is_index = bool(_ID_WORD.fullmatch(_words(column)) or _INDEX_NAME.fullmatch(_words(column)))
        return bool(values) and values <= {*ON, *OFF} and not is_index

    def warn_of_choices(
        self, text_column: str | None, labels_column: str | None, text: str | None, labels: set[str]
    ) -> None:
        """Warn of columns that could have been meant instead of those that were found."""
        free = {key: same[0] for key, same in self.by_key.items() if same[0] not in labels}
        if text is not None and text_column is None:
            texts = [free[name] for name in TEXT_NAMES if name in free]
            if len(texts) > 1:
                self.warn(f"several columns could be the text: {listed(texts)}; {text!r} is read; set text_column")
        ignored = [free[name] for name in LABELS_NAMES if name in free and free[name] != text]
        if labels and ignored and labels_column is None:
            self.warn(f"{listed(ignored)}: not read, as the labels are in {listed(sorted(labels))}; set labels_column")


def _clean(name: str) -> str:
    """A name without what cannot be seen: Unicode form, outer spaces, invisible characters."""
    return unicodedata.normalize("NFC", re.sub("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]", "", name)).strip()


def _wide(name: str) -> str:
    """The key of a name, which is also the same for full-width letters."""
    return key_of(unicodedata.normalize("NFKC", name))


def _words(name: str) -> str:
    """`tweetID`, `Tweet-Id` -> `tweet id`."""
    return " ".join(re.split(r"[\W_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).casefold())).strip()


def _id_string(value: Any) -> str | None:
    """An id as text, or None if it is empty. A whole number is the same as an integer: 7.0 is 7."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value).strip() or None


def _id_of(record: Record, column: str, line: int, mistakes: Mistakes) -> str:
    value = record.get(column)
    row_id = _id_string(value)
    if isinstance(value, (list, dict, bool, bytes)):
        mistakes.add(line, f"the id ({column}) is no text or number: ", repr(value)[:60])
    elif row_id is None:
        mistakes.add(line, f"the id ({column}) is empty" if column in record else f"no id ({column})")
    elif _SURROGATE.search(row_id):
        mistakes.add(line, f"the id ({column}) is damaged: ", ascii(row_id)[:60])
    elif _ROUNDED.fullmatch(row_id):
        mistakes.add(
            line, f"the id ({column}) is a rounded number, of which digits are lost: ", row_id, level="warning"
        )
    return row_id or ""


def _text_of(record: Record, column: str | None, line: int, mistakes: Mistakes) -> str:
    """The text of a record. A null is an empty text; every other value that is no string is a mistake."""
    if column is None:
        return ""
    value = record.get(column)
    if column not in record:
        mistakes.add(line, f"no text ({column})")
    elif isinstance(value, str):
        if (text := whole_characters(value)) == value:
            return value
        mistakes.add(line, "half a character (such as half an emoji) in the text; replaced by \ufffd", level="warning")
        return text
    elif value is not None:
        mistakes.add(line, "the text is no string: ", _shown_value(value))
    return ""


def whole_characters(text: str) -> str:
    """The text with U+FFFD in the place of half a character (such as half an emoji), which no encoding can write."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shown_value(value: Any) -> str:
    kinds = {"dict": "an object", "list": "a list", "bytes": "bytes"}
    return kinds.get(type(value).__name__) or str(value)[:60]


def _no_labels(record: Record, line: int, mistakes: Mistakes) -> Vector | None:
    return None


def _label_columns_reader(
    column_of: Mapping[str, str], label_set: LabelSet, classes: Mapping[str, Sequence[str]], *, soft: bool
) -> LabelReader:
    """A function that reads the labels of a record from one column of 0 and 1 (or probabilities) per label."""

    def read(record: Record, line: int, mistakes: Mistakes) -> Vector | None:
        values = {
            name: _binary(record.get(column, ""), name, classes.get(column)) for name, column in column_of.items()
        }
        if all(value in UNLABELLED for value in values.values()):
            return None
        for name, value in values.items():
            if read_value(value, soft=soft) is None:
                mistakes.add(line, "", f"label {name!r} is {value[:60]!r}", expected(value, soft=soft))
        return tuple(read_value(values.get(name, "0"), soft=soft) or 0 for name in label_set.names)

    return read


def _binary(value: Any, label: str, names: Sequence[str] | None) -> str:
    """A cell of a label column in lower case. A class number is read by the name of its class."""
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        if key_of(names[value]) == key_of(label):
            return "1"
        others = [key_of(name) for name in names]
        if len(names) == 2 and (others[1] == key_of(label) or others in (["no", "yes"], ["neg", "pos"])):
            return str(value)
        return names[value].casefold()
    return str(value).strip().casefold()


def _stack_labels(
    where: str,
    vectors: Sequence[Vector | None],
    lines: Sequence[int],
    label_set: LabelSet,
    empty: str,
    problems: list[Problem],
    need_labels: bool,
) -> np.ndarray | None:
    """The values of the labels, float32 [n, L], or None if no row has labels."""
    missing = [line for line, vector in zip(lines, vectors, strict=True) if vector is None]
    if len(missing) == len(vectors):
        if need_labels and vectors:
            message = "no row has labels; this file cannot be used for training or scoring"
            problems.append(Problem("error", where, message))
        return None
    if missing:
        message = f"no labels here, though other rows have them; write {empty} for a text without labels"
        problems.append(Problem("error", at_lines(where, missing), message))
    values = np.array([vector or (0,) * len(label_set) for vector in vectors], dtype=np.float32)
    if label_set.exactly_one and not any(problem.level == "error" for problem in problems):
        for n in sorted(set(values.sum(axis=1).tolist()) - {1}):
            wrong = [line for line, row in zip(lines, values, strict=True) if row.sum() == n]
            message = f"{int(n) or 'no'} labels, but {label_set.name!r} says exactly_one: each text has one label"
            problems.append(Problem("error", at_lines(where, wrong), message))
    return values
