"""Linear layers through oneDNN equal those of torch, peft and bitsandbytes."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn

from emogen.model.onednn import use_onednn


class Two(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.first, self.second = nn.Linear(24, 40, bias=bias), nn.Linear(40, 8, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def lora(bias=False, **keys):
    torch.manual_seed(0)
    model = get_peft_model(Two(bias), LoraConfig(r=4, lora_alpha=12, target_modules=["first", "second"], **keys))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide A's gradient
            nn.init.normal_(parameter)
    return model


def four_bit(layer: nn.Linear, compress: bool) -> Linear4bit:
    made = Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4", compress_statistics=compress)
    made.load_state_dict({"weight": layer.weight.data})
    return made.to("cpu").train()


def run(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_same(model, x):
    """What comes out and every gradient, before and after; and that the forward did change."""
    faster = copy.deepcopy(model)
    use_onednn(faster)
    assert any(type(m).__module__ == "emogen.model.onednn" for m in faster.modules())
    for ours, theirs in zip(run(faster, x), run(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (2, 3, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_lora_on_frozen_layers(shape, bias):
    assert_same(lora(bias), torch.randn(shape))


def test_what_is_more_than_plain_lora_goes_as_before():
    x = torch.randn(5, 24)
    for model in (lora(use_dora=True), lora(lora_bias=True), lora(lora_dropout=0.5).eval()):
        assert_same(model, x)
    model = lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first"]))
    model.base_model.set_adapter(["default", "second"])
    assert_same(model, x)


def test_dropout_is_drawn_while_training():
    model = lora(lora_dropout=0.5).train()
    use_onednn(model)
    x = torch.randn(5, 24)
    assert not torch.equal(model(x), model(x))


def test_adapters_can_be_disabled_and_merged():
    model, x = lora(), torch.randn(5, 24)
    tuned, (base,) = model(x), [model.get_base_model()]
    with model.disable_adapter():
        untuned = model(x)
    use_onednn(model)
    torch.testing.assert_close(model(x), tuned, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), untuned, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(base(x), tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_learn_themselves_get_their_gradients(bias):
    assert_same(Two(bias), torch.randn(2, 3, 24))
    model = Two(bias)
    model.first.weight.requires_grad_(False)  # what learns may be a part of a layer
    assert_same(model, torch.randn(5, 24))


def test_other_types_go_as_before():
    model = Two(bias=True).double()
    assert_same(model, torch.randn(5, 24, dtype=torch.float64))
    use_onednn(model.bfloat16())
    assert model(torch.randn(5, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    use_onednn(model.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(5, 24)).dtype == torch.bfloat16


@pytest.mark.parametrize("compress", [False, True])
def test_four_bit_layers_under_lora(compress):
    base = Two(bias=False)
    base.first, base.second = four_bit(nn.Linear(64, 128), compress), four_bit(nn.Linear(128, 64), compress)
    base.is_loaded_in_4bit = True
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["first", "second"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert_same(model, torch.randn(5, 64))


def test_a_look_in_evaluation_mode_does_not_change_four_bit_weights():
    layer = nn.Sequential(four_bit(nn.Linear(64, 128), True))
    use_onednn(layer)
    before = layer[0].weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))
    assert torch.equal(layer[0].weight.data, before)
