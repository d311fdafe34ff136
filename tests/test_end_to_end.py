"""The real entry points, as people run them."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import POSTS, write_posts

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SETTINGS = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
ENV = os.environ | SETTINGS


def emogen(*args, code=0, cwd=ROOT):
    command, env = [BIN / "emogen", *map(str, args)], os.environ | SETTINGS  # with what a test has set just now
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_from_recipe_to_submission(tiny_recipe, tmp_path, labels):
    """check, accelerate launch, predict, score; from a folder that is not the checkout."""
    recipe = tiny_recipe(eval_fraction=0.3)
    checked = emogen("check", recipe, cwd=tmp_path)
    assert "0 errors" in checked.stdout

    shown = emogen("show", recipe, "--rows", 1, cwd=tmp_path)
    assert "⟦" in shown.stdout
    by_token = emogen("show", recipe, "--rows", 1, "--tokens", cwd=tmp_path)
    assert by_token.stdout.count("SUPERVISED") == int(by_token.stdout.partition(" supervised")[0].rpartition(" ")[2])

    script = ROOT / "emogen" / "train.py"
    command = [BIN / "accelerate", "launch", "--cpu", script, recipe]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr

    held_back = write_posts(tmp_path / "test.csv", labels)
    emogen("predict", tmp_path / "run", held_back, "-o", tmp_path / "out.csv", "--jsonl", tmp_path / "out.jsonl")
    raw = (tmp_path / "out.csv").read_bytes()
    lines = raw.decode().splitlines()
    assert lines[0] == "ID," + ",".join(labels.names)
    assert b"\r" not in raw
    assert [line.split(",")[0] for line in lines[1:]] == [f"p{i}" for i in range(len(POSTS))]
    assert {cell for line in lines[1:] for cell in line.split(",")[1:]} <= {"0", "1"}
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == [text for text, _ in POSTS]
    assert {record["status"] for record in records} == {"exact"}

    figures = json.loads(emogen("score", held_back, tmp_path / "out.csv", "--json").stdout)
    assert {"f1_macro", "f1_micro", "jaccard_samples", "exact_match", "hamming_loss"} <= figures.keys()
    assert list(figures["per_label"]) == list(labels.names)
    assert set(figures["per_label"]["joy"]) >= {"precision", "recall", "f1", "support"}
    same = json.loads(emogen("score", held_back, tmp_path / "out.jsonl", "--json").stdout)
    assert same == figures
    assert "0.000" in emogen("score", held_back, tmp_path / "out.csv", tmp_path / "out.jsonl").stdout

    refused = emogen("predict", tmp_path / "run", held_back, "-o", tmp_path / "out.csv", code=2)
    assert "--overwrite" in refused.stderr
    assert (tmp_path / "out.csv").read_bytes() == raw


def test_predict_takes_a_recipe_for_the_untuned_model_and_semeval_files(tiny_recipe, tmp_path, labels):
    rows = list(csv.reader(write_posts(tmp_path / "k.csv", labels).open(encoding="utf-8")))
    (tmp_path / "s.txt").write_bytes("".join("\t".join(row) + "\r\n" for row in rows).encode())
    recipe = tiny_recipe()
    out = tmp_path / "new" / "folder"  # which predict makes
    for name in ("k.csv", "s.txt"):
        emogen("predict", recipe, tmp_path / name, "-o", out / name, "decode=constrained")
    assert (out / "k.csv").read_bytes() == (out / "s.txt").read_bytes()
    emogen("predict", recipe, tmp_path / "k.csv", "--jsonl", tmp_path / "free.jsonl", "decode=free")


def test_check_reports_everything_at_once_and_exits_with_2(tiny_recipe, tmp_path, labels):
    recipe = tiny_recipe(eval_file=str(tmp_path / "evl.csv"))
    posts = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(posts.replace("p1,", "p0,").replace(",surprise,", ",suprise,"))
    said = emogen("check", recipe, code=2).stdout
    assert "no column for the label 'surprise'" in said
    assert "the id 'p0' occurs 2 times" in said
    assert "evl.csv: no such file" in said
    (tmp_path / "bad.jinja").write_text("{% user %}\n{{ txet }}{{ text }}")
    said = emogen("check", tiny_recipe(), f"prompt={tmp_path / 'bad.jinja'}", code=2).stdout
    assert "bad.jinja:2: undefined variable 'txet'" in said
    long = write_posts(tmp_path / "long.csv", labels, [*POSTS, ("a long post " * 100, ("joy",))])
    warned = emogen("check", tiny_recipe(), f"train_file={long}", "max_length=400").stdout
    assert "long.csv:14: 1 texts are shortened to fit max_length=400" in warned
    assert "0 errors, 1 warnings" in warned


def test_what_is_wrong_ends_with_2_and_a_message(tiny_recipe, tmp_path):
    assert "no such key" in emogen("train", tiny_recipe(), "lora_rr=3", code=2).stderr
    assert "no such file" in emogen("score", tmp_path / "a.csv", tmp_path / "b.csv", code=2).stderr
    assert "not a run folder" in emogen("predict", tmp_path, tmp_path / "x.csv", "-o", tmp_path / "o", code=2).stderr
    assert "no such recipe" in emogen("check", "recipes/nothing.yaml", code=2).stdout


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on(tiny_recipe, tmp_path, how):
    recipe = tiny_recipe(max_steps=400, save_strategy="steps", save_steps=2)
    log = (tmp_path / "log").open("w")
    command = [BIN / "emogen", "train", recipe]
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and would be by what they start.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, stdout=log, stderr=log, env=ENV, cwd=tmp_path, preexec_fn=heed)
    while not list((tmp_path / "run").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(how)
    code = process.wait()
    if how == signal.SIGINT:
        assert code == 130
        assert "resume_from_checkpoint=true" in (tmp_path / "log").read_text()
    done = emogen("train", recipe, "resume_from_checkpoint=true", "max_steps=8", cwd=tmp_path)
    assert "Going on from" in done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_help_teaches():
    said = emogen("--help").stdout
    for command in ("train", "check", "show", "predict", "score", "keys"):
        assert command in said
        assert emogen(command, "--help").stdout.count("\n") > 5
    assert "shared_prefix" in emogen("keys").stdout
