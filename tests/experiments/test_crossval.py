import csv
import json
import os
import shutil
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from tiny import POSTS, kill_at, write_posts, write_recipe
from typer.testing import CliRunner

from emogen.cli.__main__ import app
from emogen.errors import InputError, ModelError
from emogen.experiments.crossval import cross_validate, cross_validate_baseline
from emogen.task.recipe import load_recipe
from emogen.task.splits import all_rows, make_folds

pytestmark = pytest.mark.slow

MANY = [(f"{text} {k}", names) for k in range(2) for text, names in POSTS]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, labels):
    """24 posts, few steps, and a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("recipe")
    path = write_recipe(folder, labels, max_steps=3, save_strategy="steps", save_steps=1)
    write_posts(folder / "train.csv", labels, MANY)
    return path


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The folder of an uninterrupted cross-validation of two folds, both at a time. Tests do not change it."""
    folder = tmp_path_factory.mktemp("whole") / "cv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        words = ["cv", recipe, "--folds", 2, "--jobs", 2, f"output_dir={folder}"]
        done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert f"The folds are in {folder}" in done.stdout.replace("\n", "")
    return folder


def read_records(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_row_is_predicted_by_the_model_that_was_not_trained_on_it(whole, labels):
    with (whole / "folds.csv").open() as file:
        fold_of = {row["id"]: int(row["fold"]) for row in csv.DictReader(file)}
    assert set(fold_of.values()) == {0, 1}
    records = read_records(whole / "predictions.jsonl")
    assert [record["id"] for record in records] == [f"p{i}" for i in range(len(MANY))]
    trained_on = [{row["id"] for row in read_records(whole / "data" / f"fold-{k}-train.jsonl")} for k in (0, 1)]
    for record in records:
        assert fold_of[record["id"]] == record["fold"]
        assert record["id"] not in trained_on[record["fold"]]
        assert record["gold"] == list(MANY[int(record["id"][1:])][1])
        assert set(record["prob"]) == set(labels.names)
    of_fold = {record["id"]: record for k in (0, 1) for record in read_records(whole / f"fold-{k}/predictions.jsonl")}
    assert all(of_fold[record["id"]]["raw"] == record["raw"] for record in records)


def test_folds_at_a_time_each_use_their_share_of_the_cores(whole):
    manifests = [json.loads((whole / f"fold-{k}" / "manifest.json").read_text()) for k in (0, 1)]
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {manifest["hardware"]["threads"] for manifest in manifests} <= {half, half + 1}


def test_metrics_vary_over_the_folds_and_have_intervals(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["n"] == len(MANY)
    by_fold = [json.loads((whole / f"fold-{k}" / "metrics.json").read_text())["f1_macro"] for k in (0, 1)]
    assert metrics["folds"]["answer"]["f1_macro"] == pytest.approx(by_fold)
    assert metrics["mean"]["answer"]["f1_macro"] == pytest.approx(np.mean(by_fold))
    assert metrics["sd"]["answer"]["f1_macro"] == pytest.approx(np.std(by_fold, ddof=1))
    assert metrics["interval"]["answer"]["f1_macro"] is None  # 24 rows are too few
    assert "mean ± sd" in (whole / "report.html").read_text()
    assert json.loads((whole / "manifest.json").read_text())["kind"] == "cross-validation"


@pytest.mark.parametrize("by", ["answer", "thresholds"])
def test_a_cross_validation_predicts_as_an_ensemble(whole, tmp_path, labels, by):
    words = [
        "predict",
        whole,
        write_posts(tmp_path / "new.csv", labels),
        "-o",
        tmp_path / "out.csv",
        f"predict_by={by}",
    ]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 13


def test_a_changed_cross_validation_is_not_resumed(recipe, whole):
    with pytest.raises(InputError, match=r"lora_r \(4 before, 2 now\) changed"):
        cross_validate(recipe, 2, [f"output_dir={whole}", "lora_r=2"])
    with pytest.raises(InputError, match=r"folds\.csv changed"):
        cross_validate(recipe, 3, [f"output_dir={whole}"])


def test_changed_texts_are_not_resumed(recipe, whole, tmp_path, labels):
    posts = [(f"{text}!", names) for text, names in POSTS]
    other = write_posts(tmp_path / "other.csv", labels, posts)
    with pytest.raises(InputError, match="the texts or labels of the rows changed"):
        cross_validate(recipe, 2, [f"output_dir={whole}", f"train_file={other}"])


def test_a_finished_cross_validation_is_not_computed_again(recipe, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "cv")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("fold-*/adapter/*")}
    _, metrics = cross_validate(recipe, 2, [f"output_dir={folder}"])
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("fold-*/adapter/*")}
    assert json.loads(json.dumps(metrics)) == json.loads((whole / "metrics.json").read_text())


@contextmanager
def half_of_the_cores():
    """Restrict the processes that are started here to as many cores as each fold of `whole` had.

    The number of threads can change the last digits of a result.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[::2])
    yield
    os.sched_setaffinity(0, cores)


def test_after_kills_in_every_phase_the_predictions_are_those_of_an_uninterrupted_call(
    recipe, whole, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "cv"
    command = [sys.executable, "-m", "emogen.cli", "cv", recipe, "--folds", "2", f"output_dir={folder}"]
    with half_of_the_cores():
        with (tmp_path / "log").open("w") as log:
            for event in ("fold-0/checkpoint-*/files.json", "fold-1"):
                kill_at(lambda event=event: any(folder.glob(event)), command, stdout=log, stderr=log)
                assert not (folder / "predictions.jsonl").exists()
        cross_validate(recipe, 2, [f"output_dir={folder}"])
    assert "Resuming from" in (folder / "fold-0.log").read_text()
    assert (folder / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert (folder / "thresholds.json").read_bytes() == (whole / "thresholds.json").read_bytes()


def test_a_failed_fold_is_named_with_the_end_of_its_log(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"(?s)fold-0 failed.*fold-0\.log.*leaves no room"):
        cross_validate(recipe, 2, [f"output_dir={tmp_path / 'cv'}", "max_length=40"])


def test_a_folder_that_holds_something_else_is_refused(recipe, tmp_path):
    (tmp_path / "cv").mkdir()
    (tmp_path / "cv" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        cross_validate(recipe, 2, [f"output_dir={tmp_path / 'cv'}"])
    assert [path.name for path in (tmp_path / "cv").iterdir()] == ["thesis.txt"]


def test_too_many_folds_are_refused(recipe, tmp_path):
    with pytest.raises(InputError, match="cannot make 25 folds of 24"):
        cross_validate(recipe, 25, [f"output_dir={tmp_path / 'cv'}"])


def test_adapters_that_were_trained_on_held_out_rows_are_refused(recipe, whole, tmp_path):
    """`init_adapter` of a cross-validation is another cross-validation with the same folds."""
    for other in (whole / "fold-0", shutil.copytree(whole, tmp_path / "other")):
        overrides = [f"output_dir={tmp_path / 'cv'}", f"init_adapter={other}", "seed=7"]
        with pytest.raises(InputError, match="not a cross-validation with the same rows and folds"):
            cross_validate(recipe, 2, overrides)
    assert not (tmp_path / "cv").exists()


def test_the_baseline_has_the_folds_of_the_recipe(tmp_path, labels):
    path = write_recipe(tmp_path, labels)
    words = ["one", "two", "three"] * 3
    posts = [(f"{word} number {k} {name}", (name,)) for k, word in enumerate(words) for name in labels.names]
    write_posts(tmp_path / "train.csv", labels, posts)
    n_done = []
    folder, metrics = cross_validate_baseline(path, 3, [], n_done.append)
    assert folder == tmp_path / "run-baseline"
    assert sum(n_done) == 3
    recipe = load_recipe(path)
    folds = make_folds(all_rows(recipe, labels), 3, recipe.seed)
    assert [record["fold"] for record in read_records(folder / "predictions.jsonl")] == folds.tolist()
    assert metrics["by_thresholds"]["f1_macro"] > 0.9  # each post contains the name of its label
    assert metrics["absent_in_folds"] == []
    assert metrics["mean"]["thresholds"]["f1_macro"] > 0.9
    assert "TF-IDF" in (folder / "report.html").read_text()
    assert json.loads((folder / "manifest.json").read_text())["kind"] == "baseline"


def test_labels_that_some_folds_lack_are_named(tmp_path, labels):
    """Such a fold counts their F1 as 0, so that the mean over the folds is below the pooled figure."""
    path = write_recipe(tmp_path, labels)
    posts = [(f"{name} number {k}", (name,)) for k in range(6) for name in ("anger", "joy")]
    posts += [(f"love number {k}", ("love",)) for k in range(2)]
    write_posts(tmp_path / "train.csv", labels, posts)
    folder, metrics = cross_validate_baseline(path, 3)
    assert metrics["absent_in_folds"] == ["love"]
    assert "Some folds have no positive row of love." in (folder / "report.html").read_text()
