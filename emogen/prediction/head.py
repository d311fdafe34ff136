"""The classification head: texts -> a probability for each label, by a linear layer on an encoder or a decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding
from transformers.utils import logging as hf_logging

from emogen import processes
from emogen.errors import ModelError
from emogen.evaluation.results import Prediction
from emogen.evaluation.run_folder import ADAPTER, MODEL
from emogen.model.decode import evaluating, in_batches
from emogen.model.loading import load_adapter, load_head_model, to_device
from emogen.model.onednn import use_onednn
from emogen.model.sources import locate
from emogen.model.tokenizer import encode_texts, load_tokenizer
from emogen.prediction.classifier import predictions_from_prob
from emogen.task.labels import LabelSet
from emogen.task.recipe import Recipe


@dataclass(frozen=True)
class HeadClassifier:
    """A model with a head that is ready to label texts; a `predict.Labeller`."""

    recipe: Recipe
    label_set: LabelSet
    tokenizer: Any
    model: Any
    n_questions: int = 1

    def predict(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
    ) -> list[Prediction]:
        """The labels with a probability above 0.5, as an answer that names them."""
        n_cut = encode_texts(self.tokenizer, texts, self.recipe.max_length)["n_cut"]
        return predictions_from_prob(self._prob(texts, batch_size, progress), self.label_set, n_cut)

    def predict_proba(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """The sigmoid of each label's logit, float32 [n, L]."""
        return self._prob(texts, 32, progress)

    def _prob(self, texts: Sequence[str], batch_size: int, progress: Callable[[int], Any] | None) -> np.ndarray:
        rows = processes.distribute(lambda own: self._prob_here(own, batch_size, progress).tolist(), texts)
        return np.array(rows, dtype=np.float32).reshape(len(texts), len(self.label_set))

    @torch.inference_mode()
    def _prob_here(self, texts: Sequence[str], batch_size: int, progress: Callable[[int], Any] | None) -> np.ndarray:
        rows = encode_texts(self.tokenizer, texts, self.recipe.max_length)["input_ids"]
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


def load_head(recipe: Recipe, label_set: LabelSet, run: Path | None) -> HeadClassifier:
    """The model of a run folder. Raises ModelError if there is none: without tuning a head says nothing."""
    if run is None:
        raise ModelError(f"{recipe.path}: a head says nothing before it is trained; name a run folder")
    tuned = run / (ADAPTER if recipe.lm_args["use_peft"] else MODEL)
    tokenizer = load_tokenizer(str(tuned), trust_remote_code=recipe.trusts_code)
    location = locate(recipe.model_name, recipe.lm_config().model_revision) if tuned.name == ADAPTER else tuned
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it would report that the base model has no head; the adapter brings that
    try:
        model = to_device(load_head_model(str(location), recipe, label_set, tokenizer))
    finally:
        hf_logging.set_verbosity(verbosity)
    if tuned.name == ADAPTER:
        model = load_adapter(model, tuned)
    use_onednn(model)
    return HeadClassifier(recipe, label_set, tokenizer, model)
