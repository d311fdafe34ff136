"""Golden tables for every rule of `parse_answer`, canonical answers both ways, and properties of arbitrary text."""

import json
import re
import subprocess
import sys
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emogen.task.answer import STYLES, answer_text
from emogen.task.labels import Label, LabelSet, load_label_set
from emogen.task.parse import ParsedAnswer, parse_answer

EMOTIONS = load_label_set("semeval2018")
GERMAN = LabelSet(
    name="deutsch",
    empty="keine",
    labels=(
        Label(name="Ärger", aliases=("verärgert", "Wut")),
        Label(name="Freude", aliases=("froh", "Spaß")),
        Label(name="sehr glücklich"),
        Label(name="Vertrauen"),
    ),
)
GO_EMOTION_NAMES = """
    admiration amusement anger annoyance approval caring confusion curiosity desire disappointment disapproval disgust
    embarrassment excitement fear gratitude grief joy love nervousness optimism pride realization relief remorse sadness
    surprise neutral
"""
GO_EMOTIONS = LabelSet(
    name="goemotions", labels=tuple(Label(name=name) for name in re.findall(r"\w+", GO_EMOTION_NAMES))
)
ODD = LabelSet(
    name="odd",
    labels=(
        Label(name="very happy"),
        Label(name="happy"),
        Label(name="self-love"),
        Label(name="love"),
        Label(name="joy & love"),
        Label(name="c++"),
        Label(name="खुशी", aliases=("喜び",)),
    ),
)


def check(
    text: str, names: str, status: str, unknown: tuple[str, ...] = (), label_set: LabelSet = EMOTIONS, **options: str
) -> None:
    """Assert that a text is read as these labels, separated by commas, with this status and these unknown words."""
    expected = tuple(name for name in names.split(", ") if name)
    read = parse_answer(text, label_set, **options)
    assert (read.labels, read.status, read.unknown) == (expected, status, unknown)
    assert read.vector == label_set.vector(expected)
    assert read.failed == (status in ("unknown", "empty"))


EXACT = [
    ("anger, joy", "anger, joy"),
    ("  anger, joy\n", "anger, joy"),
    ("joy", "joy"),
    ("none", ""),
]

NORMALISED = [
    # case, whitespace, order, full stop
    ("Anger, JOY", "anger, joy"),
    ("anger,joy", "anger, joy"),
    ("anger ,\t joy", "anger, joy"),
    ("joy, anger", "anger, joy"),
    ("anger, joy.", "anger, joy"),
    ("joy!", "joy"),
    # quotes, brackets, markdown, hashtags
    ("'anger', \"joy\"", "anger, joy"),
    ("“anger”, «joy»", "anger, joy"),
    ("(anger, joy)", "anger, joy"),
    ("[anger, joy]", "anger, joy"),
    ("{anger, joy}", "anger, joy"),
    ("**anger**, `joy`, _love_", "anger, joy, love"),
    ("#anger #joy", "anger, joy"),
    ("```\nanger, joy\n```", "anger, joy"),
    ('```json\n["anger"]\n```', "anger"),
    # separators
    ("anger; joy", "anger, joy"),
    ("anger / joy|love", "anger, joy, love"),
    ("anger\njoy\r\nlove", "anger, joy, love"),
    ("anger\n\njoy", "anger, joy"),
    ("anger and joy", "anger, joy"),
    ("anger, joy, and love", "anger, joy, love"),
    ("anger & joy + love", "anger, joy, love"),
    ("anger joy", "anger, joy"),
    ("anger、joy，love", "anger, joy, love"),
    # numbering and bullets
    ("1. anger\n2. joy", "anger, joy"),
    ("1) anger\n2) joy", "anger, joy"),
    ("(1) anger, (2) joy", "anger, joy"),
    ("1. anger, 2. joy", "anger, joy"),
    ("- anger\n- joy", "anger, joy"),
    ("* anger\n• joy\n– love", "anger, joy, love"),
    # lead-ins
    ("Emotions: anger, joy", "anger, joy"),
    ("Answer: anger", "anger"),
    ("**Emotions:** anger", "anger"),
    ("**Emotions**: anger", "anger"),
    ("The emotion labels: anger", "anger"),
    ("Final answer:\njoy", "joy"),
    # JSON
    ('["anger", "joy"]', "anger, joy"),
    ("['joy','anger']", "anger, joy"),
    ('{"emotions": ["anger", "joy"]}', "anger, joy"),
    ('{"labels": ["anger"]}', "anger"),
    ('{\n  "emotions": [\n    "anger",\n    "joy"\n  ]\n}', "anger, joy"),
    ('[{"label": "anger"}, {"label": "joy"}]', "anger, joy"),
    ('["anger", "joy', "anger, joy"),
    # yes and no
    ('{"joy": true, "anger": false}', "joy"),
    ('{"joy": 1, "anger": 0, "love": "yes", "fear": "no", "trust": null}', "joy, love"),
    ("joy: yes, anger: no", "joy"),
    ("joy: Yes\nanger: No", "joy"),
    ("**joy**: yes\n**anger**: no", "joy"),
    ("joy = 1; anger = 0", "joy"),
    ("joy - yes\nanger - no", "joy"),
    ("joy (yes), anger (no)", "joy"),
    ("joy yes, anger no", "joy"),
    ("| joy | yes |\n| anger | no |", "joy"),
    ("Joy? Yes. Anger? No.", "joy"),
    ("Joy: 1.\nAnger: 0.", "joy"),
    ("joy: none, anger: yes", "anger"),
    ("joy: no", ""),
    # the empty set
    ("None", ""),
    ("none.", ""),
    ('"none"', ""),
    ("no emotion", ""),
    ("No emotions.", ""),
    ("none of the above", ""),
    ("no labels", ""),
    ("Neutral", ""),
    ("N/A", ""),
    ("[]", ""),
    ("[ ]", ""),
    ("{}", ""),
    ('{"emotions": []}', ""),
    ("Emotions: none", ""),
    # end tokens
    ("joy<|im_end|>", "joy"),
    ("joy</s></s>", "joy"),
    ("joy <end_of_turn>\n", "joy"),
    ("anger, joy<|eot_id|>", "anger, joy"),
    ("none<|endoftext|>", ""),
]

REPAIRED = [
    # repeated
    ("joy, joy", "joy", ()),
    ("joy, anger, Joy", "anger, joy", ()),
    # aliases
    ("angry", "anger", ()),
    ("Angry, happy", "anger, joy", ()),
    ("joy, happiness", "joy", ()),
    # chatter
    ("The tweet expresses anger and joy because the weather is nice today.", "anger, joy", ()),
    ("I feel: joy", "joy", ()),
    ("anger (the author is really mad)", "anger", ()),
    ("joy\n\nNothing else is to be found in this text.", "joy", ()),
    ("Sure! joy", "joy", ()),
    ("Yes, joy.", "joy", ()),
    ("anger or joy", "anger, joy", ()),
    ("Reason: sunshine. Emotions: joy", "joy", ()),
    # a cut-off last label
    ("anger, pessi", "anger, pessimism", ()),
    ("pessi", "pessimism", ()),
    ("Emotions: pessi", "pessimism", ()),
    ("anger\nopt", "anger, optimism", ()),
    ("anger and OPT", "anger, optimism", ()),
    ("- anger\n- sur", "anger, surprise", ()),
    ('["anger", "optim', "anger, optimism", ()),
    ('["anger", "jo', "anger", ("jo",)),
    ("anger, jo", "anger", ("jo",)),
    ("anger, pessi.", "anger", ("pessi",)),
    ('["anger", "pessi"]', "anger", ("pessi",)),
    ("anger, pessi<|im_end|>", "anger", ("pessi",)),
    ("pessi, anger", "anger", ("pessi",)),
    ("anger. Pessi", "anger", ("Pessi",)),
    ("I see anger, pessim", "anger, pessimism", ()),
    ("anger with some pessi", "anger", ()),
    # negation
    ("not joy", "", ()),
    ("no anger", "", ()),
    ("no joy, no anger", "", ()),
    ("without fear", "", ()),
    ("never joy", "", ()),
    ("neither anger nor joy", "", ()),
    ("no anger or joy", "", ()),
    ("no anger or joy or fear, love", "love", ()),
    ("isn't love", "", ()),
    ("It isn’t love.", "", ()),
    ("anger but not disgust", "anger", ()),
    ("anger, not disgust", "anger", ()),
    ("anger without any sign of fear", "anger", ()),
    ("The tweet doesn't really express any anger; joy", "joy", ()),
    ("It is not expressing a feeling of joy but love", "love", ()),
    ("The author does not seem to be happy", "", ()),
    ("The user isn't happy, he is sad", "sadness", ()),
    ("no joy and love", "love", ()),
    ("no joy, love", "love", ()),
    ("not joy. love", "love", ()),
    ("no, it is joy", "joy", ()),
    ("No! joy", "joy", ()),
    ("not only joy but love", "joy, love", ()),
    ("not just joy", "joy", ()),
    ("can't hide the anger", "anger", ()),
    ("no gratitude, joy", "joy", ()),
    ("anger: no joy", "", ()),
    # unknown items
    ("joy, gratitude", "joy", ("gratitude",)),
    ("gratitude, joy, Deep Awe", "joy", ("gratitude", "Deep Awe")),
    ('["joy", "gratitude"]', "joy", ("gratitude",)),
    ("joy, gratitude, gratitude", "joy", ("gratitude",)),
    ("none, gratitude", "", ("gratitude",)),
    ('{"joy": true, "gratitude": true, "awe": false}', "joy", ("gratitude",)),
    ('{"emotion": "joy", "intensity": 0.7}', "joy", ()),
    ("joy, joyless", "joy", ("joyless",)),
    ("joy, self-love", "joy", ("self-love",)),
    ("joy, @love", "joy", ("@love",)),
    # labels win over the empty answer
    ("none, joy", "joy", ()),
    ("joy, none", "joy", ()),
    # the empty set with chatter around it
    ("None of these emotions are expressed", "", ()),
    ("There is no clear emotion in this tweet.", "", ()),
    ("The tweet does not express any of these emotions.", "", ()),
    ("The tweet is neutral", "", ()),
    # verdicts with something dropped
    ('{"joy": 0.92, "anger": 0.03}', "joy", ()),
    ('{"joy": true, "anger": fal', "joy", ()),
    ('{"joy": true, "anger": tr', "anger, joy", ()),
    ('{"joy": true, "anger"', "joy", ()),
    ("joy: yes\nanger: no\ndisgust", "joy", ()),
    ("joy: yes\nanger: no\nsur", "joy", ("sur",)),
    ("joy: yes\nanger: no\nThe anger in it is not real.", "joy", ()),
    ("joy: yes\njoy: no", "joy", ()),
    ("joy: not present, anger: yes", "anger", ()),
    ("joy: yes anger: no love: yes", "joy, love", ()),  # "no love" denies it, but the verdict takes precedence
    # a continuation with the next turn
    ("joy\n\nTweet: I am so angry\nEmotions: anger", "joy", ()),
    ("joy\n \n**Tweet 2:** I am so angry", "joy", ()),
    ("joy\n\nuser: I am so angry", "joy", ()),
    ("joy\nUser: I am so angry", "joy", ()),
    ("joy\nTweet: I am so angry\nEmotions: anger", "joy", ()),
    ("joy\n\nExplanation: there is no anger, but some fear", "joy", ()),
    ("joy<|im_end|>\n<|im_start|>user\nI am so angry", "joy", ()),
    ("joy</s> anger", "joy", ()),
    # thinking
    ("<think>anger, no, fear</think>joy", "joy", ()),
    ("<think>\n\n</think>\n\njoy, love", "joy, love", ()),
    ("<think>" + "anger " * 5000 + "</think>\njoy", "joy", ()),
]

UNKNOWN = [
    ("gratitude", ("gratitude",)),
    ("Gratitude, awe.", ("Gratitude", "awe")),
    ("the weather", ("the weather",)),
    ("joyless", ("joyless",)),
    ("unsurprising, mistrust, lovely, joyfully", ("unsurprising", "mistrust", "lovely", "joyfully")),
    ("self-love", ("self-love",)),
    ("İNTEREST", ("İNTEREST",)),
    ("yes", ("yes",)),
    ("No.", ("No.",)),
    ("- no", ("- no",)),
    ("not gratitude", ("not gratitude",)),
    ("not neutral", ("not neutral",)),
    ("42", ("42",)),
    ('{"gratitude": false}', ('{"gratitude": false}',)),
    ("I cannot tell what the author means", ("I cannot tell what the author means",)),
]

EMPTY = ["", " ", "\n\t\r\n", "...", "?!", '""', '[""]', "(", "- ", "🙂", "<|im_end|>", "<think>joy</think>", "Answer:"]
EMPTY += ["<|im_end|>\n<|im_start|>user\nI am so angry"]


@pytest.mark.parametrize(("text", "names"), EXACT)
def test_exact(text: str, names: str) -> None:
    check(text, names, "exact")
    check(text, names, "exact", mode="strict")


@pytest.mark.parametrize(("text", "names"), NORMALISED)
def test_normalised(text: str, names: str) -> None:
    check(text, names, "normalised")


@pytest.mark.parametrize(("text", "names", "unknown"), REPAIRED)
def test_repaired(text: str, names: str, unknown: tuple[str, ...]) -> None:
    check(text, names, "repaired", unknown)


@pytest.mark.parametrize(("text", "unknown"), UNKNOWN)
def test_unknown(text: str, unknown: tuple[str, ...]) -> None:
    check(text, "", "unknown", unknown)


@pytest.mark.parametrize("text", EMPTY)
def test_empty(text: str) -> None:
    check(text, "", "empty")


@pytest.mark.parametrize("text", [text for text, *_ in NORMALISED + REPAIRED + UNKNOWN])
def test_strict_mode_accepts_only_the_canonical_answer(text: str) -> None:
    check(text, "", "unknown", (text.strip(),), mode="strict")


@pytest.mark.parametrize("text", ["", " \n"])
def test_blank_text_is_empty_in_strict_mode(text: str) -> None:
    check(text, "", "empty", mode="strict")


# The style determines which answer is canonical, and nothing else.


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("other", STYLES)
@pytest.mark.parametrize("names", ["", "anger, joy", ", ".join(EMOTIONS.names)])
def test_canonical_answers_are_read_with_every_other_style(style: str, other: str, names: str) -> None:
    chosen = [name for name in names.split(", ") if name]
    own, text = answer_text(chosen, EMOTIONS, style), answer_text(chosen, EMOTIONS, other)
    check(text, names, "exact" if text == own else "normalised", style=style)
    if text != own:
        check(text, "", "unknown", (text,), mode="strict", style=style)


@pytest.mark.parametrize("style", ["json", "yes_no"])
@pytest.mark.parametrize(("text", "names", "unknown"), REPAIRED)
def test_repaired_with_every_style(style: str, text: str, names: str, unknown: tuple[str, ...]) -> None:
    check(text, names, "repaired", unknown, style=style)


@pytest.mark.parametrize("text", ['["joy", "anger"]', '["anger","joy"]', "['anger', 'joy']", '["anger", "joy"'])
def test_json_that_is_not_canonical_is_normalised(text: str) -> None:
    check(text, "anger, joy", "normalised", style="json")
    check(text, "", "unknown", (text,), style="json", mode="strict")


def test_yes_no_that_is_not_canonical_is_normalised_or_repaired() -> None:
    check("anger: yes\njoy: no", "anger", "normalised", style="yes_no")
    lines = answer_text(["anger", "trust"], EMOTIONS, "yes_no").split("\n")
    check("\n".join(reversed(lines)), "anger, trust", "normalised", style="yes_no")
    check("\n".join(lines).upper(), "anger, trust", "normalised", style="yes_no")
    check("\n".join([*lines, "joy: yes"]), "anger, trust", "repaired", style="yes_no")


# Other label sets.


@pytest.mark.parametrize(
    ("text", "names", "status", "unknown"),
    [
        ("keine", "", "exact", ()),
        ("Keine.", "", "normalised", ()),
        ("none", "", "normalised", ()),
        ("Ärger, Freude", "Ärger, Freude", "exact", ()),
        ("ÄRGER; freude", "Ärger, Freude", "normalised", ()),
        ("A\u0308rger", "Ärger", "normalised", ()),  # decomposed
        ('["\\u00c4rger", "Freude"]', "Ärger, Freude", "normalised", ()),
        ("Wut", "Ärger", "repaired", ()),
        ("SPASS", "Freude", "repaired", ()),
        ("spaß", "Freude", "repaired", ()),
        ("Sehr  Glücklich", "sehr glücklich", "normalised", ()),
        ("Ärger, sehr glü", "Ärger, sehr glücklich", "repaired", ()),
        ("Verärgert, glücklich", "Ärger", "repaired", ("glücklich",)),
        ("Ärgernis, Vorfreude", "", "unknown", ("Ärgernis", "Vorfreude")),
        ("Der Tweet drückt Freude aus.", "Freude", "repaired", ()),
        ("Ärger: yes\nFreude: no", "Ärger", "normalised", ()),
        ("joy", "", "unknown", ("joy",)),
    ],
)
def test_a_german_label_set(text: str, names: str, status: str, unknown: tuple[str, ...]) -> None:
    check(text, names, status, unknown, GERMAN)


@pytest.mark.parametrize(
    ("text", "names", "status", "unknown"),
    [
        ("neutral", "neutral", "exact", ()),
        ("Neutral.", "neutral", "normalised", ()),
        ("none", "", "exact", ()),
        ("joy, gratitude", "gratitude, joy", "normalised", ()),
        ("disapproval", "disapproval", "exact", ()),
        ("joy, grat", "gratitude, joy", "repaired", ()),
        ("joy, disapp", "joy", "repaired", ("disapp",)),
        ("joy, disappr", "disapproval, joy", "repaired", ()),
        ("dis", "", "unknown", ("dis",)),
        ("happy", "", "unknown", ("happy",)),
    ],
)
def test_a_label_set_of_28_labels(text: str, names: str, status: str, unknown: tuple[str, ...]) -> None:
    assert len(GO_EMOTIONS) == 28
    check(text, names, status, unknown, GO_EMOTIONS)


@pytest.mark.parametrize(
    ("text", "names", "status", "unknown"),
    [
        ("Very Happy", "very happy", "normalised", ()),
        ("very\nhappy", "very happy", "normalised", ()),
        ("happy, very happy", "very happy, happy", "normalised", ()),
        ("very, happy", "happy", "repaired", ("very",)),
        ("Self-love", "self-love", "normalised", ()),
        ("Joy & Love", "joy & love", "normalised", ()),
        ("Love & C++.", "love, c++", "normalised", ()),
        ("खुशी।", "खुशी", "normalised", ()),
        ("喜び。", "खुशी", "repaired", ()),
        ("खुश", "खुशी", "repaired", ()),  # cut off
        ("love, very ha", "very happy, love", "repaired", ()),
    ],
)
def test_names_with_several_words_hyphens_signs_and_other_scripts(
    text: str, names: str, status: str, unknown: tuple[str, ...]
) -> None:
    check(text, names, status, unknown, ODD)


# Canonical answers, both ways.


@pytest.mark.parametrize("mode", ["strict", "tolerant"])
def test_every_canonical_list_is_exact(mode: str) -> None:
    for vector in product((0, 1), repeat=len(EMOTIONS)):
        text = answer_text(EMOTIONS.names_of(vector), EMOTIONS, "list")
        read = parse_answer(text, EMOTIONS, mode)
        assert (read.vector, read.status, read.unknown) == (vector, "exact", ())


@pytest.mark.parametrize("mode", ["strict", "tolerant"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("label_set", [EMOTIONS, GERMAN, GO_EMOTIONS, ODD], ids=lambda label_set: label_set.name)
def test_canonical_answers_of_every_style_are_exact(label_set: LabelSet, style: str, mode: str) -> None:
    names = label_set.names
    for chosen in [names[i:j:step] for i in range(len(names)) for j in range(i, len(names) + 1) for step in (1, 3)]:
        read = parse_answer(answer_text(chosen, label_set, style), label_set, mode, style)
        assert (read.labels, read.status, read.unknown) == (chosen, "exact", ())


@pytest.mark.parametrize("style", STYLES)
def test_canonical_answers_may_exceed_the_limit_of_tolerant_reading(style: str) -> None:
    label_set = LabelSet(name="many", labels=tuple(Label(name=f"label number {i}") for i in range(1000)))
    read = parse_answer(answer_text(label_set.names, label_set, style), label_set, style=style)
    assert (read.labels, read.status) == (label_set.names, "exact")


# Any text at all.

# fmt: off
LONG = [
    "joy, ", "(", '"', "[", "{", "[ ", "\n", "\n ", "a", "a ", "a-", "not ", "no emotion", "answer ", "very ", "\u0301",
    "x:", "0.", "1) ", "<|", "<s>", "<think>", "```", "\n\n***", "\u0315\u0300", "\\u00e4", "|", "कि", "none of ", "joy:",
]
# fmt: on


@pytest.mark.parametrize("piece", LONG)
def test_100_000_characters_are_read_in_time(piece: str) -> None:
    text = (piece * 100_000)[:100_000]
    for ending in ("", "joy", "]"):
        read = parse_answer(text + ending, EMOTIONS)
        assert len(read.vector) == len(EMOTIONS)


def test_only_the_first_10_000_characters_are_read() -> None:
    check("joy" + "." * 20_000 + "anger", "joy", "repaired")


# fmt: off
FRAGMENTS = st.sampled_from([
    *(word for label in EMOTIONS.labels for word in (label.name, *label.aliases[:2])),
    "none", "neutral", "n/a", "pessi", "sur", "gratitude", "Ärger", "\u00e4", "\\u00e4", "\\ud83d", "\ud83d", "İ", "ß",
    ", ", ",", "; ", "\n", "\n\n", " ", ".", "/", "|", "&", " and ", " or ", " but ", "- ", "1. ", "#", "**", "`", "```json\n",
    "not ", "no ", "neither ", " nor ", "n't ", "without any ", "not only ", ": ", "=", "?", "yes", "no", "true", "false",
    '"', "'", "[", "]", "{", "}", '["', '", "', '"]', '": ', '{"emotions": [', "[]", "{}", "null", "0", "1", "0.5", "0.4",
    "Emotions:", "Answer: ", "\n\nTweet: ", "\nuser:", "<think>", "</think>", "<|im_end|>", "</s>", "<end_of_turn>", "@",
])
# fmt: on
TEXTS = st.lists(st.one_of(FRAGMENTS, st.text(max_size=8)), max_size=14).map("".join) | st.text()


def assert_consistent(read: ParsedAnswer, label_set: LabelSet) -> None:
    assert read.status in ("exact", "normalised", "repaired", "unknown", "empty")
    assert len(read.vector) == len(label_set)
    assert set(read.vector) <= {0, 1}
    assert read.labels == label_set.names_of(read.vector)
    assert not (read.failed and read.labels)
    assert bool(read.unknown) or read.status != "unknown"
    assert not read.unknown or read.status in ("repaired", "unknown")


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(text=TEXTS, style=st.sampled_from(STYLES))
def test_any_text_is_read(text: str, style: str) -> None:
    read = parse_answer(text, EMOTIONS, style=style)
    assert_consistent(read, EMOTIONS)
    again = parse_answer(answer_text(read.labels, EMOTIONS, style), EMOTIONS, style=style)
    assert (again.labels, again.status) == (read.labels, "exact")
    strict = parse_answer(text, EMOTIONS, "strict", style)
    assert_consistent(strict, EMOTIONS)
    assert strict.failed or strict == read


@settings(max_examples=1_000, deadline=None)
@given(text=TEXTS, label_set=st.sampled_from([GERMAN, GO_EMOTIONS, ODD]))
def test_any_text_is_read_with_other_label_sets(text: str, label_set: LabelSet) -> None:
    assert_consistent(parse_answer(text, label_set), label_set)


@settings(max_examples=1_000, deadline=None)
@given(chosen=st.lists(st.sampled_from(EMOTIONS.names), unique=True), data=st.data())
def test_order_case_and_separators_do_not_matter(chosen: list[str], data: st.DataObject) -> None:
    separator = data.draw(st.sampled_from([", ", "; ", "\n", " / ", " and ", " & ", "|", '", "', "\n- "]))
    written = [data.draw(st.sampled_from([name, name.upper(), f"#{name}", f"**{name}**"])) for name in chosen]
    read = parse_answer(separator.join(written) or "none", EMOTIONS)
    assert read.labels == EMOTIONS.sort(chosen)
    assert read.status in ("exact", "normalised")


@settings(max_examples=1_000, deadline=None)
@given(
    values=st.dictionaries(st.sampled_from(EMOTIONS.names), st.booleans(), min_size=1),
    indent=st.sampled_from([None, 2]),
)
def test_json_objects(values: dict[str, bool], indent: int | None) -> None:
    read = parse_answer(json.dumps(values, indent=indent), EMOTIONS)
    assert read.labels == EMOTIONS.sort(name for name, value in values.items() if value)
    assert read.status == "normalised"


# The interface.


@pytest.mark.parametrize(("mode", "style"), [("loose", "list"), ("", "list"), ("tolerant", "xml"), ("strict", "")])
def test_an_unknown_mode_or_style_is_an_error(mode: str, style: str) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        parse_answer("joy", EMOTIONS, mode, style)


def test_a_parsed_answer_is_immutable() -> None:
    read = parse_answer("joy", EMOTIONS)
    assert read == ParsedAnswer(("joy",), EMOTIONS.vector(["joy"]), "exact", ())
    with pytest.raises(AttributeError):
        read.status = "repaired"  # type: ignore[misc]


def test_importing_the_parser_loads_no_heavy_library() -> None:
    code = "import sys, emogen.task.parse; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
