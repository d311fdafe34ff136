"""The identity of a model says whether another one has taken its folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, save_model

from emogen.model.identity import identify


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_a_copy_is_the_same_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("a card")
    assert identify(copy) == identify(folder)


def test_the_metadata_of_the_weights_do_not_count(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    save_file(load_file(folder / "model.safetensors"), copy / "model.safetensors", {"format": "pt"})
    expected = identify(copy)
    save_file(load_file(folder / "model.safetensors"), copy / "model.safetensors", {"format": "np"})
    assert identify(copy) == expected


def test_another_model_of_the_same_shapes_is_another_one(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    make_model(seed=1).save_pretrained(copy)
    assert identify(copy) != identify(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_another_configuration_is_another_model(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "copy")
    values = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(values | {"more": 1}))
    assert identify(copy) != identify(folder)


def test_a_cut_file_is_another_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    assert identify(copy) != identify(folder)
    weights.write_bytes(b"")
    assert identify(copy) != identify(folder)


def test_a_small_change_anywhere_in_a_fine_tuned_copy_is_seen(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = {
        name: tensor + 1e-3 * torch.ones_like(tensor)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert identify(copy) != identify(folder)


def test_a_name_on_the_hub_has_no_identity():
    assert identify("org/model") is None
