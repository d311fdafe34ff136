"""The commands that evaluate run folders: compare and report."""

import json
import shutil

import numpy as np
import pytest
from tiny import write_run
from typer.testing import CliRunner

from emogen.cli.__main__ import app
from emogen.errors import InputError
from emogen.task.labels import Label, LabelSet


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on the same 40 rows with two labels."""
    folder = tmp_path_factory.mktemp("runs")
    label_set = LabelSet(name="two", labels=(Label(name="joy"), Label(name="anger")))
    posts = [(f"post {i}", [name for k, name in enumerate(label_set.names) if (i + k) % 3 == 0]) for i in range(40)]
    return [write_run(folder / name, label_set, posts=posts, seed=seed) for seed, name in enumerate("ab")]


def emogen(*words):
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200"})


def test_report_writes_page_card_and_pictures(runs, tmp_path):
    run, figures = shutil.copytree(runs[0], tmp_path / "run"), tmp_path / "figures"
    (run / "predictions.jsonl").unlink()  # leaves two pictures
    done = emogen("report", run, "--figures", figures)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"The report is in {run / 'report.html'}\n"
    assert done.stderr.splitlines() == [
        f"The model card is in {run / 'README.md'}",
        f"4 pictures are in {figures}",
    ]
    names = [f"learning-{name}.{kind}" for name in ("f1", "loss") for kind in ("png", "svg")]
    assert sorted(path.name for path in figures.iterdir()) == names


def test_report_refuses_a_folder_that_is_not_a_run(tmp_path):
    done = emogen("report", tmp_path)
    assert isinstance(done.exception, InputError)
    assert "not the folder of a run" in str(done.exception)


def test_compare_prints_a_table_or_json_and_draws_a_picture(runs, tmp_path):
    picture = tmp_path / "comparison.svg"
    done = emogen("compare", *runs, "--by", "answer", "--ensemble", "--figure", picture)
    assert done.exit_code == 0, done.output
    assert "40 rows; labels decided by answer" in done.stdout
    assert "mean of 2" in done.stdout
    assert "mean of 2" in picture.read_text()
    systems = json.loads(emogen("compare", *runs, "--json").stdout)
    assert [system["name"] for system in systems] == ["a", "b"]
    difference = systems[1]["metrics"]["f1_macro"] - systems[0]["metrics"]["f1_macro"]
    assert systems[1]["difference"] == pytest.approx(difference)
    assert np.diff(systems[1]["interval"]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--by", "vote"], "not vote"), (["--figure", "x.jpg"], "expected a file name that ends with .svg, .png, .pdf")],
)
def test_compare_refuses_bad_options(runs, options, message):
    done = emogen("compare", *runs, *options)
    assert done.exit_code == 2
    assert message in done.output
