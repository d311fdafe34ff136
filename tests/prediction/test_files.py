import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny import POSTS, write_posts

from emogen import console
from emogen.errors import InputError
from emogen.prediction import files as prediction_files
from emogen.prediction.files import predict_file
from emogen.task.rows import DataError
from emogen.train import main as train

MANY = [(f"{text} {k}", names) for k in range(3) for text, names in POSTS]


@pytest.fixture
def run(tiny_recipe, tmp_path):
    train([str(tiny_recipe(max_steps=1))])
    return tmp_path / "run"


@pytest.fixture
def label(run, tmp_path):
    """Labels a file into out.csv and out.jsonl; gives the number of texts that a model was asked about."""

    def label(source, stop_after=None, **how):
        asked = []

        def bar(what, total):
            if stop_after is not None and len(asked) == 2 * stop_after:  # answers and probabilities of each chunk
                raise KeyboardInterrupt
            asked.append(total)
            return console.progress_bar(what, total)

        files = {"csv_file": tmp_path / "out.csv", "jsonl_file": tmp_path / "out.jsonl"}
        summary = predict_file([run], source, bar=bar, **files, **how)
        return summary, sum(asked) // 2

    return label


def whole(tmp_path):
    ids = [line.partition(",")[0] for line in (tmp_path / "out.csv").read_text().splitlines()]
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ids[1:] == [record["id"] for record in records]
    assert not list(tmp_path.glob("*.partial*"))
    return records


def test_chunks_make_no_difference(label, tmp_path, labels, monkeypatch):
    source = write_posts(tmp_path / "new.csv", labels, MANY)
    summary, asked = label(source)
    expected = whole(tmp_path)
    assert (summary.n_rows, asked, summary.statuses["exact"]) == (36, 36, 36)
    monkeypatch.setattr(prediction_files, "CHUNK", 7)
    label(source)
    for a, b in zip(whole(tmp_path), expected, strict=True):
        assert a["prob"] == pytest.approx(b["prob"], abs=1e-5)
        assert a | {"prob": 0} == b | {"prob": 0}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_what_was_interrupted_goes_on(label, tmp_path, labels, monkeypatch, kind):
    monkeypatch.setattr(prediction_files, "CHUNK", 10)
    source = tmp_path / f"new.{kind}"
    rows = [{"id": f"p{i}", "text": text} for i, (text, _) in enumerate(MANY)]
    if kind == "csv":
        write_posts(source, labels, MANY)
    elif kind == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    with pytest.raises(KeyboardInterrupt):
        label(source, stop_after=2)
    assert not (tmp_path / "out.csv").exists()
    with (tmp_path / "out.jsonl.partial").open("a") as file:
        file.write('{"id": "p20", "te')  # as a kill in the middle of a chunk leaves it
    summary, asked = label(source)
    assert (summary.n_rows, asked) == (36, 16)
    assert [record["id"] for record in whole(tmp_path)] == [f"p{i}" for i in range(36)]


def test_a_bad_row_costs_nothing_that_was_done(label, tmp_path, labels, monkeypatch):
    monkeypatch.setattr(prediction_files, "CHUNK", 10)
    source = write_posts(tmp_path / "new.csv", labels, MANY)
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*lines[:26], "p25,oops\n", *lines[27:]]))
    with pytest.raises(DataError, match=r"new\.csv:27: 2 columns"):
        label(source)
    source.write_text("".join(lines))
    assert label(source)[1] == 16
    assert len(whole(tmp_path)) == 36


def test_other_work_does_not_go_on(label, run, tmp_path, labels, monkeypatch):
    monkeypatch.setattr(prediction_files, "CHUNK", 10)
    source = write_posts(tmp_path / "new.csv", labels, MANY)
    with pytest.raises(KeyboardInterrupt):
        label(source, stop_after=2)
    with pytest.raises(InputError, match="other work that was broken off"):
        label(source, overrides=["decode=free"])
    changed = [("something else", ()), *MANY[1:]]
    write_posts(source, labels, changed)
    with pytest.raises(InputError, match="not those that were labelled"):
        label(source)
    write_posts(source, labels, MANY[:15])  # ends in the middle of what is written
    with pytest.raises(InputError, match="not those that were labelled"):
        label(source)
    write_posts(source, labels, MANY)
    assert label(source, overrides=["decode=constrained"], overwrite=True)[1] == 36
    assert len(whole(tmp_path)) == 36


def test_a_file_without_rows_makes_files_without_rows(label, tmp_path, labels, caplog):
    (tmp_path / "empty.csv").write_text("ID,Tweet\n")
    summary, asked = label(tmp_path / "empty.csv")
    assert (summary.n_rows, asked) == (0, 0)
    assert "empty.csv: no rows below the header" in caplog.text
    assert (tmp_path / "out.csv").read_text() == ",".join(["ID", *labels.names]) + "\n"
    assert whole(tmp_path) == []
    with pytest.raises(DataError, match="no such file"):
        label(tmp_path / "none.csv")


def test_after_a_kill_no_row_is_lost_or_doubled(run, tmp_path, labels):
    posts = [(f"{text} {k}", names) for k in range(220) for text, names in POSTS]  # two chunks and some
    source = write_posts(tmp_path / "new.csv", labels, posts)
    command = [Path(sys.executable).parent / "emogen", "predict", run, source, "-o", tmp_path / "out.csv"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out.csv.partial.json").exists():
        assert process.poll() is None
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    process.wait()
    assert not (tmp_path / "out.csv").exists()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids = [line.partition(",")[0] for line in (tmp_path / "out.csv").read_text().splitlines()]
    assert ids == ["ID", *(f"p{i}" for i in range(len(posts)))]
