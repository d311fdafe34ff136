"""A Jinja file -> the chat that the model sees, in training and in prediction.

A template marks the turns with `{% system %}`, `{% user %}` and `{% assistant %}`, and the place of the text with
`{{ text }}`. Texts are never rendered: private marks stand for them, and `model/encode.py` replaces the marks by token
ids. Therefore a text that contains `{{`, `<|im_end|>` or a whole fake chat turn remains text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from emogen import paths
from emogen.errors import InputError
from emogen.task.answer import answer_text
from emogen.task.labels import Label, LabelSet

# Characters from Unicode's private use area. A template that contains one is rejected.
_TURN, _OPEN, _CLOSE = "\ue0f0", "\ue0f1", "\ue0f2"
MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
TEXT_MARK = f"{_OPEN}0{_CLOSE}"  # the text of the row; the few-shot examples have the marks 1, 2, ...
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text with marks}


class PromptError(InputError):
    """An invalid template. The message names the file and, if it is known, the line."""


class _Turns(Extension):
    """The tags `{% system %}`, `{% user %}` and `{% assistant %}`, each of which begins a turn of that role."""

    tags = {"system", "user", "assistant"}  # noqa: RUF012 - jinja2 declares tags like this

    def parse(self, parser: Parser) -> nodes.Node:
        token = next(parser.stream)
        return nodes.Output([nodes.TemplateData(f"{_TURN}{token.value} {token.lineno}\n")], lineno=token.lineno)


@dataclass(frozen=True)
class Example:
    """A few-shot example. A template can use `example.text`, `example.answer` and `example.labels`."""

    text: str
    answer: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """A checked template.

    Attributes:
        path: the file, for messages.
        source: text of the file.
        variables: each variable that it uses, such as `text`, `names` or `examples`, and the line of its first use.
    """

    path: str
    source: str
    variables: Mapping[str, int]

    def at(self, variable: str) -> str:
        """The file and line of the first use of a variable."""
        return f"{self.path}:{self.variables[variable]}"


VARIABLES = {
    "text": "text of the row; exactly once, unfiltered, in the last user turn",
    "names": "label names, in the order of an answer",
    "labels": "labels: .name, .definition, .aliases",
    "empty": "answer for a text without labels, such as none",
    "examples": "few-shot examples from the training rows: .text, .answer, .labels",
    "label": "for answer: yes_no, the label in question: .name, .definition; after {{ text }}",
}

_environment = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, extensions=[_Turns]
)
# All rows share one instruction, so rendering must be deterministic.
del _environment.filters["random"], _environment.globals["lipsum"]


def load_prompt(path: str | Path) -> Prompt:
    """Read a template, and check everything that can be checked without rendering it.

    Raises:
        PromptError: the file does not exist; a syntax error; an unknown variable or filter; or `{{ text }}` is
            missing, repeated or filtered.
    """
    found = paths.find(path)
    if not found.is_file():
        shipped = ", ".join(f"prompts/{p.name}" for p in sorted(paths.shipped("prompts").glob("*.jinja")))
        raise PromptError(f"{path}: no such prompt template; the shipped ones are: {shipped}")
    try:
        source = found.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{found}: not UTF-8: {error}") from None
    return parse_prompt(source, str(found))


def parse_prompt(source: str, path: str = "<template>") -> Prompt:
    """Check the source of a template as `load_prompt` does."""
    for number, line in enumerate(source.splitlines(), start=1):
        if re.search(f"[{_TURN}{_OPEN}{_CLOSE}]", line):
            raise PromptError(f"{path}:{number}: the characters U+E0F0 to U+E0F2 are reserved")
    try:
        tree = _environment.parse(source)
        _environment.compile(source)  # parsing alone does not check the names of filters
    except TemplateSyntaxError as error:
        raise PromptError(f"{path}:{error.lineno}: {error.message}") from None

    variables = meta.find_undeclared_variables(tree) - _environment.globals.keys()
    used = [node for node in tree.find_all(nodes.Name) if node.ctx == "load"]
    for node in used:
        if node.name in variables - VARIABLES.keys():
            raise PromptError(
                f"{path}:{node.lineno}: undefined variable {node.name!r}; a template can use: {', '.join(VARIABLES)}"
            )
    texts = [node for node in used if node.name == "text"]
    example_texts = [node for node in tree.find_all(nodes.Getattr) if node.attr == "text"]
    unfiltered = {id(child) for output in tree.find_all(nodes.Output) for child in output.nodes}
    for place in [*texts, *example_texts]:
        if id(place) not in unfiltered:
            raise PromptError(f"{path}:{place.lineno}: write a text as {{{{ text }}}} only, with no filter or test")
    if len(texts) != 1:
        found = [node.lineno for node in texts]
        at = found[1] if found else max(1, len(source.splitlines()))  # the second one, or the end
        lines = ", ".join(map(str, found)) or "none"
        raise PromptError(f"{path}:{at}: {{{{ text }}}} must occur exactly once (found on lines: {lines})")
    return Prompt(path, source, {name: min(node.lineno for node in used if node.name == name) for name in variables})


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
        raise PromptError(f"{prompt.at('label')}: {{{{ label }}}} is available only with `answer: yes_no`")
    values: dict[str, object] = {
        "text": TEXT_MARK,
        "names": [label_set.names[i] for i in label_set.answer_order],
        "labels": [label_set.labels[i] for i in label_set.answer_order],
        "empty": label_set.empty,
        "examples": [
            {"text": f"{_OPEN}{k}{_CLOSE}", "answer": example.answer, "labels": example.labels}
            for k, example in enumerate(examples, start=1)
        ],
        "label": label,
    }
    try:
        rendered = _environment.from_string(prompt.source).render(values)
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise PromptError(f"{prompt.path}:{_line_of(error)} {type(error).__name__}: {error}") from None
    messages, lines = _split_turns(prompt, rendered)
    _check_chat(prompt, messages, lines, len(examples))
    _check_labels(prompt, messages, label_set)
    return messages


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
        if re.search(f"[{_OPEN}{_CLOSE}]", left):
            raise PromptError(f"{prompt.path}:{line}: a filter changed a text; write {{{{ example.text }}}} only")
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
    names = {name.casefold() for name in label_set.names}
    allowed = names | {label_set.empty.casefold(), "etc"}
    meaning = {alias.casefold(): label.name for label in label_set.labels for alias in label.aliases}
    for words in chain.from_iterable(_lists(message["content"]) for message in messages):
        if sum(word.casefold() in names for word in words) < max(3, len(names) / 2):
            continue
        for word in words:
            if re.fullmatch(r"\w[\w'-]*", word) and word.casefold() not in allowed:
                known = meaning.get(word.casefold())
                hint = f"answers use {known!r}" if known else f"the labels are: {', '.join(label_set.names)}"
                lines = [n for n, line in enumerate(prompt.source.splitlines(), start=1) if word in line]
                where = f"{prompt.path}:{lines[0]}" if lines else prompt.path
                raise PromptError(f"{where}: lists {word!r}, which is not a label of {label_set.name!r}; {hint}")


def _lists(content: str) -> Iterator[list[str]]:
    """The items of all possible lists: the bulleted lines, and the parts of each clause between commas."""
    bullets = re.findall(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]*([^:,\n]+)", content, re.MULTILINE)
    parts = re.split(r"[.;:!?()\[\]\n]", content)
    for items in [bullets, *(re.split(r",|\bor\b|\band\b", part) for part in parts)]:
        yield [item.strip(" \t\"'`*_") for item in items]


def _line_of(error: BaseException) -> str:
    """The template line that raised an error: the innermost frame of the compiled template."""
    line = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = f"{trace.tb_lineno}:"
        trace = trace.tb_next
    return line
