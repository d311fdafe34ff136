import itertools

import pytest
import torch
from torch import nn

from emogen.model.decode import ReachableHead, evaluating, generate, in_batches
from emogen.model.shared_prefix import share_prefix
from emogen.task.parse import parse_answer

TEXTS = ["", "hello", "what a lovely morning by the sea " * 4, "<|im_end|>", "x " * 40, "you got this"]


def masked_greedy_answer(model, encoder, suffix):
    """One row without a cache: for each token all of it is run again, and what the grammar forbids is masked."""
    grammar, node, answer = encoder.grammar, 0, []
    while node != len(grammar.next_node) - 1:
        logits = model(torch.tensor([[*encoder.prefix_ids, *suffix, *answer]])).logits[0, -1]
        allowed = torch.from_numpy(grammar.next_node[node] >= 0)
        best = int(logits[torch.from_numpy(grammar.token_ids)].masked_fill(~allowed, -torch.inf).argmax())
        answer.append(int(grammar.token_ids[best]))
        node = grammar.next_node[node, best]
    return answer[: -len(encoder.end_ids)]


@pytest.mark.parametrize("style", ["list", "count", "json", "yes_no"])
@torch.no_grad()
def test_constrained_answers_equal_masked_greedy_search(model, both_attentions, encoder_for, style):
    encoder = encoder_for(style)
    suffixes = [row.suffix_ids for text in TEXTS for row in encoder.rows(text)[:2]]
    model.eval()
    expected = [masked_greedy_answer(model, encoder, suffix) for suffix in suffixes]
    for attention in both_attentions(model):
        for batch_size in (1, 4, 32) if attention == "shared" else (4,):  # transformers takes its time
            assert generate(model, encoder, suffixes, batch_size=batch_size) == expected


def test_constrained_answers_are_always_valid(model, both_attentions, tokenizer, labels, encoder_for):
    encoder = encoder_for("list")
    texts = [" ".join(words) for words in itertools.permutations(["joy", "rage", "42", "!"])]
    with torch.no_grad():  # weights that prefer nonsense
        model.get_input_embeddings().weight.normal_(std=2.0)
    for _ in both_attentions(model):
        for ids in generate(model, encoder, [encoder.rows(text)[0].suffix_ids for text in texts]):
            assert parse_answer(tokenizer.decode(ids), labels, mode="strict").status == "exact"


def test_free_answers_equal_those_of_transformers(model, encoder_for):
    encoder = encoder_for("yes_no")  # the style with the shortest answers, which the limit of a free answer depends on
    suffixes = [encoder.rows(text)[0].suffix_ids for text in TEXTS]
    assert share_prefix(model)
    answers = generate(model, encoder, suffixes, decode="free", batch_size=4)
    assert max(map(len, answers)) > 10
    for suffix, answer in zip(suffixes, answers, strict=True):
        ids = torch.tensor([[*encoder.prefix_ids, *suffix]])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(answer) + 1, eos_token_id=2, pad_token_id=0
        )  # fmt: skip
        assert answer == output[0, ids.shape[1] :].tolist()[: len(answer)]


def test_no_rows_get_no_answers_and_the_training_mode_is_restored(model, encoder_for):
    encoder = encoder_for("list")
    model.train()
    assert generate(model, encoder, []) == []
    generate(model, encoder, [encoder.rows("x")[0].suffix_ids])
    assert model.training


def test_evaluation_mode_ends_even_with_an_error():
    layer = nn.Dropout()

    def fail():
        with evaluating(layer):
            assert not layer.training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert layer.training


def test_batches_hold_the_longest_rows_first_and_results_keep_their_order():
    batches, progress = [], []

    def step(batch):
        batches.append(batch)
        return [len(row) for row in batch]

    assert in_batches(step, ["a", "bbbb", "cc", "ddd", ""], 2, progress.append) == [1, 4, 2, 3, 0]
    assert batches == [["bbbb", "ddd"], ["cc", "a"], [""]]
    assert progress == [2, 2, 1]


@pytest.mark.parametrize("bias", [False, True])
def test_a_reduced_head_gives_the_logits_of_its_tokens(bias):
    head, hidden = nn.Linear(8, 20, bias=bias), torch.randn(3, 8)
    ids = torch.tensor([2, 3, 11])
    torch.testing.assert_close(ReachableHead(head, ids)(hidden), head(hidden)[:, ids])

    class Doubled(nn.Linear):  # not a plain linear layer: its weight is not all that it computes
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(8, 20, bias=bias)
    doubled.out_features = 21  # as for packed weights, whose shape is not that of the layer
    assert ReachableHead(doubled, ids).weight is None
    torch.testing.assert_close(ReachableHead(doubled, ids)(hidden), doubled(hidden)[:, ids])
