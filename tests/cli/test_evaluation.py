"""The commands that evaluate run folders: compare and report."""

import json
import re
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


GOLD = "comment_id,Tweet,spam,ham\nx9,a,1,0\nx7,b,0,1\nx5,c,1,1\n"
SHUFFLED = "comment_id,spam,ham\nx5,1,1\nx9,1,0\nx7,0,1\n"


@pytest.fixture
def two(tmp_path):
    (tmp_path / "two.yaml").write_text("name: two\nlabels:\n  - name: spam\n  - name: ham\n")
    return tmp_path / "two.yaml"


@pytest.mark.parametrize(
    ("gold", "pred", "options", "f1_macro"),
    [
        (GOLD, SHUFFLED, [], 1.0),
        (GOLD.replace("comment_id", "Index"), SHUFFLED.replace("comment_id", "Index"), [], 1.0),
        (GOLD.replace("comment_id", "tweetID"), SHUFFLED.replace("comment_id", "ID"), [], 1.0),
        (GOLD.replace("comment_id", "k"), SHUFFLED.replace("comment_id", "k"), ["--id-column", "k"], 1.0),
        (GOLD, "comment_id,tags\nx5,ham\nx9,spam\nx7,ham\n", ["--labels-column", "tags"], None),
    ],
)  # fmt: skip
def test_rows_are_matched_by_their_ids_whatever_the_column_is_called(
    emogen, tmp_path, two, gold, pred, options, f1_macro
):
    (tmp_path / "gold.csv").write_text(gold)
    (tmp_path / "pred.csv").write_text(pred)
    if f1_macro is None:  # the gold file has no such column
        words = ["score", tmp_path / "gold.csv", tmp_path / "pred.csv", "--labels", two, *options]
        assert "gold.csv: labels_column is 'tags', but the columns are" in emogen(*words, code=2).err
        (tmp_path / "gold.csv").write_text("comment_id,tags\nx9,spam\nx7,ham\nx5,ham\n")
        f1_macro = 1.0
    printed = emogen("score", tmp_path / "gold.csv", tmp_path / "pred.csv", "--labels", two, "--json", *options)
    assert json.loads(printed.out)["f1_macro"] == f1_macro


@pytest.mark.parametrize(
    ("gold", "pred", "message"),
    [
        (GOLD, "spam,ham\n1,0\n0,1\n1,1\n", "pred.csv: no id column, but .*gold.csv has 'comment_id'"),
        ("Tweet,spam,ham\na,1,0\nb,0,1\n", "Tweet,spam,ham\nb,0,1\na,1,0\n", "pred.csv: no id column, and other texts"),
        (GOLD, SHUFFLED.replace("x5", "x4"), "pred.csv: no row for 1 ids of .*: x5"),
    ],
)
def test_rows_that_cannot_be_matched_are_not_scored(emogen, tmp_path, two, gold, pred, message):
    (tmp_path / "gold.csv").write_text(gold)
    (tmp_path / "pred.csv").write_text(pred)
    printed = emogen("score", tmp_path / "gold.csv", tmp_path / "pred.csv", "--labels", two, code=2)
    assert re.search(message, printed.err)


def test_files_without_ids_are_matched_by_line_and_that_is_said(emogen, tmp_path, two, caplog):
    (tmp_path / "gold.csv").write_text("spam,ham\n1,0\n0,1\n")
    printed = emogen("score", tmp_path / "gold.csv", tmp_path / "gold.csv", "--labels", two, "--json")
    assert json.loads(printed.out)["f1_macro"] == 1.0
    assert "gold.csv: no id column" in caplog.text
    assert "the ids are the line numbers" in caplog.text


def test_predictions_without_a_label_count_as_wrong_where_each_text_has_one(emogen, tmp_path, caplog):
    (tmp_path / "one.yaml").write_text("name: one\nexactly_one: true\nlabels: [{name: joy}, {name: anger}]\n")
    (tmp_path / "gold.csv").write_text("ID,joy,anger\n" + "".join(f"r{i},{i % 2},{1 - i % 2}\n" for i in range(8)))
    (tmp_path / "pred.csv").write_text((tmp_path / "gold.csv").read_text().replace("r3,1,0", "r3,0,0"))
    words = ("score", tmp_path / "gold.csv", tmp_path / "pred.csv", "--labels", tmp_path / "one.yaml")
    assert json.loads(emogen(*words, "--json").out)["exact_match"] == 7 / 8
    assert "pred.csv: 1 row without a label" in caplog.text
    (tmp_path / "pred.csv").write_text((tmp_path / "gold.csv").read_text().replace("r3,1,0", "r3,1,1"))
    assert "pred.csv:5: several labels" in emogen(*words, code=2).err
