"""Rows that share a prefix see what they would see alone."""

import pytest
import torch
from tiny import CONFIGS, SIZE, make_model
from transformers import AutoModelForCausalLM, BambaConfig, BloomConfig, Gemma2Config, Gemma3TextConfig

from emogen.model import shared_prefix
from emogen.model.shared_prefix import PackedRows, Prefix, Rows, forward, share_prefix

PREFIX = [5, 9, 17, 33, 4, 8, 21]
ROWS = [[11, 12], [13, 14, 15], [16, 18, 19], [20] * 30]  # two of them equally long, one beyond Gemma's window of 24


def alone(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.fixture
def sharing(model):
    """(a model that shares, the logits of each row alone)"""
    model.eval()
    with torch.no_grad():
        expected = [alone(model, PREFIX + row) for row in ROWS]
    assert share_prefix(model)
    return model, expected


@torch.no_grad()
def test_packed_rows_get_the_logits_they_get_alone(sharing):
    model, expected = sharing
    n = len(PREFIX)
    ids = PREFIX + [token for row in ROWS for token in row]
    layout = PackedRows(n, [(len(row),) for row in ROWS])
    assert layout.groups == [(1, (2,)), (2, (3,)), (1, (30,))]
    assert layout.positions[: n + 5].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9]
    logits = forward(model, layout, torch.tensor(ids)).logits[0]
    torch.testing.assert_close(logits[:n], expected[0][:n], rtol=1e-4, atol=1e-5)
    for got, row in zip(logits[n:].split([len(row) for row in ROWS]), expected, strict=True):
        torch.testing.assert_close(got, row[n:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_branches_of_a_row_see_its_beginning_and_nothing_of_each_other(model):
    trunks = [[11, 12], [13, 14, 15], [16, 18, 19], [20] * 30]
    branches = [[31, 32], [33], [34, 35, 36]]
    model.eval()
    rows = [PREFIX + trunk + branch for trunk in trunks for branch in branches]
    expected = [alone(model, row)[-len(branch) :] for row, branch in zip(rows, branches * 4, strict=True)]
    assert share_prefix(model)
    ids = PREFIX + [token for trunk in trunks for part in [trunk, *branches] for token in part]
    layout = PackedRows(len(PREFIX), [(len(trunk), 2, 1, 3) for trunk in trunks])
    assert layout.positions[7:15].tolist() == [7, 8, 9, 10, 9, 9, 10, 11]
    sizes = [size for trunk in trunks for size in (len(trunk), 2, 1, 3)]
    logits = forward(model, layout, torch.tensor(ids)).logits[0, len(PREFIX) :].split(sizes)
    got = [part for k, part in enumerate(logits) if k % 4]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_that_grow_by_different_steps_get_the_logits_they_get_alone(sharing):
    model, expected = sharing
    prefix = Prefix(len(PREFIX))
    forward(model, prefix, torch.tensor(PREFIX))
    layout = Rows(prefix, [1] * len(ROWS))
    assert layout.positions.tolist() == [7] * 4
    got = [[logits] for logits in forward(model, layout, torch.tensor([row[0] for row in ROWS])).logits[0]]
    # one token for each; then one for the second, two for the third, ten for the last; then the rest of the last
    for step in ([(0, 1), (1, 1), (2, 1), (3, 1)], [(1, 1), (2, 1), (3, 10)], [(3, 18)]):
        rows = [row for row, count in step for _ in range(count)]
        slots = [slot for _, count in step for slot in range(count)]
        ids = [ROWS[row][len(got[row]) + slot] for row, slot in zip(rows, slots, strict=True)]
        layout.append(torch.tensor(rows), torch.tensor(slots))
        for row, logits in zip(rows, forward(model, layout, torch.tensor(ids)).logits[0], strict=True):
            got[row].append(logits)
    for row, logits in zip(expected, got, strict=True):
        torch.testing.assert_close(torch.stack(logits), row[len(PREFIX) :], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_a_layout_a_model_answers_as_before(sharing):
    model, expected = sharing
    padded = torch.tensor([[0] * 28 + PREFIX + ROWS[0], PREFIX + ROWS[3][:-2] + ROWS[0]])
    mask = (padded != 0).long()
    logits = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(logits[0, 28:], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BambaConfig(**SIZE, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_expand=2), "layers of"),
        (BloomConfig(vocab_size=512, hidden_size=32, n_layer=1, n_head=2), "attn_implementation is eager"),
        (Gemma2Config(**SIZE), "attn_implementation is eager"),
    ],
    ids=["linear attention", "ALiBi", "soft-capped attention"],
)
def test_a_model_that_cannot_share_says_so_once(config, reason, caplog):
    model = AutoModelForCausalLM.from_config(config)
    assert not share_prefix(model)
    assert len(caplog.records) == 1
    assert "Every row is computed in full" in caplog.text
    assert reason in caplog.text
    assert model.config._attn_implementation != shared_prefix.NAME


def test_a_model_that_sees_otherwise_is_found_out(caplog):
    """Its layers do not say so, but what they compute is not attention to all earlier tokens of the row."""

    class Looks(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states, **kwargs):
            return self.inner(hidden_states.cumsum(1), **kwargs)  # a recurrence over the tokens as they lie

    model = make_model("llama")
    model.model.layers[1] = Looks(model.model.layers[1])
    assert not share_prefix(model)
    assert "answers otherwise" in caplog.text


def test_bf16_rounding_is_not_a_difference():
    for kind in CONFIGS:
        assert share_prefix(make_model(kind).bfloat16())


def test_a_long_prefix_is_cut_by_the_window():
    torch.manual_seed(0)
    sizes = SIZE | {"num_hidden_layers": 3}
    config = Gemma3TextConfig(**sizes, sliding_window=4, layer_types=["sliding_attention"] * 3, query_pre_attn_scalar=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        expected = alone(model, PREFIX + ROWS[1])
        assert share_prefix(model)
        ids, layout = torch.tensor(PREFIX + ROWS[1]), PackedRows(len(PREFIX), [(3,)])
        logits = forward(model, layout, ids).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
