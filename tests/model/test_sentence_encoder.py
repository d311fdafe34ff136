"""Embeddings of a tiny sentence encoder, against those computed by hand."""

import json

import numpy as np
import pytest
import torch
from tiny import make_tokenizer
from transformers import AutoModel, BertConfig

from emogen.errors import ModelError
from emogen.model.sentence_encoder import encoder_features

SIZE = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
TEXTS = ["what a lovely morning by the sea", "the bus", "i miss the old dog so much"]


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    AutoModel.from_config(BertConfig(**SIZE)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return tmp_path


@torch.no_grad()
def test_texts_become_the_means_of_their_tokens_at_unit_length(encoder):
    tokenizer, model = make_tokenizer(), AutoModel.from_pretrained(encoder).eval()
    expected = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        mean = model(input_ids=ids).last_hidden_state[0].mean(0).numpy()
        expected.append(mean / np.linalg.norm(mean))
    embed = encoder_features(str(encoder))
    found = embed(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(embed(TEXTS[1:2]), found[1:2], atol=1e-5)
    assert embed([]).shape == (0, 16)


def test_a_model_that_does_not_say_how_it_is_pooled_is_refused(encoder):
    (encoder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"not a sentence encoder: it has no 1_Pooling/config\.json"):
        encoder_features(str(encoder))


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        encoder_features(str(tmp_path))
