from types import SimpleNamespace

import architectures
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, save_model
from transformers import AutoModelForSeq2SeqLM, T5Config
from trl import ModelConfig

from emogen.errors import ModelError
from emogen.model.loading import load_adapter, load_model, new_adapter
from emogen.model.plain_rows import agree


def save_adapter(folder):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(make_model(), config).save_pretrained(folder)
    return folder


def test_a_saved_model_is_loaded_in_float32(tmp_path):
    loaded = load_model(str(save_model(tmp_path)), ModelConfig(dtype="float32"))
    assert loaded.dtype == torch.float32
    for name, value in make_model().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_broken_weights_file_is_named(tmp_path):
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match=f"{folder}: the model cannot be loaded"):
        load_model(str(folder), ModelConfig(dtype="float32"))


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_is_loaded_for_inference_or_for_training(tmp_path, trainable):
    model = load_adapter(make_model(), save_adapter(tmp_path), trainable=trainable)
    assert any(parameter.requires_grad for parameter in model.parameters()) == trainable


def test_a_missing_and_a_broken_adapter_are_named(tmp_path):
    with pytest.raises(ModelError, match=f"{tmp_path}: not an adapter: adapter_model.safetensors is missing"):
        load_adapter(make_model(), tmp_path)
    weights = save_adapter(tmp_path) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=f"{tmp_path}: the adapter cannot be loaded"):
        load_adapter(make_model(), tmp_path)


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=512, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a model of type t5 is an encoder with a decoder"):
        load_model(str(tmp_path), ModelConfig(dtype="float32"))


def test_the_adapter_of_a_mixture_of_experts_has_no_dropout(caplog):
    adapter = new_adapter(
        architectures.make("mixtral"), ModelConfig(use_peft=True, lora_dropout=0.05, lora_target_modules="all-linear")
    )
    assert adapter.lora_dropout == 0
    assert "lora_dropout: 0 instead of 0.05 for this mixtral model" in caplog.text


def test_an_adapter_that_peft_can_add_stays_as_it_is(caplog):
    adapter = new_adapter(
        make_model(), ModelConfig(use_peft=True, lora_dropout=0.05, lora_target_modules=["q_proj", "v_proj"])
    )
    assert (adapter.lora_dropout, adapter.exclude_modules, caplog.text) == (0.05, None, "")
    assert new_adapter(make_model(), ModelConfig(use_peft=False)) is None


def test_an_adapter_for_layers_that_do_not_exist_is_refused():
    with pytest.raises(ModelError, match=r"LoRA cannot be added to this llama model .*no_such_layer"):
        new_adapter(make_model(), ModelConfig(use_peft=True, lora_target_modules=["no_such_layer"]))


def test_routers_get_no_adapter(caplog):
    adapter = new_adapter(
        architectures.make("llama4_text"), ModelConfig(use_peft=True, lora_target_modules="all-linear")
    )
    assert adapter.exclude_modules == ["router"]
    assert "no LoRA on router of this llama4_text model" in caplog.text


@pytest.mark.parametrize(("precision", "agrees"), [("ieee", False), ("tf32", True)])
def test_logits_on_a_gpu_may_differ_by_the_rounding_of_tf32(monkeypatch, precision, agrees):
    monkeypatch.setattr(torch.backends, "fp32_precision", precision)  # as the key `tf32` sets it
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    alone = torch.linspace(-1, 1, 50).repeat(4, 1)
    assert agree(on_gpu, alone + 0.01, alone) is agrees
