"""The other way to label texts: a classification head on an encoder or a decoder, instead of a generated answer.

`answer: head` in a recipe. The model reads the text alone, without instruction; a linear layer on what it makes of it
gives each label a logit of its own, and the loss is binary cross-entropy. Everything around it - rows, folds, label
weights, checkpoint choice, thresholds, ensembles - is that of generation.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.nn import functional
from transformers import DataCollatorWithPadding, Trainer
from trl import get_peft_config

from emogen.evaluation.run_folder import ADAPTER
from emogen.model.loading import load_adapter, load_head_model
from emogen.model.onednn import use_onednn
from emogen.model.sources import locate
from emogen.model.tokenizer import encode_texts, load_tokenizer
from emogen.prediction.classifier import Classifier
from emogen.prediction.head import HeadClassifier
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
) -> tuple["HeadTrainer", Callable[[Any], Classifier]]:
    """Load the model of a recipe and all that it takes to tune it; see `trainer.prepare`."""
    recipe, label_set = task.recipe, task.label_set
    location = locate(recipe.model_name, recipe.lm_config().model_revision)
    tokenizer = load_tokenizer(location, trust_remote_code=recipe.trusts_code)
    model = load_head_model(location, recipe, label_set, tokenizer)
    if recipe.init_adapter:
        model = load_adapter(model, recipe.find(recipe.init_adapter) / ADAPTER, trainable=True)
    elif recipe.lm_args["use_peft"]:
        config = get_peft_config(recipe.lm_config())
        config.task_type = "SEQ_CLS"  # peft then trains the head in full
        model = get_peft_model(model, config)

    weights = label_weights(learnt.truth, recipe.label_weights)
    if recipe.sampling == "rare":
        learnt = learnt.take(repeat_rare(learnt.truth, recipe.seed))
    train_set, n_cut = _dataset(tokenizer, learnt, recipe)
    if n_cut:
        log.warning(f"{n_cut:,} texts were shortened to fit max_length={recipe.max_length}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log.info(
        f"{len(learnt):,} rows to learn from, {len(watched) if watched else 0:,} to watch; {trained:,} weights learn"
    )

    def make_classifier(model: Any) -> Classifier:
        return HeadClassifier(recipe, label_set, tokenizer, model)

    trainer = HeadTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=None if watched is None else _dataset(tokenizer, watched, recipe)[0],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        pos_weight=torch.tensor(weights, dtype=torch.float32),
        score=figures and (lambda model: figures(make_classifier(model))),
        select_best=recipe.select_best,
    )
    return trainer, make_classifier


class HeadTrainer(Scoring, Trainer):
    """transformers' `Trainer` with a weighted loss. Everything but loss and evaluation is its own.

    Args:
        pos_weight: float32 [L], how much a label's positives count beside its negatives.
        score, select_best: see `Scoring`.
    """

    def __init__(
        self,
        *args: Any,
        pos_weight: torch.Tensor,
        score: Callable[[Any], dict[str, float]] | None = None,
        select_best: SelectBest | None = None,
        **kwargs: Any,
    ):
        self.pos_weight, self.score, self.select_best = pos_weight, score, select_best
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss below is a mean over the batch
        use_onednn(self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean binary cross-entropy over rows and labels."""
        gold = inputs.pop("labels")
        outputs = model(**inputs)
        pos_weight = self.pos_weight.to(gold.device)
        loss = functional.binary_cross_entropy_with_logits(outputs.logits.float(), gold, pos_weight=pos_weight)
        return (loss, outputs) if return_outputs else loss


def _dataset(tokenizer: Any, rows: Rows, recipe: Recipe) -> tuple[Dataset, int]:
    """Rows -> `input_ids` and `labels` (float, as the loss takes them), and how many texts had to be shortened."""
    encoded = encode_texts(tokenizer, rows.texts, recipe.max_length)
    columns = {"input_ids": encoded["input_ids"], "labels": rows.truth.astype(np.float32).tolist()}
    return Dataset.from_dict(columns), sum(n_cut > 0 for n_cut in encoded["n_cut"])
