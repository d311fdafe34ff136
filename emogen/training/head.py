"""Training of a classification head on an encoder or a decoder, instead of generated answers (`answer: head`).

The model reads the text without an instruction. A linear layer on its output gives each label a logit. The loss is
binary cross-entropy, or cross-entropy over the labels if the label set says `exactly_one`. Everything else is the same
as for generation: rows, folds, label weights, the choice of a checkpoint, thresholds, ensembles.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch.nn import functional
from transformers import DataCollatorWithPadding, Trainer

from emogen.evaluation.run_folder import ADAPTER
from emogen.model.loading import load_adapter, load_head_model, new_adapter
from emogen.model.onednn import bf16_pays, use_onednn
from emogen.model.sources import locate
from emogen.model.tokenizer import TextTokenizer, load_tokenizer
from emogen.prediction.classifier import Classifier
from emogen.prediction.head import HeadClassifier
from emogen.prediction.weights import check_weights
from emogen.task.recipe import SelectBest
from emogen.task.rows import Rows
from emogen.task.task import Task
from emogen.training.sampling import label_weights, repeat_rare
from emogen.training.scoring import ScoringMixin
from emogen.training.teacher import soften

log = logging.getLogger(__name__)


def prepare(
    task: Task,
    args: Any,
    train_rows: Rows,
    val_rows: Rows | None,
    compute_metrics: Callable[[Classifier], dict[str, float]] | None,
) -> tuple["HeadTrainer", Callable[[Any], Classifier]]:
    """Load the model of a recipe, encode its rows, and make a trainer; see `sft.prepare`."""
    recipe, label_set = task.recipe, task.label_set
    location = locate(recipe.model_name, recipe.lm_config().model_revision)
    tokenizer = load_tokenizer(location, trust_remote_code=recipe.trusts_code)
    model = load_head_model(location, recipe, label_set, tokenizer)
    if recipe.init_adapter:
        check_weights(recipe.find(recipe.init_adapter), location)
        model = load_adapter(model, recipe.find(recipe.init_adapter) / ADAPTER, trainable=True)
    elif recipe.lm_args["use_peft"]:
        model = get_peft_model(model, new_adapter(model, recipe.lm_config(), "SEQ_CLS"))

    if recipe.teacher_weight:
        train_rows = soften(train_rows, recipe)
    weights = label_weights(train_rows.truth, recipe.label_weights)
    if recipe.sampling == "rare":
        train_rows = train_rows.take(repeat_rare(train_rows.truth, recipe.seed))
    train_set, n_cut = encode_rows(tokenizer, train_rows, recipe.max_length)
    val_set = None if val_rows is None else encode_rows(tokenizer, val_rows, recipe.max_length)[0]
    if n_cut:
        log.warning(f"{n_cut:,} texts were shortened to fit max_length={recipe.max_length}")
    n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log.info(
        f"{len(train_rows):,} training rows, {len(val_rows) if val_rows else 0:,} validation rows; {n_trained:,} "
        "trainable weights"
    )

    def make_classifier(model: Any) -> Classifier:
        return HeadClassifier(recipe, label_set, tokenizer, model)

    trainer = HeadTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=val_set,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        pos_weight=torch.tensor(weights, dtype=torch.float32),
        exactly_one=label_set.exactly_one,
        model_metrics=compute_metrics and (lambda model: compute_metrics(make_classifier(model))),
        select_best=recipe.select_best,
        bf16=bf16_pays(bool(recipe.sft_args["bf16"]), args.device),
    )
    return trainer, make_classifier


def encode_rows(tokenizer: Any, rows: Rows, max_length: int | None) -> tuple[Dataset, int]:
    """Encode labelled rows for the trainer.

    Returns:
        A dataset of `input_ids` and `labels` (float, for the loss); and the number of texts that were shortened.
    """
    encoded = TextTokenizer.of(tokenizer).encode_texts(rows.texts, max_length)
    columns = {"input_ids": encoded["input_ids"], "labels": rows.targets.tolist()}
    return Dataset.from_dict(columns), sum(n_cut > 0 for n_cut in encoded["n_cut"])


class HeadTrainer(ScoringMixin, Trainer):
    """transformers' `Trainer` with another loss and other evaluations.

    Args:
        pos_weight: float32 [L], the weight of each label's positives; its negatives have weight 1.
        exactly_one: whether each row has one label; the loss is then a softmax over the labels.
        model_metrics, select_best: see `ScoringMixin`.
        bf16: see `use_onednn`.
    """

    def __init__(
        self,
        *args: Any,
        pos_weight: torch.Tensor,
        exactly_one: bool = False,
        model_metrics: Callable[[Any], dict[str, float]] | None = None,
        select_best: SelectBest | None = None,
        bf16: bool = False,
        **kwargs: Any,
    ):
        self.pos_weight, self.exactly_one = pos_weight, exactly_one
        self.model_metrics, self.select_best = model_metrics, select_best
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss below is a mean over the batch
        self.label_names = ["labels"]  # not every head takes them, and then evaluations would have no loss
        if self.args.fp16:
            # Gradients in float16 cannot be scaled. peft has made its own weights float32, but not the head.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        use_onednn(self.model, bf16=bf16)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted binary cross-entropy, averaged over rows and labels; with `exactly_one` weighted cross-entropy."""
        gold = inputs.pop("labels")
        outputs = model(**inputs)
        logits, weight = outputs.logits.float(), self.pos_weight.to(gold.device)
        if self.exactly_one:
            loss = functional.cross_entropy(logits, gold.argmax(1), weight=weight)
        else:
            loss = functional.binary_cross_entropy_with_logits(logits, gold, pos_weight=weight)
        return (loss, outputs) if return_outputs else loss
