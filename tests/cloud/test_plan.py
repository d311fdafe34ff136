"""What a run takes: hand-computed parts, real models' sizes, real tokens, and a measured peak."""

import json
import subprocess
import sys

import pytest
import torch
from test_end_to_end import ENV, ROOT, emogen
from tiny import CONFIGS, POSTS, SIZE, save_model, write_posts
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from emogen.cloud.hardware import CPU, GIB, GPUS, SHAPES, Quote, shape_of
from emogen.cloud.plan import Tokens, count_tokens, memory, plan
from emogen.errors import InputError
from emogen.task.recipe import load_recipe

QWEN = SHAPES["Qwen/Qwen2.5-14B-Instruct"]


def test_the_14b_model_is_as_large_as_it_is():
    """Qwen2.5-14B, from its model card: 14.77 billion parameters, 13.1 without embeddings."""
    embeddings = QWEN.embeddings(with_head=True)
    assert QWEN.linear / 1e9 == pytest.approx(13.21, abs=0.005)
    assert (QWEN.linear + embeddings) / 1e9 == pytest.approx(14.77, abs=0.005)
    assert QWEN.lora(16, "all-linear") / 1e6 == pytest.approx(68.8, abs=0.05)
    assert QWEN.lora(64, None) == 4 * QWEN.lora(16, "all-linear")
    assert QWEN.lora(8, ["q_proj", "v_proj"]) == 8 * 48 * ((5120 + 5120) + (5120 + 1024))


@pytest.mark.parametrize(("changes", "batch", "length", "gib"), [({}, 8, 256, 12.5), ({}, 16, 512, 17.3)])
def test_the_14b_runs_that_were_worked_out_by_hand(tiny_recipe, changes, batch, length, gib):
    """QLoRA, r 16, checkpointing, logits on answers alone: within a tenth of an independent sum."""
    path = tiny_recipe(
        load_in_4bit=True, use_bnb_nested_quant=True, dtype="bfloat16", lora_r=16, lora_target_modules="all-linear",
        gradient_checkpointing=True, per_device_train_batch_size=batch, **changes,
    )  # fmt: skip
    tokens = Tokens(100, 0, 0, length, 8, batch * length, length, True)
    parts = memory(load_recipe(path), QWEN, tokens)
    assert parts["weights"] / GIB == pytest.approx(6.35 + 2.90, abs=0.05)
    assert sum(parts.values()) / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_shape_is_read_from_the_config_and_counts_what_the_model_has(tmp_path, kind):
    shape = shape_of(str(save_model(tmp_path / kind, kind)))
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert shape.linear == sum(layer.weight.numel() for layer in layers)
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    assert shape.embeddings(with_head=True) == sum(table.numel() for table in tables)
    assert {name: widths[::-1] for name, widths in shape.modules.items()} == {
        name.rpartition(".")[2]: tuple(m.weight.shape)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    }


def test_an_encoder_has_no_head_to_count(tmp_path):
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    model = AutoModelForSequenceClassification.from_config(config)
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "encoder" in name]
    assert shape.linear == sum(layer.weight.numel() for layer in layers)
    assert shape.embeddings(with_head=False) == (99 + 512) * 32
    assert not shape.shares


def test_recipes_can_be_planned_without_a_network():
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        if recipe.parent.name != "accelerate":
            assert load_recipe(recipe).model_name in SHAPES, recipe


def test_a_model_that_is_not_known_is_an_error_that_helps(tiny_recipe, tmp_path):
    with pytest.raises(InputError, match=r"put its config\.json into a folder"):
        plan(tiny_recipe(), ["model_name_or_path=nobody/nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        shape_of(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="says nothing of"):
        shape_of(str(tmp_path / "empty"))


def test_tokens_are_those_that_training_sees(tiny_recipe):
    """TRL counts the tokens of a run; the plan says them beforehand."""
    path = tiny_recipe(num_train_epochs=2, max_steps=-1)
    subprocess.run([sys.executable, ROOT / "emogen" / "train.py", path], check=True, capture_output=True, env=ENV)
    log = (load_recipe(path).output_dir / "train_log.jsonl").read_text().splitlines()
    trained = max(json.loads(line).get("num_tokens", 0) for line in log)
    planned = plan(path)
    assert planned.tokens.exact
    assert planned.train_tokens == trained + 2 * len(POSTS)  # nothing follows a row's last token: it is left out
    (cpu,) = (option for option in planned.options if option.gpu == CPU)  # that run, measured
    seconds = json.loads((load_recipe(path).output_dir / "metrics.json").read_text())["train_seconds"]
    assert cpu.hours["training"] == pytest.approx(seconds / 3600, rel=0.03)
    assert cpu.basis.startswith("measured")


def test_without_a_tokenizer_four_characters_are_a_token(tiny_recipe, tmp_path, labels):
    path = tiny_recipe()
    write_posts(tmp_path / "train.csv", labels, [("the bus leaves at nine", ("joy", "optimism"))])
    exact = count_tokens(load_recipe(path))
    guess = count_tokens(load_recipe(path, ["model_name_or_path=Qwen/Qwen2.5-14B-Instruct"]))
    assert (exact.exact, guess.exact) == (True, False)
    assert exact.rows == guess.rows == 1
    assert exact.scored == guess.scored == 0
    assert guess.answer == 2 + (1 + 1) + (1 + 2)  # a turn's end; each name, and what parts it from the next
    assert guess.rest == 6 + 8 + guess.answer  # 22 characters, and the chat template's own tokens around a turn


def test_gpus_come_by_what_the_whole_run_costs(tiny_recipe):
    planned = plan(tiny_recipe())
    fitting = planned.fitting
    assert len(fitting) == len(GPUS)
    assert [o.dollars for o in fitting] == sorted(o.dollars for o in fitting)
    assert fitting[0].dollars == pytest.approx(fitting[0].price * sum(fitting[0].hours.values()))
    live = plan(
        tiny_recipe(), quotes={"NVIDIA L40S": Quote(0.1, "LOW"), "NVIDIA A40": Quote(9.0), "NVIDIA X": Quote(1)}
    )
    assert [(o.gpu, o.price, o.stock) for o in live.fitting] == [("NVIDIA L40S", 0.1, "LOW"), ("NVIDIA A40", 9.0, None)]


def test_speeds_are_those_of_computing_and_of_moving_memory():
    """A40: 0.4 of 150 TFLOP/s is 60, and 150 operations a byte at 696 GB/s are 104.4: together 38.1."""
    assert GPUS["NVIDIA A40"].rate == pytest.approx(1e12 / (1 / 60 + 1 / 104.4))
    order = ["NVIDIA L4", "NVIDIA A40", "NVIDIA L40S", "NVIDIA A100 80GB PCIe", "NVIDIA H100 80GB HBM3"]
    assert sorted(order, key=lambda name: GPUS[name].rate) == order
    # By its peak an L4 is 0.8 of an A40; its memory is less than half as fast.
    assert GPUS["NVIDIA L4"].rate / GPUS["NVIDIA A40"].rate == pytest.approx(0.61, abs=0.01)


def test_a_batch_that_is_too_large_fits_nowhere(tiny_recipe):
    assert plan(tiny_recipe(), ["per_device_train_batch_size=5000000"]).fitting == []


def test_the_command_says_it_in_tables_and_in_json(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tiny_recipe()
    said = emogen("plan", path).stdout
    for word in ("weights", "optimiser", "NVIDIA L40S", "The cheapest that fits", "estimated", "remembered"):
        assert word in said
    data = json.loads(emogen("plan", path, "--json").stdout)
    assert data["peak"] == sum(data["memory"].values())
    assert data["cheapest"] == data["options"][0]["gpu"]


# Trains with the recipe that is named, and prints the most bytes that torch had allocated at a time, as CUDA counts too.
PEAK = """
import json, sys
from pathlib import Path
from torch.profiler import ProfilerActivity, profile
from emogen import train

with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
    train.main()
trace = Path(sys.argv[1]).with_suffix(".trace")
watched.export_chrome_trace(str(trace))
events = json.loads(trace.read_text())["traceEvents"]
print("peak", max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"))
"""


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_real_run_is_what_the_plan_says(tiny_recipe, tmp_path, labels, checkpointing):
    """Between a batch of one row and one of twelve: activations and logits. (Weights are mapped files here.)"""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 4096}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    folder = save_model(tmp_path / "larger")
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZE | sizes, tie_word_embeddings=True)).save_pretrained(folder)
    measured, planned = [], []
    for batch in (1, 12):
        path = tiny_recipe(
            model_name_or_path=str(folder), per_device_train_batch_size=batch, max_steps=2,
            gradient_checkpointing=checkpointing, output_dir=str(tmp_path / f"{batch}"),
        )  # fmt: skip
        write_posts(tmp_path / "train.csv", labels, [(f"{text}, " * 20, names) for text, names in POSTS])
        command = [sys.executable, "-c", PEAK, path]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENV)
        measured.append(int(done.stdout.split()[-1]))
        planned.append(plan(path).peak)
    assert planned[1] - planned[0] == pytest.approx(measured[1] - measured[0], rel=0.25)
