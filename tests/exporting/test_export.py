"""Exports of tiny runs: merged models are real; llama.cpp's server is a program that answers by its own rule."""

import json
import stat
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from stand_in import program_that_serves
from tiny import POSTS, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import emogen
from emogen.cli.__main__ import app
from emogen.console import run_command
from emogen.errors import InputError, ModelError
from emogen.exporting import export as exporting
from emogen.exporting import llama_cpp, merged
from emogen.exporting.export import export
from emogen.train import main as train

pytestmark = pytest.mark.slow
TEXTS = [text for text, _ in POSTS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, labels):
    """A generator and a head that were trained for two steps and scored."""

    def trained(name, **keys):
        folder = tmp_path_factory.mktemp(name)
        train([str(write_recipe(folder, labels, max_steps=2, learning_rate=0.05, eval_fraction=0.4, **keys))])
        return folder / "run"

    head = {"answer": "head", "lora_target_modules": ["q_proj", "v_proj"]}
    return {
        "list": trained("list"),
        "head": trained("head", **head),
        "full head": trained("full", answer="head", use_peft=False),
    }


def silent(title, total):
    return nullcontext(lambda n: None)


@pytest.mark.parametrize("style", ["list", "head", "full head"])
def test_a_merged_run_labels_as_the_run_does(runs, tmp_path, style):
    folder = tmp_path / "out"
    shifts = export(runs[style], folder, "merged", bar=silent)
    assert set(shifts) == {"answer", "thresholds"}
    assert shifts["answer"]["changed"] == shifts["thresholds"]["changed"] == 0
    assert shifts["answer"]["prob_change_max"] < 1e-4
    before, after = (emogen.load(run) for run in (runs[style], folder))
    np.testing.assert_allclose(after.predict_proba(TEXTS), before.predict_proba(TEXTS), atol=1e-4)
    assert after.predict(TEXTS) == before.predict(TEXTS)
    assert json.loads((folder / "export.json").read_text())["shift"] == shifts
    assert not list(folder.rglob("*.bin")) + list(tmp_path.glob(".out*"))
    assert "0 of 5 answers changed" in (folder / "README.md").read_text()


@pytest.mark.parametrize("style", ["head", "full head"])
def test_a_head_is_scored_by_onnxruntime(runs, tmp_path, labels, style):
    folder = tmp_path / "out"
    shifts = export(runs[style], folder, "onnx", bar=silent)
    assert shifts["answer"]["changed"] == shifts["thresholds"]["changed"] == 0
    assert 0 < shifts["answer"]["prob_change_max"] < 1e-5  # another program computed it
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code + "print(prob.tolist())"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert "`thresholds.json` has the threshold of each label" in (folder / "README.md").read_text()
    expected = emogen.load(runs[style]).predict_proba(["so happy for you!!"])
    np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-5)


def test_plain_transformers_loads_a_merged_generator(runs, tmp_path):
    export(runs["list"], tmp_path / "out", "merged", bar=silent)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert "<|im_start|>user" in chat
    assert '"regex": "(none|' in (tmp_path / "out" / "README.md").read_text()


def test_an_export_that_scores_otherwise_is_an_error_and_is_not_kept(runs, tmp_path, monkeypatch):
    real = merged.load_adapter

    def noisy(model, folder, **options):
        model = real(model, folder, **options)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.add_(5.0)
        return model

    monkeypatch.setattr(merged, "load_adapter", noisy)
    with pytest.raises(ModelError, match="does not score as the run"):
        export(runs["list"], tmp_path / "out", "merged", bar=silent)
    assert list(tmp_path.iterdir()) == []
    shifts = export(runs["list"], tmp_path / "out", "merged", force=True, bar=silent)
    assert shifts["answer"]["changed"] > 0


def fake_server(folder, monkeypatch, answer):
    """Put a program in the place of llama-server that answers every prompt with the same words."""
    program = folder / "llama-server"
    served = program_that_serves(f"""
    def do_GET(self):
        self.reply({{}})
    def do_POST(self):
        asked = json.loads(self.read())
        assert asked["grammar"].startswith("root ::= ") and all(isinstance(i, int) for i in asked["prompt"])
        self.reply({{"content": {answer!r}}})
""")
    program.write_text(f"#!{sys.executable}\n{served}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(llama_cpp.SERVER, str(program))


def test_a_gguf_file_is_scored_by_the_server_that_runs_it(runs, tmp_path, monkeypatch, labels):
    monkeypatch.setattr(exporting, "convert", lambda model, gguf, kind: gguf.write_text(kind))
    fake_server(tmp_path, monkeypatch, ", ".join(labels.names))
    with pytest.raises(ModelError, match=r"the export of .* \(llama.cpp\) does not score as the run"):
        export(runs["list"], tmp_path / "out", "ollama", bar=silent)
    shifts = export(runs["list"], tmp_path / "out", "ollama", kind="q8_0", force=True, bar=silent)
    assert shifts["llama.cpp"]["rows"] == 5
    assert "prob_change_max" not in shifts["llama.cpp"]
    assert (tmp_path / "out" / "model.gguf").read_text() == "q8_0"
    asked = json.loads((tmp_path / "out" / "prompt.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    loaded = emogen.load_run(tmp_path / "out")
    ids = tokenizer(asked["before"] + "hello there" + asked["after"], add_special_tokens=False)["input_ids"]
    assert ids == [*loaded.encoder.prefix_ids, *loaded.encoder.rows("hello there")[0].suffix_ids]
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert f'TEMPLATE """{asked["before"]}{{{{ .Prompt }}}}{asked["after"]}"""' in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile


def test_no_text_of_a_prompt_ends_the_template_of_ollama_or_becomes_code():
    assert exporting._go_escaped('say "joy" or {"a": 1}') == 'say "joy" or {"a": 1}'
    assert exporting._go_escaped("{{ .Secret }}") == '{{ "{{" }} .Secret }}'
    for text in ('a """ b', '["joy", ""', 'ends with "', '""""'):
        written = exporting._go_escaped(text)
        assert '"""' not in written + '"""'[:2]
        assert written.replace('{{ "\\"" }}', '"') == text


def test_what_cannot_be_exported_is_said_before_anything_is_computed(runs, tmp_path, monkeypatch):
    monkeypatch.delenv(llama_cpp.SERVER, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no llama-server on the path"):
        export(runs["list"], tmp_path / "out", "gguf", bar=silent)
    with pytest.raises(InputError, match="a head generates no answers"):
        export(runs["head"], tmp_path / "out", "gguf", bar=silent)
    with pytest.raises(InputError, match="--to onnx is for heads"):
        export(runs["list"], tmp_path / "out", "onnx", bar=silent)
    with pytest.raises(InputError, match="not a run folder"):
        export(tmp_path, tmp_path / "out", "merged", bar=silent)
    (tmp_path / "baseline" / "adapter").mkdir(parents=True)
    (tmp_path / "baseline" / "manifest.json").write_text('{"kind": "baseline"}')
    for name in ("recipe.yaml", "labels.yaml", "prompt.jinja"):
        (tmp_path / "baseline" / name).write_bytes((runs["list"] / name).read_bytes())
    with pytest.raises(InputError, match="not a run; export the run of a single training"):
        export(tmp_path / "baseline", tmp_path / "out", "merged", bar=silent)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(InputError, match="exists and is not empty"):
        export(runs["list"], tmp_path / "full", "merged", bar=silent)


def test_a_model_that_llama_cpp_does_not_know_is_named(runs, tmp_path):
    export(runs["list"], tmp_path / "out", "merged", bar=silent)
    with pytest.raises(ModelError, match=r"llama\.cpp's converter cannot convert it: .{10}"):
        llama_cpp.convert(tmp_path / "out" / "model", tmp_path / "model.gguf", "f16")


def test_a_server_that_ends_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(llama_cpp.SERVER, "/bin/false")
    with pytest.raises(ModelError, match="cannot load the model: it ended with 1"), llama_cpp.llama_server(tmp_path, 8):
        pass


def test_the_command_prints_the_difference(runs, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    words = ["export", str(runs["list"]), "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as done:
        run_command(lambda: app(words))
    assert done.value.code == 0
    assert "answer: 0 of 5 answers changed" in caplog.text
    assert f"The export is in {tmp_path / 'out'}" in capsys.readouterr().out.replace("\n", "")
