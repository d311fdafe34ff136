"""A job as files: what is in the archive, its name, and the way to a pod and back over SSH."""

import re
import tarfile

import pytest

from emogen.cloud import runpod, ship
from emogen.errors import InputError, ModelError
from emogen.task.recipe import load_recipe


def address_of(volume, **changes):
    return ship.Address("192.0.2.7", 22, "root", volume / "known_hosts", **{"poll": 0, "patience": 3} | changes)


def test_a_job_runs_elsewhere_and_its_archive_does_not_identify_this_machine(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe(eval_file=str(tmp_path / "train.csv")), ["learning_rate=0.5"])
    job = ship.make_job(recipe)
    with (tmp_path / "a.tgz").open("wb") as file:
        ship.write_archive(job, file)
    with tarfile.open(tmp_path / "a.tgz") as archive:
        names = set(archive.getnames())
        archive.extractall(tmp_path / "there", filter="data")
        assert {(member.uid, member.uname, member.mtime) for member in archive} == {(0, "", 0)}
    assert {"code/pyproject.toml", "code/constraints.txt", "code/emogen/train.py", "code/prompts/list.jinja"} <= names
    assert not [name for name in names if "__pycache__" in name or ".git" in name]
    there = tmp_path / "there" / "job"
    text = (there / "tiny.yaml").read_text()
    assert str(tmp_path) not in text
    shipped = load_recipe(there / "tiny.yaml")
    assert shipped.sft_args["learning_rate"] == 0.5
    for key in ("train_file", "eval_file", "prompt"):
        assert shipped.find(getattr(shipped, key)).is_relative_to(there)
    assert (there / shipped.model_name / "config.json").is_file()


def test_the_same_job_has_the_same_name_and_another_job_has_another(tiny_recipe, tmp_path):
    recipe = tiny_recipe()
    name = ship.make_job(load_recipe(recipe)).name
    assert ship.make_job(load_recipe(recipe, ["resume_from_checkpoint=true", "output_dir=elsewhere"])).name == name
    assert ship.make_job(load_recipe(recipe, ["seed=7"])).name != name
    (tmp_path / "train.csv").write_text((tmp_path / "train.csv").read_text().replace("lovely", "lovelier"))
    assert ship.make_job(load_recipe(recipe)).name != name
    assert runpod.NAME.fullmatch(f"{name}-1700000000")["recipe"] == "tiny"


@pytest.fixture
def secretive(tiny_recipe, tmp_path):
    """A recipe whose model folder is a clone with secrets in it, made of links as the Hub's cache is."""
    path = tiny_recipe()
    model, blobs = tmp_path / "model-llama", tmp_path / "blobs"
    blobs.mkdir()
    for file in list(model.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    (model / ".git").mkdir()
    for name in (".git/config", ".env", "notes.txt", "modeling_other.py", "pytorch_model.bin"):
        (model / name).write_text("k3y of somebody")
    return path


def test_a_model_folder_is_sent_without_what_else_is_in_it(secretive, tmp_path):
    job = ship.make_job(load_recipe(secretive))
    with (tmp_path / "a.tgz").open("wb") as file:
        ship.write_archive(job, file)
    with tarfile.open(tmp_path / "a.tgz") as archive:
        sent = {member.name: member for member in archive if member.name.startswith("job/files/model/")}
        assert {name.rpartition("/")[2] for name in sent} >= {"config.json", "model.safetensors", "tokenizer.json"}
        assert all(member.isreg() and member.size for member in sent.values())
        contents = b"".join(archive.extractfile(member).read() for member in archive if member.isreg())
    assert b"k3y of somebody" not in contents
    assert "job/overrides" not in {*sent}


def test_code_of_others_is_sent_and_run_if_the_command_line_says_so(secretive, tmp_path):
    job = ship.make_job(load_recipe(secretive, ["trust_remote_code=true"]))
    with (tmp_path / "a.tgz").open("wb") as file:
        ship.write_archive(job, file)
    with tarfile.open(tmp_path / "a.tgz") as archive:
        assert archive.extractfile("job/overrides").read() == b"trust_remote_code=true\n"
        assert "job/files/model/modeling_other.py" in archive.getnames()
        archive.extractall(tmp_path / "there", filter="data")
    shipped = tmp_path / "there" / "job" / "tiny.yaml"
    assert not load_recipe(shipped).trusts_code  # no file says so
    assert load_recipe(shipped, ["trust_remote_code=true"]).trusts_code


def test_a_dangling_link_and_a_model_without_weights_are_named(secretive, tmp_path):
    (tmp_path / "blobs" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"model-llama/tokenizer\.json: no such file"):
        ship.make_job(load_recipe(secretive))
    (tmp_path / "model-llama" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-llama: no weights in the format of safetensors"):
        ship.make_job(load_recipe(secretive))


def test_a_missing_file_is_named(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe())
    (tmp_path / "train.csv").unlink()
    with pytest.raises(InputError, match=r"train\.csv: no such file"):
        ship.make_job(recipe)


def test_a_job_is_sent_once(job, volume):
    name = f"{job.name}-1700000000"
    folder = volume / "emogen" / job.name
    ship.send(job, name, address_of(volume))
    assert (folder / f"ready.{name}").is_file()
    assert (folder / "code" / "emogen" / "train.py").is_file()
    (folder / "job" / "tiny.yaml").unlink()
    ship.send(job, name, address_of(volume))
    assert not (folder / "job" / "tiny.yaml").exists()
    assert (volume / "ssh.log").read_text().count("tar --no-same-owner") == 2


@pytest.mark.parametrize(("message", "attempts"), [("Connection refused", 3), ("Permission denied (publickey).", 1)])
def test_ssh_is_repeated_until_the_pod_answers_but_not_after_a_refusal(job, volume, tmp_path, message, attempts):
    script = f"#!/bin/bash\necho asked >>{volume}/ssh.log\necho '{message}' >&2\nexit 255\n"
    (tmp_path / "bin" / "ssh").write_text(script)
    with pytest.raises(ModelError, match=re.escape(message)):
        ship.send(job, f"{job.name}-1700000000", address_of(volume))
    assert (volume / "ssh.log").read_text().count("asked") == attempts
