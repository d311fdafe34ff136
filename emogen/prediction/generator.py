"""The generative classifier: texts -> generated answers and label probabilities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from emogen import processes
from emogen.evaluation.results import Prediction
from emogen.model.encode import Encoder
from emogen.task.answer import NO, YES
from emogen.task.labels import LabelSet
from emogen.task.parse import parse_answer
from emogen.task.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def predict_texts(
    model: "PreTrainedModel",
    encoder: "Encoder",
    texts: Sequence[str],
    *,
    decode: str = "constrained",
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
) -> list[Prediction]:
    """Generate and read an answer for each text.

    Args:
        progress: is told how many more questions are answered; there are `len(encoder.question_ids)` for each text.

    Returns:
        n predictions in the order of the texts.
    """
    from emogen.model.decode import generate

    rows = [encoder.rows(text) for text in texts]
    n_questions = len(encoder.question_ids)
    prob = None
    if encoder.style == "yes_no" and decode == "constrained":
        # The word that is the more probable; that way each text is computed once, not for every question anew.
        prob = predict_prob(model, encoder, texts, batch_size=batch_size, progress=progress)
        said = [YES if of_yes > 0.5 else NO for of_yes in prob.flatten()]
    else:
        suffixes = [row.suffix_ids for questions in rows for row in questions]
        answers = generate(model, encoder, suffixes, decode=decode, batch_size=batch_size, progress=progress)
        said = [encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    predictions = []
    for i, questions in enumerate(rows):
        own = said[i * n_questions : (i + 1) * n_questions]
        if encoder.style == "yes_no":
            raw = "\n".join(f"{name}: {answer}" for name, answer in zip(encoder.label_set.names, own, strict=True))
        else:
            raw = own[0]
        parsed = parse_answer(raw, encoder.label_set, style=encoder.style)
        of_row = None if prob is None else tuple(prob[i].tolist())
        predictions.append(Prediction(raw, parsed, max(row.n_cut for row in questions), of_row))
    return predictions


def predict_prob(
    model: "PreTrainedModel",
    encoder: "Encoder",
    texts: Sequence[str],
    *,
    how: str = "marginal",
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """The probability of each label for each text, float32 [n, L]; `decode.probabilities` says what that is.

    Args:
        how: `marginal` or `maximum`.
        progress: as in `predict_texts`.
    """
    from emogen.model.probabilities import probabilities

    first = [encoder.rows(text)[0] for text in texts]
    if encoder.style == "yes_no":
        before = [row.suffix_ids[: row.n_text] for row in first]
        each = (lambda n: progress(n * len(encoder.question_ids))) if progress else None  # a text is all its questions
        prob = probabilities(model, encoder, before, encoder.question_ids, batch_size=batch_size, progress=each)
        return prob[:, :, 0]  # of yes
    suffixes = [row.suffix_ids for row in first]
    return probabilities(model, encoder, suffixes, how=how, batch_size=batch_size, progress=progress)[:, 0]


@dataclass(frozen=True)
class GenerativeClassifier:
    """A model that generates its answers, with what it was trained with."""

    recipe: Recipe
    label_set: LabelSet
    encoder: "Encoder"
    model: "PreTrainedModel"

    @property
    def n_questions(self) -> int:
        """One, or with `yes_no` one for each label."""
        return len(self.encoder.question_ids)

    def predict(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
    ) -> list[Prediction]:
        """See `predict_texts`. Each process of a run does its share."""
        how: dict[str, Any] = {"decode": self.recipe.decode, "batch_size": batch_size, "progress": progress}
        return processes.distribute(lambda own: predict_texts(self.model, self.encoder, own, **how), texts)

    def predict_proba(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """See `predict_prob`. Each process of a run does its share."""
        how: dict[str, Any] = {"how": self.recipe.prob, "progress": progress}
        rows = processes.distribute(lambda own: predict_prob(self.model, self.encoder, own, **how).tolist(), texts)
        return np.array(rows, dtype=np.float32).reshape(len(texts), len(self.label_set))
