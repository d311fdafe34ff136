import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import ray
from tiny import POSTS
from typer.testing import CliRunner

from emogen.cli.__main__ import app
from emogen.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def _ray():
    """The first test that needs Ray starts it; it ends with the module."""
    yield
    ray.shutdown()


def predict(*words):
    return CliRunner().invoke(app, ["predict", *map(str, words)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in.parquet", "-o", "there"], "there: exists"),
        (["none.parquet", "-o", "out"], "no such file or folder"),
    ],
)
def test_invalid_input_is_refused_before_ray_starts(tiny_run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "in.parquet").write_text("")
    done = predict(tiny_run, *words, "--overwrite", "--engine", "ray")
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)
    assert not ray.is_initialized()


def test_labels_named_as_columns_of_ray_are_refused(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    labels = (tiny_run / "labels.yaml").read_text()
    (tmp_path / "run" / "labels.yaml").write_text(labels.replace("name: fear", "name: prob_joy"))
    (tmp_path / "in.parquet").write_text("")
    done = predict(tmp_path / "run", tmp_path / "in.parquet", "-o", tmp_path / "out", "--engine", "ray")
    assert "columns of its own that are named as labels: prob_joy" in str(done.exception)
    assert not ray.is_initialized()


@pytest.mark.parametrize("words", [["-o", "out", "--jsonl", "out.jsonl"], ["--jsonl", "out.jsonl"]])
def test_ray_writes_only_a_parquet_folder(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    done = predict("run", "in.parquet", *words, "--engine", "ray")
    assert done.exit_code == 2
    assert "give -o FOLDER, and no --jsonl" in " ".join(done.output.split())


@pytest.mark.slow
def test_ray_gives_the_same_labels_as_one_process(tiny_run, tmp_path, labels):
    texts = [f"{text} {k}" for k in range(2) for text, _ in POSTS]
    rows = [{"id": f"p{i}", "text": text, "joy": 7} for i, text in enumerate(texts)]
    (tmp_path / "shards").mkdir()
    for k in range(2):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[k::2]), tmp_path / "shards" / f"{k}.parquet")
    done = predict(tiny_run, tmp_path / "shards", "-o", tmp_path / "out", "--engine", "ray")
    assert done.exit_code == 0, done.output
    assert "24 texts ->" in done.output
    got = {row["id"]: row for row in pyarrow.parquet.read_table(tmp_path / "out").to_pylist()}

    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"id": r["id"], "text": r["text"]}) + "\n" for r in rows))
    assert predict(tiny_run, tmp_path / "new.jsonl", "--jsonl", tmp_path / "out.jsonl").exit_code == 0
    expected = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(got) == sorted(record["id"] for record in expected)
    for record in expected:
        row = got[record["id"]]
        assert row["text"] == record["text"]
        assert row["raw"] == record["raw"]
        assert [name for name in labels.names if row[name]] == record["labels"]
        prob = [row[f"prob_{name}"] for name in labels.names]
        np.testing.assert_allclose(prob, list(record["prob"].values()), atol=1e-5)
