import json
import shutil

import numpy as np
import pytest
from tiny import write_posts

from emogen.console import progress_bar
from emogen.errors import InputError, ModelError
from emogen.experiments.crossval import cross_validate_baseline
from emogen.experiments.prompts import open_benchmark
from emogen.prediction.ensemble import load_run
from emogen.prediction.files import predict_file
from emogen.prediction.tfidf import fit_tfidf
from emogen.task.readers import read_rows
from emogen.task.recipe import load_recipe
from emogen.task.rows import checked
from emogen.task.splits import all_rows, make_folds


def test_it_learns_words_and_knows_labels_that_all_or_none_have():
    texts = ["so happy today", "very happy now", "so sad today", "very sad now"] * 5
    gold = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]] * 5)
    prob = fit_tfidf(texts, gold)(["happy happy", "sad sad"])
    assert prob[0, 0] > 0.5
    assert prob[1, 0] < 0.5
    assert prob[0, 1] < 0.5
    assert prob[1, 1] > 0.5
    assert (prob[:, 2] == 1).all()
    assert (prob[:, 3] == 0).all()


@pytest.fixture
def recipe(tiny_recipe, tmp_path, labels):
    """Of posts that each say their label."""
    posts = [
        (f"{word} number {k} {name}", (name,))
        for k, word in enumerate(["one", "two", "three"] * 5)
        for name in labels.names
    ]
    path = tiny_recipe()
    write_posts(tmp_path / "train.csv", labels, posts)
    return path


def test_its_folds_are_those_of_the_recipe(recipe, tmp_path, labels):
    folder, metrics = cross_validate_baseline(recipe, 3)
    assert folder == tmp_path / "run-baseline"
    loaded = load_recipe(recipe)
    folds = make_folds(all_rows(loaded, labels), 3, loaded.seed)
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [record["fold"] for record in records] == folds.tolist()
    assert metrics["by_thresholds"]["f1_macro"] > 0.9  # each post says its label
    assert metrics["mean"]["thresholds"]["f1_macro"] > 0.9
    assert "TF-IDF" in (folder / "report.html").read_text()


@pytest.mark.parametrize("by", ["answer", "thresholds", "stack"])
def test_it_labels_new_texts_alone_or_with_others(recipe, tmp_path, labels, by):
    folder, _ = cross_validate_baseline(recipe, 3)
    again = shutil.copytree(folder, tmp_path / "again")  # stands for another system
    new = [("today number 77 trust", ()), ("it was joy", ()), ("fear again", ())]
    write_posts(tmp_path / "new.csv", labels, new)
    for runs in ([folder], [folder, again]):
        out = tmp_path / f"{len(runs)}.csv"
        predict_file(runs, tmp_path / "new.csv", [f"predict_by={by}"], csv_file=out, bar=progress_bar)
        pred = checked(read_rows(out, labels, need_labels=True, need_text=False))
        assert [labels.names_of(row) for row in pred.truth.tolist()] == [("trust",), ("joy",), ("fear",)]


def test_what_is_left_of_a_cross_validation_is_no_baseline(recipe, tmp_path, labels):
    folder, _ = cross_validate_baseline(recipe, 3)
    for left in ("data", "fold-0"):
        (folder / left).mkdir()
        with pytest.raises(ModelError, match="the run has not finished"):
            load_run(folder)
        (folder / left).rmdir()


def test_it_has_no_prompt_to_try(recipe, tmp_path):
    folder, _ = cross_validate_baseline(recipe, 3)
    with pytest.raises(InputError, match="a baseline reads each text as it stands"):
        open_benchmark(recipe, (), limit=20, tuned=folder)
