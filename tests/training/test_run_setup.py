import errno
import hashlib
import json

import pytest
from safetensors import SafetensorError
from tiny import POSTS, write_posts, write_recipe
from trl import SFTConfig

from emogen.errors import InputError
from emogen.evaluation.run_folder import FORMAT
from emogen.model.identity import identify
from emogen.prediction.weights import name_base_model
from emogen.task.readers import read_rows
from emogen.task.recipe import RecipeError, load_recipe
from emogen.task.splits import Splits
from emogen.task.task import load_task
from emogen.training import run_setup
from emogen.training.checkpoints import list_files
from emogen.training.run_setup import (
    disk_problem,
    fingerprint_of,
    newest_checkpoint,
    open_folder,
    peak_memory_bytes,
    split_rows,
    write_run_files,
)

NO_ROWS = Splits(None, None, None)  # read for Hub datasets only


def write_checkpoint(folder, step, *, complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"state")
    if complete:
        list_files(path)


def open_run(tmp_path, labels, *overrides, resume=False, fingerprint=None):
    """Opens tmp_path/run as a training with a tiny recipe does."""
    recipe = recipe_with(tmp_path, labels, *overrides)
    with open_folder(load_task(recipe), recipe.output_dir, fingerprint or {}, resume=resume):
        (recipe.output_dir / "logs").mkdir(exist_ok=True)
    return recipe.output_dir


# ------------------------------------------------------------------------------------------ open_folder


def test_a_new_folder_is_created_and_nothing_is_left_in_it(tmp_path, labels):
    assert [path.name for path in open_run(tmp_path, labels).iterdir()] == ["logs"]


def test_a_folder_with_the_log_of_its_own_process_is_empty_enough(tmp_path, labels):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    open_run(tmp_path, labels)


def test_a_folder_with_a_run_is_refused_unless_it_is_resumed(tmp_path, labels):
    folder = open_run(tmp_path, labels)
    write_run_files(load_task(recipe_with(tmp_path, labels)), folder, {"data": "1"}, [])
    with pytest.raises(RecipeError, match=r"nothing is overwritten.*resume_from_checkpoint=true"):
        open_run(tmp_path, labels, fingerprint={"data": "1"})
    open_run(tmp_path, labels, resume=True, fingerprint={"data": "1"})


def test_a_run_whose_files_have_changed_is_not_resumed(tmp_path, labels):
    folder = open_run(tmp_path, labels)
    before = {"data": "1", "prompt": "2", "labels": "3"}
    write_run_files(load_task(recipe_with(tmp_path, labels)), folder, before, [])
    open_run(tmp_path, labels, resume=True, fingerprint=before)
    with pytest.raises(RecipeError, match=r"cannot resume this run: data, prompt changed since it was started"):
        open_run(tmp_path, labels, resume=True, fingerprint=before | {"data": "9", "prompt": "9"})
    for other in (before | {"eval data": "4"}, {"data": "1", "labels": "3"}):  # one file more, one less
        with pytest.raises(RecipeError, match=r"cannot resume this run: (eval data|prompt) changed"):
            open_run(tmp_path, labels, resume=True, fingerprint=other)
    with pytest.raises(RecipeError, match=r"cannot resume this run: base model changed"):
        open_run(tmp_path, labels, resume=True, fingerprint=before | {"base model": "another"})


def test_a_base_model_without_an_identity_is_compared_by_its_name(tmp_path, labels):
    folder = open_run(tmp_path, labels)
    write_run_files(load_task(recipe_with(tmp_path, labels)), folder, {"labels": "3"}, [])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"].pop("base model")  # as if the model had not been downloaded yet
    (folder / "manifest.json").write_text(json.dumps(manifest))
    open_run(tmp_path, labels, resume=True, fingerprint={"labels": "3", "base model": "x"})
    with pytest.raises(RecipeError, match=r"model_name_or_path \(.*llama before, org/other now\)"):
        open_run(tmp_path, labels, "model_name_or_path=org/other", resume=True, fingerprint={"labels": "3"})


def test_a_run_of_an_older_emogen_is_resumed_by_what_its_manifest_has(tmp_path, labels, caplog):
    folder = open_run(tmp_path, labels)
    write_run_files(load_task(recipe_with(tmp_path, labels)), folder, {"data": "1"}, [])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": {"data": "1"}}))
    open_run(tmp_path, labels, resume=True, fingerprint={"data": "1", "labels": "3"})
    write_checkpoint(folder, 3, complete=False)
    (folder / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(folder).name == "checkpoint-3"
    assert "not verified" in caplog.text


def test_checkpoints_without_a_manifest_are_not_resumed(tmp_path, labels):
    write_checkpoint(open_run(tmp_path, labels), 3)
    with pytest.raises(InputError, match=r"manifest\.json or recipe\.yaml is missing"):
        open_run(tmp_path, labels, resume=True)


def test_a_run_whose_recipe_has_changed_is_not_resumed(tmp_path, labels):
    folder = open_run(tmp_path, labels)
    write_run_files(load_task(recipe_with(tmp_path, labels)), folder, {}, [])
    open_run(tmp_path, labels, "logging_steps=7", "save_steps=9", "weight_decay=0.0", resume=True)  # 0.0 is the default
    with pytest.raises(
        RecipeError, match=r"learning_rate \(0\.01 before, 0\.5 now\), max_steps \(4 before, 9 now\) changed"
    ):
        open_run(tmp_path, labels, "learning_rate=0.5", "max_steps=9", resume=True)
    with pytest.raises(RecipeError, match=r"eval_fraction \(0\.0 before, 0\.3 now\) changed"):
        open_run(tmp_path, labels, "eval_fraction=0.3", resume=True)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, labels):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written to"):
        open_run(tmp_path, labels, f"output_dir={tmp_path / 'file' / 'run'}")


# ------------------------------------------------------------------------------------------ newest_checkpoint


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (20, 100, 3):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-100"


def test_an_incomplete_checkpoint_is_passed_over(tmp_path, caplog):
    (tmp_path / "manifest.json").write_text('{"sha256": {"labels": "3"}}')
    write_checkpoint(tmp_path, 3)
    write_checkpoint(tmp_path, 6, complete=False)
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"
    assert "checkpoint-6: not used: it is incomplete" in caplog.text


def test_a_folder_without_a_complete_checkpoint_has_none(tmp_path, caplog):
    assert newest_checkpoint(tmp_path) is None
    assert not caplog.text
    (tmp_path / "manifest.json").write_text('{"sha256": {"labels": "3"}}')
    write_checkpoint(tmp_path, 6, complete=False)
    assert newest_checkpoint(tmp_path) is None
    assert "the training starts again" in caplog.text


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
    without = Splits(splits.train, None, splits.examples)
    assert split_rows(recipe, without) == (splits.train, None)
    for wanted in ("eval_strategy=epoch", "eval_on_start=true"):
        with pytest.raises(InputError, match="no rows to evaluate on during training; set eval_file or eval_fraction"):
            split_rows(recipe_with(tmp_path, labels, wanted), without)


# ------------------------------------------------------------------------------------------ files of a run folder


def test_the_fingerprint_has_the_digest_of_everything(tmp_path, labels):
    adapter = tmp_path / "old" / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(b"weights")
    recipe = recipe_with(tmp_path, labels)
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # noqa: E731
    expected = {
        "data": digest(tmp_path / "train.csv"),
        "prompt": digest(recipe.find("prompts/list.jinja")),
        "labels": hashlib.sha256(labels.to_yaml().encode()).hexdigest(),
        "base model": identify(tmp_path / "model-llama"),
        "processes": "1",
    }
    assert fingerprint_of(load_task(recipe), NO_ROWS) == expected
    recipe = recipe_with(tmp_path, labels, f"init_adapter={tmp_path / 'old'}", f"eval_file={tmp_path / 'train.csv'}")
    more = {"eval data": expected["data"], "init_adapter": hashlib.sha256(b"weights").hexdigest()}
    assert fingerprint_of(load_task(recipe), NO_ROWS) == expected | more
    adapter.unlink()
    with pytest.raises(RecipeError, match=r"init_adapter: .*adapter_model\.safetensors: no such file"):
        fingerprint_of(load_task(recipe), NO_ROWS)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "[enforce fail at"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "Error while"),
        (OSError(errno.ECONNREFUSED, "Connection refused"), None),
        (ValueError("something else"), None),
    ],
)
def test_a_full_disk_is_recognised(error, found):
    assert disk_problem(error) is None if found is None else disk_problem(error).startswith(found)


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
    base = {"base model": identify(tmp_path / "model-llama")}
    assert (manifest["seed"], manifest["sha256"]) == (7, {"data": "1"} | base)
    assert manifest["hardware"]["threads"] >= 1


def test_an_adapter_names_its_base_model_instead_of_a_folder(tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": 4, "base_model_name_or_path": "/home/someone/.cache/model"}))
    name_base_model(tmp_path, "org/model")
    assert json.loads(config.read_text()) == {"r": 4, "base_model_name_or_path": "org/model"}
    name_base_model(tmp_path / "nothing", "org/model")  # a run without an adapter


def test_peak_memory_is_counted_in_bytes():
    assert 2**27 < peak_memory_bytes() < 2**40  # torch alone takes more than 128 MiB


def test_a_process_that_sees_two_gpus_trains_on_one_with_its_own_batch_size(tmp_path, caplog):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4)
    args._n_gpu = 2
    assert args.train_batch_size == 8
    run_setup.use_one_gpu(args)
    assert (args.n_gpu, args.train_batch_size) == (1, 4)
    assert "this machine has 2" in caplog.text
    caplog.clear()
    run_setup.use_one_gpu(args)
    assert not caplog.text
