"""The real entry points, each in a process of its own once, as people run them."""

import csv
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import POSTS, write_posts

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SETTINGS = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def emogen(*args, code=0, cwd=ROOT):
    command, env = [BIN / "emogen", *map(str, args)], os.environ | SETTINGS
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
def test_from_recipe_to_submission(tiny_recipe, tmp_path, labels):
    """check, accelerate launch, predict, score; from a folder that is not the checkout."""
    recipe = tiny_recipe(eval_fraction=0.3)
    assert "0 errors" in emogen("check", recipe, cwd=tmp_path).stdout

    script = ROOT / "emogen" / "train.py"
    command = [BIN / "accelerate", "launch", "--cpu", script, recipe]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | SETTINGS, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.suffix for path in (tmp_path / "run" / "adapter").iterdir()} <= {
        ".json",
        ".jinja",
        ".safetensors",
        ".md",
    }

    test_file = write_posts(tmp_path / "test.csv", labels)
    emogen("predict", tmp_path / "run", test_file, "-o", tmp_path / "out.csv", "--jsonl", tmp_path / "out.jsonl")
    raw = (tmp_path / "out.csv").read_bytes()
    lines = raw.decode().splitlines()
    assert lines[0] == "ID," + ",".join(labels.names)
    assert b"\r" not in raw
    assert [line.split(",")[0] for line in lines[1:]] == [f"p{i}" for i in range(len(POSTS))]
    assert {cell for line in lines[1:] for cell in line.split(",")[1:]} <= {"0", "1"}
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == [text for text, _ in POSTS]
    assert {record["status"] for record in records} == {"exact"}

    metrics = json.loads(emogen("score", test_file, tmp_path / "out.csv", "--json").stdout)
    assert {"f1_macro", "f1_micro", "jaccard_samples", "exact_match", "hamming_loss"} <= metrics.keys()
    assert list(metrics["per_label"]) == list(labels.names)
    assert set(metrics["per_label"]["joy"]) >= {"precision", "recall", "f1", "support"}
    assert json.loads(emogen("score", test_file, tmp_path / "out.jsonl", "--json").stdout) == metrics


@pytest.mark.slow
def test_the_module_is_the_same_command(tiny_recipe, tmp_path, labels):
    """python -m emogen.cli predict, by a recipe (its untuned model), on a SemEval file; a missing folder is created."""
    rows = list(csv.reader(write_posts(tmp_path / "k.csv", labels).open(encoding="utf-8")))
    (tmp_path / "s.txt").write_bytes("".join("\t".join(row) + "\r\n" for row in rows).encode())
    output = tmp_path / "new" / "folder" / "s.csv"
    command = [sys.executable, "-m", "emogen.cli", "predict", tiny_recipe(), tmp_path / "s.txt", "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | SETTINGS, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert len(output.read_text().splitlines()) == 1 + len(POSTS)


@pytest.mark.slow
def test_an_interrupted_run_resumes(tiny_recipe, tmp_path):
    """After Ctrl-C, and after a kill in the continuation."""
    recipe = tiny_recipe(max_steps=60, save_strategy="steps", save_steps=2)
    command = [BIN / "emogen", "train", recipe]
    assert end_at_next_checkpoint(command, signal.SIGINT, tmp_path) == 130
    assert "resume_from_checkpoint=true" in (tmp_path / "log").read_text()
    assert (
        end_at_next_checkpoint([*command, "resume_from_checkpoint=true"], signal.SIGKILL, tmp_path) == -signal.SIGKILL
    )
    done = emogen("train", recipe, "resume_from_checkpoint=true", cwd=tmp_path)
    assert "Resuming from" in done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def end_at_next_checkpoint(command, how, folder):
    """Start a training, send a signal as soon as it has another complete checkpoint, and return its exit code."""

    def checkpoints():
        return set((folder / "run").glob("checkpoint-*/files.json"))

    before, log = checkpoints(), (folder / "log").open("w")
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and would be by what they start.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(
        command, stdout=log, stderr=log, env=os.environ | SETTINGS, cwd=folder, preexec_fn=heed
    )  # fmt: skip
    while not checkpoints() - before:
        assert process.poll() is None, (folder / "log").read_text()
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    process.send_signal(how)
    return process.wait()
