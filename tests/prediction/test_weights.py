"""A run predicts with the weights that it was scored with, or not at all."""

import json

import pytest
from tiny import make_model, save_model

from emogen.errors import InputError
from emogen.model.identity import identify
from emogen.prediction.weights import check_weights, hash_weights


@pytest.fixture
def run(tmp_path):
    """A run folder with an adapter, whose base model is in tmp_path/base."""
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    manifest = {"model": "org/base", "sha256": {"base model": identify(save_model(tmp_path / "base"))}}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"weights": hash_weights(folder)}))
    return folder


def test_unchanged_weights_pass(run, tmp_path, caplog):
    check_weights(run, str(tmp_path / "base"))
    check_weights(run, "org/base")  # not on this machine yet, so it cannot be compared
    (run / "adapter" / "README.md").write_text("a card")
    check_weights(run, str(tmp_path / "base"))
    assert not caplog.text


def test_a_file_more_or_less_is_found(run, tmp_path):
    (run / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match=r"adapter/chat_template\.jinja changed"):
        check_weights(run, str(tmp_path / "base"))
    (run / "adapter" / "chat_template.jinja").unlink()
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter/adapter_config\.json changed"):
        check_weights(run, str(tmp_path / "base"))


@pytest.mark.parametrize(
    "manifest", ["[]", '{"weights": [1]}', '{"sha256": null}', '{"format": "x"}', '{"kind": []}', "3"]
)
def test_a_manifest_that_emogen_did_not_write_is_an_error(run, tmp_path, manifest):
    (run / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=r"manifest\.json"):
        check_weights(run, str(tmp_path / "base"))


def test_a_flipped_bit_of_an_adapter_is_found(run, tmp_path, caplog):
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"weightr")
    with pytest.raises(
        InputError, match=r"adapter/adapter_model\.safetensors changed since the run was scored.*--force"
    ):
        check_weights(run, str(tmp_path / "base"))
    check_weights(run, str(tmp_path / "base"), force=True)
    assert "adapter_model.safetensors changed" in caplog.text


def test_another_base_model_of_the_same_shapes_is_refused(run, tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"base is not the base model that it was tuned from \(org/base\)"):
        check_weights(run, str(tmp_path / "base"))


def test_a_run_of_an_older_emogen_is_not_verified_and_says_so(run, tmp_path, caplog):
    (run / "manifest.json").unlink()
    check_weights(run, str(tmp_path / "base"))
    assert "its manifest has no digests of its weights, so they are not verified" in caplog.text


def test_a_recipe_has_nothing_to_check(tmp_path, caplog):
    check_weights(tmp_path / "recipe.yaml", str(tmp_path / "base"))
    assert not caplog.text
