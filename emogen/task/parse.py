"""A generated answer -> labels, and how it was read. The way back from `answer.py`; it never raises on any string.

A text is read in four steps: keep the first answer of what the model wrote (`_first_answer`), cut it into
items at commas, line breaks and the like (`_items`), read each item (`_read_item`), and sum up (`_tolerant`).
Quotes, brackets and other punctuation carry no meaning, so JSON, whole or cut off, needs no reader of its own.

The rules:

* Words: a name, an alias or the empty answer counts as a whole word only, in any case, longest first. A hyphen joins
  (`self-love` is one word, and no label). A word that is also a label is a label (`neutral` in GoEmotions).
* Yes and no: `yes true 1` after a label and a colon let it count, `no false 0 null none not` do not; a number between
  is a probability and counts from 0.5. Without a colon the value must end the item (`joy no,`, `Joy? No.`). The first
  verdict on a label outweighs all else. Among verdicts, a last label without one was cut off, and does not count.
* Negation stays within an item. `not no never without neither nor isn't ...` deny the next label, across filler words
  (`any`, `a sign of`) only: any other word ends it (`not only joy`). `or` hands it on (`no anger or joy`). Emotions
  denied as such (`no clear emotion`) are the empty set. It never reaches back (`joy is not there`); English words only.
* Cut-off: the last item, if nothing closes it and a separator opens it (or it is the whole text), is taken for the one
  label name that starts with it, from 3 letters on; not among verdicts.
* Unknown: an item of one to three words without a label. Longer ones are chatter and are dropped, and so are headings
  (`Reason: ...`) and what is denied.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from emogen.task.answer import NO, STYLES, YES, answer_text
from emogen.task.labels import LabelSet

MODES = ("strict", "tolerant")
MAX_CHARS = 10_000  # an answer is short: what a tolerant reading has to look at is bounded


# Words (folded). They only matter where the label set does not claim them.
_NOTHING = ("none", "none of the above", "none of these", "no emotion", "no emotions", "no label", "no labels")
_EMPTY = (*_NOTHING, "neutral", "n/a")
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


# A word is letters, digits and the marks of scripts that write vowels as marks (which `\w` leaves out).
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u109f"
_LETTER = rf"(?:[^\W_]|(?!\w)[{_MARKS}])"
_BEFORE = rf"(?<![^\W_])(?<![{_MARKS}])(?<![^\W_][-_])"
_AFTER = rf"(?!{_LETTER}|[-_][^\W_])"
_HEAD = "(?:the|my|final|predicted|detected|expressed|emotions?|feelings?|labels?|answer|output|result|response)"


# What is not matched is punctuation, and skipped. Every repetition is bounded or cannot overlap with what follows it.
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


_ESCAPE = re.compile(r"\\u(?!d[89a-f])([0-9a-f]{4})", re.IGNORECASE)  # as json.dumps writes "Ärger"; no lone surrogates
FAILED = ("unknown", "empty")  # of the ways in which an answer is read, those that are failures


@dataclass(frozen=True)
class ParsedAnswer:
    """What was read: `labels` in canonical order, the same as a 0/1 `vector`, how it was read, and what is no label."""

    labels: tuple[str, ...]
    vector: tuple[int, ...]
    status: str
    unknown: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """True where nothing could be read; `labels` is then empty for want of an answer, not as an answer."""
        return self.status in FAILED


def parse_answer(text: str, label_set: LabelSet, mode: str = "tolerant", style: str = "list") -> ParsedAnswer:
    """Read a generated answer back into labels, by the rules at the top of this module.

    Args:
        text: what the model wrote. Any string will do; a tolerant reading looks at its first 10,000 characters only,
            not counting a closed `<think>` block at its start.
        label_set: the labels that it may name.
        mode: `strict` takes the canonical answer of the style and nothing else; `tolerant` whatever can be read.
        style: whose canonical answer counts as exact. The others are read just as well.

    Returns:
        The labels and how they were read, as `status`:

        * `exact`: the canonical answer, but for whitespace around it.
        * `normalised`: says the same; only case, order, quotes, separators, numbering, a lead-in and the like differ.
        * `repaired`: something was dropped or mended: chatter, repeated, unknown or denied labels, aliases, a cut-off
          last label, labels beside the empty answer, a run-on into the next turn.
        * `unknown`: words, but neither a label nor the empty answer. They are in `unknown`, which is never empty then.
        * `empty`: no words at all.

    Raises:
        ValueError: an unknown mode or style. Never on account of the text.
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
        return _tolerant(text, label_set)
    return _parsed((), "unknown", label_set, (text,)) if text else _parsed((), "empty", label_set)


def _parsed(names: Iterable[str], status: str, label_set: LabelSet, unknown: Iterable[str] = ()) -> ParsedAnswer:
    labels = label_set.sort(names)
    return ParsedAnswer(labels, label_set.vector(labels), status, tuple(dict.fromkeys(unknown)))


def _canonical_names(text: str, label_set: LabelSet, style: str) -> list[str] | None:
    """The names in a canonical answer, or None where it is none: take it apart, and see if that is how it is made."""
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
    """What the items read so far have come to."""

    named: list[str] = field(default_factory=list)
    verdicts: dict[str, bool] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    last: str = ""  # the label that the last item ends with
    empty: bool = False
    denied: bool = False
    words: bool = False  # any that are not part of the answer


def _tolerant(text: str, label_set: LabelSet) -> ParsedAnswer:
    answer, open_ended, mended = _first_answer(text)
    pattern, meaning = _compiled(label_set)
    found = _Found()
    for before, tokens in _items(answer, pattern):
        cut_off = _cut_off_name(before, tokens, label_set) if open_ended and not found.verdicts else None
        if cut_off:
            found.named.append(cut_off)
            mended = True
        else:
            mended |= _read_item(tokens, meaning, found)

    if not (found.named or found.verdicts or found.empty or found.denied):
        if not found.words:
            return _parsed((), "empty", label_set)
        return _parsed((), "unknown", label_set, found.unknown or [answer.strip()])
    if found.verdicts and found.last and found.last not in found.verdicts:
        mended = True
        found.verdicts[found.last] = False
    names = {name for name in found.named if found.verdicts.get(name, True)}
    names |= {name for name, verdict in found.verdicts.items() if verdict}
    mended |= found.words or found.denied or len(set(found.named)) < len(found.named) or bool(found.empty and names)
    return _parsed(names, "repaired" if mended else "normalised", label_set, found.unknown)


def _first_answer(text: str) -> tuple[str, bool, bool]:
    """The first answer alone; whether it may have been cut off at its end; whether more than end tokens was dropped."""
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
    """Words that differ in case, whitespace or Unicode composition only are the same word."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


@lru_cache(maxsize=32)
def _compiled(label_set: LabelSet) -> tuple[re.Pattern[str], dict[str, str]]:
    """The token pattern of a label set, and what its words mean: folded word -> label name, or "" for the empty set."""
    meaning = dict.fromkeys((*_EMPTY, _fold(label_set.empty)), "")
    meaning |= {_fold(alias): label.name for label in label_set.labels for alias in label.aliases}
    meaning |= {_fold(label.name): label.name for label in label_set.labels}  # a name outranks an alias
    # Folding may change more than case ("Spaß" -> "spass"), so the words are also looked for as they are written.
    written = {label_set.empty, *(word for label in label_set.labels for word in (label.name, *label.aliases))}
    words = set(meaning) | {unicodedata.normalize("NFC", word) for word in written}
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    known = "|".join(r"\s+".join(re.escape(part) for part in word.split()) for word in longest_first)
    return re.compile(_TOKEN.replace("%s", known), re.IGNORECASE | re.MULTILINE | re.VERBOSE), meaning


def _items(text: str, pattern: re.Pattern[str]) -> list[tuple[str, list[re.Match[str]]]]:
    """The items of a text that have tokens, each with what stands before it: "" (nothing), "sep", "stop" or "lead"."""
    items: list[tuple[str, list[re.Match[str]]]] = [("", [])]
    for token in pattern.finditer(text):
        kind = "sep" if token.lastgroup == "word" and _fold(token[0]) == "and" else str(token.lastgroup)
        if kind in ("sep", "stop", "lead"):
            items.append((kind, []))
        elif kind != "skip":
            items[-1][1].append(token)
    return [(before, tokens) for before, tokens in items if tokens]


def _cut_off_name(before: str, tokens: list[re.Match[str]], label_set: LabelSet) -> str | None:
    """The one name that an item at the very end of the text is the beginning of."""
    text = tokens[0].string
    if before == "stop" or tokens[-1].end() < len(text) or any(token.lastgroup != "word" for token in tokens):
        return None
    start = _fold(text[tokens[0].start() :])
    names = [name for name in label_set.names if _fold(name).startswith(start)]
    return names[0] if len(names) == 1 and len(start) >= 3 else None


def _read_item(tokens: list[re.Match[str]], meaning: dict[str, str], found: _Found) -> bool:
    """Add what one item says to `found`. True if it had to be mended: an alias, a cut-off value, a probability."""
    mended = known = negated = handed_on = colon = False
    label = ""  # the label that the token before this one names
    loose: list[re.Match[str]] = []  # words that may be an unknown label
    for token in tokens:
        word = _fold(token[0])
        if token.lastgroup == "colon":
            colon = True
            continue
        verdict = _verdict(word) if colon else None
        if colon and not label and (not verdict or "." in word):
            loose.clear()  # "Reason: ..." is a heading, and "gratitude: no" says nothing; "gratitude: yes" stays
        colon = False
        if verdict is not None:
            if label:
                found.verdicts.setdefault(label, verdict)
            else:
                found.words = True
            mended |= word not in (*_YES, *_NO)
            negated, label = not verdict, ""
            continue

        label = ""
        means = "" if token.lastgroup == "empty" else meaning.get(word) if token.lastgroup == "known" else None
        if means:
            label, known = means, True
            mended |= word != _fold(label)
            if negated:
                found.denied = True
            else:
                found.named.append(label)
            negated, handed_on = False, negated
        elif means == "" and not negated:
            found.empty = known = True
        else:
            found.words = True
            if _NEGATOR.fullmatch(word):
                negated = True
            elif word == "or":
                negated = handed_on
            elif negated and word in _EMOTION:
                found.empty = known = True
            elif not (negated and _FILLER.fullmatch(word)):
                if not negated and word not in _COURTESY:
                    loose.append(token)
                negated = handed_on = False

    if colon and not label:
        loose.clear()
    if loose and not known and len(loose) <= 3:
        found.unknown.append(token.string[loose[0].start() : loose[-1].end()])
    found.last = label
    return mended


def _verdict(word: str) -> bool | None:
    """Whether a value says yes or no, or neither. A value may be cut off at the end of a text (`{"joy": tr`)."""
    if re.fullmatch(r"0\.\d+|1\.0+", word):
        return float(word) >= 0.5
    if any(yes.startswith(word) for yes in _YES):
        return True
    return False if any(no.startswith(word) for no in _NO) else None
