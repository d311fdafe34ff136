"""The command line: help, exit codes, what is an override and what is a path."""

import json
from pathlib import Path

import click
import pytest
import typer
from tiny import POSTS, write_posts
from typer.testing import CliRunner

from emogen import __version__
from emogen.cli.__main__ import app, main
from emogen.cli.shared import split_overrides
from emogen.console import run_command
from emogen.evaluation.run_folder import FORMAT


def commands(group, path=()):
    """Every command of the tool, as (words, command)."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group) or hasattr(command, "commands"):
            yield from commands(command, (*path, name))


ALL = dict(commands(typer.main.get_command(app)))


def test_every_command_is_found():
    assert {("train",), ("check",), ("predict",), ("prompts", "compare"), ("pod", "launch"), ("init",)} <= ALL.keys()


@pytest.mark.parametrize("words", [(), ("prompts",), ("pod",)])
def test_summaries_fit_a_line_of_80_columns(words):
    said = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}).output
    table = said.partition("Commands:\n")[2]
    assert len(table.splitlines()) >= 2
    assert "..." not in table
    assert "…" not in table


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_explains_itself(words):
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert done.output.count("\n") > 5
    undocumented = [p.name for p in ALL[words].params if p.name != "help" and not getattr(p, "help", None)]
    assert undocumented == []


def test_the_version(emogen):
    assert emogen("--version").out == f"emogen {__version__}\n"


def test_keys_are_listed(emogen):
    said = emogen("keys").out
    assert "shared_prefix" in said
    assert "learning_rate" in said
    assert "packing" not in said.replace(":", ",").split(", ")  # a key of TRL that emogen settles


def test_words_are_overrides_or_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["runs/a", "x=1.csv", "lora_r=8", "./y=2.csv", "predict_by=stack", "a-b=c"]
    assert split_overrides(words) == (["runs/a", "./y=2.csv", "a-b=c"], ["x=1.csv", "lora_r=8", "predict_by=stack"])
    Path("x=1.csv").touch()
    with pytest.raises(typer.BadParameter, match=r"x=1\.csv is a file and also reads as KEY=VALUE; write \./x=1\.csv"):
        split_overrides(words)
    assert split_overrides(["./x=1.csv"]) == (["./x=1.csv"], [])


def test_init_makes_a_folder_that_check_accepts(emogen, tmp_path):
    folder = tmp_path / "mine"
    emogen("init", folder)
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "prompt.jinja", "labels.yaml", "train.csv"}
    text = (folder / "recipe.yaml").read_text()
    assert text.startswith("# accelerate launch -m emogen.train ")
    for name in ("train_file: train.csv", "labels: labels.yaml", "prompt: prompt.jinja"):
        assert name in text
    (folder / "labels.yaml").write_text((folder / "labels.yaml").read_text().replace("name: trust", "name: faithful"))
    said = emogen("check", folder / "recipe.yaml", f"model_name_or_path={tmp_path}", code=2).out
    assert "no column for the label 'faithful'" in said  # the folder's own files are used
    assert "not empty" in emogen("init", folder, code=2).err


def test_wrong_input_exits_with_2_and_a_message(emogen, tiny_recipe, tmp_path):
    assert "no such key" in emogen("train", tiny_recipe(), "lora_rr=3", code=2).err
    assert "no such file" in emogen("score", tmp_path / "a.csv", tmp_path / "b.csv", code=2).err
    assert "not a run folder" in emogen("predict", tmp_path, tmp_path / "x.csv", "-o", tmp_path / "o", code=2).err
    assert "no such recipe" in emogen("check", "recipes/nothing.yaml", code=2).out
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT + 1}))
    (tmp_path / "recipe.yaml").touch()
    said = emogen("predict", tmp_path, tmp_path / "x.csv", "-o", tmp_path / "o", code=2).err
    assert "install a newer emogen" in said


def test_check_reports_everything_at_once_and_exits_with_2(emogen, tiny_recipe, tmp_path, labels):
    recipe = tiny_recipe(eval_file=str(tmp_path / "evl.csv"))
    posts = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(posts.replace("p1,", "p0,").replace(",surprise,", ",suprise,"))
    said = emogen("check", recipe, code=2).out
    assert "no column for the label 'surprise'" in said
    assert "the id 'p0' occurs 2 times" in said
    assert "evl.csv: no such file" in said
    (tmp_path / "bad.jinja").write_text("{% user %}\n{{ txet }}{{ text }}")
    said = emogen("check", tiny_recipe(), f"prompt={tmp_path / 'bad.jinja'}", code=2).out
    assert "bad.jinja:2: undefined variable 'txet'" in said
    long = write_posts(tmp_path / "long.csv", labels, [*POSTS, ("a long post " * 100, ("joy",))])
    warned = emogen("check", tiny_recipe(), f"train_file={long}", "max_length=400").out
    assert "long.csv:14: 1 texts are shortened to fit max_length=400" in warned
    assert "0 errors, 1 warning" in warned


def test_show_marks_the_supervised_tokens(emogen, tiny_recipe):
    by_token = emogen("show", tiny_recipe(), "--rows", 1, "--tokens").out
    assert by_token.count("SUPERVISED") == int(by_token.partition(" supervised")[0].rpartition(" ")[2])


def test_predict_overwrites_only_what_it_may_and_takes_a_recipe(emogen, tiny_recipe, tmp_path, labels):
    recipe, source, output = tiny_recipe(), write_posts(tmp_path / "k.csv", labels), tmp_path / "out.csv"
    rows = [line.split(",") for line in source.read_text().splitlines()]
    assert "give -o OUT.csv" in emogen("predict", recipe, source, code=2).err
    assert "name a run folder" in emogen("predict", source, "-o", output, code=2).err
    emogen("predict", recipe, source, "-o", output, "decode=constrained")
    raw = output.read_bytes()
    assert "--overwrite" in emogen("predict", recipe, source, "-o", output, code=2).err
    assert output.read_bytes() == raw
    emogen("predict", recipe, source, "-o", output, "--overwrite")
    assert output.read_bytes() == raw
    assert len(raw.splitlines()) == len(rows)
    emogen("predict", recipe, source, "--jsonl", tmp_path / "free.jsonl", "decode=free")
    several = emogen("score", source, output, output).out
    assert "0.000" in several


def test_ctrl_c_exits_with_130():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(interrupted)
    assert ended.value.code == 130


def test_the_entry_point_is_the_installed_command():
    from importlib import metadata

    (entry,) = [point for point in metadata.entry_points(group="console_scripts") if point.name == "emogen"]
    assert entry.load() is main
