"""Run as a script, this file spreads work over the processes that it is one of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import POSTS, write_posts

from emogen.processes import distribute, shut_down

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SIZES = (0, 1, 7, 1000)
# On a machine without a GPU, its processes speak over gloo. A free port, since another run may have the usual one.
LAUNCH = [BIN / "accelerate", "launch", "--config_file", ROOT / "recipes" / "accelerate" / "ddp.yaml", "--main_process_port", "0"]  # fmt: skip
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def test_one_process_does_all():
    assert distribute(lambda items: [item * 2 for item in items], [3, 1, 2]) == [6, 2, 4]


@pytest.mark.parametrize("n", [2, 3])
def test_every_item_is_done_once_and_all_processes_have_all_results(tmp_path, n):
    command = [*map(str, LAUNCH), "--num_processes", str(n), __file__, str(tmp_path)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(n)]
    for k, size in enumerate(SIZES):
        for of_rank in said:
            assert of_rank[k]["results"] == [i * 2 for i in range(size)]
        assert sorted(i for of_rank in said for i in of_rank[k]["did"]) == list(range(size))
        shares = [len(of_rank[k]["did"]) for of_rank in said]
        assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(("kind", "n", "n_rows"), [("list", 2, 41), ("head", 3, 1), ("list", 2, 0)])
def test_several_processes_predict_what_one_does(tiny_recipe, tmp_path, labels, kind, n, n_rows):
    from emogen.train import main

    main([str(tiny_recipe(max_steps=1, answer=kind))])
    posts = write_posts(tmp_path / "new.csv", labels, [(f"{text} {k}", names) for k in range(4) for text, names in POSTS][:n_rows])  # fmt: skip
    words = ["predict", tmp_path / "run", posts]
    one = [BIN / "emogen", *words, "-o", tmp_path / "1.csv", "--jsonl", tmp_path / "1.jsonl"]
    several = [
        *LAUNCH,
        "--num_processes",
        n,
        "-m",
        "emogen.cli",
        *words,
        "-o",
        tmp_path / "2.csv",
        "--jsonl",
        tmp_path / "2.jsonl",
    ]
    for command in (one, several):
        done = subprocess.run(list(map(str, command)), env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(f"{n_rows} texts ->") == 1  # one process speaks
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()
    first, second = ([json.loads(line) for line in (tmp_path / f"{k}.jsonl").read_text().splitlines()] for k in (1, 2))
    for a, b in zip(first, second, strict=True):
        assert a["prob"] == pytest.approx(b["prob"], abs=1e-5)
        assert a | {"prob": 0} == b | {"prob": 0}


FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: true
num_machines: 1
num_processes: 2
mixed_precision: "no"
dynamo_backend: "no"
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: FULL_STATE_DICT
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_and_score_as_one_does(tiny_recipe, tmp_path, labels, kind):
    """Over gloo, with the same global batch: the same weights, and every held-out row scored once."""
    held = write_posts(tmp_path / "held.csv", labels, [(f"{text} again", names) for text, names in POSTS][:7])
    recipe = tiny_recipe(max_steps=3, eval_file=str(held), lora_dropout=0)  # of 4 rows each: an epoch
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    launch = LAUNCH if kind == "ddp" else [BIN / "accelerate", "launch", "--config_file", tmp_path / "fsdp.yaml"]
    train = [*launch, ROOT / "emogen" / "train.py", recipe]
    for command in ([*train, "per_device_train_batch_size=2", f"output_dir={tmp_path / 'two'}"], [BIN / "emogen", "train", recipe, f"output_dir={tmp_path / 'one'}"]):  # fmt: skip
        done = subprocess.run(list(map(str, command)), env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    two, one = ([json.loads(line) for line in (tmp_path / run / "predictions.jsonl").read_text().splitlines()] for run in ("two", "one"))  # fmt: skip
    assert [record["id"] for record in two] == [record["id"] for record in one]
    assert [record["raw"] for record in two] == [record["raw"] for record in one]


def main(folder):
    said = []
    for size in SIZES:
        did = []

        def work(items, did=did):
            did.extend(items)
            return [item * 2 for item in items]

        said.append({"results": distribute(work, range(size)), "did": did})
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(said))
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
