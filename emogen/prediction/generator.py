"""The generative classifier: texts -> generated answers and label probabilities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emogen import processes
from emogen.accelerators import own_device
from emogen.evaluation.results import Prediction
from emogen.evaluation.run_folder import ADAPTER, MODEL
from emogen.model.encode import Encoder, load_encoder
from emogen.model.sources import locate
from emogen.prediction.classifier import labels_from_prob
from emogen.prediction.weights import check_weights
from emogen.task.answer import NO, YES
from emogen.task.labels import LabelSet
from emogen.task.parse import parse_answer
from emogen.task.recipe import Recipe
from emogen.task.task import load_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def predict_texts(
    model: "PreTrainedModel",
    encoder: Encoder,
    texts: Sequence[str],
    *,
    decode: str = "constrained",
    prob: str | None = None,
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
    kept: dict[Any, Any] | None = None,
) -> list[Prediction]:
    """Generate and parse an answer for each text.

    Args:
        decode: `constrained` (only valid answers are generated) or `free`.
        prob: `marginal` or `maximum`: constrained answers get their probabilities (see `predict_prob`), which costs
            less in the same pass than apart.
        progress: called with the number of questions that were answered since the last call. Each text has
            `len(encoder.question_ids)` questions.
        kept: see `model.decode.compute_prefix`.

    Returns:
        n predictions, in the order of the texts.
    """
    from emogen.model.decode import generate
    from emogen.model.probabilities import generate_with_probabilities

    rows = [encoder.rows(text) for text in texts]
    n_questions = len(encoder.question_ids)
    found = None  # the probabilities
    if encoder.style == "yes_no" and decode == "constrained":
        # The greedy answer is the more probable word. Read off the probabilities, each text is computed once;
        # generation would compute it once per question.
        found = predict_prob(model, encoder, texts, batch_size=batch_size, progress=progress, kept=kept)
        answers = [YES if chosen else NO for chosen in labels_from_prob(found, encoder.label_set).flatten()]
    else:
        suffixes = [row.suffix_ids for questions in rows for row in questions]
        options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "kept": kept}
        if prob and decode == "constrained":
            generated, found = generate_with_probabilities(model, encoder, suffixes, how=prob, **options)
        else:
            generated = generate(model, encoder, suffixes, decode=decode, **options)
        answers = [encoder.answer_text(ids) for ids in generated]
    predictions = []
    for i, questions in enumerate(rows):
        own = answers[i * n_questions : (i + 1) * n_questions]
        if encoder.style == "yes_no":
            raw = "\n".join(f"{name}: {answer}" for name, answer in zip(encoder.label_set.names, own, strict=True))
        else:
            raw = own[0]
        parsed = parse_answer(raw, encoder.label_set, style=encoder.style)
        row_prob = None if found is None else tuple(found[i].tolist())
        predictions.append(Prediction(raw, parsed, max(row.n_cut for row in questions), row_prob))
    return predictions


def predict_prob(
    model: "PreTrainedModel",
    encoder: Encoder,
    texts: Sequence[str],
    *,
    how: str = "marginal",
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
    kept: dict[Any, Any] | None = None,
) -> np.ndarray:
    """Compute the probability of each label for n texts.

    Args:
        how: `marginal` or `maximum`; see `model.probabilities.probabilities`. `yes_no` ignores it.
        progress, kept: as in `predict_texts`.

    Returns:
        float32 [n, L].
    """
    from emogen.model.probabilities import probabilities

    rows = [encoder.rows(text) for text in texts]
    if encoder.style == "yes_no":
        shared = [questions[0].suffix_ids[: questions[0].n_text] for questions in rows]
        asked = [[row.suffix_ids[row.n_text :] for row in questions] for questions in rows]
        n_questions = len(encoder.question_ids)
        advance = (lambda n_texts: progress(n_texts * n_questions)) if progress else None
        prob = probabilities(model, encoder, shared, asked, batch_size=batch_size, progress=advance, kept=kept)
        return prob[:, :, 0].reshape(len(texts), n_questions)  # the probability of "yes"
    suffixes = [row.suffix_ids for (row,) in rows]
    return probabilities(model, encoder, suffixes, how=how, batch_size=batch_size, progress=progress, kept=kept)[:, 0]


@dataclass(frozen=True)
class GenerativeClassifier:
    """A model that generates its answers, with the recipe, labels and encoder that it was trained with.

    Attributes:
        kept: see `model.decode.compute_prefix`; None for a model that is being trained.
    """

    recipe: Recipe
    label_set: LabelSet
    encoder: Encoder
    model: "PreTrainedModel"
    kept: dict[Any, Any] | None = None

    @property
    def n_questions(self) -> int:
        """The number of questions per text: L for `yes_no` answers, otherwise 1."""
        return len(self.encoder.question_ids)

    def predict(
        self,
        texts: Sequence[str],
        *,
        with_prob: bool = False,
        batch_size: int = 32,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Prediction]:
        """See `predict_texts`. Under `accelerate launch` the processes share the texts."""
        options: dict[str, Any] = {"decode": self.recipe.decode, "batch_size": batch_size, "progress": progress}
        options |= {"prob": self.recipe.prob if with_prob else None, "kept": self.kept}
        return processes.distribute(lambda share: predict_texts(self.model, self.encoder, share, **options), texts)

    def predict_proba(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """See `predict_prob`. Under `accelerate launch` the processes share the texts."""
        options: dict[str, Any] = {"how": self.recipe.prob, "progress": progress, "kept": self.kept}
        rows = processes.distribute(
            lambda share: predict_prob(self.model, self.encoder, share, **options).tolist(), texts
        )
        return np.array(rows, dtype=np.float32).reshape(len(texts), len(self.label_set))


class GeneratorLoader:
    """Loads generative classifiers one after another.

    The base model is loaded once as long as it stays the same; only the adapter on it changes. So a classifier can be
    used until the next one is loaded.

    Args:
        force: see `check_weights`.
    """

    def __init__(self, *, force: bool = False) -> None:
        self._force = force
        self._model: Any = None
        self._base: tuple | None = None  # everything that the loaded base model depends on

    def load(self, run: Path, recipe: Recipe) -> GenerativeClassifier:
        """Load a run folder, or the untuned model of a recipe file.

        Raises:
            InputError, ModelError: something is missing or broken.
        """
        task = load_task(recipe)
        adapter = run / ADAPTER if (run / ADAPTER).is_dir() else None
        if (run / MODEL).is_dir():  # merged by `emogen export`
            location = str(run / MODEL)
        else:
            location = locate(recipe.model_name, recipe.lm_config().model_revision)
        check_weights(run, None if (run / MODEL).is_dir() else location, force=self._force)
        encoder = load_encoder(task, str(adapter or location))
        model = self._load_model(recipe, location, adapter)
        return GenerativeClassifier(recipe, task.label_set, encoder, model, kept={})

    def _load_model(self, recipe: Recipe, location: str, adapter: Path | None) -> "PreTrainedModel":
        from emogen.model.loading import load_adapter, load_model, to_device
        from emogen.model.onednn import pack_weights, use_onednn
        from emogen.model.plain_rows import require_causal
        from emogen.model.shared_prefix import share_prefix

        config = recipe.lm_config()
        base = (location, config.dtype, config.load_in_4bit, config.load_in_8bit, recipe.shared_prefix)
        if base != self._base:
            own_device()  # selects it, before a quantised model is loaded onto it
            self._model = to_device(load_model(location, config, trust_remote_code=recipe.trusts_code))
            self._base = base
            use_onednn(self._model)  # before its first forward pass, in which bitsandbytes would repack its weights
            require_causal(self._model)
            if recipe.shared_prefix:
                share_prefix(self._model)  # a short look; rows as long as those of a prediction are tried with it
        elif hasattr(self._model, "unload"):
            self._model = self._model.unload()  # removes the adapter of the previous run
        if adapter:
            self._model = load_adapter(self._model, adapter)
        use_onednn(self._model)
        pack_weights(self._model)
        return self._model
