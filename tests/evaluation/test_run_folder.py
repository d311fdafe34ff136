"""Run folders: their kind and format, their recipe and labels, the members of a cross-validation."""

import json
import shutil
from pathlib import Path

import pytest

from emogen import __version__
from emogen.errors import InputError, ModelError
from emogen.evaluation import run_folder
from emogen.evaluation.run_folder import kind_of, label_set_of, member_folders, read_recipe

OLD_RUN = Path(__file__).parent.parent / "data" / "old_run" / "run"  # written by emogen 0.1


@pytest.mark.parametrize("kind", [run_folder.RUN, run_folder.CROSS_VALIDATION, run_folder.BASELINE, run_folder.PROMPTS])
def test_the_kind_is_in_the_manifest(tmp_path, kind):
    (tmp_path / "folds.csv").touch()  # the files do not matter
    run_folder.write_manifest(tmp_path, kind, seed=7)
    assert kind_of(tmp_path) == kind
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["format"], manifest["kind"], manifest["seed"]) == (1, kind, 7)
    assert manifest["versions"]["emogen"] == __version__
    assert "torch" in manifest["versions"]


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["recipe.yaml", "adapter/", "manifest.json"], "run"),
        (["recipe.yaml", "fold-0/"], "run"),
        (["folds.csv", "data/"], "cross-validation"),
        (["folds.csv", "fold-0/"], "cross-validation"),
        (["folds.csv", "predictions.jsonl"], "baseline"),
    ],
)
def test_the_kind_of_a_folder_of_version_0_1_follows_from_its_files(tmp_path, files, kind):
    for name in files:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text("{}")
    assert kind_of(tmp_path) == kind


def test_a_run_of_version_0_1_is_a_run():
    assert "kind" not in json.loads((OLD_RUN / "manifest.json").read_text())
    assert kind_of(OLD_RUN) == "run"


def test_a_newer_format_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": run_folder.FORMAT + 1, "kind": "run"}))
    with pytest.raises(InputError, match=r"manifest\.json: format 2, but this emogen .* install a newer emogen"):
        kind_of(tmp_path)


def test_a_manifest_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: not valid JSON.*was the file changed"):
        kind_of(tmp_path)


def test_a_cross_validation_is_replaced_by_its_folds(tmp_path):
    run, cv = tmp_path / "run", tmp_path / "cv"
    for folder in (run, cv / "fold-1", cv / "fold-0"):
        folder.mkdir(parents=True)
    (cv / "fold-0.log").touch()
    (cv / "fold-0 old").mkdir()
    assert member_folders([run, cv, run]) == [run, cv / "fold-0", cv / "fold-1", run]


def test_the_members_of_a_cross_validation_are_all_its_folds_by_number(tmp_path):
    lines = ["id,fold", *(f'"r,{k}\n",{k}' for k in range(11))]
    (tmp_path / "folds.csv").write_text("\n".join(lines) + "\n")
    for k in range(10):
        (tmp_path / f"fold-{k}").mkdir()
    with pytest.raises(ModelError, match=r"10 folders of 11 folds .*completes it"):
        member_folders([tmp_path])
    (tmp_path / "fold-10").mkdir()
    assert [folder.name for folder in member_folders([tmp_path])] == [f"fold-{k}" for k in range(11)]


def test_the_labels_of_a_folder(tmp_path, labels):
    assert label_set_of(OLD_RUN).names == labels.names
    with pytest.raises(InputError, match=r"not the folder of a run, a cross-validation or a baseline.*no labels\.yaml"):
        label_set_of(tmp_path)


def test_the_recipe_of_a_run_is_read_with_its_own_files_and_overrides(tmp_path, labels):
    folder = shutil.copytree(OLD_RUN, tmp_path / "run")
    recipe, label_set = read_recipe(folder, ["predict_by=thresholds"])
    assert recipe.find(recipe.prompt) == folder / "prompt.jinja"
    assert recipe.model_name == "model-llama"
    assert recipe.predict_by == "thresholds"
    assert label_set.names == labels.names


def test_the_recipe_of_a_baseline_trains_on_its_predictions(tmp_path):
    folder = shutil.copytree(OLD_RUN, tmp_path / "baseline", ignore=shutil.ignore_patterns("adapter", "manifest.json"))
    run_folder.write_manifest(folder, run_folder.BASELINE)
    recipe, _ = read_recipe(folder)
    assert Path(recipe.train_file) == folder / "predictions.jsonl"


def test_the_recipe_of_an_unfinished_run_or_of_another_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not a run folder: it has no recipe\.yaml"):
        read_recipe(tmp_path)
    folder = shutil.copytree(OLD_RUN, tmp_path / "run", ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(ModelError, match=r"it has no adapter/: the run has not finished; resume_from_checkpoint=true"):
        read_recipe(folder)
    (folder / "model").mkdir()  # a model that was tuned in full
    assert read_recipe(folder)[0].model_name == "model-llama"
