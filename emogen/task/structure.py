"""JSON and the like -> what it says of each label. Cut-off objects, Python literals and reprs are read as well."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from emogen.task.words import VERDICTS, Verdict, Words, fold, leading_verdict, number_verdict, verdict_of

_START = re.compile(
    r"""[\[(]\s*[\[({]|\{\s*(?:["'“]|\w[\w ./-]{0,60}\s?[:=]|\})"""
    r"""|\b(?P<callee>dict|[A-Z]\w{1,30})\(\s*[\[{(]?\s*["']?[\w -]{1,60}["']?\s?[=:]"""
)
_TOKEN = re.compile(
    r"""(?P<string> "(?:[^"\\]|\\.)*(?:"|\Z) | '(?:[^'\\\n]|\\.|(?<=\w)'(?=\w))*(?:'|\Z) | “[^”]*(?:”|\Z) )
      | (?P<comment> //[^\n]*(?=\n) | /\*.{0,500}?\*/ )
      | (?P<open> (?:[A-Za-z_][\w.]{0,40})?\( | [\[{] ) | (?P<close> [\])}] ) | (?P<colon> [:=]>? ) | (?P<comma> [,;] )
      | (?P<bare> [^\s"'“\[\](){}:=,;][^"“\[\](){}:=,;\n]* ) | (?P<skip> . | \n )""",
    re.VERBOSE | re.DOTALL,
)
_FENCE = re.compile(r"```[ \t]*[\w+-]{0,20}[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)

_ANSWERS = re.compile(
    r"(?:.*[ _])?(?:labels?|names?|emotions?|answers?|predictions?|predicted|output|results?|class(?:es)?"
    r"|categor(?:y|ies)|topics?"
    r"|tags?|classification|present|detected|selected|applicable|verdict|primary|secondary|main|dominant|yes|true)"
    r"(?:[ _](?:label|name|list|set)s?)?"
)
_DENIED = re.compile(
    r"(?:.*[ _])?(?:not|non|no|un(?:selected|detected)|absent|rejected|excluded|missing|false|irrelevant|inapplicable"
    r"|ruled)(?:[ _].*)?"
)
_ASIDE = re.compile(
    r"(?:.*[ _])?(?:reason(?:s|ing)?|explanations?|rationale|justification|evidence|text|tweet|sentence|sequence|input"
    r"|post|comments?"
    r"|notes?|thoughts?|thinking|analysis|summary|candidates?|considered|options?|available|possible|allowed|all|examples?"
    r"|opposite|language|quote|span|keywords?|trigger|cause|description|definition|id|model"
    r"|version|sentiment|tone|polarity)(?:[ _].*)?"
)
_NAMES = frozenset(
    {"label", "name", "emotion", "class", "category", "topic", "tag", "key", "answer", "prediction", "type"}
)
_VERDICT_KEYS = frozenset(
    [
        "present",
        "value",
        "answer",
        "verdict",
        "decision",
        "applies",
        "applicable",
        "detected",
        "selected",
        "predicted",
        "prediction",
        "label",
        "found",
        "true",
        "expressed",
        "active",
        "flag",
        "result",
        "is_present",
        "status",
        "exists",
        "binary",
        "yes",
        "is_applicable",
        "response",
        "positive",
    ]
)
_SCORES = frozenset(
    [
        "score",
        "scores",
        "probability",
        "probabilities",
        "prob",
        "probs",
        "confidence",
        "confidences",
        "likelihood",
        "percentage",
        "percent",
        "p",
        "weight",
        "values",
        "intensity",
        "strength",
        "level",
        "certainty",
        "rating",
    ]
)


@dataclass
class Scalar:
    """A string, a number or a word."""

    text: str
    quoted: bool = False
    cut_off: bool = False  # it ends the text


@dataclass
class Node:
    """An object, array, tuple or set: values, each with a key or with None."""

    items: list[tuple[str | None, "Scalar | Node"]] = field(default_factory=list)
    closed: bool = False

    @property
    def keyed(self) -> bool:
        """Whether the values have keys."""
        return any(key is not None for key, _ in self.items)


@dataclass(frozen=True)
class Said:
    """What a structure says, in its order: of a label, or a string in place of labels."""

    label: str = ""
    verdict: Verdict | None = None  # None for a label that is listed
    text: str = ""  # the words, for a label without a clear verdict; or the string in place of labels
    plain: bool = True  # a yes, no, true, false, 0 or 1
    cut_off: bool = False  # the string ends the text


@dataclass(frozen=True)
class Structure:
    """What the objects in a text say.

    Attributes:
        said: in their order.
        empty: whether they are empty.
        mended: whether something was dropped: other keys, a cut-off key.
        rest: the text besides them.
    """

    said: tuple[Said, ...]
    empty: bool
    mended: bool
    rest: str


def read_structure(text: str, words: Words) -> Structure | None:
    """Read the objects in a text. None if it has no object with keys and no array of pairs."""
    for fence in _FENCE.finditer(text):
        if (read := read_structure(fence[1], words)) is not None:
            return replace(read, rest=f"{text[: fence.start()]}\n{read.rest}\n{text[fence.end() :]}")
    starts = (start for start in _START.finditer(text) if not words.meaning(start["callee"] or "{"))
    for start in islice(starts, 5):
        root, end, cut_off = _parse(text, start.start())
        roots = [value for _, value in root.items if isinstance(value, Node)]
        if any(_is_structure(node, words) for node in roots):
            break
    else:
        return None
    said = tuple(each for node in roots for each in _read(node, words))
    asides = any(_has_asides(node) for node in roots)
    caption = re.compile(r"(?:\b[\w ]{1,40}\s?[:=]|\A\s*\w{1,20})\s*\Z")  # `Emotions: {`, `json {`
    before = caption.sub("", text[: start.start()])
    return Structure(said, all(_is_empty(node) for node in roots), asides or cut_off, f"{before}\n{text[end:]}")


def _parse(text: str, start: int) -> tuple[Node, int, bool]:
    """The values from `start` on, as far as they follow each other, under one root; where they end; and whether a key
    was cut off."""
    root = Node()
    stack: list[tuple[Node, str | None]] = [(root, None)]
    key: str | None = None
    last: Scalar | None = None  # a scalar that may be a key
    end = start
    for token in _TOKEN.finditer(text, start):
        kind, (node, _) = token.lastgroup, stack[-1]
        if len(stack) == 1 and kind not in ("open", "comma", "skip"):
            break
        if kind in ("string", "bare"):
            last = _scalar(token, text)
            node.items.append((key, last))
            key = None
        elif kind == "colon":
            if last is not None and node.items and node.items[-1][1] is last:
                node.items.pop()
                key, last = last.text, None
        elif kind == "open":
            child = Node()
            node.items.append((key, child))
            stack.append((child, key))
            key = last = None
        elif kind == "close":
            _drop_valueless(node, key)
            node.closed = True
            stack.pop()
            key = last = None
        elif kind == "comma":
            _drop_valueless(node, key)
            key = last = None
        if kind != "skip" or not token[0].isspace():
            end = token.end() if kind in ("open", "close", "string", "bare") or len(stack) > 1 else end
    cut_off = key is not None
    for node, _ in stack[1:]:
        if node.keyed and node.items[-1][0] is None and isinstance(node.items[-1][1], Scalar):
            node.items.pop()
            cut_off = True
    return root, end, cut_off


def _drop_valueless(node: Node, key: str | None) -> None:
    if key is not None:  # `{"joy": }`
        node.items.append((key, Scalar("")))


def _scalar(token: re.Match[str], text: str) -> Scalar:
    content = token[0].strip()
    cut_off = token.end() == len(text)
    if token.lastgroup == "bare":
        return Scalar(content, cut_off=cut_off)
    closing = {"“": "”"}.get(content[0], content[0])
    whole = len(content) > 1 and content[-1] == closing
    content = re.sub(r"\\(.)", r"\1", content[1:-1] if whole else content[1:], flags=re.DOTALL)
    return Scalar(content, True, cut_off and not whole)


def _is_structure(node: Node, words: Words) -> bool:
    """Whether a node has keys, or pairs of a label and a verdict."""
    pending, n = [node], 0
    while pending and n < 10_000:
        n += 1
        node = pending.pop()
        if node.keyed or _pair(node, words):
            return True
        pending += [value for _, value in node.items if isinstance(value, Node)]
    return False


def _is_empty(node: Node) -> bool:
    """Whether nothing but empty arrays, objects and strings is in a node, under keys that stand for an answer."""
    return all(
        (isinstance(value, Node) and not value.items and (key is None or not _ASIDE.fullmatch(fold(key))))
        or (key is not None and _ASIDE.fullmatch(fold(key)) is not None)
        for key, value in node.items
    ) and any(isinstance(value, Node) for _, value in node.items)


def _has_asides(node: Node) -> bool:
    return any(key is not None and _ASIDE.fullmatch(_spaced(key)) for key, _ in node.items)


def _spaced(key: str) -> str:
    return fold(re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", key))


def _pair(node: Node, words: Words) -> tuple[str, Scalar] | None:
    """The label and the verdict that an array consists of (`["joy", 0.98]`), or None."""
    if len(node.items) != 2 or node.keyed:
        return None
    (_, first), (_, second) = node.items
    for name, value in ((first, second), (second, first)):
        if not isinstance(name, Scalar) or not isinstance(value, Scalar) or value.quoted:
            continue
        if words.meaning(name.text) and verdict_of(value.text) and not words.meaning(value.text):
            return str(words.meaning(name.text)), value
    return None


def _read(node: Node, words: Words) -> Iterator[Said]:
    """Everything that a node says. The walk keeps its own stack, since nesting is as deep as the text is long."""
    stack: list[tuple[Node | Said, bool]] = [(node, False)]
    while stack:
        current, is_denied = stack.pop()
        if isinstance(current, Said):
            yield current
            continue
        said = _read_pairs(current, words, is_denied) if not current.keyed else _read_object(current, words, is_denied)
        stack += reversed([each if isinstance(each, tuple) else (each, is_denied) for each in said])


_Children = list["Said | tuple[Node | Said, bool]"]


def _read_pairs(node: Node, words: Words, denied: bool) -> _Children:
    if pair := _pair(node, words):
        return [_said(pair[0], pair[1])]
    children: _Children = []
    for _, value in node.items:
        children.append((value, denied) if isinstance(value, Node) else _listed(value, words, denied))
    return children


def _listed(value: Scalar, words: Words, denied: bool) -> Said:
    label = words.meaning(value.text)
    if denied:
        return Said(label or "", Verdict.NO, plain=False) if label else Said()
    if label is None or value.cut_off:
        return Said(text=value.text, cut_off=value.cut_off)
    return Said(text=value.text)


def _said(label: str, value: Scalar) -> Said:
    text = value.text
    verdict = None if value.cut_off and re.fullmatch(r"[-+]?\d*\.", text) else leading_verdict(text)
    if verdict is None and value.cut_off and len(text) > 0:  # `{"joy": tr`
        verdict = next(
            (VERDICTS[word] for word in ("true", "false", "yes", "no", "null") if word.startswith(fold(text))), None
        )
    plain = fold(text) in VERDICTS
    if value.cut_off and number_verdict(text) is not None:
        plain = False
    return Said(label, verdict or Verdict.UNCLEAR, f"{label}: {text}".strip(), plain)


def _read_object(node: Node, words: Words, denied: bool) -> _Children:
    keys = {_spaced(key): value for key, value in node.items if key is not None}
    answered = any(_ANSWERS.fullmatch(key) and not _DENIED.fullmatch(key) and not words.meaning(key) for key in keys)
    if record := _record(keys, words):
        return record
    children: _Children = []
    for key, value in node.items:
        folded = _spaced(key) if key is not None else ""
        label = words.meaning(key) if key is not None else None
        if label and (folded in _SCORES or folded == "confidence") and (answered or fold(str(key)) not in words.names):
            label = None
        if key is None:
            children.append((value, denied) if isinstance(value, Node) else _listed(value, words, denied))
        elif label:
            children.append(_verdict_under(label, value))
        elif _ASIDE.fullmatch(folded) or folded in _SCORES:
            continue
        elif _DENIED.fullmatch(folded) or (folded == "0" and isinstance(value, Node)):
            children.append(_under(value, words, True))
        elif not answered or _ANSWERS.fullmatch(folded):
            children += _under_other_key(str(key), value, words, denied, bool(_ANSWERS.fullmatch(folded)))
    return children


def _under(value: "Scalar | Node", words: Words, denied: bool) -> "Said | tuple[Node | Said, bool]":
    return (value, denied) if isinstance(value, Node) else _listed(value, words, denied)


def _under_other_key(key: str, value: "Scalar | Node", words: Words, denied: bool, is_answer: bool) -> _Children:
    """A key that is no label: the value is (part of) the answer if the key says so, or if it consists of labels."""
    if isinstance(value, Node) or is_answer:
        if isinstance(value, Scalar) and not words.meaning(value.text) and not value.quoted and verdict_of(value.text):
            return []
        return [_under(value, words, denied)]
    if words.meaning(value.text) is not None and value.quoted:
        return [_listed(value, words, denied)]
    verdict = verdict_of(value.text)
    return [Said(text=key)] if verdict is Verdict.YES else []


def _record(keys: dict[str, "Scalar | Node"], words: Words) -> _Children | None:
    """An object that names a label in one value and gives the verdict in another, or the same of parallel arrays."""
    values = next((value for key, value in keys.items() if key in _SCORES and isinstance(value, Node)), None)
    names = next((value for key, value in keys.items() if _ANSWERS.fullmatch(key) and isinstance(value, Node)), None)
    if names and values and len(names.items) == len(values.items) and not names.keyed and not values.keyed:
        pairs = [
            (words.meaning(name.text), value)
            for (_, name), (_, value) in zip(names.items, values.items, strict=True)
            if isinstance(name, Scalar) and isinstance(value, Scalar)
        ]
        if len(pairs) == len(names.items) and any(label for label, _ in pairs):
            return [_said(label, value) for label, value in pairs if label]
    named = [value for key, value in keys.items() if key.rpartition("_")[2] in _NAMES and isinstance(value, Scalar)]
    named = [value for value in named if value.quoted and words.meaning(value.text)]
    if len(named) != 1 or _DENIED.fullmatch(next(key for key, value in keys.items() if value is named[0])):
        return None
    value = _chosen({key: value for key, value in keys.items() if value is not named[0]})
    if value is None or any(words.meaning(key) and key not in _SCORES for key in keys):
        return None
    return [_said(str(words.meaning(named[0].text)), value)]


def _chosen(keys: dict[str, "Scalar | Node"]) -> Scalar | None:
    """The value that is the verdict, among the values of the object of one label: a yes or no before a number."""
    scalars = {key: value for key, value in keys.items() if isinstance(value, Scalar) and leading_verdict(value.text)}
    for wanted in (_VERDICT_KEYS, _SCORES):
        for key, value in scalars.items():
            if key in wanted:
                return value
    return None


def _verdict_under(label: str, value: "Scalar | Node") -> Said:
    if isinstance(value, Scalar):
        return _said(label, value)
    if len(value.items) == 1 and isinstance(value.items[0][1], Scalar) and not value.keyed:
        return _said(label, value.items[0][1])  # `{"joy": [0.9]}`
    chosen = _chosen({_spaced(key): each for key, each in value.items if key is not None})
    return _said(label, chosen) if chosen else Said(label, Verdict.UNCLEAR, label, False)
