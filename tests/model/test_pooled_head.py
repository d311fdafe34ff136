"""Heads on sentence encoders: pooled as the encoder says, saved, loaded, and refused where it is not understood."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, MPNetConfig

from emogen.errors import ModelError
from emogen.model.loading import load_adapter
from emogen.model.pooled_head import PooledClassifier, pooled_config

SIZE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}  # fmt: skip
MEAN = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def save_encoder(folder, pooling, config=None):
    torch.manual_seed(0)
    AutoModel.from_config(config or BertConfig(**SIZE)).save_pretrained(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return str(folder)


def config_of(location):
    return pooled_config(location, "main", trust_remote_code=False, num_labels=3)


def load(location):
    return PooledClassifier.from_pretrained(location, config=config_of(location)).eval()


@pytest.mark.parametrize("config", [BertConfig(**SIZE), MPNetConfig(**SIZE)], ids=["bert", "mpnet"])
@pytest.mark.parametrize("pooling", [MEAN, CLS, {"pooling_mode": "mean"}, {"pooling_mode": ["cls"]}])
@torch.no_grad()
def test_the_head_reads_what_the_encoder_was_trained_to_give(tmp_path, config, pooling):
    location = save_encoder(tmp_path, pooling, config)
    model, encoder = load(location), AutoModel.from_pretrained(location).eval()
    ids, mask = torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    if pooling in (CLS, {"pooling_mode": ["cls"]}):
        pooled = hidden[:, 0]
    else:
        pooled = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])  # padding does not count
    expected = pooled @ model.score.weight.T + model.score.bias
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)


@torch.no_grad()
def test_a_saved_head_is_loaded_as_it_was(tmp_path):
    model = load(save_encoder(tmp_path / "base", MEAN))
    model.save_pretrained(tmp_path / "tuned")
    again = load(str(tmp_path / "tuned"))
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    np.testing.assert_array_equal(model(**inputs).logits, again(**inputs).logits)


@pytest.mark.parametrize("pooling", [None, {"pooling_mode_lasttoken": True}])
def test_other_models_keep_the_head_of_transformers(tmp_path, pooling):
    assert config_of(save_encoder(tmp_path, pooling)) is None


@pytest.mark.parametrize(
    ("pooling", "named"),
    [
        ({"pooling_mode_max_tokens": True}, "pools by max"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "pools by cls and mean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ({"pooling_mode_mean_tokens": False}, "pools by nothing"),
    ],
)
def test_another_way_of_pooling_is_refused(tmp_path, pooling, named):
    with pytest.raises(ModelError, match=named):
        config_of(save_encoder(tmp_path, pooling))


def test_a_model_in_the_cache_of_the_hub_is_asked_for_its_pooling(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789012345678901234567890123456789"
    snapshot = tmp_path / "models--some--encoder" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    assert config_of(save_encoder(snapshot, None)) is None
    assert config_of(save_encoder(snapshot, MEAN)).pooling == "mean"


@pytest.mark.parametrize("lost", ["score", "lora_A"])
def test_an_adapter_that_lacks_weights_is_refused(tmp_path, lost):
    model = load(save_encoder(tmp_path / "base", MEAN))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["score"]))
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if lost not in name}, file)
    with pytest.raises(ModelError, match=f"the adapter cannot be loaded: .*{lost}"):
        load_adapter(load(str(tmp_path / "base")), tmp_path / "adapter")
