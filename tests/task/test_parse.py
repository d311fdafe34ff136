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


# What models write freely around, beside and instead of a list of labels. Each table is of one kind: text, labels.

TOXIC = LabelSet(
    name="toxic",
    labels=tuple(
        Label(name=name) for name in ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
    ),
)
TOPICS = LabelSet(
    name="topics",
    labels=tuple(
        Label(name=name)
        for name in (
            "love and care", "yes", "not joy", "joy", "1", "none of these", "Health (general)", "Q&A", "Who?", "U.S. politics",
            "news: local", "true or false", "arts - music", "1. FC", "A.I.", "24/7", "reason", "labels", "iPhone",
        )
    ),
)  # fmt: skip
SPANISH = LabelSet(
    name="emociones",
    empty="ninguna",
    labels=(Label(name="alegría", aliases=("feliz",)), Label(name="ira"), Label(name="tristeza"), Label(name="miedo")),
)
CHINESE = LabelSet(name="情感", empty="无", labels=tuple(Label(name=name) for name in ("喜悦", "愤怒", "悲伤", "恐惧")))
ARABIC = LabelSet(name="مشاعر", empty="لا شيء", labels=tuple(Label(name=name) for name in ("فرح", "غضب", "حزن", "خوف")))

REASONING = [
    ("The text sounds angry, not sad.</think>joy", "joy"),
    ("anger? no.\n</think>\n\njoy, love", "joy, love"),
    ("<think>first anger</think> then <think>fear</think>\njoy", "joy"),
    ("<think>the tag <think> opens it; anger</think>joy", "joy"),
    ("<think reason='fear'>anger</think>joy", "joy"),
    ("<THINK>anger</THINK>joy", "joy"),
    ("joy\n<think>or anger?", "joy"),
    ("<thinking>anger</thinking>joy", "joy"),
    ("<thought>anger</thought>\njoy", "joy"),
    ("<reasoning>\nThe user is mad.\n</reasoning>\njoy", "joy"),
    ("<reflection>anger</reflection>joy", "joy"),
    ("<scratchpad>anger</scratchpad>joy", "joy"),
    ("<analysis>anger</analysis><answer>joy</answer>", "joy"),
    ("joy\n<explanation>She overcame her fear.</explanation>", "joy"),
    ("<answer>joy</answer><explanation>no fear, no anger", "joy"),
    ("<seed:think>anger</seed:think>joy", "joy"),
    ("anger</seed:think>joy", "joy"),
    ("◁think▷anger◁/think▷joy", "joy"),
    ("[THINK]anger[/THINK]joy", "joy"),
    ("[THINK]anger[/THINK] joy</s>", "joy"),
    ("<|channel|>analysis<|message|>anger?<|end|><|start|>assistant<|channel|>final<|message|>joy", "joy"),
    ("<|channel|>final<|message|>joy<|return|>", "joy"),
    ("<|channel|>analysis<|message|>anger<|channel|>commentary<|message|>fear<|channel|>final<|message|>joy", "joy"),
    ("analysisThe user sounds angry.assistantfinaljoy", "joy"),
    ("<|START_THINKING|>anger<|END_THINKING|><|START_RESPONSE|>joy<|END_RESPONSE|>", "joy"),
    ("<|begin_of_thought|>anger<|end_of_thought|><|begin_of_solution|>joy<|end_of_solution|>", "joy"),
    ("<|begin_of_box|>joy, love<|end_of_box|>", "joy, love"),
    ("She is angry at first. <answer>joy</answer>", "joy"),
    ("She is angry. <answer>\njoy\nlove\n</answer>\nI see no fear.", "joy, love"),
    ("She is angry. <final_answer>joy", "joy"),
    ("I use <answer></answer> tags, not anger. <answer>joy</answer>", "joy"),
    ("<answer>joy</answer> and <answer>love</answer>", "joy, love"),
    ("<answer>anger: no\njoy: yes</answer>", "joy"),
    ("<answer>none</answer> although he sounds angry", ""),
    ("anger is ruled out, so \\boxed{joy}", "joy"),
    ("anger... $\\boxed{\\text{joy}, \\text{love}}$", "joy, love"),
    ("The user is mad. \\boxed{joy} and \\boxed{love}", "joy, love"),
    ("The user is mad. \\boxed{joy", "joy"),
    ("The writer is angry, so there may be anger. But she laughs. Answer: joy", "joy"),
    ("The writer is angry, so ... Answer: anger", "anger"),
    ("The writer is angry at first, then calm. Final answer: joy, love", "joy, love"),
    ("The writer is angry at first.\n\n**Final Answer:** joy", "joy"),
    ("The writer is angry at first.\n\n### Final answer\n\njoy", "joy"),
    ("The writer is angry at first.\nEmotions: joy", "joy"),
    ("The writer is angry at first. The answer is joy.", "joy"),
    ("The writer is angry at first. So the final labels are: joy", "joy"),
    ("1. The writer is angry at the bus.\n2. Then the bus comes.\nOutput: joy", "joy"),
    ("Answer: anger? The text says she laughs, though. Final answer: joy", "joy"),
    ("Step 1: the writer was angry. Conclusion: joy", "joy"),
    ("Primary emotion: joy\nSecondary emotion: anger", "anger, joy"),
    ("Primary emotion: joy, since the sun is out.\nSecondary emotion: anger", "anger, joy"),
    ("Emotions: joy\nReasoning: her anger is gone", "joy"),
    ("joy. Reason: her anger is gone", "joy"),
    ("joy\nThe writer lost her fear.", "joy"),
    ("joy\nThere is also some anger in it.", "anger, joy"),
    ("none\nThe writer only quotes somebody who is angry.", ""),
    ("joy because she overcame her fear", "joy"),
    ("joy because of the sun, and anger because of the rain", "anger, joy"),
    ("joy: she lost her fear of flying, anger: the flight was late", "anger, joy"),
    ("joy - she lost her fear of flying\nlove - she hugs the captain without fear", "joy, love"),
    ("joy (she lost all her fear), love", "joy, love"),
    ("Text: I am so angry\nLabels: joy", "joy"),
    ("I'd be happy to help! The emotion is: anger", "anger"),
    ("anger\n\nI hope this helps!", "anger"),
    ("<|im_start|>assistant\njoy<|im_end|>", "joy"),
    ("<s>joy</s>", "joy"),
    ("<start_of_turn>model\njoy<end_of_turn>", "joy"),
]

NOT_ANSWERED = [
    "<think>joy", "<think>\nThe text is about joy and", "<thinking>anger, joy", "<|channel|>analysis<|message|>anger, joy",
    "[THINK]joy", "◁think▷joy", "<seed:think>joy", "joy</think>", "<reasoning>joy</reasoning>", "<answer></answer>",
    "<think>a</think><think>joy", "analysisWe must decide: joy", "The writer is angry at first. Final answer:",
]  # fmt: skip

STRUCTURES = [
    ('{"confidence": 0.9, "labels": ["joy"]}', "joy"),
    ('{"labels": ["joy"], "confidence": 0.2}', "joy"),
    ('{"reason": "her anger and fear are gone", "labels": ["joy"]}', "joy"),
    ('{"labels": ["joy", "love"], "reasoning": "not sad, but happy"}', "joy, love"),
    ('{"text": "I am so angry", "emotion": "joy"}', "joy"),
    ('{"joy": {"present": true, "score": 0.9}, "anger": {"present": false, "score": 0.2}}', "joy"),
    ('{"joy": {"score": 0.9, "reason": "not angry"}, "anger": {"score": 0.1}}', "joy"),
    ('{"anger": {"confidence": 0.95, "present": false}, "joy": {"confidence": 0.6, "present": true}}', "joy"),
    ('[{"label": "joy", "score": 0.98}, {"label": "anger", "score": 0.01}]', "joy"),
    ('[[{"label": "joy", "score": 0.98}, {"label": "anger", "score": 0.01}]]', "joy"),
    ('[{"score": 0.98, "label": "joy"}, {"score": 0.01, "label": "anger"}]', "joy"),
    ('{"label": "joy", "score": 0.98}\n{"label": "anger", "score": 0.01}', "joy"),
    ('{"emotion": "joy", "present": "yes"}, {"emotion": "anger", "present": "no"}', "joy"),
    ('{"labels": {"anger": 0, "joy": 1}}', "joy"),
    ('{"result": {"emotions": {"anger": false, "joy": true}}}', "joy"),
    ('{"labels": ["joy", "anger"], "scores": [0.9, 0.1]}', "joy"),
    ('{"sequence": "I am angry", "labels": ["joy", "anger"], "scores": [0.9, 0.1]}', "joy"),
    ("{'joy': True, 'anger': False, 'fear': None}", "joy"),
    ("{'labels': ['joy', 'love']}", "joy, love"),
    ("[('joy', 0.98), ('anger', 0.01)]", "joy"),
    ('[["joy", 0.98], ["anger", 1e-05]]', "joy"),
    ("dict(joy=True, anger=False)", "joy"),
    ("Counter({'joy': 1, 'anger': 0})", "joy"),
    ("Emotions(joy=True, anger=False)", "joy"),
    ("{'joy', 'love'}", "joy, love"),
    ("{joy: true, anger: false}", "joy"),
    ("{joy: 0.9, anger: 0.1}", "joy"),
    ('{"joy": "85%", "anger": "10%"}', "joy"),
    ('{"joy": "present", "anger": "absent"}', "joy"),
    ('{"joy": "No, calm", "anger": "Yes - he shouts"}', "anger"),
    ('{"joy": "not present", "anger": "yes"}', "anger"),
    ('{"present": ["joy"], "absent": ["anger", "fear"]}', "joy"),
    ('{"yes": ["joy"], "no": ["anger"]}', "joy"),
    ('{"labels": ["joy"], "rejected": ["anger"]}', "joy"),
    ('{"primary_emotion": "joy", "secondary_emotions": ["love"]}', "joy, love"),
    ('{"emotions": "joy, love"}', "joy, love"),
    ('{"answer": "none"}', ""),
    ('{"labels": [], "reason": "no anger, no joy"}', ""),
    ('{"1": "joy", "2": "love"}', "joy, love"),
    ('{"anger": 0, "joy": 0}', ""),
    ('{"JOY": true, "Anger": false}', "joy"),
    ('Here is the JSON you asked for:\n```json\n{"labels": ["joy"]}\n```\nHope this helps!', "joy"),
    ('The user is angry:\n```\n{"joy": 0.9, "anger": 0.2}\n```', "joy"),
    ('Emotions: {"joy": 1, "anger": 0}', "joy"),
    ('{"labels": ["joy", // not anger\n "love"]}', "joy, love"),
    ('{"joy": true, "anger": false,}', "joy"),
    # cut off
    ('{"labels": ["joy", "pessi', "joy, pessimism"),
    ('{"confidence": 0.9, "labels": ["joy", "lo', "joy"),
    ('[{"label": "joy", "score": 0.98}, {"label": "anger", "sco', "joy, anger"),
    ('[{"label": "joy", "score": 0.98}, {"label": "anger", "score": 0.', "joy"),
    ('{"joy": {"present": true, "score": 0.9}, "anger": {"present": fal', "joy"),
    ('{"joy": {"present": true}, "anger": {', "joy"),
    ('{"labels": {"anger": 0, "joy": 1', "joy"),
    ("[('joy', 0.98), ('ang", "joy"),
    ('{"labels": ["joy"], "reason": "her anger is', "joy"),
    ('{"joy": 0.9, "anger":', "joy"),
    # YAML
    ("joy: true\nanger: false", "joy"),
    ("- joy: true\n- anger: false", "joy"),
    ("labels:\n  - joy\n  - love", "joy, love"),
    ("joy:\n  present: true\nanger:\n  present: false", "joy"),
    ("joy:\n  score: 0.9\nanger:\n  score: 0.1", "joy"),
    ("- label: joy\n  score: 0.98\n- label: anger\n  score: 0.01", "joy"),
    ("Label: joy\nConfidence: 90%", "joy"),
    ("Label: joy\nConfidence: high", "joy"),
    ("Present: joy, love\nAbsent: anger, fear", "joy, love"),
    ("Yes: joy\nNo: anger, fear", "joy"),
    ("Present:\n- joy\n- love\n\nNot present:\n- anger\n- fear", "joy, love"),
    ("✅: joy, love\n❌: anger, fear", "joy, love"),
    ("The tweet does not express the following emotions: anger, fear", ""),
    ("Absent emotions: anger, fear. Present emotions: joy", "joy"),
]

VERDICT_SIGNS = [
    ("anger ❌, joy ✅", "joy"),
    ("anger ❌ joy ✅", "joy"),
    ("❌ anger, ✅ joy", "joy"),
    ("❌ anger ✅ joy", "joy"),
    ("✅ joy\n❌ anger", "joy"),
    ("joy: ✅\nanger: ❌", "joy"),
    ("joy ✔️, anger ✖️", "joy"),
    ("joy ✓ anger ✗", "joy"),
    ("joy ☑ anger ☐", "joy"),
    ("joy 👍, anger 👎", "joy"),
    ("🟢 joy, 🔴 anger", "joy"),
    ("anger ⛔, joy 🟢", "joy"),
    ("[x] joy\n[ ] anger", "joy"),
    ("- [x] joy\n- [ ] anger", "joy"),
    ("- [X] **joy**\n- [] anger", "joy"),
    ("joy [x], anger [ ]", "joy"),
    ("joy [✓], anger [x]", "joy"),
    ("(x) joy ( ) anger", "joy"),
    ("- [ ] anger\n- [ ] fear", ""),
    ("joy: +, anger: -", "joy"),
    ("joy (+), anger (-)", "joy"),
    ("+joy, -anger", "joy"),
    ("- joy\n- anger", "anger, joy"),
    ("+ joy\n+ anger", "anger, joy"),
    ("joy ✅ Yes, anger ❌ No", "joy"),
    ("joy\n✅\nanger\n❌", "joy"),
    ("joy: present, anger: absent", "joy"),
    ("joy: Present\nanger: Not present", "joy"),
    ("joy: detected; anger: not detected", "joy"),
    ("joy = True, anger = False", "joy"),
    ("joy [yes], anger [no]", "joy"),
    ("[yes] joy, [no] anger", "joy"),
    ("joy → yes\nanger → no", "joy"),
    ("joy => 1, anger => 0", "joy"),
    ("joy: Y, anger: N", "joy"),
    ("joy: yes (very clear), anger: no (calm)", "joy"),
    ("joy: N/A\nanger: yes", "anger"),
    ("joy\tyes\nanger\tno", "joy"),
    ("joy,yes\nanger,no", "joy"),
    ("joy: likely, anger: unlikely", "joy"),
    ("Is joy expressed? Yes. Is it anger? No.", "joy"),
    ("joy: high, anger: none", "joy"),
    ("joy is present, anger is absent", "joy"),
    ("anger is absent but joy is present", "joy"),
    ("Anger is not present. Joy is.", "joy"),
    ("joy and anger are not present, love is", "love"),
    ("anger isn't expressed, joy", "joy"),
    # numbers
    ("joy: 85%, anger: 10%", "joy"),
    ("joy: 85 %, anger: 10 %", "joy"),
    ("joy 85%, anger 10%", "joy"),
    ("joy (85%), anger (10%)", "joy"),
    ("joy [85%], anger [10%]", "joy"),
    ("85% joy, 10% anger", "joy"),
    ("85% joy and 10% anger", "joy"),
    ("joy: 85 percent, anger: 10 percent", "joy"),
    ("joy: 50%, anger: 49%", "joy"),
    ("joy: 100%, anger: 0%", "joy"),
    ("joy: ~85%, anger: <5%", "joy"),
    ("joy: 80-90%, anger: 10-20%", "joy"),
    ("joy - 85%\nanger - 10%", "joy"),
    ("joy (0.9), anger (0.1)", "joy"),
    ("joy 0.9 anger 0.1", "joy"),
    ("0.9 joy, 0.1 anger", "joy"),
    ("joy: .85, anger: .15", "joy"),
    ("joy: 0,85; anger: 0,15", "joy"),
    ("joy: 0,85, anger: 0,15", "joy"),
    ("joy: 4/5, anger: 1/5", "joy"),
    ("joy: 8/10\nanger: 2/10", "joy"),
    ("joy (8 out of 10), anger (2 out of 10)", "joy"),
    ("joy: 85/100, anger: 10/100", "joy"),
    ("joy: 0.98, anger: 1e-05", "joy"),
    ("joy,0.98\nanger,0.01", "joy"),
    ("joy, 0.98, anger, 0.01", "joy"),
    ("joy (confidence: 0.9), anger (confidence: 0.2)", "joy"),
    ("joy (p=0.9), anger (p=0.2)", "joy"),
    ("joy (90% confidence), anger (20% confidence)", "joy"),
    ("joy with a probability of 0.9, anger with a probability of 0.1", "joy"),
    ("joy score: 0.9\nanger score: 0.1", "joy"),
    ("**joy**: 0.9\n**anger**: 0.1", "joy"),
    ("joy: 1\nanger: 0", "joy"),
    ("joy[1], anger[2]", "anger, joy"),
    ("joy¹, anger²", "anger, joy"),
    ("(1) joy (2) anger", "anger, joy"),
]

TABLES = [
    ("| anger | no |\n| joy | yes |", "joy"),
    ("| emotion | present |\n|---|---|\n| anger | no |\n| joy | yes |", "joy"),
    ("| Emotion | Score |\n|:--|--:|\n| anger | 0.1 |\n| joy | 0.9 |", "joy"),
    (
        "| Emotion | Present | Reason |\n|---|---|---|\n| anger | ❌ | the user was never mad |\n| joy | ✅ | no fear |",
        "joy",
    ),
    (
        "| Emotion | Reason | Present |\n|---|---|---|\n| anger | he is not sad | no |\n| joy | he lost his fear | yes |",
        "joy",
    ),
    ("| # | Emotion | Present |\n|---|---|---|\n| 1 | anger | no |\n| 2 | joy | yes |", "joy"),
    ("| label | yes | no |\n|---|---|---|\n| joy | x | |\n| anger | | x |", "joy"),
    ("| anger | joy |\n|---|---|\n| no | yes |", "joy"),
    ("| | anger | joy |\n|---|---|---|\n| text | 0 | 1 |", "joy"),
    ("anger,joy\n0,1", "joy"),
    ("anger | joy\n0 | 1", "joy"),
    ("anger\tjoy\n0\t1", "joy"),
    ("label,score\njoy,0.9\nanger,0.1", "joy"),
    ("<table><tr><td>joy</td><td>yes</td></tr><tr><td>anger</td><td>no</td></tr></table>", "joy"),
    ("| joy | love |", "joy, love"),
]

MARKUP = [
    ("<b>joy</b>", "joy"),
    ("<ul><li>joy</li><li>love</li></ul>", "joy, love"),
    ("<p>joy</p><br/>love", "joy, love"),
    ("<label>joy</label>", "joy"),
    ("<labels><label>joy</label><label>love</label></labels>", "joy, love"),
    ("<anger>0</anger><joy>1</joy>", "joy"),
    ("<anger>no</anger>\n<joy>yes</joy>", "joy"),
    ('<emotion name="joy" value="1"/><emotion name="anger" value="0"/>', "joy"),
    ('<emotion name="joy">yes</emotion><emotion name="anger">no</emotion>', "joy"),
    ("<joy present='true'/><anger present='false'/>", "joy"),
    ("<label>joy</label><reason>She is not angry.</reason>", "joy"),
    ("<!-- anger -->joy", "joy"),
    ("&quot;joy&quot; &amp; &quot;love&quot;", "joy, love"),
    ("~~anger~~ joy", "joy"),
    ("~~anger, fear~~, joy", "joy"),
    ("joy, <del>anger</del>", "joy"),
    ("joy, <s>anger</s>", "joy"),
    ("a\u0336n\u0336g\u0336e\u0336r\u0336, joy", "joy"),
    ("\\text{joy}, \\textbf{love}", "joy, love"),
    ("$\\text{joy}$", "joy"),
    ("\\begin{itemize}\\item joy\\item love\\end{itemize}", "joy, love"),
    ("joy $\\checkmark$, anger $\\times$", "joy"),
    ("# joy\n## love", "joy, love"),
    ("***joy***, __love__", "joy, love"),
    ("> joy", "joy"),
    ("```yaml\njoy: true\nanger: false\n```", "joy"),
    ("```xml\n<joy>1</joy><anger>0</anger>\n```", "joy"),
    ("joy 😊, love ❤️", "joy, love"),
    ("😡 anger 😊 joy", "anger, joy"),
    ("joy[^1]\n\n[^1]: the anger is quoted", "joy"),
    ("[joy](https://example.org/anger)", "joy"),
]

DENIED = [
    ("joy rather than anger", "joy"),
    ("joy instead of anger", "joy"),
    ("a lack of joy", ""),
    ("devoid of anger", ""),
    ("no anger, fear, or sadness", ""),
    ("no anger, fear or sadness. Only joy", "joy"),
    ("neither joy nor love, only anger", "anger"),
    ("Rejected: anger. Chosen: joy", "joy"),
    ("non-anger, joy", "joy"),
]

# fmt: off
OF_OTHER_SETS = [
    (TOXIC, [
        ("severe toxic", "severe_toxic"), ("Severe-Toxic, insult", "severe_toxic, insult"), ("severeToxic", "severe_toxic"),
        ("severetoxic", "severe_toxic"), ("SEVERE_TOXIC", "severe_toxic"), ("toxic, severe toxic", "toxic, severe_toxic"),
        ("toxic: yes\nsevere toxic: no", "toxic"), ("toxic, identity hate", "toxic, identity_hate"),
        ('{"toxic": 1, "severe toxic": 0, "identityHate": 1}', "toxic, identity_hate"),
        ("severe\\_toxic", "severe_toxic"), ("toxic, severe_to", "toxic, severe_toxic"), ("toxic, severe to", "toxic, severe_toxic"),
        ("<severe_toxic>1</severe_toxic><toxic>0</toxic>", "severe_toxic"), ("not toxic", ""), ("non-toxic", ""),
        ("not severe toxic but toxic", "toxic"), ("toxic ✅ severe toxic ❌ threat ❌", "toxic"),
        ("| toxic | severe toxic | threat |\n|---|---|---|\n| 1 | 0 | 0 |", "toxic"), ("threat: none\ninsult: 0.7", "insult"),
        ("toxic (0.93), severe toxic (0.12), insult (0.71)", "toxic, insult"), ("The comment is toxic, an insult.", "toxic, insult"),
        ("It is not a threat. It is an insult.", "insult"),
    ]),
    (GO_EMOTIONS, [
        ("joy: neutral, love: yes", "love"), ("neutral: 0.9, joy: 0.1", "neutral"), ("neutral ✅ joy ❌", "neutral"),
        ('{"neutral": true, "joy": false}', "neutral"), ("not neutral, joy", "joy"), ("neutral (no joy)", "neutral"),
        ("approval, not disapproval", "approval"), ("[{'label': 'neutral', 'score': 0.99}]", "neutral"),
        ("The answer is neutral.", "neutral"), ("self-love, caring", "caring"),
    ]),
    (TOPICS, [
        ("love and care", "love and care"), ("joy, love and care.", "love and care, joy"), ("Yes.", "yes"), ("yes, joy", "yes, joy"),
        ("yes: yes, joy: no", "yes"), ("yes: no, joy: yes", "joy"), ("not joy.", "not joy"), ("not  joy, joy", "not joy, joy"), ("1.", "1"),
        ("1, joy", "joy, 1"), ("1: yes\njoy: no", "1"), ("1. joy\n2. yes", "yes, joy"), ("None of these.", "none of these"),
        ("Health (general); Q&A", "Health (general), Q&A"), ("Health (general): yes, Q&A: no", "Health (general)"), ("who?", "Who?"),
        ("Who?: no\nQ&A: yes", "Q&A"), ("U.S. Politics, A.I.", "U.S. politics, A.I."), ("news: local, joy", "joy, news: local"),
        ("news: local: no, joy: yes", "joy"), ("true or false", "true or false"), ("arts-music", "arts - music"),
        ("arts - music, 24/7", "arts - music, 24/7"), ("24/7: 0.9, 1. FC: 0.1", "24/7"), ("1. FC", "1. FC"), ("reason: yes, joy: no", "reason"),
        ('{"reason": 1, "labels": 0, "iphone": 1}', "reason, iPhone"),
        ('["love and care", "not joy"', "love and care, not joy"), ("Labels: labels", "labels"), ("<reason>1</reason>", "reason"),
    ]),
    (SPANISH, [
        ("alegría: sí, ira: no", "alegría"), ("alegría: 0,85; ira: 0,1", "alegría"), ("sin ira, alegría", "alegría"), ("ALEGRÍA y miedo", "alegría, miedo"),
        ("no hay ira", ""), ("ninguna", ""), ("Respuesta: tristeza", "tristeza"), ("ni ira ni miedo", ""), ("alegría ✅ ira ❌", "alegría"),
        ("El texto habla de ira y miedo, pero ella ríe. Respuesta: alegría", "alegría"), ('{"alegría": true, "ira": false}', "alegría"),
        ("verdadero: alegría, falso: ira", "alegría"), ("alegría (85 %), tristeza (15 %)", "alegría"), ("feliz, tris", "alegría, tristeza"),
    ]),
    (CHINESE, [
        ("喜悦：是，愤怒：否", "喜悦"), ("喜悦、悲伤", "喜悦, 悲伤"), ("喜悦和悲伤", "喜悦, 悲伤"), ("喜悦 ✅ 愤怒 ❌", "喜悦"), ("情感：喜悦", "喜悦"),
        ("喜悦：85%，愤怒：10%", "喜悦"), ("没有 愤怒", ""), ("无", ""), ('{"喜悦": 1, "愤怒": 0}', "喜悦"), ("<喜悦>1</喜悦><愤怒>0</愤怒>", "喜悦"),
        ("这个人很愤怒，但后来很高兴。答案：喜悦", "喜悦"), ("| 情感 | 有 |\n|---|---|\n| 喜悦 | 是 |\n| 愤怒 | 否 |", "喜悦"),
    ]),
    (ARABIC, [
        ("فرح: نعم، غضب: لا", "فرح"), ("فرح، حزن", "فرح, حزن"), ("فرح ✅ غضب ❌", "فرح"), ("بدون غضب، فرح", "فرح"),
        ("فرح: ٨٥٪، غضب: ١٠٪", "فرح"), ('{"فرح": true, "غضب": false}', "فرح"), ("لا شيء", ""), ("فرح؟ نعم. غضب؟ لا.", "فرح"),
    ]),
]
# fmt: on

UNCLEAR = [
    ("joy: high, anger: low", "joy", "repaired", ("anger: low",)),
    ("joy: 3, anger: yes", "anger", "repaired", ("joy: 3",)),
    ("joy: 8, anger: 2", "", "unknown", ("joy: 8", "anger: 2")),
    ("joy: 85, anger: 10", "", "unknown", ("joy: 85", "anger: 10")),
    ("joy: maybe", "", "unknown", ("joy: maybe",)),
    ("joy 🟡", "", "unknown", ("joy 🟡",)),
    ('{"joy": 7, "anger": 0}', "", "unknown", ("joy: 7",)),
    ('{"joy": "the weather is nice"}', "", "unknown", ("joy: the weather is nice",)),
    ('{"joy": true, "anger": "partly"}', "joy", "repaired", ("anger: partly",)),
    ("joy: yes, anger: unclear", "joy", "repaired", ("anger: unclear",)),
]


@pytest.mark.parametrize(
    ("text", "names"),
    REASONING + STRUCTURES + VERDICT_SIGNS + TABLES + MARKUP + DENIED,
    ids=lambda value: ascii(value)[:60],
)
def test_free_answers(text: str, names: str) -> None:
    read = parse_answer(text, EMOTIONS)
    assert set(read.labels) == set(names.split(", ")) - {""}
    assert not read.failed


@pytest.mark.parametrize(
    ("label_set", "text", "names"),
    [(label_set, text, names) for label_set, rows in OF_OTHER_SETS for text, names in rows],
    ids=lambda value: value.name if isinstance(value, LabelSet) else ascii(value)[:60],
)
def test_free_answers_of_other_label_sets(label_set: LabelSet, text: str, names: str) -> None:
    read = parse_answer(text, label_set)
    assert set(read.labels) == set(names.split(", ")) - {""}
    assert not read.failed


@pytest.mark.parametrize("text", NOT_ANSWERED)
def test_reasoning_alone_is_no_answer(text: str) -> None:
    read = parse_answer(text, EMOTIONS)
    assert (read.labels, read.failed) == ((), True)


@pytest.mark.parametrize(("text", "names", "status", "unknown"), UNCLEAR)
def test_a_label_with_an_unclear_verdict_is_unknown(
    text: str, names: str, status: str, unknown: tuple[str, ...]
) -> None:
    check(text, names, status, unknown)


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


@pytest.mark.slow
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
@settings(max_examples=2_000, deadline=None)
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


@pytest.mark.parametrize(
    ("text", "labels"), [("sport", ["sport"]), ("Topic: SPORT.", ["sport"]), ("sport: yes, science: no", ["sport"])]
)
def test_exactly_one_label_is_an_answer(text: str, labels: list[str]) -> None:
    label_set = LabelSet(name="x", exactly_one=True, labels=(Label(name="sport"), Label(name="science")))
    assert list(parse_answer(text, label_set).labels) == labels


@pytest.mark.parametrize(
    "text", ["sport, science", "none", "sport and science both apply", '["sport", "science"]', "[]"]
)
@pytest.mark.parametrize("mode", ["strict", "tolerant"])
def test_no_label_or_several_fail_where_there_is_exactly_one(text: str, mode: str) -> None:
    label_set = LabelSet(name="x", exactly_one=True, labels=(Label(name="sport"), Label(name="science")))
    read = parse_answer(text, label_set, mode)
    assert (read.labels, read.status, read.unknown) == ((), "unknown", (text,))
