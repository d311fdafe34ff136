import io

import numpy as np
import pytest
from tiny import POSTS

from emogen.console import PlainConsole
from emogen.model.encode import make_encoder
from emogen.model.tokenizer import TextTokenizer
from emogen.task.prompt import load_prompt, parse_prompt
from emogen.task.rows import Rows
from emogen.training.show import show_rows, show_templates


@pytest.fixture(scope="module")
def encoder(tokenizer, labels):
    return make_encoder(TextTokenizer.of(tokenizer), load_prompt("prompts/list.jinja"), labels)


@pytest.fixture
def console():
    return PlainConsole(file=io.StringIO(), width=200)


def rows_of(labels, n, with_gold=True):
    gold = np.array([labels.vector(names) for _, names in POSTS[:n]], dtype=np.int8) if with_gold else None
    return Rows("posts.csv", [f"p{i}" for i in range(n)], [text for text, _ in POSTS[:n]], gold, list(range(2, n + 2)))


def test_a_row_is_shown_as_the_model_reads_it(console, encoder, labels):
    show_rows(console, encoder, rows_of(labels, 2))
    shown = console.file.getvalue()
    assert "posts.csv:2  id p0" in shown
    assert "posts.csv:3  id p1" in shown
    (row,) = encoder.rows(*POSTS[0])
    n = len(encoder.prefix_ids) + len(row.suffix_ids)
    assert f"\n{n} tokens: {len(encoder.prefix_ids)} shared, {row.n_answer} supervised\n" in shown
    prompt = encoder.tokenizer.decode([*encoder.prefix_ids, *row.suffix_ids[: -row.n_answer]])
    assert f"{prompt}⟦joy, love<|im_end|>⟧" in shown
    assert shown.count("⟦") == 2


def test_a_row_without_labels_has_no_answer(console, encoder, labels):
    show_rows(console, encoder, rows_of(labels, 1, with_gold=False))
    assert " 0 supervised" in console.file.getvalue()
    assert "⟦" not in console.file.getvalue()


def test_tokens_are_shown_one_per_line_with_their_part(console, encoder, labels):
    show_rows(console, encoder, rows_of(labels, 1), tokens=True)
    (row,) = encoder.rows(*POSTS[0])
    ids = [*encoder.prefix_ids, *row.suffix_ids]
    lines = [line.split(maxsplit=3) for line in console.file.getvalue().splitlines()[-len(ids) :]]
    assert [int(position) for position, *_ in lines] == list(range(len(ids)))
    assert [int(token) for _, token, *_ in lines] == ids
    n_prompt = len(ids) - len(encoder.prefix_ids) - row.n_answer
    parts = ["shared"] * len(encoder.prefix_ids) + ["prompt"] * n_prompt + ["SUPERVISED"] * row.n_answer
    assert [part for _, _, part, _ in lines] == parts
    assert lines[-1][3] == "'<|im_end|>'"


def test_shortened_texts_say_by_how_much(console, tokenizer, labels, encoder):
    limit = len(encoder.prefix_ids) + len(encoder.question_ids[0]) + encoder.grammar.max_length + 5
    short = make_encoder(TextTokenizer.of(tokenizer), load_prompt("prompts/list.jinja"), labels, max_length=limit)
    n_cut = len(short.plain.encode(POSTS[0][0])) - 5
    show_rows(console, short, rows_of(labels, 1))
    assert f"supervised, {n_cut} tokens of the text cut\n" in console.file.getvalue()


def test_templates_are_compared_with_the_first_one(console, tokenizer, labels):
    templates = [
        (
            name,
            make_encoder(
                TextTokenizer.of(tokenizer),
                parse_prompt(f"{{% user %}}\n{task}\n{{{{ text }}}}\nAnswer:", name),
                labels,
            ),
        )
        for name, task in (("a", "Name the emotions."), ("b", "List the feelings."))
    ]
    show_templates(console, templates, rows_of(labels, 2))
    shown = console.file.getvalue()
    n_prefix = len(templates[0][1].prefix_ids)
    assert f"a: instruction {n_prefix} tokens, the same for all rows" in shown
    difference = shown.partition("a → b")[2].splitlines()
    assert "-Name the emotions." in difference
    assert "+List the feelings." in difference
    assert " Answer:<|im_end|>" in difference
