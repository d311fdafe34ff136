"""Which labelled rows are the nearest to a text, by hand-made vectors."""

import sys

import numpy as np
import pytest

from emogen.prediction.neighbours import Neighbours
from emogen.task.recipe import RecipeError, is_encoder, load_recipe
from emogen.task.rows import Rows

TEXTS = ["a", "b", "B ", "c", "d"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Functions of the user: `angle` turns by 30 degrees for each letter after a, and is longer for later ones;
    `same` is the same for all."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vectors.py").write_text(
        "import math\n"
        "def angle(texts):\n"
        "    turns = [ord(text.strip().lower()) - ord('a') for text in texts]\n"
        "    return [[(1 + t) * math.cos(t * math.pi / 6), (1 + t) * math.sin(t * math.pi / 6)] for t in turns]\n"
        "def same(texts):\n    return [[1, 1] for text in texts]\n"
        "def nothing(texts):\n    return [[0, 0] for text in texts]\n"
    )
    yield
    sys.modules.pop("vectors", None)


def rows():
    gold = np.zeros((len(TEXTS), 2), dtype=np.int8)
    return Rows("rows.csv", list("01234"), TEXTS, gold, list(range(5)))


@pytest.mark.parametrize(
    "features", [["vectors:angle"], ["vectors:angle", "vectors:same"], ["vectors:nothing", "vectors:angle"]]
)
def test_the_cosine_decides_and_no_text_is_shown_twice_or_beside_itself(module, features):
    found = Neighbours(rows(), features).nearest(["a", "e", "b"], 2)
    assert [near.texts for near in found] == [["c", "b"], ["c", "d"], ["c", "a"]]


def test_the_words_of_a_text_decide_by_default():
    texts = ["my dog is happy", "rain again", "the cat is happy"]
    known = Rows("rows.csv", list("012"), texts, np.zeros((3, 2), dtype=np.int8), [1, 2, 3])
    (near,) = Neighbours(known).nearest(["a cat"], 1)
    assert near.texts == ["the cat is happy"]


@pytest.mark.parametrize("name", ["sentence-transformers/all-MiniLM-L6-v2", "./minilm", "/models/minilm", "C:/minilm"])
def test_a_name_with_a_slash_is_an_encoder_and_no_code(name, tmp_path):
    assert is_encoder(name)
    (tmp_path / "own.yaml").write_text(f"train_file: sample/train.csv\nmodel_name_or_path: x/y\nfeatures: [{name}]\n")
    assert load_recipe(tmp_path / "own.yaml").features == [name]
    (tmp_path / "own.yaml").write_text("train_file: x.csv\nmodel_name_or_path: x/y\nfeatures: [os:remove]\n")
    with pytest.raises(RecipeError, match="a file cannot run code"):
        load_recipe(tmp_path / "own.yaml")
