"""Rules of the house that nobody should have to remember."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

import emogen
from emogen import paths
from emogen.task.readers import read_rows
from emogen.task.rows import checked, normalise_text

ROOT = Path(__file__).parent.parent


def test_no_module_bears_the_name_of_another():
    """`accelerate launch emogen/train.py` puts emogen/ first on sys.path, where such a module would shadow the other."""
    modules = {path.stem for path in Path(emogen.__file__).parent.glob("*.py")} - {"__init__"}
    assert len(modules) > 10
    installed = {name for names in metadata.packages_distributions() for name in [names]} - {"emogen"}
    assert not modules & (set(sys.stdlib_module_names) | installed)


@pytest.mark.parametrize(("file", "least", "least_a_label"), [("train.csv", 480, 25), ("test.csv", 120, 5)])
def test_the_sample_is_what_it_says(labels, file, least, least_a_label):
    rows = checked(read_rows(paths.shipped(f"sample/{file}"), labels, need_labels=True))
    assert len(rows) >= least
    assert rows.gold.sum(0).min() >= least_a_label
    assert (rows.gold.sum(1) == 0).any()
    assert len({normalise_text(text) for text in rows.texts}) == len(rows)
    # Shares near those of the task's training file.
    expected = [0.372, 0.143, 0.381, 0.182, 0.362, 0.102, 0.290, 0.116, 0.294, 0.053, 0.052]
    assert abs(rows.gold.mean(0) - expected).max() < 0.05


def test_sample_train_and_test_share_no_text(labels):
    train, test = (checked(read_rows(paths.shipped(f"sample/{n}.csv"), labels)) for n in ("train", "test"))
    assert not {normalise_text(text) for text in train.texts} & {normalise_text(text) for text in test.texts}
