"""Shared-prefix training equals plain training on the same rows.

Run as a script, this file trains as one of several processes: see `test_two_processes`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import CONFIGS, POSTS, make_model, make_tokenizer, save_model
from trl import ModelConfig, SFTConfig

from emogen.model import loading
from emogen.model.encode import make_encoder
from emogen.model.shared_prefix import share_prefix
from emogen.task.labels import load_label_set
from emogen.task.prompt import load_prompt
from emogen.task.recipe import SelectBest
from emogen.training.scoring import best_step
from emogen.training.sft import EmogenTrainer, PrefixCollator


def make_trainer(model, folder, *, shared, n_rows=6, weights=(None, 0.0), **settings):
    """A trainer of LoRA on a tiny model and some posts, whose B is not zero: that would hide the gradients of A."""
    encoder = make_encoder(make_tokenizer(), load_prompt("prompts/list.jinja"), load_label_set("semeval2018"))
    rows = [encoder.rows(text, names)[0] for text, names in POSTS[:n_rows]]
    examples = [encoder.training_example(row, *weights) for row in rows]
    assert not shared or share_prefix(model)
    return trainer_of(model, folder, encoder, examples, shared=shared, **settings)


def trainer_of(model, folder, encoder, examples, *, shared, **settings):
    settings |= {"report_to": "none", "bf16": False, "use_cpu": True, "max_length": None}
    trainer = EmogenTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), remove_unused_columns=False, **settings),
        train_dataset=Dataset.from_list(examples),
        processing_class=encoder.tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        n_prefix=len(encoder.prefix_ids) if shared else 0,
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return trainer


def loss_and_gradients(model, folder, *, shared, checkpointing=False, **settings):
    settings |= {"gradient_checkpointing": checkpointing, "per_device_train_batch_size": 6}
    return loss_and_gradients_of(make_trainer(model, folder, shared=shared, **settings))


def loss_and_gradients_of(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(shared, plain):
    (loss, ours), (expected, theirs) = shared, plain
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ours.keys() == theirs.keys()
    assert any(tensor.abs().max() > 1e-4 for tensor in theirs.values())
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_loss_and_every_gradient_equal_plain_rows(kind, tmp_path, checkpointing):
    shared, plain = (
        loss_and_gradients(make_model(kind), tmp_path, shared=shared, checkpointing=checkpointing)
        for shared in (True, False)
    )
    assert_same(shared, plain)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_questions_that_share_their_text_too(kind, tmp_path):
    """Eleven questions on each of three posts, one of which is empty: as branches, and as 33 plain rows."""
    encoder = make_encoder(
        make_tokenizer(), load_prompt("prompts/yes_no.jinja"), load_label_set("semeval2018"), "yes_no"
    )
    rows = [encoder.rows(text, names) for text, names in [*POSTS[:2], ("", ())]]
    found = []
    for shared, examples in (
        (True, [encoder.branched_example(questions, WEIGHTS[0]) for questions in rows]),
        (False, [encoder.training_example(row, WEIGHTS[0]) for questions in rows for row in questions]),
    ):
        model = make_model(kind)
        assert not shared or share_prefix(model)
        trainer = trainer_of(model, tmp_path, encoder, examples, shared=shared, per_device_train_batch_size=33)
        found.append(loss_and_gradients_of(trainer))
    assert_same(*found)


def test_the_text_that_questions_share_is_learnt_once():
    encoder = make_encoder(
        make_tokenizer(), load_prompt("prompts/yes_no.jinja"), load_label_set("semeval2018"), "yes_no"
    )
    rows = encoder.rows(*POSTS[0])
    example = encoder.branched_example(rows, None, 0.1)
    assert sum(weight == 0.1 for weight in example["weights"]) == rows[0].n_text - 1
    assert sum(label != -100 for label in example["labels"]) == rows[0].n_text - 1 + sum(row.n_answer for row in rows)
    batch = PrefixCollator(len(encoder.prefix_ids))([example])
    assert sum(label != -100 for label in batch["labels"].tolist()) == sum(label != -100 for label in example["labels"])
    assert len(batch["input_ids"]) == len(batch["labels"]) == len(example["input_ids"]) - 11


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_on_nf4_weights_too(kind, tmp_path):
    save_model(tmp_path / "m", kind)
    config = ModelConfig(load_in_4bit=True, dtype="float32", use_bnb_nested_quant=True)
    shared, plain = (
        loss_and_gradients(loading.load_model(str(tmp_path / "m"), config), tmp_path, shared=shared)
        for shared in (True, False)
    )
    assert_same(shared, plain)


def train(folder, *, shared, accumulation):
    """Three steps of SGD (Adam would blow rounding up): the losses, and the adapter that is saved."""
    settings = {"max_steps": 3, "learning_rate": 0.5, "optim": "sgd", "logging_steps": 1, "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(make_model("llama"), folder, shared=shared, n_rows=12, save_strategy="no", **settings)
    trainer.train()
    trainer.save_model(str(folder))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_training(folder, expected_folder, losses, expected):
    assert losses == pytest.approx(expected, rel=1e-4)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, expected_folder))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_gradients_are_accumulated_as_on_plain_rows(tmp_path):
    losses, expected = (train(tmp_path / str(s), shared=s, accumulation=2) for s in (True, False))
    assert len(set(expected)) == 3
    assert_same_training(tmp_path / "True", tmp_path / "False", losses, expected)


def test_two_processes(tmp_path):
    """Two processes with two rows each, over gloo, take the steps of one process that accumulates over the four."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "two")], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in (tmp_path / "two" / "losses.txt").read_text().split()]
    expected = train(tmp_path / "one", shared=False, accumulation=2)
    assert_same_training(tmp_path / "two", tmp_path / "one", losses, expected)


def test_a_packed_row_holds_the_prefix_once_and_the_shortest_row_first():
    rows = [
        {"input_ids": [7, 8, 1, 2, 9], "labels": [-100, -100, -100, 2, 9]},
        {"input_ids": [7, 8, 3, 4], "labels": [-100, -100, -100, 4]},
    ]
    batch = PrefixCollator(2)(rows)
    assert batch["input_ids"].tolist() == [7, 8, 3, 1, 2]  # without the last tokens, which nothing follows
    assert batch["labels"].tolist() == [-100, -100, 4, 2, 9]  # what follows each
    assert next(iter(batch.values())).tolist() == [[1], [2]]
    with pytest.raises(ValueError, match="do not share"):
        PrefixCollator(2)([rows[0], {"input_ids": [9, 8, 3, 4], "labels": [-100, -100, -100, 4]}])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = train(folder, shared=True, accumulation=1)
    if os.environ["RANK"] == "0":
        assert torch.distributed.get_world_size() == 2
        (folder / "losses.txt").write_text(" ".join(map(str, found)))


WEIGHTS = ([1.0, 2.0, 3.0, 0.5, 1.5, 4.0, 1.0, 6.0, 2.5, 1.0, 9.0], 0.1)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_weights_count_the_same_shared_and_plain(tmp_path, kind):
    plain = loss_and_gradients(make_model(kind), tmp_path, shared=False, weights=WEIGHTS)
    shared = loss_and_gradients(make_model(kind), tmp_path, shared=True, weights=WEIGHTS)
    assert_same(shared, plain)
    unweighted = loss_and_gradients(make_model(kind), tmp_path, shared=True)
    assert abs(unweighted[0] - shared[0]) > 1e-3
    ones = loss_and_gradients(make_model(kind), tmp_path, shared=True, weights=([1.0] * 11, 0.0))
    assert_same(ones, unweighted)


def test_the_weighted_loss_is_each_tokens_own_times_its_weight(tmp_path):
    """By hand: the tokens that name a label have its weight, the text's have 0.1, the end has 1."""
    model = make_model("llama")
    trainer = make_trainer(model, tmp_path, shared=True, n_rows=1, weights=WEIGHTS)
    encoder = make_encoder(make_tokenizer(), load_prompt("prompts/list.jinja"), load_label_set("semeval2018"))
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    text, names = POSTS[0]
    assert names == ("joy", "love")
    pieces = [(encoder.plain.encode(text), 0.1), (encoder.question_ids[0], 0.0), (encoder.plain.encode("joy"), 1.5)]
    pieces += [(encoder.plain.encode(", love"), 4.0), (encoder.end_ids, 1.0)]
    ids, weights = list(encoder.prefix_ids), [0.0] * len(encoder.prefix_ids)
    for piece, weight in pieces:
        ids += piece
        weights += [weight] * len(piece)
    weights[len(encoder.prefix_ids)] = 0.0  # the first of the text
    log_prob = trainer.model(torch.tensor([ids])).logits[0, :-1].log_softmax(1)
    nll = -log_prob[torch.arange(len(ids) - 1), ids[1:]] * torch.tensor(weights[1:])
    assert loss.item() == pytest.approx(nll.sum().item() / sum(w > 0 for w in weights), rel=1e-5)


HISTORY = [
    {"step": 1, "loss": 9.0},
    {"step": 10, "eval_loss": 0.30, "eval_f1_macro": 0.500},
    {"step": 20, "eval_loss": 0.35, "eval_f1_macro": 0.501},
    {"step": 30, "eval_loss": 0.40, "eval_f1_macro": 0.5025},
    {"step": 40, "eval_loss": 0.35, "eval_f1_macro": 0.490},
]


@pytest.mark.parametrize(
    ("rule", "step", "waited"),
    [
        (SelectBest(within=0.0), 30, 1),
        (SelectBest(within=0.002), 20, 2),  # 0.500 is 0.0025 below the best
        (SelectBest(within=0.003), 10, 3),
        (SelectBest(metric="macro_f1", within=1.0), 10, 3),
        (SelectBest(metric="eval_loss", within=0.06, then="eval_loss"), 10, 3),
    ],
)
def test_the_best_evaluation_is_that_of_lowest_loss_within_the_tolerance(rule, step, waited):
    assert best_step(HISTORY, rule) == (step, waited)
