import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny import POSTS, kill_at, write_posts
from typer.testing import CliRunner

from emogen import console
from emogen.cli.__main__ import app
from emogen.errors import InputError
from emogen.prediction import files as prediction_files
from emogen.prediction.files import predict_file
from emogen.task.rows import DataError

pytestmark = pytest.mark.slow

MANY = [(f"{text} {k}", names) for k in range(2) for text, names in POSTS]
OLD = Path(__file__).parent.parent / "data" / "old_run"


@pytest.fixture
def predict(tiny_run, tmp_path):
    """Labels a file into out.csv and out.jsonl; returns the summary, and the number of texts that the model was asked."""

    def predict(source, stop_after=None, **options):
        totals = []

        def bar(title, total):
            if stop_after is not None and len(totals) == stop_after:  # answers and probabilities come in one pass
                raise KeyboardInterrupt
            totals.append(total)
            return console.progress_bar(title, total)

        files = {"csv_file": tmp_path / "out.csv", "jsonl_file": tmp_path / "out.jsonl"}
        summary = predict_file([tiny_run], source, bar=bar, **files, **options)
        return summary, sum(totals)

    return predict


def read_complete(folder):
    """The records of out.jsonl; out.csv has the same rows, and nothing partial is left."""
    ids = [line.partition(",")[0] for line in (folder / "out.csv").read_text().splitlines()]
    records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert ids[1:] == [record["id"] for record in records]
    assert not list(folder.glob("*.partial*"))
    return records


def test_the_chunk_size_makes_no_difference(predict, tmp_path, labels, monkeypatch):
    source = write_posts(tmp_path / "new.csv", labels, MANY)
    summary, n_asked = predict(source)
    expected = read_complete(tmp_path)
    assert (summary.n_rows, n_asked, summary.statuses["exact"]) == (24, 24, 24)
    monkeypatch.setattr(prediction_files, "CHUNK", 7)
    predict(source, overwrite=True)
    for a, b in zip(read_complete(tmp_path), expected, strict=True):
        assert a["prob"] == pytest.approx(b["prob"], abs=1e-5)
        assert a | {"prob": 0} == b | {"prob": 0}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_an_interrupted_prediction_resumes(predict, tmp_path, labels, monkeypatch, kind):
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
        predict(source, stop_after=2)
    assert not (tmp_path / "out.csv").exists()
    with (tmp_path / "out.jsonl.partial").open("a") as file:
        file.write('{"id": "p20", "te')  # as a kill in the middle of a chunk leaves it
    summary, n_asked = predict(source)
    assert (summary.n_rows, n_asked) == (24, 4)
    assert [record["id"] for record in read_complete(tmp_path)] == [f"p{i}" for i in range(24)]


def test_an_invalid_row_loses_no_finished_chunk(predict, tmp_path, labels, monkeypatch):
    monkeypatch.setattr(prediction_files, "CHUNK", 10)
    monkeypatch.setattr("emogen.task.readers.LOOK_AHEAD", 10)  # errors in these rows are found before the first chunk
    source = write_posts(tmp_path / "new.csv", labels, MANY)
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*lines[:23], "p22,oops\n", *lines[24:]]))
    with pytest.raises(DataError, match=r"new\.csv:24: 2 columns"):
        predict(source)
    source.write_text("".join(lines))
    assert predict(source)[1] == 4
    assert len(read_complete(tmp_path)) == 24


def test_other_work_is_not_resumed(predict, tmp_path, labels, monkeypatch):
    monkeypatch.setattr(prediction_files, "CHUNK", 10)
    source = write_posts(tmp_path / "new.csv", labels, MANY)
    with pytest.raises(KeyboardInterrupt):
        predict(source, stop_after=2)
    with pytest.raises(InputError, match="belongs to other, interrupted work"):
        predict(source, overrides=["decode=free"])
    changed = [("something else", ()), *MANY[1:]]
    write_posts(source, labels, changed)
    with pytest.raises(InputError, match="not the rows that were labelled"):
        predict(source)
    write_posts(source, labels, MANY[:15])  # ends in the middle of the second chunk
    with pytest.raises(InputError, match="not the rows that were labelled"):
        predict(source)
    write_posts(source, labels, MANY)
    assert predict(source, overrides=["decode=constrained"], overwrite=True)[1] == 24
    assert len(read_complete(tmp_path)) == 24


def test_a_file_without_rows_gives_files_without_rows(predict, tmp_path, labels, caplog):
    (tmp_path / "empty.csv").write_text("ID,Tweet\n")
    summary, n_asked = predict(tmp_path / "empty.csv")
    assert (summary.n_rows, n_asked) == (0, 0)
    assert "empty.csv: no rows below the header" in caplog.text
    assert (tmp_path / "out.csv").read_text() == ",".join(["ID", *labels.names]) + "\n"
    assert read_complete(tmp_path) == []
    with pytest.raises(DataError, match="no such file"):
        predict(tmp_path / "none.csv", overwrite=True)


def test_long_texts_are_counted_in_the_summary(predict, tmp_path, labels):
    source = write_posts(tmp_path / "new.csv", labels, [("a bus", ()), ("a bus " * 400, ())])
    summary, _ = predict(source)
    assert summary.n_cut == 1
    short, long = read_complete(tmp_path)
    assert "tokens_cut" not in short
    assert long["tokens_cut"] > 0


# The `emogen` command with smaller chunks, so that a kill falls between two of them.
SMALL_CHUNKS = "from emogen.prediction import files; files.CHUNK = 10; from emogen.cli.__main__ import main; main()"


def test_after_a_kill_no_row_is_lost_or_doubled(tiny_run, tmp_path, labels, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    posts = [(f"{text} {k}", names) for k in range(25) for text, names in POSTS]
    words = ["predict", tiny_run, write_posts(tmp_path / "new.csv", labels, posts), "-o", tmp_path / "out.csv"]
    note = tmp_path / "out.csv.partial.json"
    with (tmp_path / "log").open("w") as log:
        kill_at(note.exists, [sys.executable, "-c", SMALL_CHUNKS, *words], stdout=log, stderr=log)
    assert not (tmp_path / "out.csv").exists()
    assert 0 < json.loads(note.read_text())["n_rows"] < len(posts)
    monkeypatch.setattr(prediction_files, "CHUNK", 10)
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    ids = [line.partition(",")[0] for line in (tmp_path / "out.csv").read_text().splitlines()]
    assert ids == ["ID", *(f"p{i}" for i in range(len(posts)))]
    assert not list(tmp_path.glob("*.partial*"))


def test_a_run_of_emogen_0_1_predicts_what_it_was_scored_with(tmp_path):
    lines = (OLD / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    kept = {record["id"]: record for record in map(json.loads, lines)}
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps({"id": row_id, "text": kept[row_id]["text"]}) + "\n" for row_id in kept))
    words = ["predict", OLD / "run", new, "--jsonl", tmp_path / "out.jsonl", f"model_name_or_path={OLD / 'model'}"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == len(kept) == 11
    for record in records:
        before = kept[record["id"]]
        assert record["raw"] == before["raw"]
        assert record["status"] == before["status"]
        assert record["labels"] == before["labels"]
        assert record["prob"] == pytest.approx(before["prob"], abs=1e-4)
