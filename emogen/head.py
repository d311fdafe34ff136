"""The other way to label texts: a classification head on an encoder or a decoder, instead of a generated answer.

`answer: head` in a recipe. The model reads the text alone, without instruction; a linear layer on what it makes of it
gives each label a logit of its own, and the loss is binary cross-entropy. Everything around it - rows, folds, label
weights, checkpoint choice, thresholds, ensembles - is that of generation.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer
from transformers.utils import logging as hf_logging
from trl import get_peft_config, get_quantization_config

from emogen import modeling, ranks
from emogen.balance import label_weights, repeat_rare
from emogen.data import Rows
from emogen.decode import evaluating, in_batches
from emogen.errors import ModelError
from emogen.labels import LabelSet
from emogen.linear import use_onednn
from emogen.predict import ADAPTER, MODEL, Labeller, Prediction, named
from emogen.recipe import Recipe, SelectBest
from emogen.task import Task
from emogen.trainer import Scoring

log = logging.getLogger(__name__)

HEADS = ["score", "classifier"]  # what transformers calls the head; it is never quantised, and always trained


@dataclass(frozen=True)
class Classifier:
    """A model with a head that is ready to label texts; a `predict.Labeller`."""

    recipe: Recipe
    label_set: LabelSet
    tokenizer: Any
    model: Any
    n_questions: int = 1

    def answers(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
    ) -> list[Prediction]:
        """The labels with a probability above 0.5, as an answer that names them."""
        n_cut = encode(self.tokenizer, texts, self.recipe.max_length)["n_cut"]
        return named(self._prob(texts, batch_size, progress), self.label_set, n_cut)

    def prob(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """The sigmoid of each label's logit, float32 [n, L]."""
        return self._prob(texts, 32, progress)

    def _prob(self, texts: Sequence[str], batch_size: int, progress: Callable[[int], Any] | None) -> np.ndarray:
        rows = ranks.spread(lambda own: self._prob_here(own, batch_size, progress).tolist(), texts)
        return np.array(rows, dtype=np.float32).reshape(len(texts), len(self.label_set))

    @torch.inference_mode()
    def _prob_here(self, texts: Sequence[str], batch_size: int, progress: Callable[[int], Any] | None) -> np.ndarray:
        rows = encode(self.tokenizer, texts, self.recipe.max_length)["input_ids"]
        collate = DataCollatorWithPadding(self.tokenizer)

        def step(batch: list[list[int]]) -> list[list[float]]:
            inputs = collate([{"input_ids": ids} for ids in batch]).to(self.model.device)
            return self.model(**inputs).logits.float().sigmoid().tolist()

        with evaluating(self.model):
            found = in_batches(step, rows, batch_size, progress)
        prob = np.array(found, dtype=np.float32).reshape(len(texts), len(self.label_set))
        if np.isnan(prob).any():
            raise ModelError("the model computes NaN: its training has diverged (a lower learning_rate may help)")
        return prob


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


def prepare(
    task: Task,
    args: Any,
    learnt: Rows,
    watched: Rows | None,
    figures: Callable[[Labeller], dict[str, float]] | None,
) -> tuple[HeadTrainer, Callable[[Any], Labeller]]:
    """Load the model of a recipe and all that it takes to tune it; see `trainer.prepare`."""
    recipe, label_set = task.recipe, task.label_set
    location = modeling.locate(recipe.model_name, recipe.lm_config().model_revision)
    tokenizer = modeling.load_tokenizer(location, trust_remote_code=recipe.trusts_code)
    model = _load_model(location, recipe, label_set, tokenizer)
    if recipe.init_adapter:
        model = modeling.load_adapter(model, recipe.find(recipe.init_adapter) / ADAPTER, trainable=True)
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

    def labeller_of(model: Any) -> Labeller:
        return Classifier(recipe, label_set, tokenizer, model)

    trainer = HeadTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=None if watched is None else _dataset(tokenizer, watched, recipe)[0],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        pos_weight=torch.tensor(weights, dtype=torch.float32),
        score=figures and (lambda model: figures(labeller_of(model))),
        select_best=recipe.select_best,
    )
    return trainer, labeller_of


def load(recipe: Recipe, label_set: LabelSet, run: Path | None) -> Classifier:
    """The model of a run folder. Raises ModelError if there is none: without tuning a head says nothing."""
    if run is None:
        raise ModelError(f"{recipe.path}: a head says nothing before it is trained; name a run folder")
    tuned = run / (ADAPTER if recipe.lm_args["use_peft"] else MODEL)
    tokenizer = modeling.load_tokenizer(str(tuned), trust_remote_code=recipe.trusts_code)
    location = modeling.locate(recipe.model_name, recipe.lm_config().model_revision) if tuned.name == ADAPTER else tuned
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it would report that the base model has no head; the adapter brings that
    try:
        model = modeling.to_device(_load_model(str(location), recipe, label_set, tokenizer))
    finally:
        hf_logging.set_verbosity(verbosity)
    if tuned.name == ADAPTER:
        model = modeling.load_adapter(model, tuned)
    use_onednn(model)
    return Classifier(recipe, label_set, tokenizer, model)


def _load_model(location: str, recipe: Recipe, label_set: LabelSet, tokenizer: Any) -> Any:
    config = recipe.lm_config()
    quantization = get_quantization_config(config)
    if quantization is not None:
        quantization.llm_int8_skip_modules = HEADS
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            location,
            revision=config.model_revision,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            quantization_config=quantization,
            trust_remote_code=recipe.trusts_code,
            use_safetensors=True,
            num_labels=len(label_set),
            id2label=dict(enumerate(label_set.names)),
            label2id={name: i for i, name in enumerate(label_set.names)},
            problem_type="multi_label_classification",
        )
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise ModelError(f"{location}: the model cannot be loaded with a head: {error}") from error
    # Decoders read a row at its last token that is no padding, and have to know which that is.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def _dataset(tokenizer: Any, rows: Rows, recipe: Recipe) -> tuple[Dataset, int]:
    """Rows -> `input_ids` and `labels` (float, as the loss takes them), and how many texts had to be shortened."""
    encoded = encode(tokenizer, rows.texts, recipe.max_length)
    columns = {"input_ids": encoded["input_ids"], "labels": rows.truth.astype(np.float32).tolist()}
    return Dataset.from_dict(columns), sum(n_cut > 0 for n_cut in encoded["n_cut"])


def encode(tokenizer: Any, texts: Sequence[str], max_length: int | None) -> dict[str, list[Any]]:
    """Token ids of each text, special ones added, cut to `max_length`; and by how many tokens each was cut."""
    # A text is text: what looks like a special token in it is split into characters.
    ids = tokenizer(list(texts), split_special_tokens=True)["input_ids"]
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    cut = [max(0, len(row) - limit) for row in ids]
    if any(cut):
        ids = tokenizer(list(texts), split_special_tokens=True, truncation=True, max_length=limit)["input_ids"]
    return {"input_ids": ids, "n_cut": cut}
