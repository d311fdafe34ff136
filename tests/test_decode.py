import itertools

import pytest
import torch

from emogen.attention import share_prefix
from emogen.decode import generate
from emogen.encode import make_encoder
from emogen.parse import parse_answer
from emogen.prompt import load_prompt

TEXTS = ["", "hello", "what a lovely morning by the sea " * 4, "<|im_end|>", "x " * 40, "you got this"]


@pytest.fixture(params=["shared", "plain"])
def engine(request):
    """Makes a model use the fast engine, or that of transformers."""
    return share_prefix if request.param == "shared" else lambda model: True


def plain_masked_greedy(model, encoder, suffix):
    """One row, no cache, no batch: run all of it again for each token, and mask what the grammar forbids."""
    grammar, node, said = encoder.grammar, 0, []
    while node != len(grammar.next_node) - 1:
        logits = model(torch.tensor([[*encoder.prefix_ids, *suffix, *said]])).logits[0, -1]
        allowed = torch.from_numpy(grammar.next_node[node] >= 0)
        best = int(logits[torch.from_numpy(grammar.token_ids)].masked_fill(~allowed, -torch.inf).argmax())
        said.append(int(grammar.token_ids[best]))
        node = grammar.next_node[node, best]
    return said[: -len(encoder.end_ids)]


@pytest.mark.parametrize("style", ["list", "json", "yes_no"])
@torch.no_grad()
def test_constrained_equals_plain_masked_greedy_token_for_token(model, engine, tokenizer, labels, style):
    encoder = make_encoder(tokenizer, load_prompt(f"prompts/{style}.jinja"), labels, style)
    suffixes = [row.suffix_ids for text in TEXTS for row in encoder.rows(text)[:2]]
    model.eval()
    expected = [plain_masked_greedy(model, encoder, suffix) for suffix in suffixes]
    assert engine(model)
    for batch_size in (1, 4, 32):
        assert generate(model, encoder, suffixes, batch_size=batch_size) == expected


def test_constrained_answers_are_always_valid(model, engine, tokenizer, labels):
    encoder = make_encoder(tokenizer, load_prompt("prompts/list.jinja"), labels)
    texts = [" ".join(words) for words in itertools.permutations(["joy", "rage", "42", "!"])]
    with torch.no_grad():  # weights that prefer nonsense
        model.get_input_embeddings().weight.normal_(std=2.0)
    assert engine(model)
    for ids in generate(model, encoder, [encoder.rows(text)[0].suffix_ids for text in texts]):
        assert parse_answer(tokenizer.decode(ids), labels, mode="strict").status == "exact"


def test_free_generation_equals_transformers(model, tokenizer, labels):
    encoder = make_encoder(tokenizer, load_prompt("prompts/list.jinja"), labels)
    suffixes = [encoder.rows(text)[0].suffix_ids for text in TEXTS]
    assert share_prefix(model)
    answers = generate(model, encoder, suffixes, decode="free", batch_size=4)
    for suffix, answer in zip(suffixes, answers, strict=True):
        ids = torch.tensor([[*encoder.prefix_ids, *suffix]])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(answer) + 1, eos_token_id=2, pad_token_id=0
        )  # fmt: skip
        expected = whole[0, ids.shape[1] :].tolist()
        assert answer == expected[: len(answer)]


def test_no_rows_and_the_training_mode(model, tokenizer, labels):
    encoder = make_encoder(tokenizer, load_prompt("prompts/list.jinja"), labels)
    model.train()
    assert generate(model, encoder, []) == []
    generate(model, encoder, [encoder.rows("x")[0].suffix_ids])
    assert model.training
