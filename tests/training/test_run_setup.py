import hashlib
import json

import pytest
from tiny import POSTS, write_posts, write_recipe

from emogen.evaluation.run_folder import FORMAT
from emogen.task.readers import read_rows
from emogen.task.recipe import RecipeError, load_recipe
from emogen.task.splits import Splits
from emogen.task.task import load_task
from emogen.training.run_setup import (
    claim_folder,
    fingerprint_of,
    name_base_model,
    newest_checkpoint,
    peak_memory_bytes,
    split_rows,
    write_run_files,
)


def write_checkpoint(folder, step, state="{}"):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state)


# ------------------------------------------------------------------------------------------ claim_folder


def test_a_new_folder_is_created_and_left_empty(tmp_path):
    claim_folder(tmp_path / "a" / "run", resume=False, fingerprint={})
    assert list((tmp_path / "a" / "run").iterdir()) == []


def test_a_folder_with_the_log_of_its_own_process_is_empty_enough(tmp_path):
    (tmp_path / "logs").mkdir()
    claim_folder(tmp_path, resume=False, fingerprint={})


def test_a_folder_with_a_run_is_refused_unless_it_is_resumed(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"sha256": {"data": "1"}}))
    with pytest.raises(RecipeError, match=r"nothing is overwritten.*resume_from_checkpoint=true"):
        claim_folder(tmp_path, resume=False, fingerprint={"data": "1"})
    claim_folder(tmp_path, resume=True, fingerprint={"data": "1"})


def test_a_run_whose_files_have_changed_is_not_resumed(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"sha256": {"data": "1", "prompt": "2"}}))
    claim_folder(tmp_path, resume=True, fingerprint={"data": "1", "prompt": "2", "eval data": "3"})  # one file more
    with pytest.raises(RecipeError, match="cannot resume this run: data, prompt changed since it was started"):
        claim_folder(tmp_path, resume=True, fingerprint={"data": "9", "prompt": "9"})


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecipeError, match="cannot be written to"):
        claim_folder(tmp_path / "file" / "run", resume=False, fingerprint={})


# ------------------------------------------------------------------------------------------ newest_checkpoint


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (20, 100, 3):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-100"


@pytest.mark.parametrize("state", ["{", None])
def test_an_incomplete_checkpoint_is_skipped(tmp_path, caplog, state):
    write_checkpoint(tmp_path, 3)
    write_checkpoint(tmp_path, 6, state)
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"
    assert "checkpoint-6: an incomplete checkpoint" in caplog.text


def test_a_folder_without_a_complete_checkpoint_has_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 6, None)
    assert newest_checkpoint(tmp_path) is None


# ------------------------------------------------------------------------------------------ split_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory, labels):
    posts = [(f"{text} {k}", names) for k in range(3) for text, names in POSTS]
    return read_rows(write_posts(tmp_path_factory.mktemp("rows") / "posts.csv", labels, posts), labels)[0]


@pytest.fixture
def splits(rows):
    return Splits(rows.take(range(24)), rows.take(range(24, 36)), rows.take([]))


def recipe_with(tmp_path, labels, *overrides):
    return load_recipe(write_recipe(tmp_path, labels), overrides)


def test_validation_rows_are_a_fixed_part_of_the_evaluation_rows(tmp_path, labels, splits):
    recipe = recipe_with(tmp_path, labels, "eval_samples=4")
    train_rows, val_rows = split_rows(recipe, splits)
    assert train_rows.ids == splits.train.ids
    assert 0 < len(val_rows) < len(splits.eval)
    assert set(val_rows.ids) < set(splits.eval.ids)
    assert split_rows(recipe, splits)[1].ids == val_rows.ids
    assert split_rows(recipe_with(tmp_path, labels, "eval_samples=null"), splits)[1].ids == splits.eval.ids


def test_select_best_holds_validation_rows_out_of_the_training_rows(tmp_path, labels, splits):
    train_rows, val_rows = split_rows(recipe_with(tmp_path, labels, "select_best={fraction: 0.25}"), splits)
    assert not set(train_rows.ids) & set(val_rows.ids)
    assert sorted(train_rows.ids + val_rows.ids) == sorted(splits.train.ids)
    assert 2 <= len(val_rows) <= 10


def test_without_evaluation_rows_there_are_no_validation_rows(tmp_path, labels, splits):
    recipe = recipe_with(tmp_path, labels)
    assert split_rows(recipe, Splits(splits.train, None, splits.examples)) == (splits.train, None)


# ------------------------------------------------------------------------------------------ files of a run folder


def test_the_fingerprint_has_the_digest_of_each_file(tmp_path, labels):
    adapter = tmp_path / "old" / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(b"weights")
    recipe = recipe_with(tmp_path, labels)
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # noqa: E731
    expected = {"data": digest(tmp_path / "train.csv"), "prompt": digest(recipe.find("prompts/list.jinja"))}
    assert fingerprint_of(recipe) == expected
    recipe = recipe_with(tmp_path, labels, f"init_adapter={tmp_path / 'old'}", f"eval_file={tmp_path / 'train.csv'}")
    more = {"eval data": expected["data"], "init_adapter": hashlib.sha256(b"weights").hexdigest()}
    assert fingerprint_of(recipe) == expected | more
    adapter.unlink()
    with pytest.raises(RecipeError, match=r"init_adapter: .*adapter_model\.safetensors: no such file"):
        fingerprint_of(recipe)


def test_a_run_folder_gets_what_makes_it_self_contained(tmp_path, labels):
    recipe = recipe_with(tmp_path, labels, "seed=7")
    task, folder = load_task(recipe), tmp_path / "run"
    folder.mkdir()
    write_run_files(task, folder, {"data": "1"}, ["tiny.yaml", "seed=7"])
    kept = load_task(load_recipe(folder / "recipe.yaml"))
    assert kept.label_set == labels
    assert kept.prompt.source == task.prompt.source
    assert kept.recipe.seed == 7
    assert kept.recipe.output_dir == folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == FORMAT
    assert manifest["command"] == ["emogen", "train", "tiny.yaml", "seed=7"]
    assert (manifest["seed"], manifest["sha256"]) == (7, {"data": "1"})
    assert manifest["hardware"]["threads"] >= 1


def test_an_adapter_names_its_base_model_instead_of_a_folder(tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": 4, "base_model_name_or_path": "/home/someone/.cache/model"}))
    name_base_model(tmp_path, "org/model")
    assert json.loads(config.read_text()) == {"r": 4, "base_model_name_or_path": "org/model"}
    name_base_model(tmp_path / "nothing", "org/model")  # a run without an adapter


def test_peak_memory_is_counted_in_bytes():
    assert 2**27 < peak_memory_bytes() < 2**40  # torch alone takes more than 128 MiB
