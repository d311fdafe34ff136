"""Label sets: names in canonical order with definitions and aliases, and conversion to and from 0/1 vectors."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    ValidationError,
    model_validator,
)

from emogen import paths
from emogen.errors import InputError
from emogen.task.yaml_files import place_of, read_yaml

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_PROBLEMS = 10  # that a message lists
NEUTRAL_TASK = "Label the text."  # the task of a label set that does not say what it is about
_INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


def key_of(name: str) -> str:
    """A key that is equal for names that differ in case, Unicode form, outer spaces and invisible characters alone."""
    name = unicodedata.normalize("NFC", _INVISIBLE.sub("", name)).strip()
    return unicodedata.normalize("NFC", name.casefold())


def _is_one_name(word: str) -> str:
    for character in word:
        if character in ',;"[]':
            raise ValueError(f"{word!r} contains {character!r}, which separates the labels of an answer")
        if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            raise ValueError(f"{word!r} contains a line break or another control character; an answer is one line")
    return word


Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(_is_one_name)]


class Label(BaseModel):
    """One label: its name, its definition, and other words for it that may occur in free text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    definition: str = ""
    aliases: tuple[Name, ...] = ()


class LabelSet(BaseModel):
    """The labels of a task.

    Attributes:
        name: name of the label set, for messages.
        task: a sentence for the prompt: what is labelled, and what the labels are.
        empty: the answer for a text without labels.
        labels: the labels in canonical order, which is the order of vectors and columns.
        order: the label names in the order of prompts and answers, if that differs from the canonical order.
        exactly_one: whether every text has one label, no more and no less. Answers then name one label, and the most
            probable label takes the place of thresholds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    task: Annotated[str, StringConstraints(strip_whitespace=True)] = ""
    empty: Name = "none"
    labels: tuple[Label, ...] = Field(min_length=1)
    order: tuple[Name, ...] = ()
    exactly_one: StrictBool = False

    @model_validator(mode="after")
    def _words_are_unambiguous(self) -> "LabelSet":
        owner: dict[str, str] = {key_of(self.empty): f"the empty answer {self.empty!r}"}
        for label in self.labels:
            for word in (label.name, *label.aliases):
                key = key_of(word)
                if not key:
                    raise ValueError(f"{word!a} has no visible character")
                if key in owner:
                    raise ValueError(f"{word!r} stands for both {owner[key]} and {label.name!r}")
                owner[key] = repr(label.name)
        if self.order and sorted(self.order) != sorted(label.name for label in self.labels):
            raise ValueError("order must name each label once")
        if self.exactly_one and len(self.labels) < 2:
            raise ValueError("exactly_one needs two labels or more")
        return self

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The label names in canonical order."""
        return tuple(label.name for label in self.labels)

    @property
    def task_sentence(self) -> str:
        """`task`, or a neutral sentence if there is none."""
        return self.task or NEUTRAL_TASK

    @cached_property
    def answer_order(self) -> tuple[int, ...]:
        """The position of each label, in the order of prompts and answers."""
        return tuple(self.names.index(name) for name in self.order or self.names)

    def __len__(self) -> int:
        return len(self.labels)

    def sort(self, names: Iterable[str]) -> tuple[str, ...]:
        """The given names in canonical order, each once.

        Raises:
            ValueError: a name is not in the label set.
        """
        wanted = set(names)
        if unknown := sorted(wanted - set(self.names)):
            raise ValueError(f"not in the label set {self.name!r}: {', '.join(unknown)}")
        return tuple(name for name in self.names if name in wanted)

    def vector(self, names: Iterable[str]) -> tuple[int, ...]:
        """The 0/1 vector of length L of the given names.

        Raises:
            ValueError: a name is not in the label set.
        """
        present = set(self.sort(names))
        return tuple(int(name in present) for name in self.names)

    def names_of(self, vector: Sequence[int]) -> tuple[str, ...]:
        """The names, in canonical order, of a 0/1 vector of length L.

        Raises:
            ValueError: the vector has another length.
        """
        if len(vector) != len(self.labels):
            raise ValueError(f"a vector of {len(vector)} values for {len(self.labels)} labels")
        return tuple(name for name, value in zip(self.names, vector, strict=True) if value)

    def cell(self, vector: Sequence[int]) -> str:
        """The names of a 0/1 vector in one cell of a table: with commas, or the empty answer."""
        return ", ".join(self.names_of(vector)) or self.empty

    def to_yaml(self) -> str:
        """The text of a file that `load_label_set` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_label_set(name_or_path: str | Path) -> LabelSet:
    """Load a label set.

    Args:
        name_or_path: name of a shipped label set, such as `semeval2018`, or path of a YAML file.

    Raises:
        InputError: there is no such file or shipped label set, or the file is not valid.
    """
    path = paths.find(name_or_path)
    if not path.is_file():
        path = paths.shipped(Path("prompts/labels") / f"{name_or_path}.yaml")
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in paths.shipped("prompts/labels").glob("*.yaml")))
        raise InputError(f"{name_or_path}: no such label set; give the path of a YAML file, or one of: {shipped}")
    values, _ = read_yaml(path)
    try:
        return LabelSet.model_validate(values)
    except ValidationError as error:
        problems = [problem for problem in error.errors() if problem["type"] != "too_short"] or error.errors()
        raise InputError("\n".join(_explain(path, problem) for problem in problems[:MAX_PROBLEMS])) from None


def _explain(path: Path, problem: "ErrorDetails") -> str:
    """A problem of a label set as `file:line: key: what is wrong`."""
    key = ".".join(map(str, problem["loc"]))
    keys = ", ".join((Label if "labels" in problem["loc"] else LabelSet).model_fields)
    message = {
        "missing": "is missing",
        "extra_forbidden": f"no such key; the keys are: {keys}",
        "model_type": "expected a label, such as `- name: joy`",
        "tuple_type": "expected a list",
        "too_short": "expected at least one label",
    }.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    if problem["type"] == "string_type" and not isinstance(problem["input"], dict | list):
        shown = {None: "null"}.get(problem["input"], str(problem["input"]))
        message = f"{shown} is no text in YAML; write it in quotes"
    return f"{place_of(path, problem['loc'])}: " + (f"{key}: {message}" if key else message)
