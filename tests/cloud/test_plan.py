"""The estimates of a plan, against sums by hand, the tokens of a real run, and the measured peak of real runs."""

import gc
import json

import pytest
from tiny import POSTS, SIZE, save_model, write_posts
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from emogen import train
from emogen.cloud.hardware import CPU, GIB, GPUS, SHAPES, Quote
from emogen.cloud.plan import Tokens, count_tokens, make_plan, memory_parts
from emogen.errors import InputError
from emogen.task.recipe import load_recipe

QWEN = SHAPES["Qwen/Qwen2.5-14B-Instruct"]


@pytest.mark.parametrize(("batch", "length", "gib"), [(8, 256, 12.5), (16, 512, 17.3)])
def test_the_memory_of_14b_runs_matches_a_sum_by_hand(tiny_recipe, batch, length, gib):
    """QLoRA, r 16, checkpointing, logits of the answers alone: within a tenth of an independent sum."""
    path = tiny_recipe(
        load_in_4bit=True, use_bnb_nested_quant=True, dtype="bfloat16", lora_r=16, lora_target_modules="all-linear",
        gradient_checkpointing=True, per_device_train_batch_size=batch,
    )  # fmt: skip
    tokens = Tokens(100, 0, 0, length, 8, batch * length, length, True)
    parts = memory_parts(load_recipe(path), QWEN, tokens)
    assert parts["weights"] / GIB == pytest.approx(6.35 + 2.90, abs=0.05)
    assert sum(parts.values()) / GIB == pytest.approx(gib, rel=0.1)


def test_an_unknown_model_cannot_be_planned(tiny_recipe):
    with pytest.raises(InputError, match=r"put the model's config\.json into a folder"):
        make_plan(tiny_recipe(), ["model_name_or_path=nobody/nothing"])


@pytest.mark.slow
def test_the_planned_tokens_are_those_that_training_sees(tiny_recipe):
    """TRL counts the tokens of a run; the plan has them before."""
    path = tiny_recipe(num_train_epochs=2, max_steps=-1)
    train.main([str(path)])
    log = (load_recipe(path).output_dir / "train_log.jsonl").read_text().splitlines()
    trained = max(json.loads(line).get("num_tokens", 0) for line in log)
    plan = make_plan(path)
    assert plan.tokens.exact
    assert plan.train_tokens == trained + 2 * len(POSTS)  # training leaves out the last token: nothing follows it
    (cpu,) = (option for option in plan.options if option.gpu == CPU)  # the speed of that run
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
    assert guess.answer == 2 + (1 + 1) + (1 + 2)  # the end of the turn; each name, with a separator
    assert guess.rest == 6 + 8 + guess.answer  # 22 characters, and the chat template's tokens around a turn


def test_gpus_are_sorted_by_the_cost_of_the_whole_run(tiny_recipe):
    fitting = make_plan(tiny_recipe()).fitting
    assert len(fitting) == len(GPUS)
    assert [option.dollars for option in fitting] == sorted(option.dollars for option in fitting)
    assert fitting[0].dollars == pytest.approx(fitting[0].price * sum(fitting[0].hours.values()))
    quotes = {"NVIDIA L40S": Quote(0.1, "LOW"), "NVIDIA A40": Quote(9.0), "NVIDIA X": Quote(1)}
    live = make_plan(tiny_recipe(), quotes=quotes).fitting
    assert [(option.gpu, option.price, option.stock) for option in live] == [
        ("NVIDIA L40S", 0.1, "LOW"),
        ("NVIDIA A40", 9.0, None),
    ]


def test_a_batch_that_is_too_large_fits_nowhere(tiny_recipe):
    assert make_plan(tiny_recipe(), ["per_device_train_batch_size=5000000"]).fitting == []


def test_the_command_prints_tables_and_json(tiny_recipe, tmp_path, monkeypatch, emogen):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    path = tiny_recipe()
    printed = emogen("plan", path).out
    for word in ("weights", "optimiser", "NVIDIA L40S", "Cheapest fit", "estimated", "Prices: built in, as of"):
        assert word in printed
    data = json.loads(emogen("plan", path, "--json").out)
    assert data["peak"] == sum(data["memory"].values())
    assert data["cheapest"] == data["options"][0]["gpu"]


@pytest.fixture(scope="module")
def larger_model(tmp_path_factory):
    """A model whose activations are large beside everything else of a run."""
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 4096}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    folder = save_model(tmp_path_factory.mktemp("larger"))
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZE | sizes, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def measured_peak(recipe):
    """The most bytes that torch allocates at a time while it trains, above those allocated before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train.main([str(recipe)])
    trace = recipe.with_suffix(".trace")
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    first = min(events, key=lambda event: event["ts"])["args"]
    return max(event["args"]["Total Allocated"] for event in events) - first["Total Allocated"] + first["Bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_planned_peak_is_that_of_a_real_run(tiny_recipe, larger_model, tmp_path, labels, checkpointing):
    """The difference between a batch of one row and one of twelve: activations and logits. Weights are mapped files."""
    measured, planned = [], []
    for batch in (1, 12):
        path = tiny_recipe(
            model_name_or_path=str(larger_model), per_device_train_batch_size=batch, max_steps=1,
            gradient_checkpointing=checkpointing, output_dir=str(tmp_path / f"{batch}"),
        )  # fmt: skip
        write_posts(tmp_path / "train.csv", labels, [(f"{text}, " * 10, names) for text, names in POSTS])
        measured.append(measured_peak(path))
        planned.append(make_plan(path).peak)
    assert planned[1] - planned[0] == pytest.approx(measured[1] - measured[0], rel=0.25)
