import json
import shutil

import numpy as np
import pytest
from tiny import write_posts, write_recipe

from emogen.console import progress_bar
from emogen.errors import InputError, ModelError
from emogen.experiments.crossval import cross_validate_baseline
from emogen.prediction.ensemble import load_run
from emogen.prediction.files import predict_file
from emogen.prediction.tfidf import TfidfClassifier, fit_tfidf
from emogen.task.readers import read_rows
from emogen.task.rows import checked

pytestmark = pytest.mark.slow


def test_words_predict_labels_and_constant_labels_stay_constant():
    texts = ["so happy today", "very happy now", "so sad today", "very sad now"] * 5
    gold = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]] * 5)
    prob = fit_tfidf(texts, gold)(["happy happy", "sad sad"])
    assert prob.dtype == np.float32
    assert prob[0, 0] > 0.5
    assert prob[1, 0] < 0.5
    assert prob[0, 1] < 0.5
    assert prob[1, 1] > 0.5
    assert (prob[:, 2] == 1).all()
    assert (prob[:, 3] == 0).all()


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, labels):
    """The folder of a baseline whose posts each contain the name of their label. Tests do not change it."""
    folder = tmp_path_factory.mktemp("baseline")
    recipe = write_recipe(folder, labels)
    words = ["one", "two", "three"] * 3
    posts = [(f"{word} number {k} {name}", (name,)) for k, word in enumerate(words) for name in labels.names]
    write_posts(folder / "train.csv", labels, posts)
    return cross_validate_baseline(recipe, 2)[0]


def test_progress_counts_texts(baseline):
    classifier = load_run(baseline)
    assert isinstance(classifier, TfidfClassifier)
    done = []
    prob = classifier.predict_proba(["it was joy", "fear"], progress=done.append)
    assert sum(done) == 2
    assert [prediction.prob for prediction in classifier.predict(["it was joy", "fear"])] == [
        pytest.approx(row) for row in prob
    ]


@pytest.mark.parametrize("by", ["answer", "thresholds", "stack"])
def test_the_baseline_labels_new_texts_alone_and_in_an_ensemble(baseline, tmp_path, labels, by):
    again = shutil.copytree(baseline, tmp_path / "again")  # stands for another system
    posts = [("today number 77 trust", ()), ("it was joy", ()), ("fear again", ())]
    new = write_posts(tmp_path / "new.csv", labels, posts)
    for runs in ([baseline], [baseline, again]):
        out = tmp_path / f"{len(runs)}.csv"
        predict_file(runs, new, [f"predict_by={by}"], csv_file=out, bar=progress_bar)
        pred = checked(read_rows(out, labels, need_labels=True, need_text=False))
        assert [labels.names_of(row) for row in pred.truth.tolist()] == [("trust",), ("joy",), ("fear",)]


def test_folds_without_a_manifest_are_an_unfinished_cross_validation(baseline, tmp_path):
    """emogen 0.1 wrote no manifest into baselines and cross-validations."""
    folder = shutil.copytree(baseline, tmp_path / "old")
    (folder / "manifest.json").unlink()
    assert isinstance(load_run(folder), TfidfClassifier)
    for left in ("data", "fold-0"):
        (folder / left).mkdir()
        with pytest.raises(ModelError, match="the run has not finished"):
            load_run(folder)
        (folder / left).rmdir()


def test_a_baseline_without_rows_cannot_be_loaded(baseline, tmp_path):
    folder = shutil.copytree(baseline, tmp_path / "empty")
    (folder / "predictions.jsonl").unlink()
    with pytest.raises(InputError, match=r"predictions\.jsonl"):
        load_run(folder)
    assert json.loads((folder / "manifest.json").read_text())["kind"] == "baseline"
