"""The classification head: texts -> label probabilities, by a linear layer on an encoder or a decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding
from transformers.utils import logging as hf_logging

from emogen import processes
from emogen.accelerators import own_device
from emogen.errors import ModelError
from emogen.evaluation.results import Prediction
from emogen.evaluation.run_folder import ADAPTER, MODEL
from emogen.model.decode import in_batches
from emogen.model.loading import load_adapter, load_head_model, to_device
from emogen.model.onednn import use_onednn
from emogen.model.plain_rows import evaluating
from emogen.model.sources import locate
from emogen.model.tokenizer import TextTokenizer, load_tokenizer
from emogen.prediction.classifier import predictions_from_prob
from emogen.prediction.weights import check_weights
from emogen.task.labels import LabelSet
from emogen.task.recipe import Recipe


@dataclass(frozen=True)
class HeadClassifier:
    """A model with a classification head."""

    recipe: Recipe
    label_set: LabelSet
    tokenizer: Any
    model: Any
    n_questions: int = 1

    @cached_property
    def _text_tokenizer(self) -> TextTokenizer:
        return TextTokenizer.of(self.tokenizer)

    def predict(
        self,
        texts: Sequence[str],
        *,
        with_prob: bool = False,
        batch_size: int = 32,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Prediction]:
        """Predict the labels with a probability above 0.5, or the most probable label with `exactly_one`."""
        n_cut = self._text_tokenizer.encode_texts(texts, self.recipe.max_length)["n_cut"]
        return predictions_from_prob(self._prob(texts, batch_size, progress), self.label_set, n_cut)

    def predict_proba(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """The sigmoid of each label's logit, or the softmax over the labels with `exactly_one`: float32 [n, L]."""
        return self._prob(texts, 32, progress)

    def _prob(self, texts: Sequence[str], batch_size: int, progress: Callable[[int], Any] | None) -> np.ndarray:
        rows = processes.distribute(lambda share: self._share_prob(share, batch_size, progress).tolist(), texts)
        return np.array(rows, dtype=np.float32).reshape(len(texts), len(self.label_set))

    @torch.inference_mode()
    def _share_prob(self, texts: Sequence[str], batch_size: int, progress: Callable[[int], Any] | None) -> np.ndarray:
        rows = self._text_tokenizer.encode_texts(texts, self.recipe.max_length)["input_ids"]
        collate = DataCollatorWithPadding(self.tokenizer)

        def step(batch: list[list[int]]) -> list[list[float]]:
            inputs = collate([{"input_ids": ids} for ids in batch]).to(self.model.device)
            logits = self.model(**inputs).logits.float()
            return (logits.softmax(1) if self.label_set.exactly_one else logits.sigmoid()).tolist()

        with evaluating(self.model):
            values = in_batches(step, rows, batch_size, progress)
        prob = np.array(values, dtype=np.float32).reshape(len(texts), len(self.label_set))
        if np.isnan(prob).any():
            raise ModelError("the model computes NaN: its training has diverged (a lower learning_rate may help)")
        return prob


def load_head(run: Path, recipe: Recipe, label_set: LabelSet, *, force: bool = False) -> HeadClassifier:
    """Load the model of a run folder.

    Args:
        force: see `check_weights`.

    Raises:
        ModelError: `run` is a recipe file, whose head is not trained, or a file of the model is missing or broken.
    """
    if not run.is_dir():
        raise ModelError(f"{recipe.path}: a head predicts nothing before it is trained; name a run folder")
    weights = run / (ADAPTER if recipe.lm_args["use_peft"] else MODEL)
    tokenizer = load_tokenizer(str(weights), trust_remote_code=recipe.trusts_code)
    location = locate(recipe.model_name, recipe.lm_config().model_revision) if weights.name == ADAPTER else weights
    check_weights(run, str(location) if weights.name == ADAPTER else None, force=force)
    own_device()  # selects it, before a quantised model is loaded onto it
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # transformers would report that the base model has no head; the adapter has it
    try:
        model = to_device(load_head_model(str(location), recipe, label_set, tokenizer))
    finally:
        hf_logging.set_verbosity(verbosity)
    if weights.name == ADAPTER:
        model = load_adapter(model, weights)
    use_onednn(model)
    return HeadClassifier(recipe, label_set, tokenizer, model)
