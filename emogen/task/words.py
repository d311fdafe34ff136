"""The words of an answer: those of a label set, and the verdicts (yes, no, a number) that may stand beside a label."""

import re
import unicodedata
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from emogen.task.answer import NO, YES
from emogen.task.labels import LabelSet

# A word consists of letters, digits, and the combining marks that write vowels in some scripts (`\w` excludes them).
# What is written above the line (a footnote) is no part of it. `和` and the like join words without a space.
MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u109f"
_JOINS = "和与與及跟"
_ABOVE = "²³¹⁰⁴-⁹"
LETTER = rf"(?:[^\W_{_ABOVE}{_JOINS}]|(?!\w)[{MARKS}])"
BEFORE = rf"(?:(?<![^\W_{_JOINS}])|(?<=(?<![^\W_])و))(?<![{MARKS}])(?:(?<![^\W_][-_])|(?<=(?<!\w)non[-_]))"
AFTER = rf"(?!{LETTER}|[-_‐‑][^\W_])"

_NO_LABELS = (
    "none of the above",
    "none of these",
    "none apply",
    "none applies",
    "not applicable",
    *(f"no {what}{s}" for what in ("emotion", "label", "topic", "tag", "class") for s in ("", "s")),
    "no category",
    "no categories",
    "no classes",
)
_NONE = "nothing|ninguno|ninguna|keine|keines|aucun|aucune|nessuno|nessuna|nenhum|nenhuma"
_NONE += "|нет|无|無|没有|لا شيء|لا يوجد|なし"
EMPTY = ("none", "neutral", "n/a", *_NO_LABELS, *_NONE.split("|"))


class Verdict(Enum):
    """What a text says of a label."""

    YES = "yes"
    NO = "no"
    UNCLEAR = "unclear"  # about half, or on a scale that is not known


_YES = f"{YES}|y|yeah|yep|true|t|1|on|present|detected|found|expressed|applies|applicable|selected|checked|positive"
_YES += "|correct|evident|likely|high|strong|sí|si|ja|oui|sim|是|有|对|對|真|نعم|да|есть|हाँ|はい|네|예"
_YES += "|wahr|vrai|verdadero|verdadeiro|vero"
_NO = f"{NO}|n|nope|false|f|0|off|absent|not|null|none|nil|n/a|na|missing|undetected|unselected|unchecked"
_NO += "|negative|incorrect|unlikely|never|inapplicable|zero|negligible|nein|non|não|nao|否|无|無|不|不是|没有|假|لا"
_NO += "|нет|नहीं|いいえ|아니요|아니오|falsch|faux|falso|nicht"
_UNCLEAR = (
    "maybe|perhaps|possible|possibly|unsure|uncertain|unclear|unknown|partial|partially|partly|somewhat|mixed|ambiguous"
)
_UNCLEAR += "|low|medium|moderate|mild|slight|weak|minimal|undecided|neutral|quizás|vielleicht"
VERDICTS = {
    word: verdict
    for verdict, words in ((Verdict.YES, _YES), (Verdict.NO, _NO), (Verdict.UNCLEAR, _UNCLEAR))
    for word in words.split("|")
}
SYMBOLS = dict.fromkeys("✅✔✓☑👍🟢🟩🗹", Verdict.YES)
SYMBOLS |= dict.fromkeys("❌✗✘✖✕×☐⬜◻□👎🔴🟥⛔🚫❎", Verdict.NO)
SYMBOLS |= dict.fromkeys("🟡🟨🟠❓❔", Verdict.UNCLEAR)

# A percentage, a fraction, a range of percentages, a decimal with a point or a comma, or a whole number.
_DIGITS = r"(?:\d{1,9}(?:\.\d{1,20}|[,٫]\d{1,20}(?!,\d))?|[.,]\d{1,20})"
_PERCENT = r"(?:[%％٪]|percent\b|per\s?cent\b)"
NUMBER = rf"""(?<!\w)(?<!\d[.,])(?:[<>≤≥~≈]\s?)?[-+−]?{_DIGITS}(?:e[-+]?\d{{1,3}})?
    (?:\s?[-–]\s?{_DIGITS}(?=\s?{_PERCENT}))?(?:\s?{_PERCENT}|\s?(?:/|out\sof)\s?{_DIGITS})?(?![^\W_])"""
_NUMBER = re.compile(
    rf"(?P<under><?)[>≤≥~≈]?\s?(?P<value>[-+−]?{_DIGITS}(?:e[-+]?\d{{1,3}})?)(?:\s?[-–]\s?(?P<upper>{_DIGITS}))?"
    rf"(?:\s?(?P<percent>{_PERCENT})|\s?(?:/|out\sof)\s?(?P<whole>{_DIGITS}))?",
    re.IGNORECASE,
)


def fold(text: str) -> str:
    """The form in which words are compared: case, whitespace and Unicode composition do not matter."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def number_verdict(text: str) -> Verdict | None:
    """The verdict of a number, or None if the text is no number that could be one."""
    match = _NUMBER.fullmatch(text.strip())
    if not match:
        return None
    value, upper, whole = (
        float(re.sub("[,٫]", ".", match[group].replace("−", "-"))) if match[group] else None
        for group in ("value", "upper", "whole")
    )
    assert value is not None
    if match["percent"]:
        share = (value + (value if upper is None else upper)) / 200
    elif whole is not None:
        if not 0 <= value <= whole or not whole:
            return None  # `24/7`
        share = value / whole
    elif value > 1:
        return Verdict.UNCLEAR if value <= 100 else None
    else:
        share = value
    return Verdict.YES if share - (1e-9 if match["under"] else 0) >= 0.5 else Verdict.NO


def verdict_of(text: str) -> Verdict | None:
    """The verdict that a text consists of, apart from quotes, brackets and the like; None for any other text."""
    text = fold(text).replace("\ufe0f", "")
    if text in SYMBOLS:
        return SYMBOLS[text]
    text = text.strip(" \t\n\"'“”*_`()[]{}.!")
    verdict = VERDICTS.get(text, SYMBOLS.get(text)) or number_verdict(text)
    if verdict or text[:1] not in SYMBOLS:
        return verdict
    return SYMBOLS[text[0]] if VERDICTS.get(text[1:].strip()) is SYMBOLS[text[0]] else None  # `✅ yes`


def leading_verdict(text: str) -> Verdict | None:
    """The verdict that a text consists of, or begins with before an explanation (`No, calm`); else None."""
    if verdict := verdict_of(text):
        return verdict
    if re.match(r"\W{0,3}(?:not|never)\s(?!only|just)", text, re.IGNORECASE):
        return Verdict.NO
    head = re.split(r"(?<!\d)[,.](?!\d)|[;:(–—\n]|\s-\s|\b(?:because|since)\b", text[:200], maxsplit=1)[0]
    return verdict_of(head)


@dataclass(frozen=True)
class Words:
    """The words of a label set.

    Attributes:
        pattern: matches each of them as a whole word, the longest first; to be compiled with VERBOSE and IGNORECASE.
        exact: folded word -> label name, or "" for the empty answer.
        loose: the same without the separators in the word, where it is unambiguous.
        names: the folded label names.
    """

    pattern: str
    exact: dict[str, str]
    loose: dict[str, str]
    names: frozenset[str]

    def meaning(self, text: str) -> str | None:
        """The label that a text names, "" if it is the empty answer, None if it is neither."""
        folded = fold(text)
        return self.exact.get(folded, self.loose.get(_key(folded)))


@lru_cache(maxsize=32)
def words_of(label_set: LabelSet) -> Words:
    """The words of a label set: the names and aliases of its labels, and those for the empty answer.

    A name takes precedence over an alias, and both over a word for the empty answer.
    """
    exact = dict.fromkeys((*EMPTY, fold(label_set.empty)), "")
    exact |= {fold(alias): label.name for label in label_set.labels for alias in label.aliases}
    exact |= {fold(label.name): label.name for label in label_set.labels}
    # Folding may change more than case ("Spaß" -> "spass"), so the pattern also contains the words as written.
    written = {label_set.empty, *(word for label in label_set.labels for word in (label.name, *label.aliases))}
    owners: dict[str, set[str]] = {}
    for word, name in exact.items():
        owners.setdefault(_key(word), set()).add(name)
    loose = {key: owned.pop() for key, owned in owners.items() if len(owned) == 1}
    words = sorted(
        set(exact) | {unicodedata.normalize("NFC", word) for word in written}, key=lambda word: (-len(_key(word)), word)
    )
    patterns = (_word_pattern(word, fold(word) not in exact or _key(fold(word)) in loose) for word in words)
    return Words(
        rf"{BEFORE}(?:{'|'.join(patterns)}){AFTER}", exact, loose, frozenset(fold(name) for name in label_set.names)
    )


def _key(folded: str) -> str:
    return re.sub(r"(?<=[^\s_-])[\s_‐‑-]+(?=[^\s_-])", "", folded)


def _word_pattern(word: str, is_loose: bool) -> str:
    """Matches a word; if `is_loose`, with any separator or none between its parts (`severe_toxic`, `severeToxic`)."""
    if not is_loose:
        return r"\s+".join(re.escape(part) for part in word.split())
    parts = re.split(r"(?<=[^\s_-])[\s_‐‑-]+(?=[^\s_-])|(?<=[a-z])(?=[A-Z])", word)
    return r"(?:\s+|[-_‐‑])?".join(re.escape(part) for part in parts)
