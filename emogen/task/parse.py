"""A generated answer -> labels, and how it was read. The inverse of `answer.py`.

A text is read in three steps: find the part of it that answers, without reasoning and markup (`answer_part.py`); read
the JSON, the Python literal or the like in it (`structure.py`), if there is any; else split it into sentences and
items at stops, commas, line breaks and the like, read each item (`_Reader`) and combine what was found (`_combined`).

The rules:

* The part that answers: reasoning between its markers does not count, nor what precedes a closing marker or follows
  an opening one without the other. What is in `<answer>` or `\\boxed{}` is the answer. So is what follows the last
  "Final answer:" or the like behind prose. A sentence behind a line of labels explains them and does not count, unless
  it adds one (`also`); nor does what follows a label and a colon, dash, bracket or `because` in three words or more.
* Words: a name, an alias or the empty answer counts only as a whole word, in any case and with any separator between
  its parts (`severe_toxic`, `Severe Toxic`); the longest match wins. A hyphen joins (`self-love` is one word and not a
  label). Names take precedence over all that follows: a label may be called `neutral`, `yes`, `not joy` or `1`.
* Verdicts: a word (`yes`, `false`, `absent`), a symbol (`✅`, `[x]`), a probability, a percentage or a fraction beside
  a label selects it or does not; a number selects from one half. Where symbols and numbers come before the first
  label of an item, they belong to the label behind them, else to the label before them. Words come after the label. An
  item that consists of a verdict belongs to the label before it. The first verdict on a label overrides everything
  else. A verdict that is unclear (`low`, a number on an unknown scale) leaves the label out and is unknown. If there
  are verdicts, a last label without one was cut off and does not count.
* Headings: a verdict or a negation and a colon (`Absent:`, `No:`) hold for the labels behind it, as far as the line or
  the list goes. Keys of JSON are labels if their value is a verdict; otherwise the keys `labels`, `emotion` and the
  like give the answer, and keys such as `reason` do not count.
* Negation ends with the item. `not no never without neither nor isn't ...` deny the next label, with only filler words
  (`any`, `a sign of`) in between; any other word ends the negation (`not only joy`). `or` continues it (`no anger or
  joy`). It applies backwards in `joy is absent` and `joy is not present` only. Crossed-out words are denied. Denying
  emotions in general (`no clear emotion`) is the empty answer.
* Cut-off: the last item, if nothing closes it and it follows a separator (or is the whole text), is completed to the
  only label name that starts with it, given at least 3 letters. This does not apply among verdicts.
* Unknown: an item of one to three words without a label. Longer items are chatter and are dropped, as are headings
  (`Reason: ...`) and denied words.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from emogen.task.answer import STYLES, YES, answer_text
from emogen.task.answer_part import STRUCK, UNSTRUCK, answer_part
from emogen.task.labels import LabelSet
from emogen.task.structure import read_structure
from emogen.task.words import (
    AFTER,
    BEFORE,
    LETTER,
    NUMBER,
    SYMBOLS,
    VERDICTS,
    Verdict,
    fold,
    number_verdict,
    words_of,
)

MODES = ("strict", "tolerant")
FAILED = ("unknown", "empty")  # the statuses that count as parse failures

# Folded words. A label or an alias of the same spelling takes precedence.
_NEGATOR = re.compile(
    "not|no|never|without|neither|nor|cannot|lack(s|ing)?|(is|are|was|were|do|does|did)nt|.*n['’]t|excluding|minus|non"
    "|(rather than|instead of|as opposed to|absence of|free (of|from)|devoid of|no longer)|non-"
    "|kein(e|en|er|es)?|nicht|ohne|weder|sin|ni|nunca|ningún|ninguna?|tampoco|pas|sans|aucune?|sem|não|nem|senza|né"
    "|لا|ليس|ليست|بدون|غير|不|没有|無|无|не|нет|без"
)
_FILLER = re.compile(
    "an?|the|any|all|of|at|in|be|being|as|so|such|really|very|much|quite|too|exactly|actually|particularly|necessarily"
    "|longer|clear|strong|these|those|following|express(es|ed|ing)?|feel(s|ing|ings)?|show(s|n|ing)?|convey(s|ing)?"
    "|contain(s|ing)?|ha(ve|s|ving)|see|seems?|to|about|sense|signs?|hint|trace|present|detect(ed)?|found|apply|evident"
    "|hay|de|expresa|muestra|es|está|d|ist|eine?|there|find|identif(y|ied)|indicat(e|es|ed|ing)|emotions?|labels?|evidence"
)
_EMOTION = frozenset({"emotion", "emotions", "label", "labels", "topic", "topics", "category", "categories"})
_COURTESY = frozenset({"yes", "sure", "ok", "okay", "certainly", "well"})
_DENYING = frozenset(
    {
        "absent",
        "rejected",
        "excluded",
        "missing",
        "false",
        "unselected",
        "irrelevant",
        "ausente",
        "ausentes",
        "falso",
        "falsch",
        "faux",
    }
)
_ASIDE = frozenset(
    {
        "reason",
        "reasoning",
        "explanation",
        "rationale",
        "justification",
        "because",
        "evidence",
        "note",
        "analysis",
        "tweet",
    }
    | {"text", "input", "sentence", "post", "comment", "context", "thought", "thoughts", "explicación", "begründung"}
)
_SINCE = frozenset({"because", "since", "due", "porque", "weil"})
_ALSO = frozenset(
    {"also", "too", "additionally", "besides", "moreover", "furthermore", "secondary", "secondarily", "plus"}
)
# Words between a label and its verdict: `joy (confidence: very high)`.
_BETWEEN = frozenset(
    [
        "score",
        "scores",
        "probability",
        "prob",
        "confidence",
        "likelihood",
        "level",
        "intensity",
        "strength",
        "percentage",
        "percent",
        "p",
        "degree",
        "rating",
        "value",
        "weight",
        "certainty",
        "is",
        "at",
        "with",
        "a",
        "an",
        "of",
        "approximately",
        "about",
        "around",
        "approx",
        "ca",
        "roughly",
        "very",
        "highly",
        "extremely",
        "quite",
        "fairly",
        "relatively",
        "rather",
    ]
)
_PREDICATE = (
    r"(?:present|there|expressed|detected|found|evident|shown|apparent|applicable|indicated|conveyed|visible|mentioned"
    r"|selected|involved|observed|felt|apply|appear|fit|exist|occur|relevant|supported)\b"
)
_BRACKETED = {"x": Verdict.YES, "v": Verdict.YES, "*": Verdict.YES, "+": Verdict.YES, "-": Verdict.NO, "": Verdict.NO}
_HEAD = (
    "(?:the|my|final|predicted|detected|expressed|emotions?|feelings?|labels?|answer|output|result|response"
    "|topics?|tags?|categor(?:y|ies)|emoci(?:ón|ones)|etiquetas?|respuesta|antwort|情感|标签|答案)"
)
_CHATTER = (
    r"(?:i['’]?\s?(?:a?m|would\sbe|d\sbe|ll\sbe)\s)?(?:happy|glad|delighted|pleased)\sto\s(?:help|assist|classify|analy[sz]e|do)"
    r"|(?:i\s)?hope\s(?:this|that|it)\s(?:helps|is)|i['’]?\s?a?m\s(?:sorry|afraid)(?=,|\sbut\b|\si\b|\sthat\b|\sthis\b)"
    r"|(?:please\s)?trust\sme|with\s(?:high|low|great|full)?\s?confidence(?=\s?(?:[,.:;]|that\b|$))"
)

# The kinds of tokens. known: words of the label set. bracketed, symbol, sign, number: verdicts. struck, unstruck:
# around crossed-out words. absent: denies what comes before. lead: such as "Emotions:". colon and soft: between a label
# and its verdict. sep and stop: end an item. Anything else is punctuation. No repetition can backtrack far: each one is
# bounded, or cannot match the beginning of what follows.
_TOKEN = rf"""
    (?P<chatter> {BEFORE}(?:{_CHATTER}){AFTER} )
  | (?P<known>  %s )
  | (?P<skip>   (?:^[^\w\n\[☐☑✅❌✓✗✔✘]{{0,8}} | (?<=[,;]\s)\(?) \d{{1,2}}[.):](?!\d)
      | ```[a-z]{{0,12}}\b | ^\[\d{{1,2}}\](?=\s%n) | \(\) )
  | (?P<bracketed> [\[(][ ]{{0,3}}
      (?:x|v|[*+-]|yes|no|y|n|true|false|0|1|[{"".join(SYMBOLS)}]\ufe0f?)?[ ]{{0,3}}[\])] )
  | (?P<empty>  \{{\s*\}} )
  | (?P<struck> {STRUCK} )
  | (?P<unstruck> {UNSTRUCK} )
  | (?P<absent> {BEFORE}(?:
        (?:(?:is|are|was|were|does|do|did|has|have)(?:\s(?:also|clearly|really|explicitly|strongly))?(?:\snot|n['’]?t)|not)
        (?:\s(?:clearly|really|explicitly|strongly|directly|been|being|very|even|actually|at\sall)){{0,3}}\s{_PREDICATE}
      | (?:is|are|was|were|seems?)\s(?:(?:completely|entirely|clearly|notably|largely)\s)?(?:absent|missing|lacking)\b
      | (?:is|are|was|were)(?:\snot|n['’]?t)(?=\s{{0,3}}(?:[.,;\n]|$)) ) )
  | (?P<lead>   {BEFORE}{_HEAD}(?:\s{{1,3}}{_HEAD}){{0,3}}["'*_`)\s]{{0,6}}[:=：] )
  | (?P<symbol> [{"".join(SYMBOLS)}] )
  | (?P<number> {NUMBER} )
  | (?P<negator> {BEFORE}(?:rather\sthan|instead\sof|as\sopposed\sto|absence\sof|free\s(?:of|from)|devoid\sof
      |no\slonger|non-(?=\w)) )
  | (?P<word>   @\w+ | https?://\S+ | {LETTER}+(?:[-_'’]{LETTER}+)* )
  | (?P<colon>  [=-]> | [:=：→⇒] )
  | (?P<soft>   [(（\t] | (?<=[^\s,;:|])[ ]{{1,4}}[-–—]{{1,2}}(?=[ ]) )
  | (?P<sign>   [+−-](?=[ \t]{{0,3}}(?:[,;|)\n]|$)) | (?:^|(?<=[\s,;(]))[+−-](?=[ ]?{LETTER}) )
  | (?P<close>  [)）\]}}] )
  | (?P<sep>    \n\s* | [,;/|&+、，；،؛和与與及跟] )
  | (?P<stop>   [.!?。…？！؟।] )
"""
_MARKS = ("bracketed", "symbol", "sign", "number")


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
          With `exactly_one` also an answer with no label or several.
        * `empty`: no words at all.

    Raises:
        ValueError: the mode or the style is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of: {', '.join(MODES)}")
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; it must be one of: {', '.join(STYLES)}")
    read = _read(text.strip(), label_set, mode, style)
    if label_set.exactly_one and not read.failed and len(read.labels) != 1:
        return _parsed((), "unknown", label_set, (text.strip(),))
    return read


def _read(text: str, label_set: LabelSet, mode: str, style: str) -> ParsedAnswer:
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
class _Token:
    """A piece of a text.

    Attributes:
        kind: see `_TOKEN`; "label" for a known word that names a label.
        word: the folded text.
        label: the label that it names.
        verdict: the verdict that it is, or may be beside a label.
    """

    kind: str
    word: str
    start: int
    end: int
    label: str = ""
    verdict: Verdict | None = None


@dataclass
class _Item:
    """The tokens between two separators: the text of the first ("" at the beginning), and the kind of the second."""

    before: str
    tokens: list[_Token] = field(default_factory=list)
    closed_by: str = ""


@dataclass
class _Found:
    """The findings in all items read so far."""

    mended: bool  # something was dropped or corrected, apart from what the other fields record
    named: list[str] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)  # labels that are denied wherever they are named
    unknown: list[str] = field(default_factory=list)
    unclear: dict[str, str] = field(default_factory=dict)  # labels with an unclear verdict -> the words
    cut_off: str = ""  # the label that ends the text, without a verdict
    empty: bool = False  # the empty answer
    denied: bool = False  # a label with a negation
    words: bool = False  # words that are not part of the answer


def _read_tolerantly(text: str, label_set: LabelSet) -> ParsedAnswer:
    words = words_of(label_set)
    known, _pattern = _compiled(label_set)
    part = answer_part(text, words, known)
    found = _Found(part.mended)
    structure = read_structure(part.text, words)
    if structure is None:
        _Reader(part.text, part.open_ended, label_set, found).read()
    else:
        found.empty, found.words = structure.empty, not structure.empty and not structure.said
        found.mended |= structure.mended or bool(re.search(r"\w", structure.rest))
        for each in structure.said:
            if each.label and each.verdict:
                _judge(found, each.label, each.verdict, each.text)
                found.mended |= not each.plain
            elif each.text:
                _Reader(each.text, each.cut_off and part.open_ended, label_set, found).read()
        if not structure.said and not structure.empty:
            _Reader(structure.rest, part.open_ended, label_set, found).read()
    return _combined(found, part.text, label_set)


def _judge(found: _Found, label: str, verdict: Verdict, text: str) -> None:
    if label not in found.verdicts and verdict is Verdict.UNCLEAR:
        found.unclear[label] = text
    found.verdicts.setdefault(label, verdict)


def _combined(found: _Found, text: str, label_set: LabelSet) -> ParsedAnswer:
    unknown = [*found.unknown, *found.unclear.values()]
    if not (found.named or found.verdicts or found.empty or found.denied or found.absent):
        if not found.words and not unknown:
            return _parsed((), "empty", label_set)
        return _parsed((), "unknown", label_set, unknown or [text.strip()])
    mended = found.mended or found.words or found.denied or len(set(found.named)) < len(found.named)
    mended |= bool(found.absent or unknown)
    names = set(found.named)
    if found.verdicts and found.cut_off and names - found.verdicts.keys() == {found.cut_off}:
        names.remove(found.cut_off)  # cut off before its verdict
        mended = True
    names = {name for name in names - found.absent if found.verdicts.get(name, Verdict.YES) is Verdict.YES}
    names |= {name for name, verdict in found.verdicts.items() if verdict is Verdict.YES}
    if not names and found.unclear and not found.empty:
        return _parsed((), "unknown", label_set, unknown)
    mended |= bool(found.empty and names)
    return _parsed(names, "repaired" if mended else "normalised", label_set, unknown)


@lru_cache(maxsize=32)
def _compiled(label_set: LabelSet) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The patterns of the words of a label set, and of all tokens."""
    flags = re.IGNORECASE | re.MULTILINE | re.VERBOSE
    known = words_of(label_set).pattern
    return re.compile(known, flags), re.compile(_TOKEN.replace("%s", known).replace("%n", known), flags)


class _Reader:
    """Reads the items of a text, and adds the findings to `found`."""

    def __init__(self, text: str, open_ended: bool, label_set: LabelSet, found: _Found) -> None:
        self.text, self.open_ended, self.label_set, self.found = text, open_ended, label_set, found
        self.words = words_of(label_set)
        self.clean = False  # a sentence of labels alone, or the empty answer, was read
        self.last = ""  # the label that ends the last item
        self.run: list[str] = []  # the labels of this sentence, without verdicts
        self.denied_run: list[str] | None = None  # the labels listed behind a denied one
        self.scope = ""  # "deny" or "ignore": what the heading says of the labels behind it
        self.scope_items = 0  # how many lines the heading has held for; more than 0 if its own line went on
        self.scope_is_line = False
        self.explaining = ""  # "line" or "paren": words behind a label that explain it
        self.pending: Verdict | None = None  # a verdict in an item of its own before the first label
        self.carried: Verdict | None = None  # the verdict before an earlier label of the line
        self.struck = False

    def read(self) -> None:
        """Read the text."""
        sentences = self._sentences()
        for sentence in sentences:
            self.run, self.denied_run = [], None
            if self.clean and self._explains(sentence):
                self.found.words = True
                continue
            for item in sentence:
                is_last = item is sentences[-1][-1]
                self._begin(item)
                cut_off = self._cut_off_name(item) if is_last and self.open_ended and not self.found.verdicts else None
                if cut_off and not self.scope:
                    self.found.named.append(cut_off)
                    self.found.mended = True
                elif self.explaining and not _is_entry(item.tokens):
                    self._pass_explanation(item)
                else:
                    self.explaining = ""
                    self._read(item)
            self.clean |= not self.scope and _is_clean(sentence)
        ends = self.open_ended and sentences and sentences[-1][-1].tokens
        if ends and sentences[-1][-1].closed_by == "" and self.last:
            self.found.cut_off = self.last

    def _sentences(self) -> list[list[_Item]]:
        """The sentences of the text: items between line breaks and stops."""
        sentences: list[list[_Item]] = [[_Item("")]]
        for token in self._tokens():
            if token.kind not in ("sep", "stop", "lead"):
                sentences[-1][-1].tokens.append(token)
                continue
            sentences[-1][-1].closed_by = token.kind
            item = _Item(self.text[token.start : token.end])
            if token.kind == "stop" or item.before.startswith("\n"):
                sentences.append([item])
            else:
                sentences[-1].append(item)
        kept = [[item for item in sentence if item.tokens or item.closed_by == "lead"] for sentence in sentences]
        return [sentence for sentence in kept if sentence]

    def _tokens(self) -> list[_Token]:
        _known, pattern = _compiled(self.label_set)
        ticked = bool(re.search("[✓✔☑✅]", self.text))
        signed = _signed(self.text)
        tokens: list[_Token] = []
        for match in pattern.finditer(self.text):
            kind, word = str(match.lastgroup), fold(match[0])
            token = _Token(kind, word, match.start(), match.end())
            if kind in ("skip", "chatter") or (kind == "known" and word.isdigit() and self._numbers_a_line(match)):
                self.found.words |= kind == "chatter"
                continue
            if kind == "word" and word in ("and", "y", "und", "et", "e", "и") and word not in self.words.exact:
                token.kind = "sep"
            elif kind in ("word", "known"):
                meaning = self.words.meaning(word) if kind == "known" else None
                token.label = meaning or ""
                token.kind = "word" if meaning is None else "label" if meaning else "known"
                token.verdict = VERDICTS.get(word)
            elif kind == "symbol":
                token.verdict = SYMBOLS[word]
            elif kind == "number":
                token.verdict = number_verdict(word)
                token.kind = "number" if token.verdict else "word"
                if word.isdigit() and token.end == len(self.text) and self.open_ended and "%" in self.text:
                    token.verdict = Verdict.UNCLEAR  # cut off
            elif kind == "bracketed":
                inner = word[1:-1].strip().replace("\ufe0f", "")
                token.verdict = _BRACKETED.get(inner) or VERDICTS.get(inner) or SYMBOLS.get(inner)
                if inner == "x" and ticked:
                    token.verdict = Verdict.NO
            elif kind == "sign":
                if not signed:
                    token.kind = "sep" if word == "+" else "skip"
                token.verdict = Verdict.YES if word == "+" else Verdict.NO
            if token.kind != "skip":
                tokens.append(token)
        return self._without_captions(tokens)

    def _numbers_a_line(self, match: re.Match[str]) -> bool:
        """Whether a label such as `1` numbers the line that it begins."""
        line = self.text.rfind("\n", 0, match.start()) + 1
        return not re.search(r"\w", self.text[line : match.start()]) and bool(
            re.match(r"[.)][ \t]+\S", self.text[match.end() : match.end() + 9])
        )

    def _without_captions(self, tokens: list[_Token]) -> list[_Token]:
        """Read an alias such as `confidence` as a plain word where it is the caption of a verdict."""
        for i, token in enumerate(tokens):
            if token.kind == "label" and token.word in _BETWEEN and token.word not in self.words.names:
                beside = [*tokens[max(i - 1, 0) : i], *tokens[i + 1 : i + 2]]
                if any(t.kind in ("colon", "number", "symbol") or (t.verdict and t.kind == "word") for t in beside):
                    token.kind, token.label = "word", ""
        return tokens

    def _explains(self, sentence: list[_Item]) -> bool:
        """Whether a sentence behind a line of labels is prose that does not add to them."""
        tokens = [token for item in sentence for token in item.tokens]
        if any(token.word in _ALSO or token.kind in _MARKS or token.kind == "lead" for token in tokens):
            return False
        if any(item.closed_by == "lead" for item in sentence) or any(token.kind == "colon" for token in tokens):
            return False
        return _is_prose(sentence) and bool(tokens) and tokens[0].kind != "label"

    def _begin(self, item: _Item) -> None:
        """Begin an item: a line break may end what holds for a line or for a list."""
        if item.before.startswith("\n"):
            self.explaining = ""
            self.carried = None
            self.struck = False
            if self.scope_is_line or ("\n" in item.before[1:] and self.scope_items):
                self.scope = ""
        self.scope_items += 1

    def _cut_off_name(self, item: _Item) -> str | None:
        """The only label name that starts with this item, if the item ends the text; else None."""
        tokens = item.tokens
        if not tokens or re.match(r"[.!?。…？！؟।]", item.before):
            return None
        if tokens[-1].end < len(self.text) or any(token.kind != "word" for token in tokens):
            return None
        start = re.sub(r"[\s_-]+", "", fold(self.text[tokens[0].start :]))
        names = [name for name in self.label_set.names if re.sub(r"[\s_-]+", "", fold(name)).startswith(start)]
        return names[0] if len(names) == 1 and len(start) >= 3 else None

    def _pass_explanation(self, item: _Item) -> None:
        self.found.words = True
        closing = next((i for i, token in enumerate(item.tokens) if token.kind == "close"), None)
        if self.explaining == "paren" and closing is not None:
            self.explaining = ""
            rest = item.tokens[closing + 1 :]
            if rest:
                self._read(_Item("", rest, item.closed_by))

    def _read(self, item: _Item) -> None:
        """Read an item."""
        tokens = item.tokens
        if item.closed_by == "lead" and not any(token.label for token in tokens):
            self.found.words |= any(token.kind == "word" for token in tokens)
            self._set_scope(tokens, has_rest=True)
            self.scope_is_line = False
            return
        if item.closed_by == "lead":
            self.scope = ""
        value = self._value(tokens)
        if value:
            self._attach(value, item)
            return
        colon = next((i for i, token in enumerate(tokens) if token.kind in ("colon", "label")), None)
        if colon and tokens[colon].kind == "colon" and any(token.kind != "soft" for token in tokens[:colon]):
            self._read_heading(tokens[:colon], tokens[colon + 1 :])
            return
        if self.scope == "ignore":
            self.found.words = True
            return
        self._read_tokens(tokens)

    def _value(self, tokens: list[_Token]) -> _Token | None:
        """The verdict that an item consists of, with nothing but its caption (`score: 0.9`) or the like; else None."""
        value = None
        for i, token in enumerate(tokens):
            if token.kind in _MARKS or (token.kind in ("word", "known") and token.verdict):
                if token.kind == "known" and not (i and tokens[i - 1].kind in ("colon", "word")):
                    return None
                if token.kind == "bracketed" and token.word in ("[ ]", "[]", "( )") and len(tokens) == 1:
                    return None
                value = token
            elif token.kind == "absent":
                value = _Token("absent", token.word, token.start, token.end, verdict=Verdict.NO)
            elif token.kind not in ("colon", "soft", "close") and token.word not in _BETWEEN:
                return None
        if value and tokens[-1].kind in ("colon",):
            return None  # the heading `Absent:`
        return value if value and self._follows_up(tokens, value) else None

    def _follows_up(self, tokens: list[_Token], value: _Token) -> bool:
        """Whether no label follows in the same item: `Yes: joy` is a heading."""
        return not any(token.label for token in tokens) and value.verdict is not None

    def _attach(self, value: _Token, item: _Item) -> None:
        """Give the verdict of an item to the label of the item before it."""
        attachable = not re.match(r"[.!。…！।]", item.before)
        captioned = any(token.word in _BETWEEN for token in item.tokens)
        if value.kind == "absent" and self.run:
            self._deny_run(value)
        elif self.last and attachable and self.last not in self.found.verdicts:
            if not (captioned and len(self.run) > 1) and not (captioned and self.scope):
                if value.word.isdigit() and value.word not in ("0", "1") and not captioned:
                    self.found.words = True
                else:
                    self._add_verdict(self.last, value)
                    self.run.clear()
            else:
                self.found.words = True
        else:
            self.found.words |= value.kind not in ("symbol", "bracketed")
            if value.kind in ("symbol", "bracketed", "number") and not self.found.named and not value.word.isdigit():
                self.pending = value.verdict
        if not self.pending and not captioned:
            self.last = ""

    def _read_heading(self, head: list[_Token], rest: list[_Token]) -> None:
        """Read an item that begins with words and a colon."""
        self.found.words = True
        verdict = rest[0].verdict if rest and not rest[0].label else None
        if verdict and len(rest) == 1:
            is_name = len(head) <= 3 and all(token.kind == "word" for token in head)
            is_name &= rest[0].kind != "number" and self.scope != "ignore"
            if verdict is Verdict.YES and is_name:
                self.found.unknown.append(self.text[head[0].start : head[-1].end])
            self.last = ""
            return
        self._set_scope(head, bool(rest))
        if rest and self.scope != "ignore":
            self._read_tokens(rest)

    def _set_scope(self, head: list[_Token], has_rest: bool) -> None:
        self.scope_items, self.scope_is_line = int(has_rest), has_rest
        negated = False
        self.scope = ""
        for token in head:
            if token.kind in ("absent", "negator") or _NEGATOR.fullmatch(token.word):
                negated = True
            elif token.kind in ("symbol", "bracketed", "number", "sign"):
                negated = token.verdict is Verdict.NO
            elif token.word in _DENYING:
                self.scope = "deny"
            elif token.word in _ASIDE:
                self.scope = "ignore"
            elif not _FILLER.fullmatch(token.word) and token.word not in _EMOTION:
                negated = False
        if negated:
            self.scope = "deny"
        if self.scope == "ignore" or not has_rest:
            self.scope_is_line = has_rest

    def _read_tokens(self, tokens: list[_Token]) -> None:
        """Read the tokens of an item one by one."""
        state = _State(before_label=_marks_come_first(tokens), carried=self.carried)
        if self.pending and any(token.label for token in tokens):
            state.pending, self.pending = self.pending, None
            state.before_label = True
        for i, token in enumerate(tokens):
            if self.explaining:
                if token.kind == "close" and self.explaining == "paren":
                    self.explaining = ""
                elif token.kind == "symbol" and state.label and token.verdict:
                    self._add_verdict(state.label, token)
                continue
            self._read_token(tokens, i, token, state)
        if state.pending and state.latest and state.latest not in self.found.verdicts:
            _judge(self.found, state.latest, state.pending, state.latest)
        if state.loose and not state.known and len(state.loose) <= 3 and not self.scope:
            self.found.unknown.append(self.text[state.loose[0].start : state.loose[-1].end])
        if self.explaining == "item":
            self.explaining = ""
        self.last = state.label

    def _read_token(self, tokens: list[_Token], i: int, token: _Token, state: "_State") -> None:
        if token.kind in ("colon", "soft", "close"):
            if token.kind != "close":
                state.colon = token.kind
            if state.label and self._explanation_follows(tokens, i):
                self.explaining = "paren" if token.word in ("(", "（") else "line"
                self.found.words = True
        elif token.kind in ("struck", "unstruck"):
            self.struck = token.kind == "struck"
        elif token.kind == "absent":
            self._read_absence(token, state)
        elif self._is_verdict(tokens, i, state):
            self._read_verdict(token, state)
        elif token.label:
            self._add_label(token, state)
        elif token.kind in ("known", "empty", "bracketed") and not state.negated:
            self._add_empty(tokens, i, state)
        elif token.kind == "word" and token.word in _SINCE and state.latest:
            self.explaining = "item"
            self.found.words = True
        else:
            self._add_word(token, state)

    def _explanation_follows(self, tokens: list[_Token], i: int) -> bool:
        following = tokens[i + 1 : i + 4]
        if len(following) < 3 or following[0].verdict or _NEGATOR.fullmatch(following[0].word):
            return False
        return all(token.kind == "word" and token.word not in _BETWEEN for token in following)

    def _is_verdict(self, tokens: list[_Token], i: int, state: "_State") -> bool:
        """Whether a token is a verdict at its place in the item."""
        token = tokens[i]
        if token.kind in _MARKS:
            if token.kind == "bracketed" and not any(each.label for each in tokens):
                return False
            scored = token.kind != "number" or not token.word.isdigit() or (i == 0 and token.word == "0")
            return bool(state.label) or (scored and any(each.label for each in tokens))
        ends = i + 1 == len(tokens) or tokens[i + 1].kind in ("close", "soft", "colon")
        if state.label and state.colon == "colon":
            if token.verdict in (Verdict.YES, Verdict.NO):
                return True
            cut_off = i + 1 == len(tokens) and token.kind == "word" and _cut_off_verdict(token.word) is not None
            if cut_off:
                token.verdict = _cut_off_verdict(token.word)
            return (token.verdict is not None and ends) or cut_off
        if not state.label or not token.verdict or not ends or token.label:
            return False
        return token.kind == "word" or bool(state.colon)

    def _read_verdict(self, token: _Token, state: "_State") -> None:
        assert token.verdict is not None
        if state.before_label:
            state.pending = token.verdict
        elif state.label:
            self._add_verdict(state.label, token)
            state.label = ""
        state.colon = ""
        state.negated = token.verdict is Verdict.NO and token.kind in ("word", "known")

    def _add_verdict(self, label: str, token: _Token) -> None:
        assert token.verdict is not None
        start = self.text.rfind(label, 0, token.start)
        line = self.text[max(start, 0) : token.end] if start >= 0 and token.end - start < 80 else label
        _judge(self.found, label, token.verdict, line)
        if self.scope == "deny":
            self.found.absent.add(label)
        self.found.mended |= token.kind == "number" and not token.word.isdigit()
        if label in self.run:
            self.run.remove(label)

    def _add_label(self, token: _Token, state: "_State") -> None:
        label = token.label
        if state.loose and fold(state.loose[-1].word) == "or" and self.denied_run is not None:
            self._deny_listed()
            state.negated = True
        if state.negated:
            self.found.denied = True
            self.denied_run = []
        elif self.struck or self.scope == "deny":
            self.found.absent.add(label)
        else:
            self.found.named.append(label)
            self.run.append(label)
            if self.denied_run is not None:
                self.denied_run.append(label)
            if state.pending:
                _judge(self.found, label, state.pending, self.text[token.start : token.end])
                self.carried = Verdict.YES if state.pending is Verdict.YES else Verdict.UNCLEAR
                state.pending = None
            elif state.carried and not state.known:
                state.from_carried = True
        self.found.mended |= self.words.exact.get(token.word, label) != label or not self._is_name(token.word, label)
        state.label, state.latest, state.known, state.colon = label, label, True, ""
        state.negated, state.continues = False, state.negated

    def _is_name(self, word: str, label: str) -> bool:
        return re.sub(r"[\s_‐‑\\-]+", "", word) == re.sub(r"[\s_‐‑-]+", "", fold(label))

    def _deny_listed(self) -> None:
        """`no anger, fear or sadness`: the labels between the denied one and `or` are denied too."""
        for name in self.denied_run or ():
            if name in self.found.named:
                self.found.named.remove(name)
        self.found.denied = True

    def _add_empty(self, tokens: list[_Token], i: int, state: "_State") -> None:
        token = tokens[i]
        if token.kind == "known" and _NEGATOR.fullmatch(token.word) and any(each.label for each in tokens[i + 1 :]):
            state.negated = True
            self.found.words = True
            return
        state.label = ""
        state.known = True
        if self.scope != "deny":
            self.found.empty = True

    def _read_absence(self, token: _Token, state: "_State") -> None:
        self.found.words = True
        if state.latest or self.run:
            self._deny_run(token, state.latest)
            state.label = ""
        else:
            state.negated = True

    def _deny_run(self, token: _Token, latest: str = "") -> None:
        plural = re.match("are|were|do |don|have", token.word)
        for label in self.run if plural or not latest else [latest]:
            self.found.absent.add(label)
        self.run = []

    def _add_word(self, token: _Token, state: "_State") -> None:
        """Read a token that is neither a verdict nor a label."""
        self.found.words = True
        word = token.word
        if state.label and word in _BETWEEN:
            return
        state.label = ""
        state.colon = ""
        if token.kind == "negator" or _NEGATOR.fullmatch(word):
            state.negated = True
        elif word == "or":
            state.negated = state.continues
            state.loose.append(token)
        elif state.negated and word in _EMOTION:
            state.known = self.found.empty = True
        elif not (state.negated and _FILLER.fullmatch(word)):
            if not state.negated and word not in _COURTESY and token.kind == "word" and not word.isdigit():
                state.loose.append(token)
            state.negated = state.continues = False


@dataclass
class _State:
    """The state of reading one item, between two of its tokens."""

    before_label: bool  # symbols and numbers come before their labels
    carried: Verdict | None
    label: str = ""  # the label that a verdict here would belong to
    latest: str = ""  # the latest label of the item
    colon: str = ""  # "colon" or "soft" behind the label
    known: bool = False  # a token names a label or the empty answer
    negated: bool = False  # the next label is denied
    continues: bool = False  # the last label was denied, and `or` would deny the next one
    pending: Verdict | None = None  # the verdict before a label
    from_carried: bool = False
    loose: list[_Token] = field(default_factory=list)  # words that may be an unknown label


def _signed(text: str) -> bool:
    """Whether plus and minus signs are verdicts: both come before labels, or both behind them."""
    behind = {sign for sign in "+-" if re.search(rf"\w[*_`):]*\s?(?:\(|:\s?)?[{sign}](?=[ \t]*(?:[,;|)\n]|$))", text)}
    before = {sign for sign in "+-" if re.search(rf"(?m)(?:^|[,;])[ ]?[{sign}][ ]?\w|(?<!\S)[{sign}]\w", text)}
    return len(behind) == 2 or len(before) == 2


def _marks_come_first(tokens: list[_Token]) -> bool:
    for i, token in enumerate(tokens):
        if token.label:
            return False
        if token.kind in _MARKS and (
            token.kind != "number" or not token.word.isdigit() or (i == 0 and token.word == "0")
        ):
            return True
    return False


def _is_entry(tokens: list[_Token]) -> bool:
    """Whether an item begins with a label and a colon, or a label and a verdict."""
    kinds = [token.kind for token in tokens[:2]]
    return len(kinds) == 2 and kinds[0] == "label" and kinds[1] in ("colon", "soft", *_MARKS)


def _is_prose(sentence: list[_Item]) -> bool:
    """Whether a sentence has three words in a row that name no label."""
    for item in sentence:
        row = 0
        for token in item.tokens:
            row = row + 1 if token.kind in ("word", "absent", "negator") and "://" not in token.word else 0
            if row >= 3:
                return True
    return False


def _is_clean(sentence: list[_Item]) -> bool:
    """Whether a sentence consists of labels (or the empty answer), with hardly a word besides."""
    kinds = [token.kind for item in sentence for token in item.tokens]
    return ("label" in kinds or "known" in kinds) and not _is_prose(sentence)


def _cut_off_verdict(word: str) -> Verdict | None:
    """The verdict that a word begins (`{"joy": tr`), or None."""
    for whole in ("yes", "no", "true", "false", "null", "none"):
        if whole.startswith(word):
            return VERDICTS[whole]
    return None
