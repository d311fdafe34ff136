import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import POSTS, make_tokenizer, write_posts
from transformers import AutoModelForCausalLM, BloomConfig

from emogen import paths
from emogen.errors import InputError, ModelError
from emogen.prediction.ensemble import load_run
from emogen.prediction.generator import predict_texts
from emogen.task.recipe import RecipeError
from emogen.train import main
from emogen.training.run_setup import newest_checkpoint

FILES = {"recipe.yaml", "prompt.jinja", "labels.yaml", "examples.jsonl", "manifest.json", "metrics.json", "adapter"}


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


# SmolLM2 and Llama 3 are Llama, both Qwens are Qwen2; those that the recipes quantise are quantised here as well.
@pytest.mark.parametrize(("kind", "four_bit"), [("llama", False), ("llama", True), ("qwen2", True), ("gemma3", False), ("gemma3", True)])  # fmt: skip
def test_every_architecture_of_the_recipes_trains(tiny_recipe, tmp_path, kind, four_bit):
    recipe = tiny_recipe(kind, load_in_4bit=four_bit, use_bnb_nested_quant=four_bit, max_steps=3)
    main([str(recipe)])
    assert {path.name for path in (tmp_path / "run").iterdir()} >= FILES
    lora_b = [value for name, value in weights(tmp_path / "run").items() if "lora_B" in name]
    assert all(value.abs().sum() > 0 for value in lora_b)


def test_it_learns_the_answers_by_heart(tiny_recipe, tmp_path, labels):
    held = write_posts(tmp_path / "eval.csv", labels)
    recipe = tiny_recipe(
        max_steps=80, per_device_train_batch_size=12, eval_file=str(held), lora_r=16, learning_rate=2e-2
    )
    main([str(recipe)])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["f1_micro"] > 0.8
    assert metrics["parse"] == {"exact": 1.0, "parse_failure": 0.0}
    assert metrics["peak_memory_bytes"] > 2**27  # torch alone takes more
    assert metrics["answer_seconds"] > 0
    assert "by nested thresholds" in (tmp_path / "run" / "report.html").read_text()
    assert "library_name: peft" in (tmp_path / "run" / "README.md").read_text()  # and no longer what TRL left there
    # What was scored at the end of training is what a loaded run predicts.
    loaded = load_run(tmp_path / "run")
    kept = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    again = predict_texts(loaded.model, loaded.encoder, [row["text"] for row in kept])
    assert [prediction.raw for prediction in again] == [row["raw"] for row in kept]


def test_a_base_model_yes_no_and_few_shot_examples(tiny_recipe, tmp_path):
    recipe = tiny_recipe(chat_template=None, answer="yes_no", prompt="prompts/yes_no.jinja", max_steps=2)
    main([str(recipe)])
    loaded = load_run(tmp_path / "run")
    (prediction,) = predict_texts(loaded.model, loaded.encoder, ["hello"])
    assert len(prediction.raw.splitlines()) == 11
    assert not prediction.parsed.failed

    recipe = tiny_recipe(
        chat_template=None, prompt="prompts/few_shot.jinja", examples=3, max_steps=2, output_dir=str(tmp_path / "few")
    )
    main([str(recipe)])
    shown = [json.loads(line)["text"] for line in (tmp_path / "few" / "examples.jsonl").read_text().splitlines()]
    assert len(shown) == 3
    assert json.loads((tmp_path / "few" / "metrics.json").read_text())["train_rows"] == 9
    loaded = load_run(tmp_path / "few")
    prefix = loaded.encoder.tokenizer.decode(loaded.encoder.prefix_ids)
    assert all(text in prefix for text in shown)


def test_with_and_without_sharing_the_same_is_learnt_and_said(tiny_recipe, tmp_path):
    said, prob = [], []
    for shared in (True, False):
        keys = {"lora_dropout": 0.0, "eval_fraction": 0.3, "optim": "sgd", "output_dir": str(tmp_path / str(shared))}
        main([str(tiny_recipe(shared_prefix=shared, **keys))])
        records = [json.loads(line) for line in (tmp_path / str(shared) / "predictions.jsonl").open(encoding="utf-8")]
        prob.append([list(record.pop("prob").values()) for record in records])
        said.append(records)
    assert said[0] == said[1]
    np.testing.assert_allclose(prob[0], prob[1], atol=1e-5)
    for name, tensor in weights(tmp_path / "True").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "False")[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_model_that_cannot_share_its_prefix_trains_all_the_same(tiny_recipe, tmp_path, caplog):
    config = BloomConfig(vocab_size=512, hidden_size=32, n_layer=1, n_head=2, eos_token_id=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    make_tokenizer().save_pretrained(tmp_path / "bloom")
    main([str(tiny_recipe(model_name_or_path=str(tmp_path / "bloom"), eval_fraction=0.3, max_steps=2))])
    assert caplog.text.count("Every row is computed in full") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["parse"]["parse_failure"] == 0
    loaded = load_run(tmp_path / "run")
    assert not predict_texts(loaded.model, loaded.encoder, ["hello"])[0].parsed.failed


def test_evaluation_generates_and_the_best_checkpoint_is_chosen_by_it(tiny_recipe, tmp_path):
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
    logged = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert len(logged) == 2
    assert all({"eval_f1_macro", "eval_f1/trust", "eval_parse_failure"} <= entry.keys() for entry in logged)
    assert state["best_metric"] == max(entry["eval_f1_macro"] for entry in logged)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resuming_ends_at_the_weights_of_an_uninterrupted_run(tiny_recipe, tmp_path, dropout):
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9, "lora_dropout": dropout}
    recipe = tiny_recipe(**keys)
    main([str(recipe), f"output_dir={tmp_path / 'whole'}"])

    main([str(recipe), f"output_dir={tmp_path / 'cut'}"])
    # As a kill during the last save would leave it: the newest checkpoint is broken, and there is no adapter yet.
    (tmp_path / "cut" / "checkpoint-6" / "trainer_state.json").write_text("{")
    for path in (tmp_path / "cut" / "adapter").iterdir():
        path.unlink()
    (tmp_path / "cut" / "adapter").rmdir()
    with pytest.raises(ModelError, match="resume_from_checkpoint=true"):
        load_run(tmp_path / "cut")
    assert newest_checkpoint(tmp_path / "cut").name == "checkpoint-3"
    main([str(recipe), f"output_dir={tmp_path / 'cut'}", "resume_from_checkpoint=true"])

    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name


def test_another_run_is_never_overwritten(tiny_recipe, tmp_path, labels):
    recipe = tiny_recipe(max_steps=1)
    main([str(recipe)])
    before = weights(tmp_path / "run")
    with pytest.raises(RecipeError, match="nothing is overwritten"):
        main([str(recipe)])
    write_posts(tmp_path / "train.csv", labels, [("other", ("joy",)), ("posts", ())])
    with pytest.raises(RecipeError, match="data changed since"):
        main([str(recipe), "resume_from_checkpoint=true"])
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_output_folder_that_cannot_be_written_to_fails_first(tiny_recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecipeError, match="cannot be written to"):
        main([str(tiny_recipe()), f"output_dir={tmp_path / 'file' / 'run'}"])


def test_broken_runs_are_named(tiny_recipe, tmp_path):
    main([str(tiny_recipe(max_steps=1))])
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:100])
    with pytest.raises(ModelError, match="adapter cannot be loaded"):
        load_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"not a run folder: it has no recipe\.yaml"):
        load_run(tmp_path)


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("before")

    def fail_halfway():
        with paths.writing(path) as file:
            file.write("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


def logged(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_select_best_ends_with_the_checkpoint_of_its_rule(tiny_recipe, tmp_path, labels):
    posts = [(f"{text} {k}", names) for k in range(3) for text, names in POSTS]
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    # Any macro-F1 will do, and no answer is ever unreadable: of equal ones the first is taken.
    rule = {"within": 1.0, "then": "parse_failure", "fraction": 0.3}
    recipe = tiny_recipe(select_best=rule, max_steps=12, eval_fraction=0.2, **steps)
    write_posts(tmp_path / "train.csv", labels, posts)
    main([str(recipe)])
    folder = tmp_path / "run"
    assert [logs["step"] for logs in logged(folder) if "eval_loss" in logs] == [2, 4, 6, 8, 10, 12]
    chosen, last = (load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 12))
    kept = weights(folder)
    assert all(torch.equal(kept[name], value) for name, value in chosen.items())
    assert any(not torch.equal(kept[name], value) for name, value in last.items())
    # It chose by rows that it did not learn from, and that are not those it is scored on in the end.
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["train_rows"] + metrics["n"] < len(posts)

    main(
        [
            str(recipe),
            f"output_dir={tmp_path / 'early'}",
            "select_best={within: 1.0, then: parse_failure, fraction: 0.3, patience: 1}",
        ]
    )
    assert logged(tmp_path / "early")[-1]["step"] == 4
    assert json.loads((tmp_path / "early" / "metrics.json").read_text())["f1_macro"] == metrics["f1_macro"]


def test_a_run_goes_on_from_the_adapter_of_another_one(tiny_recipe, tmp_path):
    recipe = str(tiny_recipe())
    main([recipe])
    second = tmp_path / "second"
    main([recipe, f"output_dir={second}", f"init_adapter={tmp_path / 'run'}", "learning_rate=0", "max_steps=1"])
    first, after = weights(tmp_path / "run"), weights(second)
    assert all(torch.equal(after[name], value) for name, value in first.items())
    with pytest.raises(RecipeError, match=r"init_adapter: .*nowhere.*no such file"):
        main([recipe, f"output_dir={tmp_path / 'third'}", f"init_adapter={tmp_path / 'nowhere'}"])


def test_weights_and_sampling_change_what_is_learnt(tiny_recipe, tmp_path):
    recipe = str(tiny_recipe(max_steps=2))
    learnt = {}
    for setting in ("seed=42", "label_weights=within", "label_weights=across", "sampling=rare", "text_loss_weight=0.1"):
        main([recipe, f"output_dir={tmp_path / setting}", setting])
        learnt[setting] = next(iter(weights(tmp_path / setting).values())).numpy().tobytes()
    assert len(set(learnt.values())) == 5


def test_answers_can_name_frequent_or_rare_labels_first(tiny_recipe, tmp_path, labels):
    """joy stands in three posts, love in two and trust in one; sadness in two."""
    for order, first in (("frequent_first", "joy"), ("rare_first", "trust")):
        folder = tmp_path / order
        main([str(tiny_recipe()), f"output_dir={folder}", f"order={order}"])
        loaded = load_run(folder)
        said = loaded.label_set.order
        assert sorted(said) == sorted(labels.names)
        assert said.index("joy") < said.index("trust") if first == "joy" else said.index("trust") < said.index("joy")
        assert loaded.label_set.names == labels.names
        prompt = loaded.encoder.tokenizer.decode(loaded.encoder.prefix_ids)
        assert ", ".join(said) in prompt
        (prediction,) = predict_texts(loaded.model, loaded.encoder, ["a lovely morning"])
        assert prediction.parsed.status == "exact"
