"""Shapes of models and speeds of GPUs, against real models and sums by hand."""

import pytest
import torch
from tiny import CONFIGS, save_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig

from emogen import paths
from emogen.cloud.hardware import GPUS, SHAPES, shape_of
from emogen.errors import InputError
from emogen.task.recipe import load_recipe

QWEN = SHAPES["Qwen/Qwen2.5-14B-Instruct"]


def test_the_14b_model_has_the_parameters_of_its_model_card():
    """Qwen2.5-14B: 14.77 billion parameters, 13.1 without embeddings."""
    embeddings = QWEN.embeddings(with_head=True)
    assert QWEN.linear / 1e9 == pytest.approx(13.21, abs=0.005)
    assert (QWEN.linear + embeddings) / 1e9 == pytest.approx(14.77, abs=0.005)
    assert QWEN.lora(16, "all-linear") / 1e6 == pytest.approx(68.8, abs=0.05)
    assert QWEN.lora(64, None) == 4 * QWEN.lora(16, "all-linear")
    assert QWEN.lora(8, ["q_proj", "v_proj"]) == 8 * 48 * ((5120 + 5120) + (5120 + 1024))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_shape_from_a_config_has_the_parameters_of_the_model(tmp_path, kind):
    shape = shape_of(str(save_model(tmp_path / kind, kind)))
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert shape.linear == sum(module.weight.numel() for module in linear.values())
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    assert shape.embeddings(with_head=True) == sum(table.numel() for table in tables)
    assert {name: widths[::-1] for name, widths in shape.modules.items()} == {
        name.rpartition(".")[2]: tuple(module.weight.shape) for name, module in linear.items()
    }


def test_the_shape_of_an_encoder_has_no_head(tmp_path):
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    model = AutoModelForSequenceClassification.from_config(config)
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "encoder" in name]
    assert shape.linear == sum(layer.weight.numel() for layer in layers)
    assert shape.embeddings(with_head=False) == (99 + 512) * 32
    assert not shape.shares_prefix


def test_the_models_of_the_shipped_recipes_are_built_in():
    recipes = [path for path in paths.shipped("recipes").rglob("*.yaml") if path.parent.name != "accelerate"]
    assert len(recipes) > 5
    for recipe in map(load_recipe, recipes):
        assert recipe.api_base or recipe.model_name in SHAPES, recipe.path


def test_an_unknown_model_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"put the model's config\.json into a folder"):
        shape_of("nobody/nothing")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"config\.json: has no key"):
        shape_of(str(tmp_path))


def test_the_speed_of_a_gpu_combines_computing_and_moving_memory():
    """A40: 0.4 of 150 TFLOP/s is 60, and 150 operations per byte at 696 GB/s are 104.4: together 38.1."""
    assert GPUS["NVIDIA A40"].rate == pytest.approx(1e12 / (1 / 60 + 1 / 104.4))
    order = ["NVIDIA L4", "NVIDIA A40", "NVIDIA L40S", "NVIDIA A100 80GB PCIe", "NVIDIA H100 80GB HBM3"]
    assert sorted(order, key=lambda name: GPUS[name].rate) == order
    # The peak of an L4 is 0.8 of an A40's; its memory is less than half as fast.
    assert GPUS["NVIDIA L4"].rate / GPUS["NVIDIA A40"].rate == pytest.approx(0.61, abs=0.01)
