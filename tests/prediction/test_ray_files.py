import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import ray
from tiny import POSTS
from typer.testing import CliRunner

from emogen.cli.__main__ import app
from emogen.errors import InputError
from emogen.train import main as train


@pytest.fixture
def run(tiny_recipe, tmp_path):
    train([str(tiny_recipe(max_steps=1))])
    return tmp_path / "run"


@pytest.fixture
def predict():
    yield lambda *words: CliRunner().invoke(app, ["predict", *map(str, words)])
    ray.shutdown()


def test_a_fleet_labels_as_one_machine_does(run, tmp_path, labels, predict):
    rows = [{"id": f"p{i}", "text": f"{text} {k}", "joy": 7} for i, (k, (text, _)) in enumerate((k, post) for k in range(3) for post in POSTS)]  # fmt: skip
    (tmp_path / "shards").mkdir()
    for k in range(2):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[k::2]), tmp_path / "shards" / f"{k}.parquet")
    done = predict(run, tmp_path / "shards", "-o", tmp_path / "out", "--engine", "ray")
    assert done.exit_code == 0, done.output
    assert "36 texts ->" in done.output
    got = {row["id"]: row for row in pyarrow.parquet.read_table(tmp_path / "out").to_pylist()}

    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"id": r["id"], "text": r["text"]}) + "\n" for r in rows))
    assert predict(run, tmp_path / "new.jsonl", "--jsonl", tmp_path / "out.jsonl").exit_code == 0
    expected = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(got) == sorted(record["id"] for record in expected)
    for record in expected:
        row = got[record["id"]]
        assert row["text"] == record["text"]
        assert row["raw"] == record["raw"]
        assert [name for name in labels.names if row[name]] == record["labels"]
        np.testing.assert_allclose([row[f"prob_{name}"] for name in labels.names], list(record["prob"].values()), atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["in.parquet", "-o", "there"], "there: exists"),
        (["none.parquet", "-o", "out"], "no such file or folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(run, tmp_path, monkeypatch, predict, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "in.parquet").write_text("")
    done = predict(run, *words, "--overwrite", "--engine", "ray")
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)
    assert not ray.is_initialized()
