"""A generated answer -> labels, and how it was read. The inverse of `answer.py`.

A text is read in four steps: keep the first answer in it (`_first_answer`), split it into items at commas, line breaks
and the like (`_items`), read each item (`_read_item`), and combine the items (`_read_tolerantly`). Quotes, brackets and
other punctuation carry no meaning, so JSON needs no reader of its own, whether it is complete or cut off.

The rules:

* Words: a name, an alias or the empty answer counts only as a whole word, in any case; the longest match wins. A hyphen
  joins (`self-love` is one word and not a label). A word that is also a label is a label (`neutral` in GoEmotions).
* Yes and no: after a label and a colon, `yes true 1` select the label, and `no false 0 null none not` do not. A number
  between 0 and 1 is a probability and selects the label from 0.5. Without a colon, the value must end the item
  (`joy no,`, `Joy? No.`). The first verdict on a label overrides everything else. If there are verdicts, a last label
  without one was cut off and does not count.
* Negation is English only and ends with the item. `not no never without neither nor isn't ...` deny the next label,
  with only filler words (`any`, `a sign of`) in between; any other word ends the negation (`not only joy`). `or`
  continues it (`no anger or joy`). It never applies backwards (`joy is not there`). Denying emotions in general
  (`no clear emotion`) is the empty answer.
* Cut-off: the last item, if nothing closes it and it follows a separator (or is the whole text), is completed to the
  only label name that starts with it, given at least 3 letters. This does not apply among verdicts.
* Unknown: an item of one to three words without a label. Longer items are chatter and are dropped, as are headings
  (`Reason: ...`) and denied words.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from emogen.task.answer import NO, STYLES, YES, answer_text
from emogen.task.labels import LabelSet

MODES = ("strict", "tolerant")
FAILED = ("unknown", "empty")  # the statuses that count as parse failures
MAX_CHARS = 10_000  # answers are short; this bounds the time of a tolerant reading

# Folded words. A label or an alias of the same spelling takes precedence.
_NO_LABELS = ("none of the above", "none of these", "no emotion", "no emotions", "no label", "no labels")
_EMPTY = ("none", "neutral", "n/a", *_NO_LABELS)
_YES = (YES, "true", "1")
_NO = (NO, "false", "0", "null", "none", "not", "n/a")
_NEGATOR = re.compile("not|no|never|without|neither|nor|cannot|lack(s|ing)?|(is|are|was|were|do|does|did)nt|.*n['’]t")
_FILLER = re.compile(
    "an?|the|any|all|of|at|in|be|being|as|so|such|really|very|much|quite|too|exactly|actually|particularly|necessarily"
    "|longer|clear|strong|these|those|express(es|ed|ing)?|feel(s|ing|ings)?|show(s|n|ing)?|convey(s|ing)?|contain(s|ing)?"
    "|ha(ve|s|ving)|see|seems?|to|about|sense|signs?|hint|trace"
)
_EMOTION = frozenset({"emotion", "emotions", "label", "labels"})
_COURTESY = frozenset({"yes", "sure", "ok", "okay", "certainly", "well"})

# A word consists of letters, digits, and the combining marks that write vowels in some scripts (`\w` excludes them).
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u109f"
_LETTER = rf"(?:[^\W_]|(?!\w)[{_MARKS}])"
_BEFORE = rf"(?<![^\W_])(?<![{_MARKS}])(?<![^\W_][-_])"
_AFTER = rf"(?!{_LETTER}|[-_][^\W_])"
_HEAD = "(?:the|my|final|predicted|detected|expressed|emotions?|feelings?|labels?|answer|output|result|response)"

# The kinds of tokens: skip (numbering, code fences), known (words of the label set), empty ([] or {}), lead (such as
# "Emotions:"), word, colon (or what takes its place before a verdict), sep and stop (which end an item). Anything else
# is punctuation. No repetition can backtrack far: each one is bounded, or cannot match the beginning of what follows.
_TOKEN = rf"""
    (?P<skip>   (?:^[^\w\n]{{0,8}} | (?<=[,;]\s)\(?) \d{{1,2}}[.):](?!\d) | ```(?:json|text|plaintext|python)\b )
  | (?P<known>  {_BEFORE}(?:%s){_AFTER} )
  | (?P<empty>  \[\s*\] | \{{\s*\}} )
  | (?P<lead>   {_BEFORE}{_HEAD}(?:\s{{1,3}}{_HEAD}){{0,3}}["'*_`)\s]{{0,6}}[:=] )
  | (?P<word>   @\w+ | https?://\S+ | \d+\.\d+ | {_LETTER}+(?:[-_'’]{_LETTER}+)* )
  | (?P<colon>  [:=] | [ \t(|?>→–—-](?=[ \t"*]{{0,3}}(?:yes|no|true|false|[01])[ \t"*)]{{0,3}}(?:[,;.|\n]|$)) )
  | (?P<sep>    [,;/|&+\n、，；،] )
  | (?P<stop>   [.!?。…] )
"""

_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>|\[/?INST\]"
)
_NEW_TURN = re.compile(
    r"\n[ \t\r]{0,9}\n\W{0,9}(?:tweet|text|input|question|example|instruction|user|human|assistant|system"
    r"|explanation|reason|reasoning|note)\b\W{0,3}\d{0,4}\W{0,3}:"
    r"|\n\W{0,9}(?:tweet|user|human|assistant|system)\W{0,3}:",
    re.IGNORECASE,
)
_ESCAPE = re.compile(r"\\u(?!d[89a-f])([0-9a-f]{4})", re.IGNORECASE)  # as json.dumps writes "Ä"; no lone surrogates


@dataclass(frozen=True)
class ParsedAnswer:
    """The result of reading an answer.

    Attributes:
        labels: label names in canonical order.
        vector: the same as a 0/1 vector of length L.
        status: how the answer was read; see `parse_answer`.
        unknown: words in place of a label that are not in the label set.
    """

    labels: tuple[str, ...]
    vector: tuple[int, ...]
    status: str
    unknown: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether nothing could be read. `labels` is then empty, which is not the same as the empty answer."""
        return self.status in FAILED


def parse_answer(text: str, label_set: LabelSet, mode: str = "tolerant", style: str = "list") -> ParsedAnswer:
    """Read a generated answer, by the rules at the top of this module. No text raises an error.

    Args:
        text: the generated text. A tolerant reading considers its first 10,000 characters, after a closed `<think>`
            block at its start.
        label_set: the labels that the answer may name.
        mode: `strict` accepts only the canonical answer of the style; `tolerant` reads whatever it can.
        style: the style whose canonical answer is `exact`. Answers in other styles are read too.

    Returns:
        The labels, and one of these as `status`:

        * `exact`: the canonical answer, apart from surrounding whitespace.
        * `normalised`: equivalent to it; only case, order, quotes, separators, numbering, a lead-in or the like differ.
        * `repaired`: something was dropped or corrected: chatter; repeated, unknown or denied labels; aliases; a
          cut-off last label; labels beside the empty answer; a continuation with the next turn.
        * `unknown`: words, but neither a label nor the empty answer. They are in `unknown`, which is then not empty.
        * `empty`: no words at all.

    Raises:
        ValueError: the mode or the style is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of: {', '.join(MODES)}")
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; it must be one of: {', '.join(STYLES)}")
    text = text.strip()
    names = _canonical_names(text, label_set, style)
    if names is not None:
        return _parsed(names, "exact", label_set)
    if mode == "tolerant":
        return _read_tolerantly(text, label_set)
    return _parsed((), "unknown", label_set, (text,)) if text else _parsed((), "empty", label_set)


def _parsed(names: Iterable[str], status: str, label_set: LabelSet, unknown: Iterable[str] = ()) -> ParsedAnswer:
    labels = label_set.sort(names)
    return ParsedAnswer(labels, label_set.vector(labels), status, tuple(dict.fromkeys(unknown)))


def _canonical_names(text: str, label_set: LabelSet, style: str) -> list[str] | None:
    """The names in a canonical answer, or None for any other text.

    The text is split as if it were canonical, and compared with the canonical answer for the resulting names.
    """
    if style == "list":
        names = [] if text == label_set.empty else text.split(", ")
    elif style == "count":
        names = [] if text == label_set.empty else text.partition(": ")[2].split(", ")
    elif style == "json":
        names = [] if text == "[]" else text[2:-2].split('", "')
    else:
        names = [line.removesuffix(f": {YES}") for line in text.split("\n") if line.endswith(f": {YES}")]
    known = set(names) <= set(label_set.names)
    return names if known and answer_text(names, label_set, style) == text else None


@dataclass
class _Found:
    """The findings in all items read so far."""

    mended: bool  # something was dropped or corrected, apart from what the other fields record
    named: list[str] = field(default_factory=list)
    verdicts: dict[str, bool] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    last: str = ""  # the label that ends the last item
    empty: bool = False  # the empty answer
    denied: bool = False  # a label with a negation
    words: bool = False  # words that are not part of the answer


@dataclass
class _Item:
    """The state of reading one item, between two of its tokens."""

    label: str = ""  # the label that the previous token names
    known: bool = False  # a token names a label or the empty answer
    negated: bool = False  # the next label is denied
    continues: bool = False  # the last label was denied, and `or` would deny the next one
    loose: list[re.Match[str]] = field(default_factory=list)  # words that may be an unknown label


def _read_tolerantly(text: str, label_set: LabelSet) -> ParsedAnswer:
    answer, open_ended, mended = _first_answer(text)
    pattern, meaning = _compiled(label_set)
    found = _Found(mended)
    for before, tokens in _items(answer, pattern):
        cut_off = _cut_off_name(before, tokens, label_set) if open_ended and not found.verdicts else None
        if cut_off:
            found.named.append(cut_off)
            found.mended = True
        else:
            _read_item(tokens, meaning, found)

    if not (found.named or found.verdicts or found.empty or found.denied):
        if not found.words:
            return _parsed((), "empty", label_set)
        return _parsed((), "unknown", label_set, found.unknown or [answer.strip()])
    mended = found.mended or found.words or found.denied or len(set(found.named)) < len(found.named)
    if found.verdicts and found.last and found.last not in found.verdicts:
        found.verdicts[found.last] = False  # cut off before its verdict
        mended = True
    names = {name for name in found.named if found.verdicts.get(name, True)}
    names |= {name for name, verdict in found.verdicts.items() if verdict}
    mended |= bool(found.empty and names)
    return _parsed(names, "repaired" if mended else "normalised", label_set, found.unknown)


def _first_answer(text: str) -> tuple[str, bool, bool]:
    """Drop everything but the first answer.

    Returns:
        The answer; whether its end may be cut off; whether anything other than end tokens was dropped.
    """
    open_ended, mended = True, False
    if text.startswith("<think>") and "</think>" in text:
        text = text.partition("</think>")[2]
        mended = True
    if len(text) > MAX_CHARS:
        text = text[:MAX_CHARS]
        mended = True
    if end := _SPECIAL.search(text):
        mended |= bool(_SPECIAL.sub("", text[end.start() :]).strip())
        text, open_ended = text[: end.start()], False
    text = text.strip()
    if turn := _NEW_TURN.search(text):
        text, open_ended, mended = text[: turn.start()], False, True
    text = _ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), text)
    return unicodedata.normalize("NFC", text), open_ended, mended


def _fold(text: str) -> str:
    """The form in which words are compared: case, whitespace and Unicode composition do not matter."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


@lru_cache(maxsize=32)
def _compiled(label_set: LabelSet) -> tuple[re.Pattern[str], dict[str, str]]:
    """The token pattern of a label set, and the meaning of its words: folded word -> label name, or "" for no label."""
    meaning = dict.fromkeys((*_EMPTY, _fold(label_set.empty)), "")
    meaning |= {_fold(alias): label.name for label in label_set.labels for alias in label.aliases}
    meaning |= {_fold(label.name): label.name for label in label_set.labels}  # a name takes precedence over an alias
    # Folding may change more than case ("Spaß" -> "spass"), so the pattern also contains the words as written.
    written = {label_set.empty, *(word for label in label_set.labels for word in (label.name, *label.aliases))}
    words = set(meaning) | {unicodedata.normalize("NFC", word) for word in written}
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    known = "|".join(r"\s+".join(re.escape(part) for part in word.split()) for word in longest_first)
    return re.compile(_TOKEN.replace("%s", known), re.IGNORECASE | re.MULTILINE | re.VERBOSE), meaning


def _items(text: str, pattern: re.Pattern[str]) -> list[tuple[str, list[re.Match[str]]]]:
    """Split a text into items.

    Returns:
        The tokens of each item that has any, after the kind of token before it: "sep", "stop", "lead", or "" for none.
    """
    items: list[tuple[str, list[re.Match[str]]]] = [("", [])]
    for token in pattern.finditer(text):
        kind = "sep" if token.lastgroup == "word" and _fold(token[0]) == "and" else str(token.lastgroup)
        if kind in ("sep", "stop", "lead"):
            items.append((kind, []))
        elif kind != "skip":
            items[-1][1].append(token)
    return [(before, tokens) for before, tokens in items if tokens]


def _cut_off_name(before: str, tokens: list[re.Match[str]], label_set: LabelSet) -> str | None:
    """The only label name that starts with this item, if the item ends the text; else None."""
    text = tokens[0].string
    if before == "stop" or tokens[-1].end() < len(text) or any(token.lastgroup != "word" for token in tokens):
        return None
    start = _fold(text[tokens[0].start() :])
    names = [name for name in label_set.names if _fold(name).startswith(start)]
    return names[0] if len(names) == 1 and len(start) >= 3 else None


def _read_item(tokens: list[re.Match[str]], meaning: dict[str, str], found: _Found) -> None:
    """Read the tokens of one item, and add the findings to `found`."""
    item = _Item()
    after_colon = False
    for token in tokens:
        if token.lastgroup == "colon":
            after_colon = True
            continue
        word = _fold(token[0])
        verdict = _verdict(word) if after_colon else None
        if after_colon and not item.label and (not verdict or "." in word):
            item.loose.clear()  # drop the heading "Reason: ..." and the denied "gratitude: no"; keep "gratitude: yes"
        after_colon = False
        label = meaning.get(word) if token.lastgroup == "known" else None
        if verdict is not None:
            _add_verdict(verdict, word, item, found)
        elif label:
            _add_label(label, word, item, found)
        elif (label == "" or token.lastgroup == "empty") and not item.negated:
            item.label = ""
            item.known = found.empty = True
        else:
            _add_word(token, word, item, found)

    if after_colon and not item.label:
        item.loose.clear()
    if item.loose and not item.known and len(item.loose) <= 3:
        found.unknown.append(tokens[0].string[item.loose[0].start() : item.loose[-1].end()])
    found.last = item.label


def _add_verdict(verdict: bool, word: str, item: _Item, found: _Found) -> None:
    if item.label:
        found.verdicts.setdefault(item.label, verdict)
    else:
        found.words = True
    found.mended |= word not in (*_YES, *_NO)  # a probability, or a cut-off value
    item.label = ""
    item.negated = not verdict


def _add_label(label: str, word: str, item: _Item, found: _Found) -> None:
    if item.negated:
        found.denied = True
    else:
        found.named.append(label)
    found.mended |= word != _fold(label)  # an alias
    item.label, item.known = label, True
    item.negated, item.continues = False, item.negated


def _add_word(token: re.Match[str], word: str, item: _Item, found: _Found) -> None:
    """Read a token that is neither a verdict nor a label."""
    found.words = True
    item.label = ""
    if _NEGATOR.fullmatch(word):
        item.negated = True
    elif word == "or":
        item.negated = item.continues
    elif item.negated and word in _EMOTION:
        item.known = found.empty = True
    elif not (item.negated and _FILLER.fullmatch(word)):
        if not item.negated and word not in _COURTESY:
            item.loose.append(token)
        item.negated = item.continues = False


def _verdict(word: str) -> bool | None:
    """True for yes, False for no, None for other words. A value may be cut off at the end of a text (`{"joy": tr`)."""
    if re.fullmatch(r"0\.\d+|1\.0+", word):
        return float(word) >= 0.5
    if any(yes.startswith(word) for yes in _YES):
        return True
    return False if any(no.startswith(word) for no in _NO) else None
