"""One Jinja file -> the chat that the model sees, the same for training and inference.

A template marks whose turn it is with `{% system %}`, `{% user %}` and `{% assistant %}`, and puts the text with
`{{ text }}`. Texts are never rendered: a private mark stands where each belongs, and `encode.py` replaces the marks by
token ids. So a text that holds `{{`, `<|im_end|>` or a whole fake chat turn stays text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from emogen import paths
from emogen.errors import InputError
from emogen.task.answer import answer_text
from emogen.task.labels import Label, LabelSet

# From Unicode's private use area, which no keyboard produces; a template that contains one is refused.
_TURN, _OPEN, _CLOSE = "\ue0f0", "\ue0f1", "\ue0f2"
MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
TEXT_MARK = f"{_OPEN}0{_CLOSE}"  # the row's own text; the marks of the few-shot examples are 1, 2, ...
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text with marks}


class PromptError(InputError):
    """A template that breaks the contract. The message names the file and, where it can, the line."""


class _Turns(Extension):
    """`{% system %}`, `{% user %}`, `{% assistant %}`: from here on it is this role's turn."""

    tags = {"system", "user", "assistant"}  # noqa: RUF012 - jinja2's own way to declare tags

    def parse(self, parser: Parser) -> nodes.Node:
        token = next(parser.stream)
        return nodes.Output([nodes.TemplateData(f"{_TURN}{token.value} {token.lineno}\n")], lineno=token.lineno)


@dataclass(frozen=True)
class Example:
    """A few-shot example as a template sees it: `example.text` and `example.answer`."""

    text: str
    answer: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """A template file, checked and ready to render.

    Attributes:
        path: where it came from, for messages.
        source: the file's text.
        variables: the names that it uses, such as `text`, `names`, `examples`, and on which line each first stands.
    """

    path: str
    source: str
    variables: Mapping[str, int]

    def at(self, variable: str) -> str:
        """File and line of where a variable first stands."""
        return f"{self.path}:{self.variables[variable]}"


VARIABLES = {
    "text": "the row's text; once, bare, in the last user turn",
    "names": "the label names, in the order of an answer",
    "labels": "the labels: .name, .definition, .aliases",
    "empty": "the answer for a text without labels, such as none",
    "examples": "few-shot examples from the training rows: .text, .answer, .labels",
    "label": "answer yes_no: the label asked about: .name, .definition; after {{ text }}",
}


_environment = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, extensions=[_Turns]
)


# What comes out anew at each rendering is not one instruction that all rows share.
del _environment.filters["random"], _environment.globals["lipsum"]


def load_prompt(path: str | Path) -> Prompt:
    """Read a template and check what can be checked without rendering it.

    Raises:
        PromptError: no such file, a syntax error, an unknown variable or filter, or `{{ text }}` missing, repeated or
            filtered.
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
    """Check a template's source; see `load_prompt`."""
    for number, line in enumerate(source.splitlines(), start=1):
        if re.search(f"[{_TURN}{_OPEN}{_CLOSE}]", line):
            raise PromptError(f"{path}:{number}: the characters U+E0F0 to U+E0F2 are reserved")
    try:
        tree = _environment.parse(source)
        _environment.compile(source)  # knows the filters
    except TemplateSyntaxError as error:
        raise PromptError(f"{path}:{error.lineno}: {error.message}") from None

    used = [node for node in tree.find_all(nodes.Name) if node.ctx == "load"]
    variables = meta.find_undeclared_variables(tree) - _environment.globals.keys()
    for node in used:
        if node.name in variables - VARIABLES.keys():
            raise PromptError(
                f"{path}:{node.lineno}: undefined variable {node.name!r}; a template can use: {', '.join(VARIABLES)}"
            )
    bare = {id(child) for output in tree.find_all(nodes.Output) for child in output.nodes}
    texts = [node for node in used if node.name == "text"]
    of_examples = [node for node in tree.find_all(nodes.Getattr) if node.attr == "text"]
    for place in [*texts, *of_examples]:
        if id(place) not in bare:
            raise PromptError(
                f"{path}:{place.lineno}: a text must stand bare, as {{{{ text }}}}, with no filter or test"
            )
    if len(texts) != 1:
        found = [node.lineno for node in texts]
        at = found[1] if found else max(1, len(source.splitlines()))  # the second one, or where it should stand
        lines = ", ".join(map(str, found)) or "none"
        raise PromptError(f"{path}:{at}: {{{{ text }}}} must occur exactly once (found on lines: {lines})")
    return Prompt(path, source, {name: min(node.lineno for node in used if node.name == name) for name in variables})


def make_examples(rows: Sequence[tuple[str, tuple[str, ...]]], label_set: LabelSet, style: str) -> list[Example]:
    """(text, label names) rows -> few-shot examples with their canonical answers."""
    return [Example(text, answer_text(labels, label_set, style), labels) for text, labels in rows]


def render(
    prompt: Prompt, label_set: LabelSet, examples: Sequence[Example] = (), label: Label | None = None
) -> list[Message]:
    """A template -> chat messages, in which marks stand for the texts.

    Args:
        examples: few-shot examples; their texts become the marks 1, 2, ...
        label: the label asked about, for `yes_no`.

    Returns:
        Messages from an optional system turn to the last user turn, which holds `TEXT_MARK`.

    Raises:
        PromptError: an error while rendering, or turns that do not make a chat.
    """
    marked = [
        {"text": f"{_OPEN}{k}{_CLOSE}", "answer": example.answer, "labels": example.labels}
        for k, example in enumerate(examples, start=1)
    ]
    values: dict[str, object] = {
        "text": TEXT_MARK,
        "names": [label_set.names[i] for i in label_set.answer_order],
        "labels": [label_set.labels[i] for i in label_set.answer_order],
        "empty": label_set.empty,
        "examples": marked,
    }
    if label is not None:
        values["label"] = label
        if "label" not in prompt.variables:
            raise PromptError(
                f"{prompt.at('text')}: does not use {{{{ label }}}} after it, which `answer: yes_no` asks about"
            )
    elif "label" in prompt.variables:
        raise PromptError(f"{prompt.at('label')}: uses {{{{ label }}}}, which exists only with `answer: yes_no`")
    try:
        rendered = _environment.from_string(prompt.source).render(values)
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise PromptError(f"{prompt.path}:{_line_of(error)} {type(error).__name__}: {error}") from None

    before, *turns = rendered.split(_TURN)
    if before.strip():
        raise PromptError(f"{prompt.path}:1: text before the first turn; begin with {{% system %}} or {{% user %}}")
    messages, lines = [], []
    for turn in turns:
        head, _, content = turn.partition("\n")
        role, _, line = head.partition(" ")
        messages.append({"role": role, "content": content.strip()})
        lines.append(line)
    _check_chat(prompt, messages, lines, len(examples))
    _check_labels(prompt, messages, label_set)
    return messages


def fill(messages: Sequence[Message], texts: Sequence[str]) -> list[Message]:
    """Messages with every mark replaced by its text (`texts[0]` is the row's own), for people and other engines."""
    return [m | {"content": MARK.sub(lambda mark: texts[int(mark[1])], m["content"])} for m in messages]


def _check_chat(prompt: Prompt, messages: list[Message], lines: list[str], n_examples: int) -> None:
    """Refuse turns that do not make a chat, or in which not every text comes out; `lines` are those of the turns."""
    roles = [message["role"] for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    wrong = [k for k in range(first, len(roles)) if roles[k] != ("user", "assistant")[(k - first) % 2]]
    if wrong or roles[first:][-1:] != ["user"]:
        line = lines[wrong[0] if wrong else -1] if lines else "1"
        raise PromptError(
            f"{prompt.path}:{line}: the turns are {', '.join(roles) or 'none'}; expected an optional system turn, then "
            "user and assistant in turn, and a user turn last (emogen adds the answer)"
        )
    for message, line in zip(messages, lines, strict=True):
        left = MARK.sub("", message["content"])
        if re.search(f"[{_OPEN}{_CLOSE}]", left):
            raise PromptError(f"{prompt.path}:{line}: a filter changed a text; use {{{{ example.text }}}} as it is")
        if not message["content"]:
            raise PromptError(f"{prompt.path}:{line}: the {message['role']} turn is empty")
    where = [TEXT_MARK in message["content"] for message in messages]
    if sum(m["content"].count(TEXT_MARK) for m in messages) != 1 or not where[-1]:
        raise PromptError(f"{prompt.at('text')}: {{{{ text }}}} must come out exactly once, in the last user turn")
    marks = {int(mark) for message in messages for mark in MARK.findall(message["content"])}
    if n_examples and "examples" in prompt.variables and marks != set(range(n_examples + 1)):
        raise PromptError(f"{prompt.at('examples')}: not every example's text comes out; use {{{{ example.text }}}}")


def _check_labels(prompt: Prompt, messages: list[Message], label_set: LabelSet) -> None:
    """Refuse a list of the labels in which there stands another word: no answer could name it.

    A list is one of the labels if it has half of them.
    """
    names = {name.casefold() for name in label_set.names}
    allowed = names | {label_set.empty.casefold(), "etc"}
    meaning = {alias.casefold(): label.name for label in label_set.labels for alias in label.aliases}
    for words in (words for message in messages for words in _lists(message["content"])):
        if sum(word.casefold() in names for word in words) < max(3, len(names) / 2):
            continue
        for word in words:
            if re.fullmatch(r"\w[\w'-]*", word) and word.casefold() not in allowed:
                known = meaning.get(word.casefold())
                hint = f"answers say {known!r}" if known else f"the labels are: {', '.join(label_set.names)}"
                lines = [n for n, line in enumerate(prompt.source.splitlines(), start=1) if word in line]
                where = f"{prompt.path}:{lines[0]}" if lines else prompt.path
                raise PromptError(f"{where}: lists {word!r}, which is no label of {label_set.name!r}; {hint}")


def _lists(content: str) -> Iterator[list[str]]:
    """The items of what may be lists: of bullets, and of each part of a sentence by its commas."""
    bullets = re.findall(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]*([^:,\n]+)", content, re.MULTILINE)
    parts = re.split(r"[.;:!?()\[\]\n]", content)
    for items in [bullets, *(re.split(r",|\bor\b|\band\b", part) for part in parts)]:
        yield [item.strip(" \t\"'`*_") for item in items]


def _line_of(error: BaseException) -> str:
    """The template line that an error came from: the innermost frame of the compiled template."""
    line = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = f"{trace.tb_lineno}:"
        trace = trace.tb_next
    return line
