"""Instruction tuning with TRL's `SFTTrainer`: the prefix is computed once per batch, and evaluations generate answers.

Loss and gradients equal those of plain training on the same rows; `model/shared_prefix.py` explains why.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from trl import SFTTrainer, get_peft_config

from emogen.evaluation.run_folder import ADAPTER
from emogen.model.encode import IGNORE, Encoder, load_encoder
from emogen.model.loading import load_adapter, load_model
from emogen.model.onednn import use_onednn
from emogen.model.shared_prefix import TrainingLayout, forward, share_prefix
from emogen.model.sources import locate
from emogen.prediction.classifier import Classifier
from emogen.prediction.generator import GenerativeClassifier
from emogen.task.recipe import Recipe, SelectBest
from emogen.task.rows import Rows
from emogen.task.task import Task
from emogen.training.sampling import label_weights, repeat_rare
from emogen.training.scoring import ScoringMixin

log = logging.getLogger(__name__)


def prepare(
    task: Task,
    args: Any,
    train_rows: Rows,
    val_rows: Rows | None,
    compute_metrics: Callable[[Classifier], dict[str, float]] | None,
) -> tuple["EmogenTrainer", Callable[[Any], Classifier]]:
    """Load the model of a recipe, encode its rows, and make a trainer.

    Args:
        args: TRL's `SFTConfig`.
        val_rows: the rows of the evaluations during training.
        compute_metrics: the metrics to log at each evaluation.

    Returns:
        The trainer; and a function that makes a classifier of its model.

    Raises:
        InputError: the parts of the recipe do not fit together.
        ModelError: the model cannot be loaded.
    """
    recipe, lm_config = task.recipe, task.recipe.lm_config()
    location = locate(recipe.model_name, lm_config.model_revision)
    encoder = load_encoder(task, location)
    if encoder.has_plain_template:
        log.warning(f"{recipe.model_name} has no chat template: it is a base model, and gets a plain one.")
    model = load_model(location, lm_config, trust_remote_code=recipe.trusts_code)
    if recipe.init_adapter:
        model = load_adapter(model, recipe.find(recipe.init_adapter) / ADAPTER, trainable=True)
    n_prefix = len(encoder.prefix_ids) if recipe.shared_prefix and share_prefix(model) else 0
    train_set, n_cut = encode_rows(encoder, train_rows, recipe, branched=bool(n_prefix))
    val_set = None if val_rows is None else encode_rows(encoder, val_rows, branched=bool(n_prefix))[0]
    if n_cut:
        log.warning(f"{n_cut:,} texts were shortened to fit max_length={recipe.max_length}")
    mean = sum(len(example["input_ids"]) for example in train_set) / len(train_set) - len(encoder.prefix_ids)
    log.info(
        f"{len(train_rows):,} training rows, {len(val_rows) if val_rows else 0:,} validation rows; the instruction has "
        f"{len(encoder.prefix_ids)} tokens, the rest of a row {mean:.0f} on average"
    )

    def make_classifier(model: Any) -> Classifier:
        return GenerativeClassifier(recipe, task.label_set, encoder, model)

    trainer = EmogenTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(train_set),
        eval_dataset=None if val_set is None else Dataset.from_list(val_set),
        processing_class=encoder.tokenizer,
        peft_config=None if recipe.init_adapter else get_peft_config(lm_config),
        n_prefix=n_prefix,
        model_metrics=compute_metrics and (lambda model: compute_metrics(make_classifier(model))),
        select_best=recipe.select_best,
    )
    return trainer, make_classifier


def encode_rows(
    encoder: Encoder, rows: Rows, recipe: Recipe | None = None, *, branched: bool
) -> tuple[list[dict[str, Any]], int]:
    """Encode labelled rows for the trainer.

    Args:
        recipe: its sampling and its loss weights are applied; None for validation rows.
        branched: whether several questions on one text become a single example.

    Returns:
        The examples; and the number of texts that were shortened.
    """
    weights = None
    if recipe and recipe.sampling == "rare":
        rows = rows.take(repeat_rare(rows.truth, recipe.seed))
    if recipe and recipe.label_weights != "none":
        weights = label_weights(rows.truth, recipe.label_weights).tolist()
    text_weight = recipe.text_loss_weight if recipe else 0.0
    examples: list[dict[str, Any]] = []
    n_cut = 0
    for text, vector in zip(rows.texts, rows.truth, strict=True):
        questions = encoder.rows(text, encoder.label_set.names_of(vector))
        n_cut += any(row.n_cut for row in questions)
        if branched and len(questions) > 1:
            examples.append(encoder.branched_example(questions, weights, text_weight))
        else:
            examples += [encoder.training_example(row, weights, text_weight) for row in questions]
    if examples and "weights" in examples[0]:
        # Scaled to a mean of 1 over the supervised tokens, so that a learning rate fits with and without weights.
        supervised = [
            w for e in examples for w, label in zip(e["weights"], e["labels"], strict=True) if label != IGNORE
        ]
        mean = sum(supervised) / len(supervised)
        examples = [example | {"weights": [w / mean for w in example["weights"]]} for example in examples]
    return examples, n_cut


class PrefixCollator:
    """Packs B rows that begin with the same P tokens into one row of T tokens, which contains the prefix once.

    The rows are sorted by length. The last token of a row, or of each of its branches, is left out, because no token
    that follows it is predicted.

    Returns:
        `shapes`: int64 [B, 1 + K], the shapes of the rows in `TrainingLayout`: the number of tokens after the prefix
            before the K branches, and in each branch. It comes first, because the trainer reads the number of rows off
            the first entry.
        `input_ids`: int64 [T].
        `labels`: int64 [T], the token to predict after each token, or -100 if that is not supervised.
        `weights`: float32 [T], the weight of each label, if the examples have weights.
    """

    def __init__(self, n_prefix: int):
        self.n_prefix = n_prefix

    def __call__(self, examples: list[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
        n = self.n_prefix
        examples = sorted(examples, key=lambda example: len(example["input_ids"]))
        prefix = examples[0]["input_ids"][:n]
        packed: dict[str, list[Any]] = {"input_ids": list(prefix), "labels": [IGNORE] * n}
        if "weights" in examples[0]:
            packed["weights"] = [0.0] * n
        shapes = []
        for example in examples:
            if example["input_ids"][:n] != prefix or example["labels"][n] != IGNORE:
                raise ValueError("the rows of a batch do not share their prefix")
            branches = example.get("branches") or []
            trunk = len(example["input_ids"]) - n - sum(branches)
            shapes.append([trunk, *(length - 1 for length in branches)] if branches else [trunk - 1])
            start = n
            for k, length in enumerate([trunk, *branches]):
                _add_part(packed, example, slice(start, start + length), has_branches=bool(branches) and k == 0)
                start += length
        return {"shapes": torch.tensor(shapes)} | {name: torch.tensor(values) for name, values in packed.items()}


def _add_part(packed: dict[str, list[Any]], example: dict[str, list[Any]], part: slice, *, has_branches: bool) -> None:
    """Append a part of an example to a packed row, with the labels and weights moved to the token before.

    Args:
        has_branches: whether branches follow the part. Then its last token is kept, unsupervised: several tokens follow
            it.
    """
    for name, values in packed.items():
        own = example[name][part]
        if name == "input_ids":
            values += own if has_branches else own[:-1]
        elif has_branches:
            values += [*own[1:], IGNORE if name == "labels" else 0][: len(own)]
        else:
            values += own[1:]


def collate_weighted(examples: list[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
    """Collate B rows with weights that do not share a prefix. Examples without weights, for validation, get weight 1.

    Returns:
        `input_ids`, `attention_mask`, `labels` and `weights`, each [B, T], padded on the right.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    filler = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE, "weights": 0.0}
    ones = [[1] * len(example["input_ids"]) for example in examples]
    rows = [{"weights": one} | example | {"attention_mask": one} for example, one in zip(examples, ones, strict=True)]
    return {
        name: torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])
        for name, value in filler.items()
    }


class EmogenTrainer(ScoringMixin, SFTTrainer):
    """`SFTTrainer` on rows that share a prefix. Only the loss, the batches and the evaluations are not TRL's.

    Args:
        n_prefix: the number of tokens that all rows share, for a model that `share_prefix` accepted; 0 for training on
            plain rows, as in TRL.
        model_metrics, select_best: see `ScoringMixin`.
    """

    def __init__(
        self,
        *args: Any,
        n_prefix: int = 0,
        model_metrics: Callable[[Any], dict[str, float]] | None = None,
        select_best: SelectBest | None = None,
        **kwargs: Any,
    ):
        self.n_prefix, self.model_metrics, self.select_best = n_prefix, model_metrics, select_best
        if n_prefix:
            kwargs["data_collator"] = PrefixCollator(n_prefix)
        elif "weights" in kwargs["train_dataset"].column_names:
            kwargs["data_collator"] = collate_weighted
        super().__init__(*args, **kwargs)
        if self.model.dtype == torch.float32:
            # TRL casts the adapter of a quantised model to bf16, the precision of such a model on a GPU. If the model
            # computes in float32, this would only round the adapter and lose small updates.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        use_onednn(self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of the supervised tokens, each times its weight if there are any.

        `loss_type: nll` is the mean negative log-likelihood, with `label_smoothing_factor`; `dft` weighs each token by
        its probability (Dynamic Fine-Tuning, arXiv 2508.05629), without smoothing.
        """
        if self.n_prefix:
            labels = inputs["labels"]
            supervised = (labels != IGNORE).nonzero()[:, 0]  # [A], the tokens whose successor is supervised
            layout = TrainingLayout(self.n_prefix, [tuple(shape) for shape in inputs["shapes"].tolist()])
            outputs = forward(model, layout, inputs["input_ids"], logits_to_keep=supervised)
            logits, target, weights = outputs.logits[0], labels[supervised], inputs.get("weights")
        elif "weights" in inputs:
            labels, weights = inputs["labels"][:, 1:], inputs["weights"][:, 1:]
            supervised = labels != IGNORE
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            logits, target = outputs.logits[:, :-1][supervised], labels[supervised]
        else:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits = logits.float()  # [A, V]
        is_dft = self.args.loss_type == "dft"
        smoothing = 0.0 if is_dft else self.args.label_smoothing_factor
        nll = functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        if is_dft:
            nll = nll * (-nll).exp().detach()
        total = nll.sum() if weights is None else nll @ weights[supervised]
        loss = total / (len(target) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._log_token_metrics(logits.detach(), target, inputs["input_ids"].numel())
        return (loss, outputs) if return_outputs else loss

    def _log_token_metrics(self, logits: torch.Tensor, target: torch.Tensor, n_tokens: int) -> None:
        """Log the token accuracy and the number of tokens, as TRL does.

        Args:
            logits: [A, V], of the supervised tokens.
            target: int64 [A], the supervised tokens.
            n_tokens: the number of tokens in the batch.
        """
        mode = "train" if self.model.training else "eval"
        sums = torch.stack([(logits.argmax(1) == target).sum(), torch.tensor(len(target), device=logits.device)])
        correct, n, tokens = self.accelerator.reduce(torch.cat([sums, sums.new_tensor([n_tokens])])).tolist()
        self._metrics[mode]["mean_token_accuracy"].append(correct / max(n, 1))
        if mode == "train":
            self._total_train_tokens += tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
