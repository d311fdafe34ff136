"""Training runs from a recipe to a run folder, in this process, with tiny models."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import POSTS, make_tokenizer, write_posts, write_recipe
from transformers import AutoModelForCausalLM, BloomConfig

from emogen.errors import InputError, ModelError
from emogen.prediction.ensemble import load_run
from emogen.prediction.generator import predict_texts
from emogen.report import page
from emogen.task.recipe import RecipeError
from emogen.train import main
from emogen.training.run_setup import newest_checkpoint

pytestmark = pytest.mark.slow

FILES = {"recipe.yaml", "prompt.jinja", "labels.yaml", "examples.jsonl", "manifest.json", "metrics.json", "adapter"}


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, labels):
    """(recipe, run folder) of a run of four steps. Tests do not change them."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = str(write_recipe(folder, labels))
    main([recipe])
    return recipe, folder / "run"


@pytest.fixture
def without_report(monkeypatch):
    """Leaves out the report of a run, because it takes longer than the training."""
    monkeypatch.setattr(page, "report_finished", lambda folder: None)


# SmolLM2 and Llama 3 are Llama, both Qwens are Qwen2. Those that the recipes quantise are quantised here as well.
@pytest.mark.parametrize(("kind", "four_bit"), [("llama", False), ("llama", True), ("qwen2", True), ("gemma3", False), ("gemma3", True)])  # fmt: skip
def test_every_architecture_of_the_recipes_trains(tiny_recipe, tmp_path, kind, four_bit):
    main([str(tiny_recipe(kind, load_in_4bit=four_bit, use_bnb_nested_quant=four_bit, max_steps=3))])
    assert {path.name for path in (tmp_path / "run").iterdir()} >= FILES
    lora_b = [value for name, value in weights(tmp_path / "run").items() if "lora_B" in name]
    assert lora_b
    assert all(value.abs().sum() > 0 for value in lora_b)


def test_a_run_memorises_its_posts_and_is_loaded_as_it_was_scored(tiny_recipe, tmp_path, labels):
    eval_file = write_posts(tmp_path / "eval.csv", labels)
    recipe = tiny_recipe(
        max_steps=80, per_device_train_batch_size=12, eval_file=str(eval_file), lora_r=16, learning_rate=2e-2
    )
    main([str(recipe)])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["f1_micro"] > 0.8
    assert metrics["parse"] == {"exact": 1.0, "parse_failure": 0.0}
    assert metrics["peak_memory_bytes"] > 2**27  # torch alone takes more
    assert metrics["answer_seconds"] > 0
    assert "macro-F1, nested thresholds" in (tmp_path / "run" / "report.html").read_text()
    assert "library_name: peft" in (tmp_path / "run" / "README.md").read_text()  # and not the card that TRL writes
    loaded = load_run(tmp_path / "run")
    scored = read_jsonl(tmp_path / "run" / "predictions.jsonl")
    again = predict_texts(loaded.model, loaded.encoder, [row["text"] for row in scored])
    assert [prediction.raw for prediction in again] == [row["raw"] for row in scored]


def test_a_base_model_answers_yes_no_questions(tiny_recipe, tmp_path, caplog):
    main([str(tiny_recipe(chat_template=None, answer="yes_no", prompt="prompts/yes_no.jinja", max_steps=2))])
    assert "has no chat template" in caplog.text
    loaded = load_run(tmp_path / "run")
    (prediction,) = predict_texts(loaded.model, loaded.encoder, ["hello"])
    assert len(prediction.raw.splitlines()) == 11
    assert not prediction.parsed.failed


def test_few_shot_examples_are_kept_and_are_not_trained_on(tiny_recipe, tmp_path):
    main([str(tiny_recipe(chat_template=None, prompt="prompts/few_shot.jinja", examples=3, max_steps=2))])
    shown = [record["text"] for record in read_jsonl(tmp_path / "run" / "examples.jsonl")]
    assert len(shown) == 3
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train_rows"] == 9
    loaded = load_run(tmp_path / "run")
    prefix = loaded.encoder.tokenizer.decode(loaded.encoder.prefix_ids)
    assert all(text in prefix for text in shown)


@pytest.mark.usefixtures("without_report")
def test_with_and_without_shared_prefix_a_run_is_the_same(tiny_recipe, tmp_path):
    labelled, prob = [], []
    for shared in (True, False):
        keys = {"lora_dropout": 0.0, "eval_fraction": 0.3, "optim": "sgd", "output_dir": str(tmp_path / str(shared))}
        main([str(tiny_recipe(shared_prefix=shared, **keys))])
        records = read_jsonl(tmp_path / str(shared) / "predictions.jsonl")
        prob.append([list(record.pop("prob").values()) for record in records])
        labelled.append(records)
    assert labelled[0] == labelled[1]
    np.testing.assert_allclose(prob[0], prob[1], atol=1e-5)
    for name, tensor in weights(tmp_path / "True").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "False")[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.usefixtures("without_report")
def test_a_model_that_cannot_share_its_prefix_trains_with_a_warning(tiny_recipe, tmp_path, caplog):
    config = BloomConfig(vocab_size=512, hidden_size=32, n_layer=1, n_head=2, eos_token_id=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    make_tokenizer().save_pretrained(tmp_path / "bloom")
    main([str(tiny_recipe(model_name_or_path=str(tmp_path / "bloom"), eval_fraction=0.3, max_steps=2))])
    assert caplog.text.count("Every row is computed in full") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["parse"]["parse_failure"] == 0
    loaded = load_run(tmp_path / "run")
    assert not predict_texts(loaded.model, loaded.encoder, ["hello"])[0].parsed.failed


# ------------------------------------------------------------------------------------------ evaluations and checkpoints


@pytest.mark.usefixtures("without_report")
def test_evaluations_generate_and_choose_the_best_checkpoint(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        max_steps=4,
        eval_fraction=0.3,
        eval_samples=3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model="f1_macro",
        load_best_model_at_end=True,
    )
    main([str(recipe)])
    state = json.loads((newest_checkpoint(tmp_path / "run") / "trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert all({"eval_f1_macro", "eval_f1/trust", "eval_parse_failure"} <= entry.keys() for entry in evaluations)
    assert state["best_metric"] == max(entry["eval_f1_macro"] for entry in evaluations)


@pytest.mark.usefixtures("without_report")
def test_select_best_ends_with_the_checkpoint_of_its_rule(tiny_recipe, tmp_path, labels):
    posts = [(f"{text} {k}", names) for k in range(3) for text, names in POSTS]
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    # Every macro-F1 is within the tolerance, and no answer is ever unreadable: of equal ones the first is taken.
    rule = {"within": 1.0, "then": "parse_failure", "fraction": 0.3}
    recipe = tiny_recipe(select_best=rule, max_steps=12, eval_fraction=0.2, **steps)
    write_posts(tmp_path / "train.csv", labels, posts)
    main([str(recipe)])
    folder = tmp_path / "run"
    log = read_jsonl(folder / "train_log.jsonl")
    assert [logs["step"] for logs in log if "eval_loss" in logs] == [2, 4, 6, 8, 10, 12]
    chosen, last = (load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 12))
    kept = weights(folder)
    assert all(torch.equal(kept[name], value) for name, value in chosen.items())
    assert any(not torch.equal(kept[name], value) for name, value in last.items())
    # The checkpoint is chosen by rows that are neither trained on nor scored at the end.
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["train_rows"] + metrics["n"] < len(posts)

    patient = "select_best={within: 1.0, then: parse_failure, fraction: 0.3, patience: 1}"
    main([str(recipe), f"output_dir={tmp_path / 'early'}", patient])
    assert read_jsonl(tmp_path / "early" / "train_log.jsonl")[-1]["step"] == 4
    assert json.loads((tmp_path / "early" / "metrics.json").read_text())["f1_macro"] == metrics["f1_macro"]


def train_loss(run):
    return [entry["train_loss"] for entry in read_jsonl(run / "train_log.jsonl") if "train_loss" in entry][-1]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tiny_recipe, tmp_path, dropout):
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9, "lora_dropout": dropout}
    recipe = tiny_recipe(**keys)
    main([str(recipe), f"output_dir={tmp_path / 'whole'}"])

    # As a kill during the last save would leave it: the newest checkpoint is broken, and there is no adapter yet.
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    optimizer = cut / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    (cut / "checkpoint-6" / "README.md").write_bytes(b"\xd2")  # peft would read it before it writes it again
    shutil.rmtree(cut / "adapter")
    with pytest.raises(ModelError, match="resume_from_checkpoint=true"):
        load_run(cut)
    assert newest_checkpoint(cut).name == "checkpoint-3"
    main([str(recipe), f"output_dir={cut}", "resume_from_checkpoint=true"])

    expected, resumed = weights(tmp_path / "whole"), weights(cut)
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name
    # The mean loss of all steps, also after a resume, and if there was nothing left to do.
    means = [train_loss(tmp_path / "whole"), train_loss(cut)]
    main([str(recipe), f"output_dir={cut}", "resume_from_checkpoint=true"])
    assert [*means, train_loss(cut)] == pytest.approx([means[0]] * 3, rel=1e-6)
    losses = [entry["loss"] for entry in read_jsonl(cut / "train_log.jsonl") if "loss" in entry]
    assert means[0] == pytest.approx(sum(losses) / 6, abs=1e-3)


# ------------------------------------------------------------------------------------------ run folders


def test_another_run_is_never_overwritten(trained, tmp_path, labels):
    recipe, run = trained
    before = weights(run)
    with pytest.raises(RecipeError, match="nothing is overwritten"):
        main([recipe])
    other = write_posts(tmp_path / "other.csv", labels, [("other", ("joy",)), ("posts", ())])
    with pytest.raises(RecipeError, match="data changed since"):
        main([recipe, f"train_file={other}", "resume_from_checkpoint=true"])
    after = weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_output_folder_that_cannot_be_written_to_is_an_error_before_training(tiny_recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written to"):
        main([str(tiny_recipe()), f"output_dir={tmp_path / 'file' / 'run'}"])


def test_a_broken_run_is_named(trained, tmp_path):
    run = shutil.copytree(trained[1], tmp_path / "run")
    adapter = run / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:100])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors changed since the run was scored.*--force"):
        load_run(run)
    with pytest.raises(ModelError, match="adapter cannot be loaded"):
        load_run(run, force=True)
    with pytest.raises(InputError, match=r"not a run folder: it has no recipe\.yaml"):
        load_run(tmp_path)


# ------------------------------------------------------------------------------------------ keys of a recipe


def test_a_run_continues_from_the_adapter_of_another(trained, tmp_path):
    recipe, run = trained
    second = tmp_path / "second"
    main([recipe, f"output_dir={second}", f"init_adapter={run}", "learning_rate=0", "max_steps=1"])
    first, after = weights(run), weights(second)
    assert all(torch.equal(after[name], value) for name, value in first.items())
    with pytest.raises(RecipeError, match=r"init_adapter: .*nowhere.*no such file"):
        main([recipe, f"output_dir={tmp_path / 'third'}", f"init_adapter={tmp_path / 'nowhere'}"])


def test_weights_and_sampling_change_the_adapter(tiny_recipe, tmp_path):
    recipe = str(tiny_recipe(max_steps=2))
    adapters = {}
    for setting in ("seed=42", "label_weights=within", "label_weights=across", "sampling=rare", "text_loss_weight=0.1"):
        main([recipe, f"output_dir={tmp_path / setting}", setting])
        adapters[setting] = next(iter(weights(tmp_path / setting).values())).numpy().tobytes()
    assert len(set(adapters.values())) == 5


@pytest.mark.parametrize(("order", "first", "second"), [("frequent_first", "joy", "trust"), ("rare_first", "trust", "joy")])  # fmt: skip
def test_answers_can_name_frequent_or_rare_labels_first(tiny_recipe, tmp_path, labels, order, first, second):
    """Three posts have joy, and one has trust."""
    main([str(tiny_recipe()), f"order={order}", "max_steps=1"])
    loaded = load_run(tmp_path / "run")
    named = loaded.label_set.order
    assert sorted(named) == sorted(labels.names)
    assert named.index(first) < named.index(second)
    assert loaded.label_set.names == labels.names
    prompt = loaded.encoder.tokenizer.decode(loaded.encoder.prefix_ids)
    assert ", ".join(named) in prompt
    (prediction,) = predict_texts(loaded.model, loaded.encoder, ["a lovely morning"])
    assert prediction.parsed.status == "exact"


def test_a_run_that_was_killed_after_its_last_step_takes_no_other(tiny_recipe, tmp_path, without_report):
    """The last checkpoint is within an epoch, and the learning rate does not end at 0."""
    keys = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    recipe, run = str(tiny_recipe(**keys)), tmp_path / "run"
    main([recipe])
    expected = weights(run)
    shutil.rmtree(run / "adapter")
    (run / "metrics.json").unlink()
    main([recipe, "resume_from_checkpoint=true"])
    assert all(torch.equal(value, expected[name]) for name, value in weights(run).items())
    assert newest_checkpoint(run).name == "checkpoint-4"
