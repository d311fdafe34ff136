import json

import numpy as np
from conftest import write_posts

from emogen.baseline import cross_validate_baseline, fit_and_predict
from emogen.crossval import all_rows
from emogen.data import make_folds
from emogen.recipe import load_recipe


def test_it_learns_words_and_knows_labels_that_all_or_none_have():
    texts = ["so happy today", "very happy now", "so sad today", "very sad now"] * 5
    gold = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]] * 5)
    prob = fit_and_predict(texts, gold, ["happy happy", "sad sad"])
    assert prob[0, 0] > 0.5
    assert prob[1, 0] < 0.5
    assert prob[0, 1] < 0.5
    assert prob[1, 1] > 0.5
    assert (prob[:, 2] == 1).all()
    assert (prob[:, 3] == 0).all()


def test_its_folds_are_those_of_the_recipe(tiny_recipe, tmp_path, labels):
    recipe = tiny_recipe()
    posts = [
        (f"{word} number {k} {name}", (name,))
        for k, word in enumerate(["one", "two", "three"] * 5)
        for name in labels.names
    ]
    write_posts(tmp_path / "train.csv", labels, posts)
    folder, metrics = cross_validate_baseline(recipe, 3)
    assert folder == tmp_path / "run-baseline"
    loaded = load_recipe(recipe)
    folds = make_folds(all_rows(loaded, labels), 3, loaded.seed)
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [record["fold"] for record in records] == folds.tolist()
    assert metrics["by_thresholds"]["f1_macro"] > 0.9  # each post says its label
    assert metrics["mean"]["thresholds"]["f1_macro"] > 0.9
    assert "TF-IDF" in (folder / "report.html").read_text()
