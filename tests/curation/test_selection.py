"""Which rows to label next."""

import csv

import numpy as np
import pytest
from tiny import write_run

from emogen.curation.selection import choose, select_rows, worth
from emogen.errors import InputError


def test_hesitation_counts_by_the_nearness_to_the_threshold():
    prob = np.array([[[0.2], [0.1], [0.0], [0.6], [1.0]]])
    assert worth(prob, np.array([0.2])) == pytest.approx([1, 0.5, 0, 0.5, 0])


def test_disagreement_and_rare_labels_count_more():
    agreed = np.full((2, 1, 1), 0.5)
    split = np.array([[[0.1]], [[0.9]]])
    assert worth(split, np.array([0.5]))[0] == pytest.approx(worth(agreed, np.array([0.5]))[0] + 0.8)
    # The first row hesitates about a label of 50 %, the second one about a label of 2 %.
    prob = np.array([[[0.5, 0.0], [1.0, 0.02], [0.0, 0.04]]])
    common, rare, _ = worth(prob, np.array([0.5, 0.02]))
    assert rare > common


def test_no_text_is_chosen_twice_or_known_or_empty():
    texts = ["one two three", "One  two three", "four five six", "", "seven eight nine"]
    worths = np.array([5.0, 4, 3, 2, 1])
    assert choose(texts, worths, 10, known=["FOUR five six"]) == [0, 4]


def test_of_similar_texts_a_different_one_comes_before_the_second():
    texts = ["the cat sat on the mat", "the cat sat on the mat again", "quantum physics lecture"]
    assert choose(texts, np.array([1.0, 0.99, 0.6]), 2) == [0, 2]


def test_texts_of_emoji_differ_by_their_characters():
    assert choose(["😀😀", "😀😀😀", "😡"], np.array([1.0, 0.99, 0.6]), 2) == [0, 2]


def test_runs_that_cannot_decide_together_are_refused_before_their_models_are_asked(tmp_path, labels):
    runs = [write_run(tmp_path / name, labels, n) for name, n in (("a", 10), ("b", 12))]
    (tmp_path / "new.csv").write_text("ID,Tweet\n1,one\n")
    with pytest.raises(InputError, match=r"b/predictions\.jsonl: not the same rows as in"):
        select_rows(runs, tmp_path / "new.csv", 1, bar=lambda title, n: pytest.fail("a model is asked"))


def test_rows_to_label_are_written_for_a_person(tmp_path, labels, emogen):
    emogen("baseline", "recipes/demo.yaml", "eval_fraction=0", f"output_dir={tmp_path / 'base'}")
    done = emogen("select", tmp_path / "base", "sample/test.csv", "-n", 10, "-o", tmp_path / "out.csv")
    assert "10 rows to label" in done.out
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["Tweet"] for row in rows}) == 10
    assert all(row["labels"] == "" for row in rows)
    assert "exists" in emogen("select", tmp_path / "base", "sample/test.csv", "-o", tmp_path / "out.csv", code=2).err
    # All of these rows are labelled already.
    none = emogen("select", tmp_path / "base", "sample/train.csv", "-o", tmp_path / "none.csv", code=2).err
    assert "no row is left to label" in none
    assert not (tmp_path / "none.csv").exists()
