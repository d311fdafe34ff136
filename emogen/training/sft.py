"""Instruction tuning with TRL's `SFTTrainer`: the prefix is computed once per batch, and evaluations generate answers.

Loss and gradients equal those of plain training on the same rows; `model/shared_prefix.py` explains why.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from trl import SFTTrainer

from emogen import processes
from emogen.errors import ModelError
from emogen.evaluation.run_folder import ADAPTER
from emogen.model.decode import longest_row
from emogen.model.encode import IGNORE, Encoder, load_encoder
from emogen.model.loading import load_adapter, load_model, new_adapter
from emogen.model.onednn import bf16_pays, use_onednn
from emogen.model.plain_rows import pads, problem, require_causal, require_length, takes_positions
from emogen.model.shared_prefix import PLAIN, TrainingLayout, forward, share_prefix
from emogen.model.sources import locate
from emogen.model.tokenizer import load_chat_tokenizer
from emogen.prediction.classifier import Classifier
from emogen.prediction.generator import GenerativeClassifier, predict_prob, predict_texts
from emogen.prediction.weights import check_weights
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

    What the model can do is found out here, before the first step: whether rows can share their prefix, whether they
    can be padded, and whether it generates answers.

    Args:
        args: TRL's `SFTConfig`.
        val_rows: the rows of the evaluations during training.
        compute_metrics: the metrics to log at each evaluation.

    Returns:
        The trainer; and a function that makes a classifier of its model.

    Raises:
        InputError: the parts of the recipe do not fit together.
        ModelError: the model cannot be loaded, trained with the adapter of the recipe, or made to answer.
    """
    recipe, lm_config = task.recipe, task.recipe.lm_config()
    location = locate(recipe.model_name, lm_config.model_revision)
    encoder = load_encoder(task, location)
    if encoder.has_plain_template:
        log.warning(f"{recipe.model_name} has no chat template: it is a base model, and gets a plain one.")
    model = load_model(location, lm_config, trust_remote_code=recipe.trusts_code)
    if not (processes.is_sharded() or getattr(model, "is_quantized", False)):
        model.to(args.device)
    use_onednn(model)  # before its first forward pass, in which bitsandbytes would repack its weights
    texts = [*train_rows.texts, *(val_rows.texts if val_rows else ())]
    with torch.random.fork_rng():  # a trial changes nothing that is drawn after it
        peft_config = None if recipe.init_adapter else new_adapter(model, lm_config)
        shares, padded = _try_ways(model, encoder, recipe, texts)
    if recipe.init_adapter:
        check_weights(recipe.find(recipe.init_adapter), location)
        model = load_adapter(model, recipe.find(recipe.init_adapter) / ADAPTER, trainable=True)
    train_set, n_cut = encode_rows(encoder, train_rows, recipe, branched=shares)
    val_set = None if val_rows is None else encode_rows(encoder, val_rows, branched=shares)[0]
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
        processing_class=load_chat_tokenizer(recipe, location),  # saved beside the adapter
        peft_config=peft_config,
        n_prefix=len(encoder.prefix_ids) if shares else 0,
        padded=padded,
        model_metrics=compute_metrics and (lambda model: compute_metrics(make_classifier(model))),
        select_best=recipe.select_best,
        bf16=bf16_pays(bool(recipe.sft_args["bf16"]), args.device),
    )
    if not processes.is_sharded():
        with torch.random.fork_rng():
            try_a_step(trainer)
            _try_to_answer(trainer.model, encoder, recipe, min(texts, key=len))
    return trainer, make_classifier


def _try_ways(model: Any, encoder: Encoder, recipe: Recipe, texts: Sequence[str]) -> tuple[bool, bool]:
    """Whether rows of some texts can share their prefix, and whether they can be padded.

    Raises:
        ModelError: the model cannot be trained to generate at all.
    """
    require_causal(model)
    suffixes = [row.suffix_ids for text in texts for row in encoder.rows(text)]
    longest = longest_row(encoder, suffixes, recipe.decode)
    require_length(model, longest)
    shares = recipe.shared_prefix and share_prefix(model, encoder.prefix_ids, longest)
    padded = shares or pads(model, encoder.prefix_ids, longest)
    if not processes.is_sharded():
        return shares, padded
    # With FSDP, the main process alone may have the weights, so it decides.
    shares_in_main, padded = processes.of_main_process((shares, padded))
    if shares and not shares_in_main:
        model.set_attn_implementation(PLAIN)
    return shares_in_main, padded


def try_a_step(trainer: "EmogenTrainer") -> None:
    """Compute the loss and the gradients of the shortest row, and change nothing.

    Raises:
        ModelError: the model cannot be trained.
    """
    model, args = trainer.model, trainer.args
    batch = trainer.data_collator([min(trainer.train_dataset, key=lambda example: len(example["input_ids"]))])
    was_training = model.training
    model.train()
    try:
        if args.gradient_checkpointing:  # as the trainer does when it starts
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(model, {name: tensor.to(args.device) for name, tensor in batch.items()}).backward()
    except Exception as error:  # whatever an architecture raises, it raises it in the first step, too
        raise ModelError(
            f"this {model.config.model_type} model cannot be trained with this recipe ({problem(error)}); choose "
            "another model, or other settings of the adapter and of gradient checkpointing"
        ) from error
    finally:
        model.train(was_training)
        model.zero_grad()
        trainer.forget_metrics()


def _try_to_answer(model: Any, encoder: Encoder, recipe: Recipe, text: str) -> None:
    """Predict a text as it is done after training.

    Raises:
        ModelError: the model can be trained only.
    """
    try:
        predict_texts(model, encoder, [text], decode=recipe.decode)
        predict_prob(model, encoder, [text], how=recipe.prob)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"this {model.config.model_type} model could be trained, but not made to answer ({problem(error)}); choose "
            "another model"
        ) from error


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


def collate_rows(examples: list[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
    """Collate B rows that do not share a prefix.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each [B, T], padded on the right; and `weights` [B, T] if any row
        has them. Rows without weights among them, for validation, get weight 1.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    filler: dict[str, float] = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    if any("weights" in example for example in examples):
        filler["weights"] = 0.0
    ones = [[1] * len(example["input_ids"]) for example in examples]
    rows = [{"weights": one} | example | {"attention_mask": one} for example, one in zip(examples, ones, strict=True)]
    return {
        name: torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])
        for name, value in filler.items()
    }


class EmogenTrainer(ScoringMixin, SFTTrainer):
    """`SFTTrainer` on rows that share a prefix. Only the loss, the batches and the evaluations are not TRL's.

    The loss is computed from the model's own logits, because TRL computes them from the hidden states, by rules for
    each architecture. Routers of a mixture of experts get no loss of their own: it would depend on the tokens that
    share a batch.

    Args:
        n_prefix: the number of tokens that all rows share, for a model that `share_prefix` accepted; 0 for training on
            plain rows.
        padded: whether plain rows of different lengths may be computed together; see `plain_rows.pads`.
        model_metrics, select_best: see `ScoringMixin`.
        bf16: see `use_onednn`.
    """

    def __init__(
        self,
        *args: Any,
        n_prefix: int = 0,
        padded: bool = True,
        model_metrics: Callable[[Any], dict[str, float]] | None = None,
        select_best: SelectBest | None = None,
        bf16: bool = False,
        **kwargs: Any,
    ):
        self.n_prefix, self.padded, self.model_metrics, self.select_best = n_prefix, padded, model_metrics, select_best
        kwargs["data_collator"] = PrefixCollator(n_prefix) if n_prefix else collate_rows
        kwargs["args"].router_aux_loss_coef = 0.0
        super().__init__(*args, **kwargs)
        self.takes_positions = takes_positions(self.model)
        if self.model.dtype == torch.float32 or self.args.fp16:
            # TRL casts the adapter of a quantised model to bf16, the precision of such a model on a GPU. If the model
            # computes in float32, this would only round the adapter and lose small updates; and float16 needs an
            # adapter in float32, whose gradients are scaled.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        use_onednn(self.model, bf16=bf16)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of the supervised tokens, each times its weight if there are any.

        `loss_type: nll` is the mean negative log-likelihood, with `label_smoothing_factor`; `dft` weighs each token by
        its probability (Dynamic Fine-Tuning, arXiv 2508.05629), without smoothing.
        """
        compute = self._packed_logits if self.n_prefix else self._plain_logits
        logits, target, weights = compute(model, inputs)
        logits = logits.float()  # [A, V]
        is_dft = self.args.loss_type == "dft"
        smoothing = 0.0 if is_dft else self.args.label_smoothing_factor
        nll = functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        if is_dft:
            nll = nll * (-nll).exp().detach()
        total = nll.sum() if weights is None else nll @ weights
        loss = total / (len(target) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        n_tokens = inputs["attention_mask"].sum().item() if "attention_mask" in inputs else inputs["input_ids"].numel()
        self._log_token_metrics(logits.detach(), target, n_tokens)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _packed_logits(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The logits [A, V] of the A supervised tokens of a packed row, the tokens [A], and their weights [A]."""
        labels, weights = inputs["labels"], inputs.get("weights")
        supervised = (labels != IGNORE).nonzero()[:, 0]  # [A], the tokens whose successor is supervised
        layout = TrainingLayout(self.n_prefix, [tuple(shape) for shape in inputs["shapes"].tolist()])
        logits = forward(model, layout, inputs["input_ids"], logits_to_keep=supervised).logits[0]
        return logits, labels[supervised], None if weights is None else weights[supervised]

    def _plain_logits(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The same of B plain rows, which are computed together if they may be padded or are of equal length."""
        lengths = inputs["attention_mask"].sum(1)
        groups = [lengths > 0] if self.padded else [lengths == length for length in lengths.unique()]
        logits, targets, weights = [], [], []
        for rows in groups:
            n = int(lengths[rows].max())
            labels = inputs["labels"][rows, 1:n]
            supervised = labels != IGNORE
            columns = supervised.any(0).nonzero()[:, 0]
            part = {"input_ids": inputs["input_ids"][rows, :n]}
            if (lengths[rows] < n).any():
                part["attention_mask"] = inputs["attention_mask"][rows, :n]
            if self.takes_positions:
                some = model(use_cache=False, logits_to_keep=columns, **part).logits
            else:
                some = model(use_cache=False, **part).logits[:, columns]
            logits.append(some[supervised[:, columns]])
            targets.append(labels[supervised])
            if "weights" in inputs:
                weights.append(inputs["weights"][rows, 1:n][supervised])
        return torch.cat(logits), torch.cat(targets), torch.cat(weights) if weights else None

    def forget_metrics(self) -> None:
        """Forget the metrics that are not logged yet."""
        self._metrics["train"].clear()
        self._total_train_tokens = 0

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
