"""TRL's `SFTTrainer`, with the instruction computed once a batch, logits on the answers alone, and generated scores.

Loss and gradients equal those of plain training on the same rows; `attention.py` says why.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from trl import SFTTrainer, get_peft_config

from emogen.evaluation.run_folder import ADAPTER
from emogen.model.encode import Encoder, load_encoder
from emogen.model.loading import load_adapter, load_model
from emogen.model.onednn import use_onednn
from emogen.model.shared_prefix import PackedRows, forward, share_prefix
from emogen.model.sources import locate
from emogen.prediction.classifier import Classifier
from emogen.prediction.generator import GenerativeClassifier
from emogen.task.recipe import Recipe, SelectBest
from emogen.task.rows import Rows
from emogen.task.task import Task
from emogen.training.sampling import label_weights, repeat_rare
from emogen.training.scoring import Scoring

log = logging.getLogger(__name__)


def prepare(
    task: Task,
    args: Any,
    learnt: Rows,
    watched: Rows | None,
    figures: Callable[[Classifier], dict[str, float]] | None,
) -> tuple["EmogenTrainer", Callable[[Any], Classifier]]:
    """Load the model of a recipe and all that it takes to tune it.

    Args:
        args: TRL's `SFTConfig`.
        learnt, watched: the rows to learn from, and those to look at during training.
        figures: what to log of the watched rows.

    Returns:
        The trainer, and what makes a `Labeller` of its model.

    Raises:
        InputError, ModelError: the recipe's parts do not go together, or the model cannot be loaded.
    """
    recipe, lm_config = task.recipe, task.recipe.lm_config()
    location = locate(recipe.model_name, lm_config.model_revision)
    encoder, plain = load_encoder(task, location)
    if plain:
        log.warning(f"{recipe.model_name} has no chat template: it is a base model, and gets a plain one.")
    model = load_model(location, lm_config, trust_remote_code=recipe.trusts_code)
    if recipe.init_adapter:
        model = load_adapter(model, recipe.find(recipe.init_adapter) / ADAPTER, trainable=True)
    n_prefix = len(encoder.prefix_ids) if recipe.shared_prefix and share_prefix(model) else 0
    train_set, n_cut = encode_rows(encoder, learnt, recipe, branched=bool(n_prefix))
    eval_set = None if watched is None else encode_rows(encoder, watched, branched=bool(n_prefix))[0]
    if n_cut:
        log.warning(f"{n_cut:,} texts were shortened to fit max_length={recipe.max_length}")
    mean = sum(len(example["input_ids"]) for example in train_set) / len(train_set) - len(encoder.prefix_ids)
    log.info(
        f"{len(learnt):,} rows to learn from, {len(watched) if watched else 0:,} to watch; the instruction takes "
        f"{len(encoder.prefix_ids)} tokens, the rest of a row {mean:.0f}"
    )

    def make_classifier(model: Any) -> Classifier:
        return GenerativeClassifier(recipe, task.label_set, encoder, model)

    trainer = EmogenTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(train_set),
        eval_dataset=None if eval_set is None else Dataset.from_list(eval_set),
        processing_class=encoder.tokenizer,
        peft_config=None if recipe.init_adapter else get_peft_config(lm_config),
        n_prefix=n_prefix,
        score=figures and (lambda model: figures(make_classifier(model))),
        select_best=recipe.select_best,
    )
    return trainer, make_classifier


def encode_rows(
    encoder: Encoder, rows: Rows, recipe: Recipe | None = None, *, branched: bool
) -> tuple[list[dict[str, Any]], int]:
    """Rows -> examples, and how many texts had to be shortened. With a recipe, weighted and repeated as it says.

    Args:
        branched: several questions on one text are one example.
    """
    weights = None
    if recipe and recipe.sampling == "rare":
        rows = rows.take(repeat_rare(rows.truth, recipe.seed))
    if recipe and recipe.label_weights != "none":
        weights = label_weights(rows.truth, recipe.label_weights).tolist()
    examples: list[dict[str, Any]] = []
    n_cut = 0
    for text, vector in zip(rows.texts, rows.truth, strict=True):
        questions = encoder.rows(text, encoder.label_set.names_of(vector))
        n_cut += any(row.n_cut for row in questions)
        text_weight = recipe.text_loss_weight if recipe else 0.0
        if branched and len(questions) > 1:
            examples.append(encoder.branched_example(questions, weights, text_weight))
        else:
            examples += [encoder.training_example(row, weights, text_weight) for row in questions]
    if examples and "weights" in examples[0]:
        # The mean weight of what is learnt is 1: the learning rate means what it means without weights.
        learnt = [w for e in examples for w, label in zip(e["weights"], e["labels"], strict=True) if label != -100]
        mean = sum(learnt) / len(learnt)
        examples = [example | {"weights": [w / mean for w in example["weights"]]} for example in examples]
    return examples, n_cut


class PrefixCollator:
    """B rows that begin with the same P tokens -> one packed row of T = P + sum of what is left of each.

    The rows are sorted by length. What nothing is to follow, the last token of a row or of each of its `branches`, is
    left out.

    Returns:
        `shapes` int64 [B, 1 + K]: how much of the packed row each row takes after the prefix, before its K branches and
            in each of them. It comes first because the trainer reads the number of rows off the first entry.
        `input_ids`: int64 [T].
        `labels`: int64 [T], the token that is to follow each one, or -100 where none is learnt.
        `weights`: float32 [T], what that counts, where the examples have weights.
    """

    def __init__(self, n_prefix: int):
        self.n_prefix = n_prefix

    def __call__(self, examples: list[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
        n = self.n_prefix
        examples = sorted(examples, key=lambda example: len(example["input_ids"]))
        prefix = examples[0]["input_ids"][:n]
        packed: dict[str, list[Any]] = {"input_ids": list(prefix), "labels": [-100] * n}
        if "weights" in examples[0]:
            packed["weights"] = [0.0] * n
        shapes = []
        for example in examples:
            if example["input_ids"][:n] != prefix or example["labels"][n] != -100:
                raise ValueError("the rows of a batch do not share their prefix")
            branches = example.get("branches") or []
            trunk = len(example["input_ids"]) - n - sum(branches)
            shapes.append([trunk, *(length - 1 for length in branches)] if branches else [trunk - 1])
            for name, values in packed.items():
                nothing = -100 if name == "labels" else 0
                start = n
                for k, length in enumerate([trunk, *branches]):
                    part = example[name][start : start + length]
                    if name == "input_ids":
                        values += part if branches and k == 0 else part[:-1]
                    else:  # what follows; after the tokens before the branches several things do, and none is learnt
                        values += [*part[1:], nothing][: len(part)] if branches and k == 0 else part[1:]
                    start += length
        return {"shapes": torch.tensor(shapes)} | {name: torch.tensor(values) for name, values in packed.items()}


def collate_weighted(examples: list[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
    """B rows with weights, that do not share a prefix -> `input_ids`, `attention_mask`, `labels` and `weights` [B, T].

    Padded on the right, where causal attention does not look. Examples without weights (to evaluate on) weigh 1.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    filler = {"input_ids": 0, "attention_mask": 0, "labels": -100, "weights": 0.0}
    ones = [[1] * len(example["input_ids"]) for example in examples]
    rows = [{"weights": one} | example | {"attention_mask": one} for example, one in zip(examples, ones, strict=True)]
    return {
        name: torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])
        for name, value in filler.items()
    }


class EmogenTrainer(Scoring, SFTTrainer):
    """`SFTTrainer` on rows that share a prefix. Everything but loss, batches and evaluation is TRL's.

    Args:
        n_prefix: how many tokens all rows share, if `attention.share_prefix` allows; or 0 to train on plain rows, as
            TRL does.
        score, select_best: see `Scoring`.
    """

    def __init__(
        self,
        *args: Any,
        n_prefix: int = 0,
        score: Callable[[Any], dict[str, float]] | None = None,
        select_best: SelectBest | None = None,
        **kwargs: Any,
    ):
        self.n_prefix = n_prefix
        self.score = score
        self.select_best = select_best
        if n_prefix:
            kwargs["data_collator"] = PrefixCollator(n_prefix)
        elif "weights" in kwargs["train_dataset"].column_names:
            kwargs["data_collator"] = collate_weighted
        super().__init__(*args, **kwargs)
        if self.model.dtype == torch.float32:
            # TRL casts the adapter of a quantised model to bf16, as wide as such a model computes on a GPU. Where it
            # computes in float32, that would only round the adapter, and lose small updates altogether.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        use_onednn(self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean negative log-likelihood of what is learnt, as in TRL, each token times its weight if there are any."""
        if self.n_prefix:
            labels = inputs["labels"]
            learnt = (labels != -100).nonzero()[:, 0]  # [A], where the next token is learnt
            layout = PackedRows(self.n_prefix, [tuple(shape) for shape in inputs["shapes"].tolist()])
            outputs = forward(model, layout, inputs["input_ids"], logits_to_keep=learnt)
            logits, target, weights = outputs.logits[0], labels[learnt], inputs.get("weights")
        elif "weights" in inputs:
            labels, weights = inputs["labels"][:, 1:], inputs["weights"][:, 1:]
            learnt = labels != -100
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            logits, target = outputs.logits[:, :-1][learnt], labels[learnt]
        else:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits = logits.float()  # [A, V]
        nll = functional.cross_entropy(logits, target, reduction="none")
        total = nll.sum() if weights is None else nll @ weights[learnt]
        loss = total / (len(target) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._note_metrics(logits.detach(), target, inputs["input_ids"].numel())
        return (loss, outputs) if return_outputs else loss

    def _note_metrics(self, logits: torch.Tensor, target: torch.Tensor, n_tokens: int) -> None:
        """What TRL logs beside the loss."""
        mode = "train" if self.model.training else "eval"
        sums = torch.stack([(logits.argmax(1) == target).sum(), torch.tensor(len(target), device=logits.device)])
        correct, n, tokens = self.accelerator.reduce(torch.cat([sums, sums.new_tensor([n_tokens])])).tolist()
        self._metrics[mode]["mean_token_accuracy"].append(correct / max(n, 1))
        if mode == "train":
            self._total_train_tokens += tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
