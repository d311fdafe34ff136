"""Linear layers through oneDNN compute what those of torch, peft and bitsandbytes compute."""

import copy
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from tiny import make_model
from torch import nn

from emogen.model import onednn
from emogen.model.onednn import pack_weights, use_onednn


class TwoLayers(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.first, self.second = nn.Linear(24, 40, bias=bias), nn.Linear(40, 8, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def lora(bias=False, **keys):
    torch.manual_seed(0)
    model = get_peft_model(TwoLayers(bias), LoraConfig(r=4, lora_alpha=12, target_modules=["first", "second"], **keys))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide A's gradient
            nn.init.normal_(parameter)
    return model


def four_bit(layer: nn.Linear, compress: bool) -> Linear4bit:
    quantised = Linear4bit(
        layer.in_features, layer.out_features, bias=False, quant_type="nf4", compress_statistics=compress
    )
    quantised.load_state_dict({"weight": layer.weight.data})
    return quantised.to("cpu").train()


def output_and_gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_same(model, x):
    """Assert that output and gradients stay the same, and that the forward did change."""
    faster = copy.deepcopy(model)
    use_onednn(faster)
    assert any(type(m).__module__ == "emogen.model.onednn" for m in faster.modules())
    for ours, theirs in zip(output_and_gradients(faster, x), output_and_gradients(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (2, 3, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_lora_on_frozen_layers_stays_the_same(shape, bias):
    assert_same(lora(bias), torch.randn(shape))


def test_variants_of_lora_compute_as_before():
    x = torch.randn(5, 24)
    for model in (lora(use_dora=True), lora(lora_bias=True), lora(lora_dropout=0.5).eval()):
        assert_same(model, x)
    model = lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first"]))
    model.base_model.set_adapter(["default", "second"])
    assert_same(model, x)


def test_dropout_stays_random_in_training():
    model = lora(lora_dropout=0.5).train()
    use_onednn(model)
    x = torch.randn(5, 24)
    assert not torch.equal(model(x), model(x))


def test_adapters_can_still_be_disabled_and_merged():
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
def test_trainable_layers_get_the_same_gradients(bias):
    assert_same(TwoLayers(bias), torch.randn(2, 3, 24))
    model = TwoLayers(bias)
    model.first.weight.requires_grad_(False)  # only the bias of the layer is trained
    assert_same(model, torch.randn(5, 24))


def test_other_data_types_compute_as_before():
    model = TwoLayers(bias=True).double()
    assert_same(model, torch.randn(5, 24, dtype=torch.float64))
    use_onednn(model.bfloat16())
    assert model(torch.randn(5, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    use_onednn(model.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(5, 24)).dtype == torch.bfloat16


@pytest.mark.parametrize("compress", [False, True])
def test_four_bit_layers_under_lora_stay_the_same(compress):
    base = TwoLayers(bias=False)
    base.first, base.second = four_bit(nn.Linear(64, 128), compress), four_bit(nn.Linear(128, 64), compress)
    base.is_loaded_in_4bit = True
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["first", "second"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert_same(model, torch.randn(5, 64))


@pytest.mark.parametrize("quantised", [False, True])
def test_in_bf16_only_the_frozen_products_of_training_steps_are_rounded(quantised):
    base = TwoLayers(bias=not quantised)
    if quantised:
        base.first, base.second = four_bit(nn.Linear(64, 128), False), four_bit(nn.Linear(128, 64), False)
        base.is_loaded_in_4bit = True
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["first", "second"])).train()
    x = torch.randn(50, 64 if quantised else 24)
    rounded = copy.deepcopy(model)
    use_onednn(model)
    use_onednn(rounded, bf16=True)
    for ours, theirs in zip(output_and_gradients(rounded, x), output_and_gradients(model, x), strict=True):
        assert ours.dtype == torch.float32
        difference = (ours - theirs).norm() / theirs.norm().clamp(min=1e-9)
        assert difference < 0.02
    assert not torch.equal(rounded(x), model(x))
    with torch.no_grad():
        assert torch.equal(rounded(x), model(x))
    assert torch.equal(rounded.eval()(x), model.eval()(x))
    assert rounded.state_dict().keys() == model.state_dict().keys()


def test_bf16_without_a_frozen_weight_is_a_warning(caplog):
    use_onednn(nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)), bf16=True)
    assert caplog.text == ""
    use_onednn(nn.Linear(8, 8), bf16=True)
    assert "bf16: no weight of this model is frozen, so it computes in float32" in caplog.text


def test_a_changed_weight_is_rounded_anew():
    layer = nn.Linear(8, 8, bias=False).requires_grad_(False)
    use_onednn(layer, bf16=True)
    x = torch.randn(3, 8, requires_grad=True)
    before = layer(x)
    layer.weight.mul_(2)
    assert torch.equal(layer(x), 2 * before)


def test_what_a_processor_is_good_at_is_said(monkeypatch, caplog):
    caplog.set_level("INFO")
    cpu = torch.device("cpu")
    monkeypatch.setattr(onednn, "_bf16_speed", lambda: 0.5)
    assert not onednn.bf16_pays(True, cpu)
    assert "slower in bfloat16 than in float32" in caplog.text
    monkeypatch.setattr(onednn, "_bf16_speed", lambda: 3.0)
    assert onednn.bf16_pays(True, cpu)
    assert not onednn.bf16_pays(False, cpu)
    assert "3.0 times faster in bfloat16; bf16=true uses it" in caplog.text
    assert not onednn.bf16_pays(True, torch.device("meta"))


def test_the_library_is_chosen_once_on_a_machine(tmp_path, monkeypatch):
    """oneDNN and MKL round differently: a busy core must not change the choice between two runs."""
    monkeypatch.setenv("EMOGEN_CACHE", str(tmp_path))
    before = torch.random.get_rng_state()
    times = iter([1.0, 2.0, 4.0, 3.0])
    monkeypatch.setattr(onednn, "_seconds", lambda work: next(times))
    choose = onednn._onednn_is_faster.__wrapped__  # as in a new process
    assert [choose(), choose()] == [True, True]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert not choose()  # with other cores it is measured anew
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("faster", [False, True])
def test_both_libraries_compute_the_same(monkeypatch, faster):
    monkeypatch.setattr(onednn, "_onednn_is_faster", lambda: faster)
    assert_same(lora(True), torch.randn(5, 24))


def test_evaluation_does_not_repack_four_bit_weights():
    layer = nn.Sequential(four_bit(nn.Linear(64, 128), True))
    use_onednn(layer)
    before = layer[0].weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))
    assert torch.equal(layer[0].weight.data, before)


def packed_layers(model):
    return [module for module in model.modules() if "packed" in module.__dict__]


@pytest.fixture
def onednn_is_faster(monkeypatch):
    monkeypatch.setattr(onednn, "_onednn_is_faster", lambda: True)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (2, 3, 24), (400, 24)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("onednn_is_faster")
def test_packed_weights_compute_the_same(shape, bias):
    x = torch.randn(shape)
    torch.manual_seed(0)
    for model in (TwoLayers(bias).requires_grad_(False), lora(bias)):
        expected = model(x).detach()
        use_onednn(model)
        pack_weights(model)
        assert len(packed_layers(model)) == 2
        with torch.no_grad():
            found = model(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert not {name for name in model.state_dict() if "packed" in name}


@pytest.mark.usefixtures("onednn_is_faster")
def test_a_packed_weight_is_not_used_once_the_layer_or_its_adapter_has_changed():
    x = torch.randn(5, 24)
    for change in (
        lambda model: model.base_model.model.first.base_layer.weight.add_(1.0),
        lambda model: model.base_model.model.first.lora_B.default.weight.mul_(2.0),
        lambda model: model.base_model.model.first.scaling.update(default=0.5),
        lambda model: model.base_model.merge_adapter(),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
    ):
        model, plain = lora(), lora()
        use_onednn(model)
        pack_weights(model)
        for each in (model, plain):
            with torch.no_grad():
                change(each)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("onednn_is_faster")
def test_training_does_not_use_packed_weights():
    model, x = lora(), torch.randn(5, 24)
    expected = output_and_gradients(model, x)
    model.zero_grad()
    use_onednn(model)
    pack_weights(model)
    for ours, theirs in zip(output_and_gradients(model, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.usefixtures("onednn_is_faster")
def test_weights_are_packed_where_that_pays_and_fits(monkeypatch):
    model = lora()
    use_onednn(model)
    pack_weights(model)
    assert len(packed_layers(model)) == 2
    monkeypatch.setattr(onednn.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    pack_weights(model)
    assert not packed_layers(model)
    monkeypatch.undo()
    for unsupported in (lora(use_dora=True), lora().bfloat16(), TwoLayers(False).to("meta")):
        use_onednn(unsupported)
        pack_weights(unsupported)
        assert not packed_layers(unsupported)
    language_model = make_model()
    use_onednn(language_model)
    pack_weights(language_model)
    assert len(packed_layers(language_model)) == 2 * 7
    assert "packed" not in language_model.lm_head.__dict__
