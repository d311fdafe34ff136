"""Rows that share a prefix get the logits that they get alone."""

import pytest
import torch
from tiny import CONFIGS, SIZE, make_model
from transformers import AutoModelForCausalLM, BambaConfig, BloomConfig, Gemma2Config, Gemma3TextConfig

from emogen.model import shared_prefix
from emogen.model.shared_prefix import DecodingLayout, PrefixLayout, TrainingLayout, forward, share_prefix

PREFIX = [5, 9, 17, 33, 4, 8, 21]
ROWS = [[11, 12], [13, 14, 15], [16, 18, 19], [20] * 30]  # two of equal length, one longer than Gemma's window of 24


goes_at_once = shared_prefix._goes_at_once


def test_accelerators_go_at_once_up_to_a_number_of_tokens():
    assert goes_at_once(torch.device("cuda"), shared_prefix.MAX_PACKED)
    assert not goes_at_once(torch.device("cuda"), shared_prefix.MAX_PACKED + 1)
    assert not goes_at_once(torch.device("cpu"), 8)


def test_no_plans_are_made_for_the_shapes_of_packed_rows():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with shared_prefix._without_cudnn(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.fixture(params=["in groups", "at once"], autouse=True)
def way(request, monkeypatch):
    """Each test runs both ways: in groups of equal rows, as on a CPU, and at once, as on a GPU."""
    monkeypatch.setattr(shared_prefix, "_goes_at_once", lambda device, n_tokens: request.param == "at once")


def logits_alone(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def assert_close(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def sharing(model):
    """(a model with shared-prefix attention, the logits of each row alone)"""
    model.eval()
    with torch.no_grad():
        expected = [logits_alone(model, PREFIX + row) for row in ROWS]
    assert share_prefix(model)
    return model, expected


@torch.no_grad()
def test_packed_rows_get_the_logits_they_get_alone(sharing):
    model, expected = sharing
    n = len(PREFIX)
    ids = PREFIX + [token for row in ROWS for token in row]
    layout = TrainingLayout(n, [(len(row),) for row in ROWS])
    assert layout.groups == [(1, (2,)), (2, (3,)), (1, (30,))]
    assert layout.positions[: n + 5].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9]
    logits = forward(model, layout, torch.tensor(ids)).logits[0]
    assert_close(logits[:n], expected[0][:n])
    for ours, theirs in zip(logits[n:].split([len(row) for row in ROWS]), expected, strict=True):
        assert_close(ours, theirs[n:])


@torch.no_grad()
def test_branches_see_their_trunk_and_not_each_other(model):
    trunks = [[11, 12], [13, 14, 15], [16, 18, 19], [20] * 30]
    branches = [[31, 32], [33], [34, 35, 36]]
    model.eval()
    rows = [PREFIX + trunk + branch for trunk in trunks for branch in branches]
    expected = [logits_alone(model, row)[-len(branch) :] for row, branch in zip(rows, branches * 4, strict=True)]
    assert share_prefix(model)
    ids = PREFIX + [token for trunk in trunks for part in [trunk, *branches] for token in part]
    layout = TrainingLayout(len(PREFIX), [(len(trunk), 2, 1, 3) for trunk in trunks])
    assert layout.positions[7:15].tolist() == [7, 8, 9, 10, 9, 9, 10, 11]
    sizes = [size for trunk in trunks for size in (len(trunk), 2, 1, 3)]
    logits = forward(model, layout, torch.tensor(ids)).logits[0, len(PREFIX) :].split(sizes)
    ours = [part for k, part in enumerate(logits) if k % 4]
    for part, theirs in zip(ours, expected, strict=True):
        assert_close(part, theirs)


@torch.no_grad()
def test_rows_that_grow_by_different_steps_get_the_logits_they_get_alone(sharing):
    model, expected = sharing
    prefix = PrefixLayout(len(PREFIX))
    forward(model, prefix, torch.tensor(PREFIX))
    layout = DecodingLayout(prefix, [1] * len(ROWS))
    assert layout.positions.tolist() == [7] * 4
    found = [[logits] for logits in forward(model, layout, torch.tensor([row[0] for row in ROWS])).logits[0]]
    # One token for each row; then one for the second, two for the third, ten for the last; then the rest of the last.
    for step in ([(0, 1), (1, 1), (2, 1), (3, 1)], [(1, 1), (2, 1), (3, 10)], [(3, 18)]):
        rows = [row for row, count in step for _ in range(count)]
        slots = [slot for _, count in step for slot in range(count)]
        ids = [ROWS[row][len(found[row]) + slot] for row, slot in zip(rows, slots, strict=True)]
        layout.append(torch.tensor(rows), torch.tensor(slots))
        for row, logits in zip(rows, forward(model, layout, torch.tensor(ids)).logits[0], strict=True):
            found[row].append(logits)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(torch.stack(ours), theirs[len(PREFIX) :])


@torch.no_grad()
def test_split_branches_get_the_logits_they_get_alone(model):
    model.eval()
    trunks, ends = [[11, 12], [13, 14, 15]], {0: [[31, 32], [33]], 1: [[34]]}
    rows = [(parent, PREFIX + trunks[parent] + end) for parent, several in ends.items() for end in several]
    expected = [logits_alone(model, ids) for _, ids in rows]
    assert share_prefix(model)
    prefix = PrefixLayout(len(PREFIX))
    forward(model, prefix, torch.tensor(PREFIX))
    layout = DecodingLayout(prefix, [2, 3])
    forward(model, layout, torch.tensor([11, 12, 13, 14, 15]))
    layout.branch(torch.tensor([0, 0, 1]))
    ids, count = layout.append_padded(torch.arange(3), torch.tensor([[31, 32], [33, -1], [34, -1]]))
    assert ids.tolist() == [31, 32, 33, 34]
    assert count.tolist() == [2, 1, 1]
    assert layout.positions.tolist() == [9, 10, 9, 10]
    assert layout.lengths.tolist() == [4, 3, 4]
    for ours, theirs in zip(forward(model, layout, ids).logits[0].split([2, 1, 1]), expected, strict=True):
        assert_close(ours, theirs[-len(ours) :])


@torch.no_grad()
def test_without_a_layout_the_logits_stay_as_they_were(sharing):
    model, expected = sharing
    padded = torch.tensor([[0] * 28 + PREFIX + ROWS[0], PREFIX + ROWS[3][:-2] + ROWS[0]])
    mask = (padded != 0).long()
    logits = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert_close(logits[0, 28:], expected[0])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BambaConfig(**SIZE, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_expand=2), "layers of"),
        (BloomConfig(vocab_size=512, hidden_size=32, n_layer=1, n_head=2), "attn_implementation is eager"),
        (Gemma2Config(**SIZE), "attn_implementation is eager"),
    ],
    ids=["linear attention", "ALiBi", "soft-capped attention"],
)
def test_an_unsupported_model_is_left_as_it_was_with_one_warning(config, reason, caplog):
    model = AutoModelForCausalLM.from_config(config)
    assert not share_prefix(model)
    assert len(caplog.records) == 1
    assert "Every row is computed in full" in caplog.text
    assert reason in caplog.text
    assert model.config._attn_implementation != shared_prefix.NAME


def test_an_unsupported_model_is_detected_by_its_logits(caplog):
    """The configuration does not say so, but a layer lets tokens of different rows see each other."""

    class Recurrent(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states, **kwargs):
            return self.inner(hidden_states.cumsum(1), **kwargs)

    model = make_model("llama")
    model.model.layers[1] = Recurrent(model.model.layers[1])
    assert not share_prefix(model)
    assert "packed rows get other logits" in caplog.text


def test_bf16_rounding_does_not_make_a_model_unsupported():
    for kind in CONFIGS:
        assert share_prefix(make_model(kind).bfloat16())


def test_the_prefix_may_be_longer_than_the_window():
    torch.manual_seed(0)
    sizes = SIZE | {"num_hidden_layers": 3}
    config = Gemma3TextConfig(**sizes, sliding_window=4, layer_types=["sliding_attention"] * 3, query_pre_attn_scalar=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        expected = logits_alone(model, PREFIX + ROWS[1])
        assert share_prefix(model)
        ids, layout = torch.tensor(PREFIX + ROWS[1]), TrainingLayout(len(PREFIX), [(3,)])
        logits = forward(model, layout, ids).logits[0]
    assert_close(logits, expected)


@pytest.mark.parametrize("window", [None, 5])
def test_groups_and_one_call_have_the_same_outputs_and_gradients(monkeypatch, window):
    shapes = [(2,), (2,), (3, 1, 2), (3, 1, 2), (6,)]
    generator = torch.Generator().manual_seed(0)
    n = 7 + sum(map(sum, shapes))
    inputs = [torch.randn(1, heads, n, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    found = []
    for at_once in (False, True):
        monkeypatch.setattr(shared_prefix, "_goes_at_once", lambda device, n_tokens, at_once=at_once: at_once)
        settings = {"scale": 0.3, "dropout_p": 0.0}
        output = TrainingLayout(7, shapes).attend(0, *inputs, window, settings)
        found.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
