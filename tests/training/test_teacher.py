"""The teacher of a head: targets between labels and probabilities of baselines."""

import numpy as np
import pytest
from tiny import invented_posts, write_posts, write_recipe

from emogen.evaluation.results import read_scored
from emogen.prediction.baseline import cross_fit_baseline
from emogen.task.labels import load_label_set
from emogen.task.readers import read_rows
from emogen.task.recipe import RecipeError, load_recipe
from emogen.task.splits import load_splits, make_folds
from emogen.train import main
from emogen.training.teacher import soften


@pytest.fixture
def rows(tmp_path, labels):
    return read_rows(write_posts(tmp_path / "posts.csv", labels, invented_posts(60)), labels)[0]


def recipe_of(tmp_path, labels, *overrides):
    return load_recipe(write_recipe(tmp_path, labels), ["answer=head", *overrides])


def test_targets_lie_between_labels_and_cross_fitted_probabilities(rows, tmp_path, labels):
    half, all_of_it = (soften(rows, recipe_of(tmp_path, labels, f"teacher_weight={weight}")) for weight in (0.5, 1))
    assert half.targets == pytest.approx((all_of_it.targets + rows.truth) / 2, abs=1e-6)
    assert np.array_equal(half.truth, rows.truth)
    # A regression on one member keeps the order of its probabilities within a fold.
    folds = make_folds(rows, 5, 42)
    alone = cross_fit_baseline(rows.texts, rows.truth, folds)
    joy = labels.names.index("joy")
    for fold in range(5):
        held = folds == fold
        assert np.array_equal(np.argsort(all_of_it.targets[held, joy]), np.argsort(alone[held, joy]))


def test_a_head_is_trained_with_a_teacher_and_scored_on_certain_labels(tmp_path, labels, caplog):
    mine = write_posts(tmp_path / "mine.csv", labels, invented_posts(40))
    keys = {"answer": "head", "train_file": str(mine), "eval_file": str(mine), "teacher_weight": 0.5, "max_steps": 1}
    with caplog.at_level("INFO"):
        main([str(write_recipe(tmp_path, labels, **keys))])
    assert "The teacher is fitted to the training rows: tfidf" in caplog.text
    assert set(np.unique(read_scored(tmp_path / "run", labels).gold)) == {0, 1}


def test_a_teacher_is_for_heads_with_labels_that_do_not_exclude_each_other(tmp_path, labels):
    path = write_recipe(tmp_path, labels)
    with pytest.raises(RecipeError, match="teacher_weight: only for answer: head"):
        load_recipe(path, ["teacher_weight=0.5"])
    with pytest.raises(RecipeError, match="teacher_weight: cannot be combined with soft_labels"):
        load_recipe(path, ["answer=head", "teacher_weight=0.5", "soft_labels=true"])
    single = load_label_set("semeval2018").model_copy(update={"exactly_one": True})
    splits, problems = load_splits(recipe_of(tmp_path, labels, "teacher_weight=0.5"), single)
    assert splits is None
    assert "teacher_weight: not for" in "\n".join(map(str, problems))
