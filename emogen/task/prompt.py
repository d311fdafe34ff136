"""A Jinja file -> the chat that the model sees, in training and in prediction.

A template marks the turns with `{% system %}`, `{% user %}` and `{% assistant %}`, and the place of the text with
`{{ text }}`. `{% answer "json" %}` at its top declares the style of the answers that it asks for.

Texts are never rendered: private marks stand for them, and `model/encode.py` replaces the marks by token ids. Therefore
a text that contains `{{`, `<|im_end|>` or a whole fake chat turn remains text. A template reaches plain data only, and
prints only text and numbers.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Never

from jinja2 import StrictUndefined, TemplateSyntaxError, Undefined, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from emogen import paths
from emogen.errors import InputError
from emogen.task.answer import STYLES, answer_text
from emogen.task.labels import Label, LabelSet
from emogen.task.rows import Problem, shorten_list
from emogen.task.sandbox import MAX_SIZE, LimitedEnvironment, TemplateLimitError, time_limit

# Characters from Unicode's private use area. A template or a label set that contains one is rejected.
_TURN, _OPEN, _CLOSE = "\ue0f0", "\ue0f1", "\ue0f2"
_RESERVED = re.compile(f"[{_TURN}{_OPEN}{_CLOSE}]")
# The letters are of mixed case, so that a filter that changes the case of a text is noticed.
MARK = re.compile(f"{_OPEN}mArk(\\d+){_CLOSE}")
TEXT_MARK = f"{_OPEN}mArk0{_CLOSE}"  # the text of the row; the few-shot examples have the marks 1, 2, ...
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text with marks}


class PromptError(InputError):
    """An invalid template. The message names the file and, if it is known, the line."""


class _Tags(Extension):
    """The tags `{% system %}`, `{% user %}` and `{% assistant %}`, which begin a turn, and `{% answer "STYLE" %}`."""

    tags = {"system", "user", "assistant", "answer"}  # noqa: RUF012 - jinja2 declares tags like this

    def parse(self, parser: Parser) -> nodes.Node:
        token = next(parser.stream)
        if token.value != "answer":
            return nodes.Output([nodes.TemplateData(f"{_TURN}{token.value} {token.lineno}\n")], lineno=token.lineno)
        style = parser.stream.current
        if style.type != "string" or style.value not in STYLES:
            given = repr(style.value) if style.type == "string" else "none in quotes"
            styles = ", ".join(f'"{style}"' for style in STYLES)
            parser.fail(f"{{% answer %}} declares one of the styles {styles}; found {given}", token.lineno)
        next(parser.stream)
        # Only this tag makes such a node. It prints nothing, and `_declared_style` finds it.
        return nodes.ExprStmt(nodes.Const(style.value, lineno=token.lineno), lineno=token.lineno)


@dataclass(frozen=True)
class Example:
    """A few-shot example, with its canonical answer."""

    text: str
    answer: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """A checked template.

    Attributes:
        path: the file, for messages.
        source: text of the file, without a byte order mark and with `\\n` as line end.
        variables: each variable that it uses, such as `text`, `names` or `examples`, and the line of its first use.
        style: the style of answer that it declares, and the line of the declaration; None if it declares none.
        definition_line: the line that prints `.definition` without a test of whether there is one; None for no such.
    """

    path: str
    source: str
    variables: Mapping[str, int]
    style: tuple[str, int] | None = None
    definition_line: int | None = None

    def at(self, variable: str) -> str:
        """The file and line of the first use of a variable."""
        return f"{self.path}:{self.variables[variable]}"


VARIABLES = {
    "text": "text of the row; exactly once, unfiltered, in the last user turn",
    "task": "what is to be labelled, and with what: the `task` of the label set",
    "names": "label names, in the order of an answer",
    "labels": "labels: .name, .definition, .aliases",
    "empty": "answer for a text without labels, such as none",
    "exactly_one": "whether every text has exactly one label, for {% if exactly_one %}",
    "examples": "few-shot examples from the training rows: .text, .answer, .labels",
    "label": "for answer: yes_no, the label in question: .name, .definition; after {{ text }}",
}


def _refuse_list(*_: Any) -> Never:
    raise PromptError(
        'this prints a whole list; write its items, as in {{ names | join(", ") }} or in a {% for %} loop'
    )


class _List(list):
    """A list that a template can go through, but that no filter or operator can print as a whole."""

    __str__ = __repr__ = _refuse_list


class _Tuple(tuple):
    """The same for a tuple."""

    __slots__ = ()
    __str__ = __repr__ = _refuse_list


@dataclass(frozen=True, repr=False)
class ShownLabel:
    """A label as a template sees it: data alone. It is printed as its name."""

    name: str
    definition: str
    aliases: tuple[str, ...]

    def __str__(self) -> str:
        return self.name

    __repr__ = _refuse_list  # called only where a list of labels is printed


@dataclass(frozen=True, repr=False)
class ShownExample:
    """A few-shot example as a template sees it: data alone, with a mark as text."""

    text: str
    answer: str
    labels: tuple[str, ...]

    def __str__(self) -> str:
        raise PromptError("this prints a whole example; write {{ example.text }} and {{ example.answer }}")

    __repr__ = _refuse_list


def _printable(value: Any) -> Any:
    """What `{{ }}` prints: text, numbers and the names of labels. The repr of anything else is never meant."""
    if isinstance(value, list | tuple | dict | set | Iterator):
        _refuse_list()
    if value is None or isinstance(value, bool):
        raise PromptError(f"this prints {value}, which is not a text; choose a text with {{% if %}}")
    if isinstance(value, str | int | float | ShownLabel | ShownExample | Undefined):
        return str(value)  # raises for an example and for an undefined value
    raise PromptError(f"this prints a {type(value).__name__}, which is not a text; is a pair of parentheses missing?")


_environment = LimitedEnvironment(
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    extensions=[_Tags],
    finalize=_printable,
)
# All rows share one instruction, so rendering must be deterministic.
del _environment.filters["random"], _environment.globals["lipsum"]


def load_prompt(path: str | Path) -> Prompt:
    """Read a template, and check everything that can be checked without rendering it.

    Raises:
        PromptError: the file does not exist or is not UTF-8; a syntax error; an unknown variable, filter or style; or
            `{{ text }}` is missing, repeated or filtered.
    """
    found = paths.find(path)
    return parse_prompt(read_template(found), str(found))


def read_template(path: Path) -> str:
    """The source of a template.

    Raises:
        PromptError: the file does not exist, cannot be read, or is not UTF-8.
    """
    if not path.is_file():
        shipped = ", ".join(f"prompts/{p.name}" for p in sorted(paths.shipped("prompts").glob("*.jinja")))
        raise PromptError(f"{path}: no such prompt template; the shipped ones are: {shipped}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from None
    if b"\0" in content:
        raise PromptError(f"{path}: not UTF-8 (UTF-16, or not a text); save the template as UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); save the template as UTF-8"
        ) from None


def parse_prompt(source: str, path: str = "<template>") -> Prompt:
    """Check the source of a template as `load_prompt` does."""
    if len(source) > MAX_SIZE:
        raise PromptError(f"{path}: {len(source):,} characters; a template has {MAX_SIZE:,} at most")
    source = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    for number, line in enumerate(source.split("\n"), start=1):
        if _RESERVED.search(line):
            raise PromptError(f"{path}:{number}: the characters U+E0F0 to U+E0F2 are reserved")
    try:
        tree = _environment.parse(source)
        _environment.compile(source)  # parsing alone does not check the names of filters
    except TemplateSyntaxError as error:
        raise PromptError(f"{path}:{error.lineno}: {error.message}") from None
    except (RecursionError, MemoryError):
        raise PromptError(f"{path}: its expressions are nested too deeply") from None
    except ValueError:
        raise PromptError(f"{path}: a number in it has more digits than Python reads") from None

    for other in tree.find_all((nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport)):
        tag = {"FromImport": "from"}.get(type(other).__name__, type(other).__name__.lower())
        raise PromptError(f"{path}:{other.lineno}: {{% {tag} %}}: a template is one file, and can use no other file")
    variables = meta.find_undeclared_variables(tree) - _environment.globals.keys()
    used = [node for node in tree.find_all(nodes.Name) if node.ctx == "load"]
    for node in used:
        if node.name in variables - VARIABLES.keys():
            raise PromptError(
                f"{path}:{node.lineno}: undefined variable {node.name!r}; a template can use: {', '.join(VARIABLES)}"
            )
    _check_texts(tree, source, path)
    lines = {name: min(node.lineno for node in used if node.name == name) for name in variables}
    return Prompt(path, source, lines, _declared_style(tree, path), _definition_line(tree))


def _check_texts(tree: nodes.Template, source: str, path: str) -> None:
    """Reject a template whose `{{ text }}` is not there once, or that does more with a text than print it."""
    texts = [node for node in tree.find_all(nodes.Name) if node.ctx == "load" and node.name == "text"]
    example_texts = [
        *(node for node in tree.find_all(nodes.Getattr) if node.attr == "text"),
        *(node for node in tree.find_all(nodes.Getitem) if _is_constant(node.arg, "text")),
    ]
    printed = {id(child) for output in tree.find_all(nodes.Output) for child in output.nodes}
    blocks = [*tree.find_all(nodes.FilterBlock), *(set_ for set_ in tree.find_all(nodes.AssignBlock) if set_.filter)]
    filtered = {id(node) for block in blocks for node in block.find_all(nodes.Expr)}
    for place in [*texts, *example_texts]:
        if id(place) not in printed or id(place) in filtered:
            raise PromptError(f"{path}:{place.lineno}: write a text as {{{{ text }}}} only, with no filter or test")
    if len(texts) != 1:
        found = [node.lineno for node in texts]
        at = found[1] if found else max(1, source.rstrip("\n").count("\n") + 1)  # the second one, or the end
        lines = ", ".join(map(str, found)) or "none"
        raise PromptError(f"{path}:{at}: {{{{ text }}}} must occur exactly once (found on lines: {lines})")


def _is_constant(node: nodes.Node, value: str) -> bool:
    return isinstance(node, nodes.Const) and bool(node.value == value)


def _declared_style(tree: nodes.Template, path: str) -> tuple[str, int] | None:
    """The style in the tag `{% answer "STYLE" %}`, and its line."""
    tags = list(tree.find_all(nodes.ExprStmt))
    if not tags:
        return None
    first, *others = tags
    above = tree.body[: tree.body.index(first)] if first in tree.body else tree.body
    turns = [data for node in above for data in node.find_all(nodes.TemplateData) if _TURN in data.data]
    if others or turns:
        line = (others or tags)[0].lineno
        raise PromptError(f"{path}:{line}: {{% answer %}} stands once, at the top of a template, before the first turn")
    assert isinstance(first.node, nodes.Const)
    return first.node.value, first.lineno


def _definition_line(tree: nodes.Template) -> int | None:
    """The first line with `.definition`, unless `if`, `or` or `default` says what to do with a label without one."""
    shown = [node for node in tree.find_all(nodes.Getattr) if node.attr == "definition"]
    cases = [
        *(node.test for node in tree.find_all(nodes.If)),
        *(node.test for node in tree.find_all(nodes.CondExpr)),
        *(node.test for node in tree.find_all(nodes.For) if node.test is not None),
        *tree.find_all(nodes.Or),
        *(node for node in tree.find_all(nodes.Filter) if node.name in ("default", "d")),
    ]
    handled = {id(node) for case in cases for node in (case, *case.find_all(nodes.Getattr))}
    if not shown or any(id(node) in handled for node in shown):
        return None
    return min(node.lineno for node in shown)


def make_examples(rows: Sequence[tuple[str, tuple[str, ...]]], label_set: LabelSet, style: str) -> list[Example]:
    """Few-shot examples with canonical answers, from pairs of a text and its label names."""
    return [Example(text, answer_text(labels, label_set, style), labels) for text, labels in rows]


def render(
    prompt: Prompt, label_set: LabelSet, examples: Sequence[Example] = (), label: Label | None = None
) -> list[Message]:
    """Render a template as chat messages, with marks in place of the texts.

    Args:
        examples: few-shot examples; the marks 1, 2, ... stand for their texts.
        label: the label in question, for `yes_no`.

    Returns:
        The messages, from an optional system turn to the last user turn, which contains `TEXT_MARK`.

    Raises:
        PromptError: an error while rendering; turns that do not form a chat; or a list of labels with another word.
    """
    if label is not None and "label" not in prompt.variables:
        raise PromptError(
            f"{prompt.at('text')}: `answer: yes_no` needs {{{{ label }}}}, the label in question, after {{{{ text }}}}"
        )
    if label is None and "label" in prompt.variables:
        raise PromptError(
            f"{prompt.at('label')}: {{{{ label }}}} is available only with `answer: yes_no`; a template declares it "
            'with {% answer "yes_no" %} at its top'
        )
    try:
        with time_limit():
            rendered = _environment.from_string(prompt.source).render(_values(label_set, examples, label))
    except PromptError as error:
        raise PromptError(f"{prompt.path}:{_line_of(error)} {error}") from None
    except TemplateLimitError as error:
        raise PromptError(f"{prompt.path}:{_line_of(error)} the template is stopped: {error}") from None
    except Exception as error:  # whatever an expression of the template raises
        raise PromptError(f"{prompt.path}:{_line_of(error)} {type(error).__name__}: {error}") from None
    messages, lines = _split_turns(prompt, rendered)
    _check_chat(prompt, messages, lines, len(examples))
    _check_labels(prompt, messages, label_set)
    return messages


def _values(label_set: LabelSet, examples: Sequence[Example], label: Label | None) -> dict[str, Any]:
    """The variables of a template: strings, lists of them, and records of them."""

    def shown(label: Label) -> ShownLabel:
        return ShownLabel(label.name, label.definition, _Tuple(label.aliases))

    texts = [label_set.name, label_set.task_sentence, label_set.empty]
    texts += [text for each in label_set.labels for text in (each.name, each.definition, *each.aliases)]
    if wrong := [text for text in texts if _RESERVED.search(text)]:
        raise PromptError(f"the characters U+E0F0 to U+E0F2 are reserved; the label set has them in {wrong[0]!r}")
    return {
        "text": TEXT_MARK,
        "task": label_set.task_sentence,
        "names": _List(label_set.names[i] for i in label_set.answer_order),
        "labels": _List(shown(label_set.labels[i]) for i in label_set.answer_order),
        "empty": label_set.empty,
        "exactly_one": label_set.exactly_one,
        "examples": _List(
            ShownExample(TEXT_MARK.replace("0", str(k)), example.answer, _Tuple(example.labels))
            for k, example in enumerate(examples, start=1)
        ),
        "label": None if label is None else shown(label),
    }


def fill(messages: Sequence[Message], texts: Sequence[str]) -> list[Message]:
    """Replace the marks in messages by texts, for display and for other engines. `texts[0]` is the text of the row."""
    return [m | {"content": MARK.sub(lambda mark: texts[int(mark[1])], m["content"])} for m in messages]


def _split_turns(prompt: Prompt, rendered: str) -> tuple[list[Message], list[str]]:
    """The messages of a rendered template, and the template line on which each turn begins."""
    before, *turns = rendered.split(_TURN)
    if before.strip():
        raise PromptError(f"{prompt.path}:1: text before the first turn; begin with {{% system %}} or {{% user %}}")
    messages, lines = [], []
    for turn in turns:
        head, _, content = turn.partition("\n")
        role, _, line = head.partition(" ")
        messages.append({"role": role, "content": content.strip()})
        lines.append(line)
    return messages, lines


def _check_chat(prompt: Prompt, messages: list[Message], lines: list[str], n_examples: int) -> None:
    """Reject turns that do not form a chat, or that do not contain every text.

    Args:
        lines: the template line on which each turn begins.
    """
    roles = [message["role"] for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    wrong = [k for k in range(first, len(roles)) if roles[k] != ("user", "assistant")[(k - first) % 2]]
    if wrong or roles[first:][-1:] != ["user"]:
        line = lines[wrong[0] if wrong else -1] if lines else "1"
        raise PromptError(
            f"{prompt.path}:{line}: the turns are {', '.join(roles) or 'none'}; expected an optional system turn, then "
            "alternating user and assistant turns that end with a user turn (emogen adds the answer)"
        )
    for message, line in zip(messages, lines, strict=True):
        left = MARK.sub("", message["content"])
        if _RESERVED.search(left):
            raise PromptError(
                f"{prompt.path}:{line}: a filter changed a text; write {{{{ text }}}} and {{{{ example.text }}}} only"
            )
        if not message["content"]:
            raise PromptError(f"{prompt.path}:{line}: the {message['role']} turn is empty")
    where = [TEXT_MARK in message["content"] for message in messages]
    if sum(m["content"].count(TEXT_MARK) for m in messages) != 1 or not where[-1]:
        raise PromptError(f"{prompt.at('text')}: {{{{ text }}}} must be rendered exactly once, in the last user turn")
    marks = {int(mark) for message in messages for mark in MARK.findall(message["content"])}
    if n_examples and "examples" in prompt.variables and marks != set(range(n_examples + 1)):
        raise PromptError(f"{prompt.at('examples')}: some examples have no text; write {{{{ example.text }}}} for each")


def _check_labels(prompt: Prompt, messages: list[Message], label_set: LabelSet) -> None:
    """Reject a list of the labels that contains another word, since no answer can name it.

    A list counts as one of labels if at least half of all labels, and at least three, are in it.
    """
    names = {_fold(name) for name in label_set.names}
    allowed = names | {_fold(label_set.empty), "etc"}
    meaning = {_fold(alias): label.name for label in label_set.labels for alias in label.aliases}
    known = _pattern_of([label_set.empty, *label_set.names, *(a for label in label_set.labels for a in label.aliases)])
    for words in chain.from_iterable(_lists(message["content"], known) for message in messages):
        if sum(_fold(word) in names for word in words) < max(3, len(names) / 2):
            continue
        for word in words:
            if (_fold(word) in meaning or _is_word(word)) and _fold(word) not in allowed:
                alias_of = meaning.get(_fold(word))
                hint = f"answers use {alias_of!r}" if alias_of else f"the labels are: {', '.join(label_set.names)}"
                lines = [n for n, line in enumerate(prompt.source.split("\n"), start=1) if word in line]
                where = f"{prompt.path}:{lines[0]}" if lines else prompt.path
                raise PromptError(f"{where}: lists {word!r}, which is not a label of {label_set.name!r}; {hint}")


def _lists(content: str, known: re.Pattern[str]) -> Iterator[list[str]]:
    """The items of all possible lists: the bulleted lines, and the parts of each clause between commas.

    Args:
        known: the words of the label set, which stay whole even if they look like several items or clauses.
    """
    whole: list[str] = []

    def take_out(word: re.Match[str]) -> str:
        whole.append(word[0])
        return f"{_OPEN}{len(whole) - 1}{_CLOSE}"

    def put_back(item: str) -> str:
        return re.sub(f"{_OPEN}(\\d+){_CLOSE}", lambda mark: whole[int(mark[1])], item)

    content = known.sub(take_out, _plain(content))
    bullets = re.findall(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]*([^:,\n]+)", content, re.MULTILINE)
    parts = re.split(r"[.;:!?()\[\]\n]", content)
    for items in [bullets, *(re.split(r",|\bor\b|\band\b", part) for part in parts)]:
        yield [put_back(item.strip(" \t\"'`*_")) for item in items]


def _plain(content: str) -> str:
    """The content of a message without the marks of texts."""
    return unicodedata.normalize("NFC", MARK.sub("", content))


def _fold(word: str) -> str:
    """The form in which words are compared."""
    return unicodedata.normalize("NFC", word.casefold())


def _pattern_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds the given words in a text, in any case. A hyphen or an apostrophe joins: `self-love` is not `love`."""
    forms = {form for word in words for form in (word, word.upper(), word.casefold())}  # "Spaß" is "SPASS" in capitals
    longest_first = sorted((unicodedata.normalize("NFC", form) for form in forms), key=lambda form: (-len(form), form))
    known = "|".join(map(re.escape, longest_first))
    return re.compile(rf"(?<!\w)(?<!\w[-'’])(?:{known})(?!\w|[-'’]\w)", re.IGNORECASE)


def _is_word(item: str) -> bool:
    """Whether an item is a single word: letters of any script with their marks, digits, hyphens and apostrophes."""
    return item[:1].isalnum() and all(c.isalnum() or c in "_-'’" or unicodedata.category(c)[0] == "M" for c in item)


def warnings_about(prompt: Prompt, label_set: LabelSet, examples: Sequence[Example], style: str) -> list[Problem]:
    """Render a prompt for all of its questions, and find what the model is not told about its labels.

    Raises:
        PromptError: the template is not valid, or asks the same about two labels.
    """
    if style == "yes_no":
        _check_questions(prompt, label_set, examples)
        warnings = []
    else:
        content = "\n".join(message["content"] for message in render(prompt, label_set, examples))
        warnings = _untold(prompt, label_set, style, _plain(content))
    without = [label.name for label in label_set.labels if not label.definition]
    if without and prompt.definition_line is not None:
        message = (
            f"prints the definition of each label, and {len(without)} have none ({shorten_list(without)}); define them "
            "in the label set, or write {% if label.definition %}"
        )
        warnings.append(Problem("warning", f"{prompt.path}:{prompt.definition_line}", message))
    return warnings


def _check_questions(prompt: Prompt, label_set: LabelSet, examples: Sequence[Example]) -> None:
    """Reject a `yes_no` template that asks the same about two labels."""
    asked: dict[str, str] = {}
    for label in label_set.labels:
        question = render(prompt, label_set, examples, label)[-1]["content"]
        if question in asked:
            both = f"{asked[question]!r} and {label.name!r}"
            raise PromptError(f"{prompt.at('label')}: asks the same about {both}; write {{{{ label.name }}}}")
        asked[question] = label.name


def _untold(prompt: Prompt, label_set: LabelSet, style: str, content: str) -> list[Problem]:
    """The labels that a rendered prompt does not name, and the empty answer if it does not name that."""
    named = {_fold(word) for word in _pattern_of([*label_set.names, label_set.empty]).findall(content)}
    warnings = []
    if missing := [name for name in label_set.names if _fold(name) not in named]:
        message = f"the prompt does not name {len(missing)} of the {len(label_set)} labels ({shorten_list(missing)})"
        warnings.append(Problem("warning", prompt.path, f'{message}; write {{{{ names | join(", ") }}}}'))
    if label_set.exactly_one:
        return warnings
    empty = answer_text((), label_set, style)
    is_told, hint = (empty in content, empty) if style == "json" else (_fold(empty) in named, "{{ empty }}")
    if not is_told:
        message = f"the prompt does not say that the answer for a text without labels is {empty}; write {hint}"
        warnings.append(Problem("warning", prompt.path, message))
    return warnings


def _line_of(error: BaseException) -> str:
    """The template line that raised an error: the innermost frame of the compiled template."""
    line = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = f"{trace.tb_lineno}:"
        trace = trace.tb_next
    return line
