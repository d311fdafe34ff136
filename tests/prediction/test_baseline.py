import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import write_posts, write_recipe

from emogen.console import progress_bar
from emogen.errors import InputError, ModelError
from emogen.experiments.crossval import cross_validate_baseline
from emogen.model.emoji import emoji_features, prepare
from emogen.prediction.baseline import BaselineClassifier, cross_fit_baseline, fit_baseline
from emogen.prediction.ensemble import load_run, load_runs
from emogen.prediction.files import predict_file
from emogen.task.readers import read_rows
from emogen.task.recipe import RecipeError, load_recipe
from emogen.task.rows import checked

pytestmark = pytest.mark.slow


def test_words_predict_labels_and_constant_labels_stay_constant():
    texts = ["so happy today", "very happy now", "so sad today", "very sad now"] * 5
    gold = np.array([[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]] * 5)
    prob = fit_baseline(texts, gold)(["happy happy", "sad sad"])
    assert prob.dtype == np.float32
    assert prob[0, 0] > 0.5
    assert prob[1, 0] < 0.5
    assert prob[0, 1] < 0.5
    assert prob[1, 1] > 0.5
    assert (prob[:, 2] == 1).all()
    assert (prob[:, 3] == 0).all()


def test_texts_without_words_are_told_apart_by_their_characters():
    texts, gold = ["😀🎉", "😀🎉", "😡🌧", "😡🌧"] * 5, np.array([[1], [1], [0], [0]] * 5)
    happy, angry = fit_baseline(texts, gold)(["😀🎉", "😡🌧"])[:, 0]
    assert happy > 0.5 > angry


def test_texts_that_share_nothing_are_too_few():
    with pytest.raises(InputError, match="no sequence of characters is in 2 or more of 2 texts; more rows are needed"):
        fit_baseline(["one", "你好"], np.array([[0], [1]]))


@pytest.fixture
def own_features(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def shouts(texts):\n    return [[text.count('!'), 1] for text in texts]\n\n"
        "def broken(texts):\n    return [1.0 for text in texts]\n\nnumber = 7\n"
    )
    yield "mine:shouts"
    sys.modules.pop("mine", None)


def test_features_of_the_user_are_averaged_with_those_of_emogen(own_features):
    texts, gold = ["no", "no!", "yes!!!", "yes"] * 200, np.array([[0], [0], [1], [0]] * 200)
    new = ["no!!!!", "yes"]
    both = fit_baseline(texts, gold, features=["tfidf", own_features])(new)
    alone = [fit_baseline(texts, gold, features=[name])(new) for name in ("tfidf", own_features)]
    np.testing.assert_allclose(both, (alone[0] + alone[1]) / 2, rtol=1e-6)
    assert alone[1][0, 0] > 0.5 > alone[1][1, 0]


def test_features_are_computed_once_for_all_folds(own_features):
    (Path("mine.py")).write_text(
        "calls = []\ndef shouts(texts):\n    calls.append(texts)\n    return [[len(t)] for t in texts]\n"
    )
    texts, gold, folds = ["a", "bb"] * 10, np.array([[0], [1]] * 10), np.arange(20) // 10
    prob = cross_fit_baseline(texts, gold, folds, features=[own_features])
    assert sys.modules["mine"].calls == [texts]
    expected = fit_baseline(texts[10:], gold[10:], features=[own_features])(texts[:10])
    np.testing.assert_allclose(prob[:10], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:shouts", "No module named 'nowhere'"),
        ("mine:whispers", "has no attribute 'whispers'"),
        ("mine:number", "not a function"),
        ("mine:broken", r"expected an array of 2 rows of finite numbers, got one of shape \(2,\)"),
    ],
)
def test_features_that_cannot_be_used_are_an_error(own_features, name, message):
    with pytest.raises(InputError, match=message):
        fit_baseline(["a", "b"], np.array([[0], [1]]), features=[name])


def test_only_the_command_line_names_code(own_features, baseline):
    with pytest.raises(
        RecipeError, match="features: words: expected tfidf, emoji, MODULE:FUNCTION, or a sentence encoder"
    ):
        load_recipe("recipes/demo.yaml", ["features=[words]"])
    folder = shutil.copytree(baseline, Path("with-own"))
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace("- tfidf", f"- {own_features}"))
    with pytest.raises(RecipeError, match=r"features: mine:shouts: a file cannot run code; add features="):
        load_run(folder)
    allowed = f"features=[tfidf,{own_features}]"
    both = [one.predict_proba(["it was joy!"]) for one in load_runs([baseline, folder], [allowed])]
    assert both[1].shape == (1, 11)
    np.testing.assert_array_equal(both[0], load_run(baseline).predict_proba(["it was joy!"]))  # keeps its own features
    with pytest.raises(InputError, match=r"features=\[emoji\].* was made with features: ..tfidf.., and its model"):
        load_run(baseline, ["features=[emoji]"])


def test_emoji_are_asked_about_prepared_texts():
    assert prepare("So HAPPY!!for   you ...") == "so happy !! for you ..."


@pytest.mark.network
def test_the_emoji_of_a_text_tell_joy_from_sorrow():
    features = emoji_features(["so happy, best day ever", "my grandma died", "so happy, best day ever"])
    assert features.shape == (3, 151)
    np.testing.assert_array_equal(features[0], features[2])
    assert np.corrcoef(features[0], features[1])[0, 1] < 0.8


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
    assert isinstance(classifier, BaselineClassifier)
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
    assert isinstance(load_run(folder), BaselineClassifier)
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
