"""Every architecture of transformers is computed as rows alone are, or refused before the first step.

The reference is written out here: each row alone, in full, without padding, a cache or a shared prefix.
"""

import itertools

import architectures
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import POSTS, make_tokenizer
from torch.nn import functional
from trl import ModelConfig, SFTConfig

from emogen.errors import ModelError
from emogen.model.decode import generate, longest_row
from emogen.model.encode import make_encoder
from emogen.model.grammar import encode_answer
from emogen.model.loading import new_adapter
from emogen.model.plain_rows import base_model, pads, require_causal, require_length
from emogen.model.probabilities import probabilities
from emogen.model.shared_prefix import share_prefix
from emogen.model.tokenizer import TextTokenizer
from emogen.task.labels import Label, LabelSet
from emogen.task.prompt import load_prompt
from emogen.training.sft import EmogenTrainer, try_a_step

TEXTS = [POSTS[5][0], "x", POSTS[1][0]]
ANSWERS = [("joy",), (), ("joy", "fear")]


@pytest.fixture(scope="module")
def encoder(tokenizer, tmp_path_factory):
    labels = LabelSet(name="two", labels=(Label(name="joy"), Label(name="fear")))
    template = tmp_path_factory.mktemp("prompt") / "short.jinja"
    template.write_text("{% user %}Which feelings are in this text? List them, or say none.\n{{ text }}\n")
    return make_encoder(TextTokenizer.of(tokenizer), load_prompt(str(template)), labels, "list")


RARE = [name for name in architectures.NAMES if name not in architectures.COMMON]
QUICK = {"gemma3_text", "gpt2", "llama", "mixtral", "phimoe", "qwen2", "xlnet"}  # shared, in full, and refused


@pytest.mark.parametrize(
    "name",
    [
        *sorted(QUICK),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in [*sorted(architectures.COMMON - QUICK), *architectures.ODD]
        ),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in RARE),
    ],
)
def test_it_is_computed_as_rows_alone_or_refused(name, encoder, tmp_path, caplog):
    try:
        model = architectures.make(name)
    except Exception as error:  # whatever a configuration raises that was made smaller
        refused(name, error)
        return
    try:
        require_causal(model)
        require_length(model, 80)
        adapter = new_adapter(
            model, ModelConfig(use_peft=True, lora_target_modules="all-linear", lora_r=2, lora_dropout=0.05)
        )
    except ModelError as error:
        refused(name, error)
        return
    adapter.lora_dropout = 0.0
    model = with_random_adapter(model, adapter)
    prompts = [[*encoder.prefix_ids, *encoder.rows(text)[0].suffix_ids] for text in TEXTS]
    examples = [encoder.training_example(encoder.rows(t, a)[0]) for t, a in zip(TEXTS, ANSWERS, strict=True)]
    loss, gradients = loss_alone(model, examples)
    with torch.no_grad():
        answers = [answer_alone(model, encoder, prompt) for prompt in prompts]
        prob = [probability_alone(model, encoder, prompt) for prompt in prompts]

    longest = longest_row(encoder, [row[len(encoder.prefix_ids) :] for row in prompts])
    shares = share_prefix(base_model(model), encoder.prefix_ids, longest)
    assert shares or "Every row is computed in full" in caplog.text
    trainer = make_trainer(model, encoder, examples, tmp_path, shares=shares, longest=longest)
    try:
        try_a_step(trainer)
    except ModelError as error:
        refused(name, error)
        return
    assert name not in architectures.REFUSED
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    ours = trainer.compute_loss(model, batch)
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-4)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    scale = max(float(gradient.norm()) for gradient in gradients.values())
    assert scale > 1e-4
    for key, gradient in gradients.items():
        assert float((found[key] - gradient).norm()) < 1e-3 * scale, key
    suffixes = [prompt[len(encoder.prefix_ids) :] for prompt in prompts]
    assert generate(model, encoder, suffixes, batch_size=2) == answers
    found = probabilities(model, encoder, suffixes, floor=0, width=None, batch_size=2)
    if name not in architectures.LENGTH_DEPENDENT:
        np.testing.assert_allclose(found[:, 0], prob, atol=1e-4)


def refused(name, error):
    """A tiny model of some architectures that are not used much cannot compute anything; that is not emogen's refusal."""
    if name not in architectures.REFUSED:
        assert name in RARE, error
        pytest.skip(f"no tiny model: {error}")


def with_random_adapter(model, adapter):
    """A model with an adapter whose B is not zero, which would hide the gradients of A."""
    model = get_peft_model(model, adapter).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def make_trainer(model, encoder, examples, folder, *, shares, longest):
    settings = {"report_to": "none", "bf16": False, "use_cpu": True, "max_length": None, "disable_tqdm": True}
    return EmogenTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), remove_unused_columns=False, per_device_train_batch_size=3, **settings),
        train_dataset=Dataset.from_list(examples),
        processing_class=make_tokenizer(),
        n_prefix=len(encoder.prefix_ids) if shares else 0,
        padded=shares or pads(model, encoder.prefix_ids, longest),
    )


def logits_alone(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def loss_alone(model, examples):
    """The mean loss of the tokens of all answers, and the gradients of the adapter."""
    losses = []
    for example in examples:
        labels = torch.tensor(example["labels"])[1:]
        logits = logits_alone(model, example["input_ids"])[:-1]
        losses.append(functional.cross_entropy(logits[labels >= 0], labels[labels >= 0], reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def answer_alone(model, encoder, prompt):
    """The greedy answer under the grammar; each token is the best one of those that are allowed."""
    grammar, node, answer = encoder.grammar, 0, []
    while node != len(grammar.next_node) - 1:
        logits = logits_alone(model, prompt + answer)[-1, torch.from_numpy(grammar.token_ids)]
        best = int(logits.masked_fill(torch.from_numpy(grammar.next_node[node] < 0), -torch.inf).argmax())
        answer.append(int(grammar.token_ids[best]))
        node = grammar.next_node[node, best]
    return answer[: -len(encoder.end_ids)]


def probability_alone(model, encoder, prompt):
    """The probability of each label: the sum over the answers that name it."""
    grammar, prob = encoder.grammar, np.zeros(2)
    column = {int(token): c for c, token in enumerate(grammar.token_ids)}
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(2), size) for size in range(3)):
        answer, node, log_prob = encode_answer(grammar, chosen)[0], 0, 0.0
        steps = logits_alone(model, prompt + answer)[len(prompt) - 1 :, torch.from_numpy(grammar.token_ids)]
        for token, logits in zip(answer, steps, strict=False):  # the last step is that after the answer
            allowed = torch.from_numpy(grammar.next_node[node] >= 0)
            log_prob += float(logits.masked_fill(~allowed, -torch.inf).log_softmax(0)[column[token]])
            node = grammar.next_node[node, column[token]]
        prob[list(chosen)] += np.exp(log_prob)
    return prob
