import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, save_model
from trl import ModelConfig

from emogen.errors import ModelError
from emogen.model.loading import load_adapter, load_model


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
