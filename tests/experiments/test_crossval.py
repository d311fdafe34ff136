import csv
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import POSTS, write_posts

from emogen.errors import InputError, ModelError
from emogen.experiments.crossval import cross_validate
from emogen.experiments.jobs import RunProcess, failure
from emogen.task.readers import read_rows
from emogen.task.rows import normalise_text
from emogen.task.splits import make_folds

BIN = Path(sys.executable).parent
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
MANY = [(f"{text} {k}", names) for k in range(3) for text, names in POSTS]


@pytest.fixture
def recipe(tiny_recipe, tmp_path, labels):
    """36 posts, so few steps a fold that five of them take seconds; a checkpoint after each."""
    path = tiny_recipe(save_strategy="steps", save_steps=1)
    write_posts(tmp_path / "train.csv", labels, MANY)
    return path


def cv(recipe, tmp_path, *words):
    command = [BIN / "emogen", "cv", recipe, f"output_dir={tmp_path / 'cv'}", *words]
    return subprocess.Popen(command, env=ENV, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_folds_hold_all_rows_balanced_and_keep_equal_texts_together(tmp_path, labels):
    posts = [*MANY, *[(f"  {text.upper()} 1", names) for text, names in POSTS]]
    rows, _ = read_rows(write_posts(tmp_path / "t.csv", labels, posts), labels)
    folds = make_folds(rows, 3, seed=1)
    assert sorted(np.unique(folds)) == [0, 1, 2]
    assert np.bincount(folds).min() >= 8
    fold_of = {}
    for text, fold in zip(rows.texts, folds, strict=True):
        assert fold_of.setdefault(normalise_text(text), fold) == fold
    assert (make_folds(rows, 3, seed=1) == folds).all()
    assert (make_folds(rows, 3, seed=2) != folds).any()
    with pytest.raises(ValueError, match="cannot make 40 folds of 36"):
        make_folds(rows, 40, seed=1)


def test_every_row_is_predicted_by_the_model_that_had_not_seen_it(recipe, tmp_path, labels):
    process = cv(recipe, tmp_path, "--folds", "3", "--jobs", "2")
    said = process.communicate()[0]
    assert process.returncode == 0, said
    folder = tmp_path / "cv"
    # Two folds at once keep to their own half of the cores.
    manifests = [json.loads((folder / f"fold-{k}" / "manifest.json").read_text()) for k in range(3)]
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {manifest["hardware"]["threads"] for manifest in manifests} <= {half, half + 1}
    fold_of = {row["id"]: int(row["fold"]) for row in csv.DictReader((folder / "folds.csv").open())}
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [f"p{i}" for i in range(36)]
    for record in records:
        own = folder / "data" / f"fold-{record['fold']}-train.jsonl"
        assert fold_of[record["id"]] == record["fold"]
        assert record["id"] not in {json.loads(line)["id"] for line in own.read_text().splitlines()}
        assert record["gold"] == list(MANY[int(record["id"][1:])][1])
        assert set(record["prob"]) == set(labels.names)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["n"] == 36
    folds = metrics["folds"]["answer"]["f1_macro"]
    each = [json.loads((folder / f"fold-{k}" / "metrics.json").read_text())["f1_macro"] for k in range(3)]
    assert folds == pytest.approx(each)
    assert metrics["mean"]["answer"]["f1_macro"] == pytest.approx(np.mean(each))
    assert metrics["sd"]["answer"]["f1_macro"] == pytest.approx(np.std(each, ddof=1))
    low, high = metrics["interval"]["answer"]["f1_macro"]
    assert low <= metrics["f1_macro"] <= high
    assert "mean ± sd" in (folder / "report.html").read_text()

    # The folder predicts as an ensemble, by thresholds and by vote.
    posts = write_posts(tmp_path / "new.csv", labels)
    for by in ("answer", "thresholds"):
        command = [BIN / "emogen", "predict", folder, posts, "-o", tmp_path / f"{by}.csv", f"predict_by={by}"]
        done = subprocess.run(command, env=ENV, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len((tmp_path / f"{by}.csv").read_text().splitlines()) == 13

    with pytest.raises(InputError, match="lora_r changed"):
        cross_validate(recipe, 3, [f"output_dir={folder}", "lora_r=2"])
    with pytest.raises(InputError, match=r"folds\.csv changed"):
        cross_validate(recipe, 4, [f"output_dir={folder}"])


def test_killed_at_any_moment_and_started_again_it_says_the_same(recipe, tmp_path):
    whole = cv(recipe, tmp_path, "--folds", "2", f"output_dir={tmp_path / 'whole'}")
    assert whole.wait() == 0
    moments = random.Random(7)
    for _ in range(4):
        process = cv(recipe, tmp_path, "--folds", "2")
        try:
            process.wait(moments.uniform(3, 15))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    last = cv(recipe, tmp_path, "--folds", "2")
    assert last.wait() == 0, last.stdout.read()
    expected = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert (tmp_path / "cv" / "predictions.jsonl").read_bytes() == expected


def test_a_fold_that_fails_is_named_with_what_it_said(recipe, tmp_path):
    with pytest.raises(ModelError, match=r"(?s)fold-0 failed.*fold-0\.log.*leaves no room"):
        cross_validate(recipe, 2, [f"output_dir={tmp_path / 'cv'}", "max_length=40"])


def test_the_log_of_a_run_has_the_whole_name_of_its_folder(tmp_path):
    for name in ("rate-0.03", "rate-0.1"):
        (tmp_path / f"{name}.log").write_text(f"this is {name}")
    assert failure(RunProcess(0, tmp_path / "rate-0.03")).endswith("this is rate-0.03")


def test_it_refuses_a_folder_that_holds_something_else(recipe, tmp_path):
    (tmp_path / "cv").mkdir()
    (tmp_path / "cv" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        cross_validate(recipe, 2, [f"output_dir={tmp_path / 'cv'}"])
