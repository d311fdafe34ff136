import logging

import numpy as np
import pytest
from tiny import POSTS, write_posts

from emogen.task.recipe import RecipeError, load_recipe
from emogen.task.rows import DataError, Rows, normalise_text
from emogen.task.splits import all_rows, hold_out, load_splits, make_folds, sample_rows

# 240 different texts, and the twelve posts twice more (once in capitals): 252 different ones in 264 rows.
MANY = [(f"{text} {k}", names) for k in range(20) for text, names in POSTS] + POSTS
MANY += [(f"  {text.upper()}", names) for text, names in POSTS]


def make_rows(labels, posts):
    gold = np.array([labels.vector(names) for _, names in posts], dtype=np.int8)
    n = len(posts)
    return Rows("d.csv", [f"p{i}" for i in range(n)], [text for text, _ in posts], gold, list(range(2, n + 2)))


def recipe_of(tmp_path, labels, posts=POSTS, *overrides):
    train = write_posts(tmp_path / "train.csv", labels, posts)
    path = tmp_path / "r.yaml"
    path.write_text(f"model_name_or_path: m\ntrain_file: {train}\n")
    return load_recipe(path, overrides)


def test_hold_out_is_stratified_and_keeps_the_same_text_together(labels):
    rows = make_rows(labels, MANY)
    kept, held_out = hold_out(rows, 0.25, seed=1)
    assert sorted([*kept, *held_out]) == list(range(len(rows)))
    assert not {normalise_text(rows.texts[i]) for i in kept} & {normalise_text(rows.texts[i]) for i in held_out}
    np.testing.assert_allclose(rows.gold[held_out].mean(0), rows.gold.mean(0), atol=0.05)
    assert np.array_equal(held_out, hold_out(rows, 0.25, seed=1)[1])
    assert not np.array_equal(held_out, hold_out(rows, 0.25, seed=2)[1])


def test_folds_are_balanced_and_keep_the_same_text_together(labels):
    rows = make_rows(labels, MANY)
    folds = make_folds(rows, 4, seed=1)
    assert folds.dtype == np.int64
    assert all(abs(np.sum(folds == fold) - 66) <= 12 for fold in range(4))
    fold_of = dict(zip(map(normalise_text, rows.texts), folds, strict=True))
    assert [fold_of[normalise_text(text)] for text in rows.texts] == folds.tolist()
    for fold in range(4):
        np.testing.assert_allclose(rows.gold[folds == fold].mean(0), rows.gold.mean(0), atol=0.05)
    assert np.array_equal(folds, make_folds(rows, 4, seed=1))
    assert not np.array_equal(folds, make_folds(rows, 4, seed=2))


def test_rows_without_labels_or_different_texts_cannot_be_split(labels):
    rows = make_rows(labels, [("a", ("joy",)), ("A ", ())])
    with pytest.raises(ValueError, match="fewer than two different texts"):
        hold_out(rows, 0.5, 1)
    with pytest.raises(ValueError, match="cannot make 2 folds of 1 different texts"):
        make_folds(rows, 2, 1)
    unlabelled = Rows("d.csv", ["1", "2"], ["a", "b"], None, [2, 3])
    for split in (lambda: hold_out(unlabelled, 0.5, 1), lambda: make_folds(unlabelled, 2, 1)):
        with pytest.raises(ValueError, match=r"d\.csv: no labels to stratify by"):
            split()


def test_a_sample_is_stratified_and_never_larger_than_the_rows(labels):
    rows = make_rows(labels, MANY)
    sample = sample_rows(rows, 60, 1)
    assert [len(sample_rows(rows, n, 1)) for n in (10, 37, 60, 101, 263)] == [10, 37, 60, 101, 263]
    np.testing.assert_allclose(sample.gold.mean(0), rows.gold.mean(0), atol=0.05)
    assert sample.ids == sample_rows(rows, 60, 1).ids
    assert sample_rows(rows, 264, 1) is rows
    assert sample_rows(rows, 10_000, 1) is rows


def test_a_sample_of_unlabelled_rows_has_exactly_n_rows_in_order():
    rows = Rows("d.csv", [str(i) for i in range(9)], list("abcdefghi"), None, list(range(9)))
    sample = sample_rows(rows, 4, 1)
    assert len(sample) == 4
    assert sample.lines == sorted(sample.lines)


def test_without_more_keys_all_rows_are_training_rows(tmp_path, labels):
    splits, problems = load_splits(recipe_of(tmp_path, labels), labels)
    assert (len(splits.train), splits.eval, len(splits.examples), problems) == (12, None, 0, [])


def test_examples_and_held_out_rows_are_not_training_rows(tmp_path, labels):
    splits, problems = load_splits(recipe_of(tmp_path, labels, POSTS, "examples=3", "eval_fraction=0.25"), labels)
    assert problems == []
    assert len(splits.examples) == 3
    parts = [set(rows.ids) for rows in (splits.train, splits.eval, splits.examples)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12
    again, _ = load_splits(recipe_of(tmp_path, labels, POSTS, "examples=3", "eval_fraction=0.25"), labels)
    assert [again.train.ids, again.examples.ids] == [splits.train.ids, splits.examples.ids]


def test_examples_by_coverage_show_each_label_before_one_is_shown_again(tmp_path, labels):
    posts = [(f"a {i}", ("joy",)) for i in range(40)] + [("b", ("anger", "fear")), ("c", ("joy", "fear")), ("d", ())]

    def examples(*overrides):
        keys = [f"{key}={value}" for key, value in (("examples", 4), ("examples_by", "coverage"))]
        splits, _ = load_splits(recipe_of(tmp_path, labels, posts, *keys, *overrides), labels)
        assert len(splits.train) == 39
        return sorted(splits.examples.texts)

    first = examples()
    assert {"b", "d"} < set(first)
    assert "c" not in first  # its labels are shown by then, and 40 rows with joy alone come before it
    assert len([text for text in first if text.startswith("a ")]) == 2
    assert examples() == first
    assert len({tuple(examples(f"seed={k}")) for k in range(5)}) > 1


def test_an_evaluation_file_is_checked_against_the_training_file(tmp_path, labels):
    held_out = write_posts(tmp_path / "eval.csv", labels, [("new", ()), POSTS[0], ("new", ("joy",))])
    splits, problems = load_splits(recipe_of(tmp_path, labels, POSTS, f"eval_file={held_out}"), labels)
    assert splits.eval.texts == ["new", POSTS[0][0], "new"]
    messages = [str(problem) for problem in problems]
    assert f"{held_out}:3: 1 texts also occur in {tmp_path / 'train.csv'}" in messages
    assert f"{held_out}:2, 4: the same text with different labels: 'new'" in messages
    assert {problem.level for problem in problems} == {"warning"}


def test_errors_of_both_files_are_reported_together(tmp_path, labels):
    recipe = recipe_of(tmp_path, labels, POSTS, f"eval_file={tmp_path / 'nowhere.csv'}")
    path = tmp_path / "train.csv"
    path.write_text(path.read_text().replace("p1,", "p0,"))
    splits, problems = load_splits(recipe, labels)
    assert splits is None
    messages = "\n".join(map(str, problems))
    assert "the id 'p0' occurs 2 times" in messages
    assert "nowhere.csv: no such file" in messages


def test_rows_that_cannot_be_held_out_are_an_error(tmp_path, labels):
    splits, problems = load_splits(recipe_of(tmp_path, labels, [("a", ("joy",))], "eval_fraction=0.5"), labels)
    assert splits is None
    assert "cannot hold out rows" in str(problems[-1])


def test_training_needs_rows_beside_the_examples(tmp_path, labels):
    _, problems = load_splits(recipe_of(tmp_path, labels, POSTS[:2], "examples=2"), labels)
    assert str(problems[-1]).endswith("train.csv: no training rows are left")
    assert problems[-1].level == "error"


def test_all_rows_holds_out_none_and_logs_warnings(tmp_path, labels, caplog):
    recipe = recipe_of(tmp_path, labels, [*POSTS, POSTS[0]], "examples=3", "eval_fraction=0.25")
    with caplog.at_level(logging.WARNING):
        assert len(all_rows(recipe, labels)) == 13
    assert "1 texts repeat an earlier one" in caplog.text
    (tmp_path / "train.csv").unlink()
    with pytest.raises(DataError, match="no such file"):
        all_rows(recipe, labels)


def test_soft_labels_are_drawn_and_kept(tmp_path, labels):
    text = "id,text," + ",".join(labels.names) + "\n"
    text += "".join(
        f"{k},post number {k},{','.join(['0.25', '0', '1'] + ['0'] * (len(labels) - 3))}\n" for k in range(2000)
    )
    recipe = recipe_of(tmp_path, labels)
    recipe = recipe.model_copy(update={"soft_labels": True, "train_file": str(tmp_path / "soft.csv")})
    (tmp_path / "soft.csv").write_text(text)
    train = load_splits(recipe, labels)[0].train
    assert train.targets[0].tolist()[:3] == [0.25, 0, 1]
    assert train.truth.mean(axis=0)[:3] == pytest.approx([0.25, 0, 1], abs=0.03)
    assert np.array_equal(train.truth, load_splits(recipe, labels)[0].train.truth)
    with pytest.raises(DataError, match="soft_labels: rows with probabilities"):
        all_rows(recipe, labels)


@pytest.mark.parametrize("override", ["eval_fraction=0.1", "select_best={}"])
def test_soft_labels_are_not_scored(tmp_path, labels, override):
    with pytest.raises(RecipeError, match="cannot be combined with soft_labels"):
        recipe_of(tmp_path, labels, POSTS, "soft_labels=true", override)


def test_a_single_certain_label_is_not_soft(tmp_path, labels):
    single = labels.model_copy(update={"exactly_one": True})
    splits, problems = load_splits(recipe_of(tmp_path, labels, POSTS, "soft_labels=true"), single)
    assert splits is None
    assert "says exactly_one" in str(problems[-1])


def test_the_splits_of_a_local_dataset_folder(tmp_path, labels, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "posts"
    folder.mkdir()
    write_posts(folder / "train.csv", labels)
    write_posts(folder / "test.csv", labels, [("new", ("trust",))])
    path = tmp_path / "r.yaml"
    path.write_text(f"model_name_or_path: m\ndataset_name: {folder}\ndataset_test_split: test\n")
    splits, problems = load_splits(load_recipe(path), labels)
    assert (len(splits.train), splits.eval.texts, problems) == (12, ["new"], [])
