"""Fixtures of the tests of prediction."""

from pathlib import Path

import pytest
from tiny import write_recipe

from emogen.train import main as train


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, labels) -> Path:
    """The folder of a run that was trained for one step. Tests do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    train([str(write_recipe(folder, labels, max_steps=1))])
    return folder / "run"
