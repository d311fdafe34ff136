"""Shared-prefix training equals plain training on the same rows."""

import pytest
import torch
from conftest import CONFIGS, POSTS, make_model
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from emogen.attention import share_prefix
from emogen.encode import make_encoder
from emogen.prompt import load_prompt
from emogen.trainer import EmogenTrainer, PrefixCollator


@pytest.fixture
def encoder(labels, tokenizer):
    return make_encoder(tokenizer, load_prompt("prompts/list.jinja"), labels)


def examples_of(encoder):
    return [encoder.training_example(encoder.rows(text, names)[0]) for text, names in POSTS[:6]]


def loss_and_gradients(kind, encoder, folder, *, shared, checkpointing):
    args = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_length=None,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=6,
    )
    model = make_model(kind)
    assert not shared or share_prefix(model)
    trainer = EmogenTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(examples_of(encoder)),
        processing_class=encoder.tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        n_prefix=len(encoder.prefix_ids) if shared else 0,
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the gradients of A
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_loss_and_every_gradient_equal_plain_rows(kind, encoder, tmp_path, checkpointing):
    expected, plain = loss_and_gradients(kind, encoder, tmp_path, shared=False, checkpointing=checkpointing)
    loss, packed = loss_and_gradients(kind, encoder, tmp_path, shared=True, checkpointing=checkpointing)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert packed.keys() == plain.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in plain.values())
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_packed_row_holds_the_prefix_once_and_the_shortest_row_first():
    rows = [
        {"input_ids": [7, 8, 1, 2, 9], "labels": [-100, -100, -100, 2, 9]},
        {"input_ids": [7, 8, 3, 4], "labels": [-100, -100, -100, 4]},
    ]
    batch = PrefixCollator(2)(rows)
    assert batch["input_ids"].tolist() == [7, 8, 3, 1, 2]  # without the last tokens, which nothing follows
    assert batch["labels"].tolist() == [-100, -100, 4, 2, 9]  # what follows each
    assert batch["position_ids"].tolist() == [0, 1, 2, 2, 3]
    assert next(iter(batch.values())).tolist() == [1, 2]
    with pytest.raises(ValueError, match="do not share"):
        PrefixCollator(2)([rows[0], {"input_ids": [9, 8, 3, 4], "labels": [-100, -100, -100, 4]}])
