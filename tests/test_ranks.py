"""Run as a script, this file spreads work over the processes that it is one of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import POSTS, write_posts

from emogen.ranks import spread

BIN = Path(sys.executable).parent
SIZES = (0, 1, 7, 1000)
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def test_one_process_does_all():
    assert spread(lambda items: [item * 2 for item in items], [3, 1, 2]) == [6, 2, 4]


@pytest.mark.parametrize("n", [2, 3])
def test_every_item_is_done_once_and_all_processes_have_all_results(tmp_path, n):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", __file__]
    done = subprocess.run([*command, tmp_path], env=ENV, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(n)]
    for k, size in enumerate(SIZES):
        for of_rank in said:
            assert of_rank[k]["results"] == [i * 2 for i in range(size)]
        assert sorted(i for of_rank in said for i in of_rank[k]["did"]) == list(range(size))
        shares = [len(of_rank[k]["did"]) for of_rank in said]
        assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("kind", ["list", "head"])
def test_two_processes_predict_what_one_does(tiny_recipe, tmp_path, labels, kind):
    from emogen.train import main

    main([str(tiny_recipe(max_steps=1, answer=kind))])
    posts = write_posts(tmp_path / "new.csv", labels, [(f"{text} {k}", names) for k in range(4) for text, names in POSTS][:41])  # fmt: skip
    words = ["predict", tmp_path / "run", posts]
    one = [BIN / "emogen", *words, "-o", tmp_path / "1.csv", "--jsonl", tmp_path / "1.jsonl"]
    launch = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    two = [*launch, "-m", "emogen.cli", *words, "-o", tmp_path / "2.csv", "--jsonl", tmp_path / "2.jsonl"]
    for command in (one, two):
        done = subprocess.run(list(map(str, command)), env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("41 texts ->") == 1  # one process speaks
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()
    first, second = ([json.loads(line) for line in (tmp_path / f"{k}.jsonl").read_text().splitlines()] for k in (1, 2))
    for a, b in zip(first, second, strict=True):
        assert a["prob"] == pytest.approx(b["prob"], abs=1e-5)
        assert a | {"prob": 0} == b | {"prob": 0}


def main(folder):
    said = []
    for size in SIZES:
        did = []

        def work(items, did=did):
            did.extend(items)
            return [item * 2 for item in items]

        said.append({"results": spread(work, range(size)), "did": did})
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
