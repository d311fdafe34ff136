"""What the tests of prompts, their scores and the lab share."""

import pytest
from tiny import MANY, write_posts, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, labels):
    """A recipe with 36 posts. Tests do not change its files."""
    folder = tmp_path_factory.mktemp("recipe")
    path = write_recipe(folder, labels)
    write_posts(folder / "train.csv", labels, MANY)
    return path
