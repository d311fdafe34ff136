"""The part of a generated text that answers: without reasoning, markup and what a model writes after its answer.

All steps look at the text from left to right once, and every repetition in a pattern is bounded or cannot match the
beginning of what follows it, so that the time is linear in the length of the text.
"""

import html
import re
import unicodedata
from dataclasses import dataclass

from emogen.task.words import Verdict, Words, leading_verdict, verdict_of

MAX_CHARS = 10_000  # answers are short; this bounds the time of a tolerant reading
STRUCK, UNSTRUCK = "\ue000", "\ue001"  # stand for the beginning and the end of words that are crossed out

# Reasoning stands between an opening and a closing marker. Tags that explain may also stand after the answer.
_THINK = (
    r"(?:[\w.-]{1,20}:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratch_?pad|inner_monologue"
    r"|chain_of_thought|cot|plan(?:ning)?|deliberation)"
)
_EXPLAIN = r"explanations?|rationale|justification|evidence|comments?|notes?"
_ATTRIBUTES = r"(?:\s[^<>]{0,200})?"
_REASONING = re.compile(
    rf"""
    (?P<close> </(?P<closed>{_THINK})\s?> | \[/THINK(?:ING)?\] | ◁/think(?:ing)?▷ | <unused95> | <channel\|>
      | <\|(?:/think(?:ing)?|end_of_(?:thought|thinking)|END_THINKING|inner_suffix)\|>
      | (?:<\|start\|>assistant)?<\|channel\|>\s?final[^<]{{0,80}}<\|message\|> | assistantfinal(?![a-z]*\s) )
  | (?P<open> <(?P<opened>{_THINK}){_ATTRIBUTES}(?<!/)> | \[THINK(?:ING)?\] | ◁think(?:ing)?▷ | <unused94> | <\|channel>
      | <\|(?:think(?:ing)?|begin_of_(?:thought|thinking)|start_of_thought|START_THINKING|inner_prefix)\|>
      | <\|channel\|>\s?(?:analysis|commentary)[^<]{{0,80}}<\|message\|> | \A\s{{0,9}}analysis(?=[A-Z"']) )
  | (?P<end> </(?P<explained>{_EXPLAIN})\s?> )
  | (?P<begin> <(?P<explaining>{_EXPLAIN}){_ATTRIBUTES}(?<!/)> )
    """,
    re.IGNORECASE | re.VERBOSE,
)
_ANSWER_TAG = re.compile(
    r"<(?P<name>(?:final[_-]?)?(?:answer|output|response|result|solution)|final)\s?>"
    r"|</(?P<end>(?:final[_-]?)?(?:answer|output|response|result|solution)|final)\s?>"
    r"|(?P<begin_token><\|(?:begin_of_(?:solution|answer|box)|START_RESPONSE)\|>)"
    r"|(?P<end_token><\|(?:end_of_(?:solution|answer|box)|END_RESPONSE)\|>)|(?P<boxed>\\f?boxed\s?\{)",
    re.IGNORECASE,
)

_START = re.compile(
    r"(?:\s{0,9}(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|\[/INST\]|<\|im_start\|>\s?assistant\s?\n"
    r"|<start_of_turn>\s?model\s?\n|<\|start_header_id\|>\s?assistant\s?<\|end_header_id\|>|<｜Assistant｜>"
    r"|<\|assistant\|>|<\|start\|>assistant)){1,4}"
)
_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|</s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>|\[/?INST\]"
)
_STRUCK_S = re.compile(r"<s>([^<>\n]{1,200})</s>")
_NEW_TURN = re.compile(
    r"\n[ \t\r]{0,9}\n\W{0,9}(?:tweet|text|input|question|example|instruction|user|human|assistant|system)"
    r"\b\W{0,3}\d{0,4}\W{0,3}[:：]|\n\W{0,9}(?:tweet|user|human|assistant|system)\W{0,3}:",
    re.IGNORECASE,
)
_AFTERTHOUGHT = re.compile(
    r"\n[ \t\r]{0,9}\n\W{0,9}(?:explanation|reason|reasoning|justification|rationale|note)\b\W{0,6}[:：]", re.IGNORECASE
)
_ESCAPE = re.compile(r"\\u(?!d[89a-f])([0-9a-f]{4})", re.IGNORECASE)  # as json.dumps writes "Ä"; no lone surrogates

# "Answer:", "So the final labels are:", "### Final answer" on a line of its own, at the beginning of a sentence. The
# nouns of the second group announce the answer only with "final", or where nothing else has announced it.
_NOUN = r"labels?|emotions?|categor(?:y|ies)|class(?:es)?|classification|topics?|tags?"
_LEAD_IN = re.compile(
    rf"""(?:^|(?<=[.!?:;,)\]*>…。]\s)|(?<=\bso\s)|(?<=\bso,\s)|(?<=hence\s)|(?<=hence,\s)|(?<=therefore\s)|(?<=thus\s))
    [ \t\#*_>"'(-]{{0,9}}
    (?:(?:so|thus|hence|therefore|overall|finally|in\ conclusion|in\ summary)\b,?[ ]{{1,3}})?(?:(?:the|my)[ ]{{1,3}})?
    (?: (?P<strong> (?:final|correct|overall|best)[ ]{{1,3}}(?:set[ ]of[ ])?
            (?:answer|output|result|response|verdict|decision|{_NOUN})
          | answer|verdict|conclusion|final|prediction|output|result|response|respuesta|antwort|réponse|resposta
          | 答案|الإجابة )
      | (?P<weak> (?:(?:predicted|detected|expressed)[ ])?(?:emotion[ ]|topic[ ]|class[ ])?(?:{_NOUN}) ) )
    (?: (?:[ ]{{1,3}}(?:is|are|would[ ]be|should[ ]be|es|son|ist|est))?["'*_`) \t]{{0,6}}[:=：][ \t*_]{{0,6}}
      | (?P<copula> [ ]{{1,3}}(?:is|are|would[ ]be|should[ ]be|es|son|ist|est)[ ]+(?!not\b|no\b|that\b) )
      | (?P<line> [ \t*_]{{0,9}}(?=\n|$) ) )""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_THREE_WORDS = re.compile(r"[^\W\d_][\w'’-]{0,40}(?:[ ][\w'’-]{1,40}){2}|[\u3040-\u30ff\u3400-\u9fff]{6}")


@dataclass(frozen=True)
class AnswerPart:
    """The part of a text that answers.

    Attributes:
        text: the part, as plain text.
        open_ended: whether its end may be cut off.
        mended: whether anything other than markup and end tokens was dropped.
    """

    text: str
    open_ended: bool
    mended: bool


def answer_part(text: str, words: Words, known: re.Pattern[str]) -> AnswerPart:
    """Find the part of a generated text that answers, and write it without markup.

    Args:
        text: the generated text.
        words: the words of the label set.
        known: matches each of them.
    """
    kept = _without_reasoning(text, words)
    mended, open_ended = kept.strip() != text.strip(), True
    if start := _START.match(kept):
        kept = kept[start.end() :]
    kept = _STRUCK_S.sub(rf"{STRUCK}\1{UNSTRUCK}", kept)
    inside, closed = _inside_answer_tags(kept, words)
    if inside is not None:
        mended, open_ended, kept = True, not closed, inside
    if end := _SPECIAL.search(kept):
        mended |= bool(_SPECIAL.sub("", kept[end.start() :]).replace("<s>", "").strip())
        kept, open_ended = kept[: end.start()], False
    kept = kept.strip()
    if turn := _NEW_TURN.search(kept):
        kept, open_ended, mended = kept[: turn.start()], False, True
    if lead_in := _last_lead_in(kept, words, known):
        mended, kept = True, kept[lead_in:]
    if len(kept) > MAX_CHARS:
        mended, kept = True, kept[:MAX_CHARS]
    kept = kept.strip()
    if afterthought := _AFTERTHOUGHT.search(kept):
        kept, open_ended, mended = kept[: afterthought.start()], False, True
    kept = _ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), kept)
    plain = _without_markup(kept, words)
    return AnswerPart(_rows_of_tables(unicodedata.normalize("NFC", plain), words), open_ended, mended)


def _without_reasoning(text: str, words: Words) -> str:
    """Drop reasoning: what is between its markers, before a closing one (a template may open it), or after an opening
    one (the answer was cut off in it). A tag that is a label is no marker."""
    kept: list[str] = []
    start, inside = 0, ""
    for marker in _REASONING.finditer(text):
        name = marker["closed"] or marker["opened"] or marker["explained"] or marker["explaining"]
        if name and words.meaning(name):
            continue
        if marker["open"] or marker["begin"]:
            if not inside:
                kept.append(text[start : marker.start()])
                inside = str(marker.lastgroup)
        elif marker["close"]:
            if inside != "open":
                kept.clear()
            start, inside = marker.end(), ""
        elif inside == "begin":
            start, inside = marker.end(), ""
    if not inside:
        kept.append(text[start:])
    return "\n".join(part for part in kept if part.strip())


def _inside_answer_tags(text: str, words: Words) -> tuple[str | None, bool]:
    """What is inside the last answer tags (`<answer>`, `\\boxed{}` and the like), and whether they are closed.

    Tags that follow each other directly belong together. None if there are no such tags.
    """
    parts: list[tuple[int, int, str]] = []
    opened: re.Match[str] | None = None
    closed, i = True, 0
    while tag := _ANSWER_TAG.search(text, i):
        i = tag.end()
        name = tag["name"] or tag["end"]
        if name and words.meaning(name):
            continue
        if tag["boxed"]:
            i, closed = _closing_brace(text, tag.end())
            parts.append((tag.start(), i, text[tag.end() : i - closed]))
        elif tag["name"] or tag["begin_token"]:
            opened, closed = tag, False
        elif opened:
            parts.append((opened.start(), tag.end(), text[opened.end() : tag.start()]))
            opened, closed = None, True
        elif not parts:  # the prompt opened it
            parts.append((0, tag.end(), text[: tag.start()]))
    if opened and text[opened.end() :].strip():
        parts.append((opened.start(), len(text), text[opened.end() :]))
    parts = [part for part in parts if re.search(r"\w|\[\s*\]", part[2])] or parts[-1:]
    if not parts:
        return (None, True) if not opened else ("", False)
    first = len(parts) - 1
    while first and not set(re.findall(r"\w+", text[parts[first - 1][1] : parts[first][0]])) - {"and", "or"}:
        first -= 1
    return "\n".join(part[2] for part in parts[first:]), closed


def _closing_brace(text: str, start: int) -> tuple[int, bool]:
    """The end of what a brace before `start` encloses, with the closing brace, and whether there is one."""
    depth = 1
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return brace.end(), True
    return len(text), False


def _has_prose(text: str, known: re.Pattern[str]) -> bool:
    """Whether a text has three words in a row that name no label."""
    return bool(_THREE_WORDS.search(known.sub("\n", re.sub(r"\b(?:and|or|und|y|et)\b", ",", text))))


def _last_lead_in(text: str, words: Words, known: re.Pattern[str]) -> int:
    """Where the answer begins behind prose: after the last "Final answer:" or the like, else after the first
    "Emotions:" or the like. 0 if there is no prose before it."""
    found = 0
    checked, prose, announced = 0, False, False
    for lead_in in _LEAD_IN.finditer(text):
        if not prose:
            prose = _has_prose(text[checked : lead_in.start()][-MAX_CHARS:], known)
        checked = lead_in.start()
        if words.meaning(lead_in["strong"] or lead_in["weak"]) or (lead_in["line"] is not None and lead_in["weak"]):
            continue
        if lead_in["copula"] and not lead_in["strong"]:
            continue
        if prose and (lead_in["strong"] or not announced):
            found = lead_in.end()
        announced = True
    return found


# Markup.

_LATEX = re.compile(r"\\(?:begin|end)\{\w{1,20}\*?\}|\\(?P<mark>checkmark|times|item)\b|\\[a-zA-Z]{2,20}\s?\{")
_BACKSLASH = re.compile(r"\\(?=[_*#~`\[\](){}$&%!.>-])")
_ENTITY = re.compile(r"&(?:#\d{1,6}|#x[0-9a-f]{1,5}|[a-z]{2,8});", re.IGNORECASE)
_STRIKE = re.compile(r"~~([^~\n]{1,400})~~")
_OVERLAID = re.compile(r"(?:[^\W_ ]\u0336){2,400}(?:\s?(?:[^\W_ ]\u0336)+)*")
_TAG = re.compile(
    r"<!--.{0,2000}?-->|<(?P<close>/?)(?P<name>[^\W\d_][\w:.-]{0,60})(?P<attributes>\s[^<>]{0,300})?/?>", re.DOTALL
)
_ATTRIBUTE = re.compile(r"""([\w:.-]{1,40})\s?=\s?(?:"([^"]{0,200})"|'([^']{0,200})'|([^\s"'/>]{1,100}))""")
_INLINE = frozenset(
    {"b", "i", "u", "em", "strong", "span", "code", "mark", "font", "small", "big", "tt", "kbd", "a", "sup", "sub"}
)
_STRIKING = frozenset({"s", "del", "strike"})
_FOOTNOTE = re.compile(r"(?m)^\s{0,3}\[\^\w{1,9}\]:.*$|\[\^\w{1,9}\]|(?<=[^\W\d_])\[\d{1,2}\]")  # joy[^1], anger[2]
_VALUES = frozenset(
    {"value", "present", "score", "probability", "confidence", "selected", "detected", "applies", "answer", "checked"}
)


def _without_markup(text: str, words: Words) -> str:
    """Write HTML, XML, LaTeX and Markdown as plain text: a tag that names a label as `label: `, crossed-out words
    between `STRUCK` and `UNSTRUCK`."""
    text = _STRIKE.sub(rf"{STRUCK}\1{UNSTRUCK}", text)
    if "\u0336" in text:
        text = _OVERLAID.sub(lambda match: STRUCK + match[0].replace("\u0336", "") + UNSTRUCK, text)
    if "<" in text:
        text = _TAG.sub(lambda tag: _plain_tag(tag, words), text)
    if "&" in text:
        text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    if "\\" in text:
        text = _LATEX.sub(
            lambda match: {"checkmark": "✓", "times": "✗", "item": "\n- "}.get(match["mark"] or "", " "), text
        )
        text = _BACKSLASH.sub("", text)
    if re.match(r"\s*\(1\)", text):
        text = re.sub(r"\(\d{1,2}\)", "; ", text)  # (1) joy (2) anger
    return _FOOTNOTE.sub("", text)


def _plain_tag(tag: re.Match[str], words: Words) -> str:
    name, close = tag["name"], tag["close"]
    if name is None:
        return " "  # a comment
    attributes = {key.casefold(): a or b or c for key, a, b, c in _ATTRIBUTE.findall(tag["attributes"] or "")}
    if name.casefold() in _INLINE:
        return " "
    label = name if words.meaning(name) else ""
    if not label and name.casefold() in _STRIKING:
        return UNSTRUCK if close else STRUCK
    if not label and name.casefold() in ("td", "th"):
        return " | " if close else ""
    if not label and not close:
        label = next((value for value in attributes.values() if words.meaning(value)), "")
    if close or not label:
        return "\n"
    value = next((value for key, value in attributes.items() if key in _VALUES and verdict_of(value)), "")
    return f"\n{label}: {value}{' ' if value else ''}" + ("\n" if tag[0].endswith("/>") else "")


# Tables.

_RULE = re.compile(r"[\s|:+=-]{1,300}")


def _cells(line: str, separator: str) -> list[str]:
    line = line.strip()
    if separator == "|":
        line = line.removeprefix("|").removesuffix("|")
    return [cell.strip(" \t\r\"'*_`") for cell in line.split(separator)]


def _rows_of_tables(text: str, words: Words) -> str:
    """Write the rows and columns of tables that pair labels with verdicts as lines `label: verdict`."""
    lines = text.split("\n")
    if len(lines) == 1 and "|" not in text:
        return text
    for separator in ("|", "\t", ";", ","):
        if separator in text:
            lines = _rows_of_table(lines, separator, words)
    return "\n".join(lines)


def _rows_of_table(lines: list[str], separator: str, words: Words) -> list[str]:
    written: list[str] = []
    header: list[str] = []  # cells of the first row of the table
    at = 0  # where the header was written
    for line in lines:
        if separator not in line:
            header = []
            written.append(line)
            continue
        if _RULE.fullmatch(line) and "-" in line:
            continue
        cells = _cells(line, separator)
        verdicts = [leading_verdict(cell) for cell in cells]
        labels = [words.meaning(cell) for cell in cells]
        columns = [i for i, cell in enumerate(header) if words.meaning(cell)]
        if len(cells) == len(header) and len(columns) > 1 and all(verdicts[i] for i in columns):
            written[at] = ""
            written += [f"{header[i]}: {cells[i]}" for i in columns]
        elif separator == "|" and (row := _row(cells, labels, verdicts, header)):
            written.append(row)
        else:
            written.append(line)
        if not header:
            header, at = cells, len(written) - 1
    return written


def _row(cells: list[str], labels: list[str | None], verdicts: list[Verdict | None], header: list[str]) -> str:
    """A row as `label: verdict`, or "" if it does not consist of one label and a verdict.

    Under a header with verdicts (`yes | no`), the column of the mark counts. Else it is the first verdict; a whole
    number before the label numbers the row.
    """
    named = [i for i, label in enumerate(labels) if label]
    n_verdicts = sum(verdict is not None for verdict in verdicts)
    if not named or not (len({labels[i] for i in named}) == 1 or 0 < n_verdicts < len(named)):
        return ""
    values = [i for i in range(len(cells)) if i != named[0] and verdicts[i]]
    heads = [verdict_of(cell) for cell in header] if len(header) == len(cells) else []
    marked = [i for i in range(len(cells)) if i != named[0] and heads and heads[i] and cells[i]]
    if len({heads[i] for i in range(len(heads)) if heads[i]}) > 1:
        chosen = [i for i in marked if verdicts[i] is not Verdict.NO or cells[i] in "xX✗✘×"]
        if len(chosen) == 1 and heads[chosen[0]]:
            return f"{cells[named[0]]}: {'yes' if heads[chosen[0]] is Verdict.YES else 'no'}"
    values = [i for i in values if i > named[0] or not cells[i].isdigit()]
    if values:
        return f"{cells[named[0]]}: {cells[values[0]]}"
    if len(header) == len(cells) and any(cell in ("x", "X") for cell in cells):
        return f"{cells[named[0]]}: yes"
    return f"{cells[named[0]]}" if header and len(cells) > 2 else ""
