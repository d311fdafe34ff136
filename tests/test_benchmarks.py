"""Every benchmark script runs to its end on a tiny model, and its table and JSON hold what they should."""

import gzip
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import answering
import common
import decode_speed
import gpu
import grid_page
import large_file
import oof
import pytest
import serving
import serving_load
import settings
import startup
import torch
import train_speed
import worth_of_curation
import worth_of_improve
from stand_in import program_that_serves
from tiny import POSTS, write_recipe, write_run

from emogen import paths
from emogen.errors import InputError
from emogen.evaluation.results import read_records, read_scored
from emogen.model.encode import load_encoder
from emogen.task.answer_patterns import answer_gbnf
from emogen.task.task import load_task_with_rows
from emogen.train import main as train

pytestmark = pytest.mark.slow

BENCHMARKS = Path(common.__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory, labels):
    """The run folder of a tiny model after one step."""
    folder = tmp_path_factory.mktemp("tiny")
    train([str(write_recipe(folder, labels, max_steps=1))])
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    """The folder of that model without its adapter."""
    return run.parent / "model-llama"


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """Runs the child processes of the speed benchmarks in this process: importing torch for each takes ten seconds."""

    def run_child(script, *args):
        module = importlib.import_module(Path(script).stem)
        module.main([*args, "--out", str(tmp_path / "child.json")])
        return json.loads((tmp_path / "child.json").read_text())

    for module in (train_speed, decode_speed, gpu):
        monkeypatch.setattr(module, "run_child", run_child)
        monkeypatch.setattr(module, "use_all_cores", lambda: None)  # other tests run on the other cores


def test_every_script_is_tested_here():
    scripts = {
        answering,
        common,
        decode_speed,
        gpu,
        grid_page,
        large_file,
        oof,
        serving,
        serving_load,
        settings,
        startup,
        train_speed,
        worth_of_curation,
        worth_of_improve,
    }
    names = {module.__name__ for module in scripts} | {"llama_cpp_worker"}
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == names


def test_the_readme_names_files_that_exist():
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:benchmarks|recipes|results|emogen)/[\w/.-]*\w\.\w+", text)
    assert len(named) > 20
    root = BENCHMARKS.parent
    assert [name for name in named if not (root / name).exists() and not (BENCHMARKS / name).exists()] == []
    unnamed = {path.name for path in (BENCHMARKS / "results").rglob("*.*")} - {Path(name).name for name in named}
    assert unnamed == set()


# ---------------------------------------------------------------------------------------------- train_speed


def test_train_speed_compares_with_trl(model, tmp_path, capsys, in_this_process):
    file = tmp_path / "train.json"
    train_speed.main(["--model", str(model), "--rows", "4", "--quick", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result.keys() == {"model", "batch", "rows", "repeats", "versions", "machine", "runs", "ratio", "growth"}
    assert result["versions"].keys() == {"python", "emogen", *train_speed.PACKAGES}
    assert result["machine"]["gemm_peak"] > 1e9
    assert result["runs"].keys() == {"short fp32", "long fp32"}
    for case, runs in result["runs"].items():
        (trl,), (own,) = runs["trl"], runs["emogen"]
        assert trl.keys() == own.keys()
        assert all(trl[key] == own[key] for key in ("n_prefix", "n_rest", "flops_per_row"))
        assert (trl["rows"], own["rows"]) == (4, 16)  # whole micro-batches
        assert own["rows_per_second"] == pytest.approx(16 / own["seconds"])
        assert 4 < own["first_loss"] < 10  # that of a random model with 512 tokens: ln 512 = 6.2
        assert 4 < trl["first_loss"] < 10
        assert result["ratio"][case]["rows_per_second"] == round(own["rows_per_second"] / trl["rows_per_second"], 2)
    assert [measured["n_prefix"] for measured in result["growth"]] == [64, 256, 1024]
    out = capsys.readouterr().out
    n_short, n_long = (result["runs"][case]["emogen"][0]["n_prefix"] for case in ("short fp32", "long fp32"))
    assert n_short < n_long
    assert f"short ({n_short} tokens), fp32: trl" in out
    assert f"long ({n_long} tokens), fp32: emogen" in out
    assert f"{result['runs']['short fp32']['trl'][0]['rows_per_second']:.2f}" in out
    assert "tokens of instruction" in out


def test_train_speed_trains_quantised_models(model, in_this_process):
    options = ["--system", "emogen", "--precision", "nf4", "--rows", "1"]
    measured = train_speed.run_child(train_speed.__file__, "--model", str(model), *options)
    assert measured["rows"] == 16
    assert measured["seconds"] > 0


# ---------------------------------------------------------------------------------------------- gpu


def test_gpu_measures_both_systems_on_a_cpu_too(tmp_path, capsys, monkeypatch, in_this_process):
    monkeypatch.setattr(gpu, "BATCH", 2)
    file = tmp_path / "gpu.json"
    gpu.main(["--instructions", "short", "--steps", "1", "--texts", "4", "--json", str(file)])
    result = json.loads(file.read_text())
    (case,) = result["runs"]
    assert case == "tiny, bf16, short"
    own, stock = result["runs"][case]["emogen"], result["runs"][case]["stock"]
    assert own["losses"] == pytest.approx(stock["losses"], rel=0.02)
    assert own["train_flops_per_row"] == stock["train_flops_per_row"] > 0
    assert own["texts_per_second"] > 0
    assert f"{own['train_rows_per_second']:.1f} / {stock['train_rows_per_second']:.1f}" in capsys.readouterr().out


def test_gpu_shows_what_failed(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("... failed:\nCUDA out of memory")

    monkeypatch.setattr(gpu, "run_child", fail)
    gpu.main(["--instructions", "long"])
    assert "emogen: CUDA out of memory" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- decode_speed


def test_decode_speed_compares_with_the_peers_that_are_installed(run, tmp_path, capsys, in_this_process):
    file = tmp_path / "decode.json"
    decode_speed.main(["--run", str(run), "--rows", "6", "--quick", "--json", str(file)])
    result = json.loads(file.read_text())
    peers = [name for name in decode_speed.CONSTRAINED if common.is_installed(name)]
    assert result.keys() == {"model", "batch", "rows", "repeats", "versions", "machine", "runs", "ratio", "growth"}
    assert result["versions"].keys() == {"python", "emogen", *decode_speed.PACKAGES, *peers}
    assert result["model"] == str(run.parent / "model-llama")
    assert result["runs"].keys() == {"short", "long"}
    for case, runs in result["runs"].items():
        assert list(runs) == ["emogen", "generate", *peers]
        speed = {system: measured["texts_per_second"] for system, (measured,) in runs.items()}
        assert all(measured["texts"] == 6 for (measured,) in runs.values())
        assert all(runs[system][0]["valid"] == 1 for system in ("emogen", *peers))
        assert runs["emogen"][0]["as_emogen"] == 1
        assert result["ratio"][case] == {
            system: round(speed["emogen"] / speed[system], 2) for system in ("generate", *peers)
        }
    assert [measured["n_prefix"] for measured in result["growth"]["instruction"]] == [64, 256, 1024]
    assert [measured["texts"] for measured in result["growth"]["texts"]] == [6]
    out, err = capsys.readouterr()
    assert "long: generate" in out
    assert "1024 tokens of instruction" in out
    missing = [name for name in decode_speed.CONSTRAINED if name not in peers]
    assert all(name in err for name in missing)


def test_decode_speed_needs_a_tuned_model(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        decode_speed.main(["--run", str(tmp_path)])
    assert "no tuned model here" in capsys.readouterr().err


STUB = '''
"""Stands for llama.cpp, which is not installed: answers with the grammar and the prompt's length."""

class LlamaGrammar:
    from_string = staticmethod(lambda text, verbose: text)

class Llama:
    def __init__(self, path, n_ctx, n_threads, verbose):
        assert (path, n_threads) == ("model.gguf", 2)

    def create_completion(self, ids, grammar, temperature, max_tokens):
        return {"choices": [{"text": f" {grammar} {len(ids)} {max_tokens} "}]}
'''


def test_llama_cpp_gets_the_same_prompts(model, tmp_path):
    recipe = common.benchmark_recipe(str(model), "short")
    task, splits, _ = load_task_with_rows(recipe)
    encoder = load_encoder(task)
    made = decode_speed.llama_cpp_task(str(model), "short", 2)
    assert made["max_tokens"] == encoder.grammar.max_length
    assert made["gbnf"] == answer_gbnf(task.label_set, "list")
    assert len(made["prompts"]) == 2
    prompt = encoder.tokenizer.decode(made["prompts"][0])
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith(f"{splits.train.texts[0].strip()}<|im_end|>\n<|im_start|>assistant\n")

    (tmp_path / "llama_cpp.py").write_text(STUB)
    task_file, out = tmp_path / "task.json", tmp_path / "out.json"
    job = {"gguf": "model.gguf", "gbnf": "G", "threads": 2, "max_tokens": 7, "prompts": [[1], [1, 2]]}
    task_file.write_text(json.dumps(job))
    command = [sys.executable, BENCHMARKS / "llama_cpp_worker.py", task_file, "--out", out]
    subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, check=True)
    result = json.loads(out.read_text())
    assert result["answers"] == ["G 1 7", "G 2 7"]
    assert result["texts"] == 2
    assert result["peak_mb"] > 0


# ---------------------------------------------------------------------------------------------- the other scripts


def test_large_file_predicts_every_row(model, tmp_path, capsys):
    file = tmp_path / "large.json"
    large_file.main(["--rows", "40", "--model", str(model), "--json", str(file)])
    result = json.loads(file.read_text())
    assert result.keys() == {"machine", "versions", "runs"}
    (measured,) = result["runs"]
    assert measured["rows"] == 40
    assert measured["seconds"] > 0
    assert measured["peak_megabytes"] > 100  # torch alone takes more
    assert re.search(rf"│ 40 +│ +{measured['seconds']:.0f} │", capsys.readouterr().out)


def test_answering_compares_one_pass_with_two(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    file = tmp_path / "answering.json"
    answering.main([str(run), "--rows", "6", "--batches", "1", "4", "--json", str(file)])
    result = json.loads(file.read_text())
    assert set(result["runs"]) == {"1", "4"}
    for measured in result["runs"].values():
        assert all(rate > 0 for rate in measured["texts_per_cpu_second"].values())
        assert len(measured["texts_per_cpu_second"]) == 4
        assert measured["same_answers"] == 6
        assert measured["largest_change"] < 1e-4
    assert "6 of 6" in capsys.readouterr().out


def test_serving_compares_with_llama_cpp(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "answer.gbnf").write_text('root ::= "none"')
    for name in ("adapter", "recipe.yaml", "prompt.jinja", "labels.yaml", "manifest.json"):
        (tmp_path / name).symlink_to(run / name)
    program = tmp_path / "llama-server"
    program.write_text(f"#!{sys.executable}\n{LLAMA_SERVER_STUB}")
    program.chmod(0o755)
    monkeypatch.setenv("LLAMA_SERVER", str(program))
    file = tmp_path / "serving.json"
    serving.main([str(tmp_path), "--clients", "1", "3", "--seconds", "1", "--json", str(file)])
    runs = json.loads(file.read_text())["runs"]
    assert set(runs) == {"1", "3"}
    for both in runs.values():
        assert both["emogen"]["texts_per_second"] > 0 < both["llama.cpp"]["median_ms"]
        assert both["same_labels"][1] > 0
    assert "same labels" in capsys.readouterr().out


def test_a_served_run_under_load_loses_nothing(run, tmp_path, capsys):
    file = tmp_path / "load.json"
    serving_load.main([str(run), "--minutes", "0.03", "--clients", "4", "--json", str(file)])
    counts = json.loads(file.read_text())["counts"]
    assert counts["texts"] > 0 == counts["wrong"]
    assert "MiB at the end" in capsys.readouterr().out


LLAMA_SERVER_STUB = program_that_serves("""
    def do_GET(self):
        self.reply({})
    def do_POST(self):
        self.read()
        self.reply({"content": " none"})
""")


@pytest.mark.slow
def test_startup_times_commands_with_an_empty_cache_and_after_that(tiny_recipe, tmp_path, capsys):
    file = tmp_path / "startup.json"
    startup.main(["--repeats", "1", "--recipe", str(tiny_recipe()), "--only", "check", "score", "--json", str(file)])
    seconds = json.loads(file.read_text())["seconds"]
    assert list(seconds) == ["check", "score"]
    assert seconds["check"]["median"] == seconds["check"]["all"][0] > 0
    assert "emogen check" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"emogen check no\.yaml failed:\n.*no such recipe"):
        startup.run(["check", "no.yaml"], tmp_path, tmp_path / "cache")


def test_the_grid_is_opened_and_filtered(chromium, tmp_path, capsys):
    file = tmp_path / "grid.json"
    command = ["--rows", "60", "--templates", "2", "--repeats", "1", "--json", str(file)]
    grid_page.main(command, chromium)
    result = json.loads(file.read_text())
    assert list(result["milliseconds"]) == ["open", *grid_page.CHANGES]
    assert all(time > 0 for times in result["milliseconds"].values() for time in times)
    assert "60 rows × 2 templates" in capsys.readouterr().out


def test_a_failed_prediction_is_reported(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)failed:.*no such recipe"):
        large_file.predict(tmp_path / "none.yaml", tmp_path / "in.csv", tmp_path / "out.csv")


def test_settings_trains_and_compares(model, tmp_path, capsys):
    data = str(paths.shipped("sample/test.csv"))
    command = [data, "--rows", "15", "--epochs", "0.1", "--model", str(model), "--out", str(tmp_path / "runs")]
    settings.main([*command, "list", "--jobs", "2"])
    first = capsys.readouterr().out
    assert "list" in first
    assert ", 0.1 epochs, 15 rows" in first.replace("\n", " ")

    # A finished run is not repeated; a copy of it does not differ from it.
    shutil.copytree(tmp_path / "runs" / "list", tmp_path / "runs" / "text-.1")
    settings.main([*command, "text .1", "--json", str(tmp_path / "settings.json")])
    result = json.loads((tmp_path / "settings.json").read_text())
    assert result.keys() == {"model", "epochs", "machine", "versions", "runs"}
    assert list(result["runs"]) == ["list", "text .1"]
    copied = result["runs"]["text .1"]
    assert copied["keys"] == ["text_loss_weight=0.1"]
    assert copied["answer"] == result["runs"]["list"]["answer"]
    assert copied["answer"]["n"] == 15
    assert copied["difference"] == 0
    assert copied["difference_interval"] is None  # 15 rows are too few
    assert copied["log_loss_difference"] == [0, 0]
    out = capsys.readouterr().out
    assert "+0.000 (no interval)" in out
    assert "+0.000 ± 0.000" in out


def test_settings_rejects_unknown_names(capsys):
    with pytest.raises(SystemExit, match="2"):
        settings.main(["posts.csv", "lists"])
    assert "no such settings: lists" in capsys.readouterr().err


def test_kept_predictions_are_restored_without_a_text_in_them(labels, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", labels)
    oof.main(["keep", str(run), "--to", str(tmp_path / "kept")])
    kept = (tmp_path / "kept" / "run.csv.gz").read_bytes()
    oof.main(["keep", str(run), "--to", str(tmp_path / "again")])
    assert (tmp_path / "again" / "run.csv.gz").read_bytes() == kept
    before = read_scored(run, labels)
    lines = gzip.decompress(kept).decode().splitlines()
    assert lines[0] == ",".join(["id", "fold", "answer", *labels.names])
    assert all(re.fullmatch(r"r\d+,\d,[01]{11}(,\d\.\d{4}){11}", line) for line in lines[1:])
    data = tmp_path / "data.jsonl"
    records = read_records(run / "predictions.jsonl")
    rows = [{"id": record["id"], "text": record["text"], "labels": record["gold"]} for record in records]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "labels.yaml").write_text(labels.to_yaml())
    words = ["restore", str(data), "--from", str(tmp_path / "kept"), "--labels", str(tmp_path / "labels.yaml")]
    oof.main([*words, "--to", str(tmp_path / "restored")])
    after = read_scored(tmp_path / "restored" / "run", labels)
    assert after.ids == before.ids
    for name in ("gold", "pred", "folds"):
        assert getattr(after, name).tolist() == getattr(before, name).tolist()
    assert abs(after.prob - before.prob).max() <= 0.5001e-4
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="its rows are not those of"):
        oof.main([*words, "--to", str(tmp_path / "other")])


# ---------------------------------------------------------------------------------------------- common


def test_a_child_process_returns_its_json(tmp_path):
    script = tmp_path / "child.py"
    script.write_text("import json, sys\nwith open(sys.argv[-1], 'w') as file:\n    json.dump(sys.argv[1:-1], file)\n")
    assert common.run_child(str(script), "--rows", "3") == ["--rows", "3", "--out"]


def test_a_failed_child_process_shows_its_error(tmp_path):
    script = tmp_path / "child.py"
    script.write_text("raise SystemExit('the model has gone')")
    with pytest.raises(RuntimeError, match=r"child\.py --rows 3 --out .* failed:\nthe model has gone"):
        common.run_child(str(script), "--rows", "3")
    script.write_text("")  # success, but no result
    with pytest.raises(RuntimeError, match="failed"):
        common.run_child(str(script))


def test_the_systems_alternate(capsys):
    assert list(common.alternate(["a", "b"], 3, "short")) == ["a", "b", "b", "a", "a", "b"]
    assert "short: b, run 3 of 3" in capsys.readouterr().err


def test_a_benchmark_resumes_with_the_same_settings_only(tmp_path):
    file = tmp_path / "result.json"
    new = common.start_or_resume(file, model="m", rows={"short": 3})
    assert new == {"model": "m", "rows": {"short": 3}, "machine": common.machine(), "runs": {}, "ratio": {}}
    new["runs"]["short"] = {"trl": []}
    common.write_json(file, new)
    assert common.start_or_resume(file, model="m", rows={"short": 3}) == new
    assert common.start_or_resume(file, model="m", rows={"short": 4})["runs"] == {}
    assert common.start_or_resume(None, model="m", rows={"short": 3})["runs"] == {}
    common.write_json(file, new | {"growth": []})  # a finished one
    assert common.start_or_resume(file, model="m", rows={"short": 3})["runs"] == {}


def test_necessary_flops():
    config = SimpleNamespace(
        hidden_size=2,
        intermediate_size=3,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=5,
    )
    # 4 * 2 * 2 + 3 * 2 * 3 = 34 weights for each of 1 + 2 tokens, 5 * 2 for the projected one, 2 FLOPs each.
    assert common.necessary_flops(config, 1, 2, 1) == 2 * (34 * 3 + 10) == 224
    # Training: twice that, and 6 FLOPs for each of LoRA's 4 * (2 + 2) + 3 * (2 + 3) = 31 weights and token.
    assert common.necessary_flops(config, 1, 2, 1, train_rank=1) == 2 * 224 + 6 * 31 * 3 == 1006


# ---------------------------------------------------------------------------------------------- worth_of_curation


def test_the_worth_of_curation_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worth_of_curation, "STEP", 20)
    monkeypatch.setattr(worth_of_curation, "ROUNDS", 1)
    file = tmp_path / "worth.json"
    worth_of_curation.main(["sample/test.csv", "--seeds", "2", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["rows"] == 125
    assert len(result["flips"]["lift"]) == 2
    assert result["prune"].keys() == {"all rows", "without the worst 2 %", "without random 2 %"}
    random, select = result["select"]["random"], result["select"]["select"]
    assert [len(curve) for curve in random + select] == [1, 1, 1, 1]  # 100 rows are all that there are
    assert random == select
    assert "Turned labels" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- worth_of_improve


def test_the_prompt_that_was_found_is_compared_with_shipped_ones(tmp_path, labels, capsys, monkeypatch):
    monkeypatch.setattr("emogen.experiments.improve.FIRST_ROUND", 6)
    posts = [(f"{text} {k}", names) for k in range(5) for text, names in POSTS]
    recipe = write_recipe(tmp_path, labels, posts=posts, eval_fraction=0.5, max_length=None)
    file, own = tmp_path / "worth.json", ["order=canonical", "examples=2", f"output_dir={tmp_path / 'out'}"]
    options = ["--limit", "20", "--by", "answer", "--shipped", "list", "few_shot", "--json", str(file)]
    worth_of_improve.main([str(recipe), *own, *options])
    result, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert result["search rows"] == 20
    assert result["systems"].keys() == {"the start", "found", "list", "few_shot"}
    assert result["systems"][result["best shipped"]]["difference"] == 0
    assert "to the best shipped" in shown
