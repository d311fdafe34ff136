import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import POSTS, write_posts
from typer.testing import CliRunner

from emogen.cli.__main__ import app
from emogen.processes import distribute, is_main_process, world_size
from emogen.train import main as train

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# Without a GPU, the processes communicate over gloo. Port 0 is any free one, as another run may use the default.
LAUNCH = [BIN / "accelerate", "launch", "--config_file", ROOT / "recipes" / "accelerate" / "ddp.yaml", "--main_process_port", "0"]  # fmt: skip
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


SIZES = (0, 1, 7, 1000)
# Writes what each process returns and works on, for several numbers of items.
SHARE_WORK = f"""
import json, os
from pathlib import Path
from emogen.processes import distribute, shut_down

rounds = []
for size in {SIZES}:
    share = []
    results = distribute(lambda items: [share.append(item) or item * 2 for item in items], range(size))
    rounds.append({{"results": results, "share": share}})
Path(os.environ["RANK"]).with_suffix(".json").write_text(json.dumps(rounds))
shut_down()
"""


def launch(*command, cwd=None):
    done = subprocess.run(list(map(str, command)), env=ENV, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def read_records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_single_process_is_the_main_one_and_works_on_all_items(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (world_size(), is_main_process()) == (1, True)
    assert distribute(lambda items: [item * 2 for item in items], [3, 1, 2]) == [6, 2, 4]


def test_rank_and_world_size_are_those_of_the_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert (world_size(), is_main_process()) == (3, False)


def test_without_items_no_work_is_called(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distribute(lambda items: 1 / 0, []) == []


@pytest.mark.parametrize("backend", ["FSDP", "DEEPSPEED"])
def test_each_process_of_a_sharded_model_works_on_all_items(monkeypatch, backend):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(f"ACCELERATE_USE_{backend}", "true")
    calls = []
    assert distribute(lambda items: [calls.append(items) or item for item in items], [1, 2]) == [1, 2]
    assert calls == [[1, 2]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_every_item_is_worked_on_once_and_all_processes_get_all_results(tmp_path, n):
    (tmp_path / "share_work.py").write_text(SHARE_WORK)
    launch(*LAUNCH, "--num_processes", n, tmp_path / "share_work.py", cwd=tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(n)]
    for k, size in enumerate(SIZES):
        shares = [rank[k]["share"] for rank in ranks]
        assert all(rank[k]["results"] == [item * 2 for item in range(size)] for rank in ranks)
        assert sorted(item for share in shares for item in share) == list(range(size))
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "n", "n_rows"), [("list", 2, 41), ("head", 3, 1)])
def test_several_processes_predict_as_one_does(tiny_recipe, tmp_path, labels, answer, n, n_rows):
    train([str(tiny_recipe(max_steps=1, answer=answer))])
    posts = [(f"{text} {k}", names) for k in range(4) for text, names in POSTS][:n_rows]
    source = write_posts(tmp_path / "new.csv", labels, posts)

    def arguments(name):
        return ["predict", tmp_path / "run", source, "-o", tmp_path / f"{name}.csv", "--jsonl", tmp_path / f"{name}.jsonl"]  # fmt: skip

    one = CliRunner().invoke(app, list(map(str, arguments("one"))), env=ENV, catch_exceptions=False)
    assert one.exit_code == 0
    several = launch(*LAUNCH, "--num_processes", n, "-m", "emogen.cli", *arguments("several"))
    for messages in (one.stderr, several.stderr):
        assert messages.count(f"{n_rows} texts ->") == 1  # printed by the main process only
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "several.csv").read_bytes()
    for a, b in zip(read_records(tmp_path / "one.jsonl"), read_records(tmp_path / "several.jsonl"), strict=True):
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


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_and_score_as_one_does(tiny_recipe, tmp_path, labels, strategy):
    """With the same global batch, the weights are the same, and every held-out row is scored once."""
    held_out = write_posts(tmp_path / "held_out.csv", labels, [(f"{text} again", names) for text, names in POSTS][:7])
    recipe = tiny_recipe(max_steps=3, eval_file=str(held_out), lora_dropout=0)  # 3 steps of 4 rows are an epoch
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    command = LAUNCH if strategy == "ddp" else [BIN / "accelerate", "launch", "--config_file", tmp_path / "fsdp.yaml"]
    launch(*command, ROOT / "emogen" / "train.py", recipe, "per_device_train_batch_size=2", f"output_dir={tmp_path / 'two'}")  # fmt: skip
    train([str(recipe), f"output_dir={tmp_path / 'one'}"])
    two, one = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("two", "one"))
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    two, one = (
        [entry["loss"] for entry in read_records(tmp_path / run / "train_log.jsonl") if "loss" in entry]
        for run in ("two", "one")
    )
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-3)
    two, one = (read_records(tmp_path / run / "predictions.jsonl") for run in ("two", "one"))
    assert [record["id"] for record in two] == [record["id"] for record in one]
    assert [record["raw"] for record in two] == [record["raw"] for record in one]


def test_products_of_many_shapes_do_not_fill_the_memory():
    """Without the limits this takes 700 MiB more (measured on a processor with AVX-512)."""
    program = """
from emogen.processes import share_machine
share_machine()
import psutil, torch
weights = [torch.ops.mkldnn._reorder_linear_weight(torch.zeros(n_out, 576)) for n_out in (192, 576, 1536)]
memory = psutil.Process().memory_info
before = memory().rss
with torch.no_grad():
    for n_tokens in range(1, 401):
        x = torch.zeros(n_tokens, 576)
        for weight in weights:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
print((memory().rss - before) / 2**20)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 350
