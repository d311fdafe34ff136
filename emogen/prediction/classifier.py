"""The protocol that every classifier follows, and what those share that read labels off probabilities."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from emogen.console import Bar
from emogen.evaluation.results import Prediction
from emogen.task.answer import answer_text
from emogen.task.labels import LabelSet
from emogen.task.parse import ParsedAnswer
from emogen.task.recipe import Recipe


class Classifier(Protocol):
    """What is ready to label texts: by generation (`Generator`), by a head (`head.Classifier`), or by TF-IDF
    (`baseline.Baseline`)."""

    @property
    def recipe(self) -> Recipe:
        """What it was trained by."""
        ...

    @property
    def label_set(self) -> LabelSet:
        """Its L labels."""
        ...

    @property
    def n_questions(self) -> int:
        """How many rows one text makes."""
        ...

    def predict(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
    ) -> list[Prediction]:
        """What it says of each text. `progress` is told how many more rows are done."""
        ...

    def predict_proba(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """The probability of each label for each text, float32 [n, L]."""
        ...


def predictions_from_prob(prob: np.ndarray, label_set: LabelSet, n_cut: Sequence[int]) -> list[Prediction]:
    """What is said by what generates no answer: the labels with a probability above 0.5, prob [n, L]."""
    predictions = []
    for row, cut in zip(prob, n_cut, strict=True):
        names = label_set.names_of((row > 0.5).astype(int).tolist())
        parsed = ParsedAnswer(names, label_set.vector(names), "exact")
        predictions.append(Prediction(answer_text(names, label_set, "list"), parsed, cut, tuple(row.tolist())))
    return predictions


def prob_of(
    classifier: Classifier, texts: Sequence[str], predictions: Sequence[Prediction], bar: Bar, title: str
) -> np.ndarray:
    """The probability of each label, float32 [n, L]: those that answers were read off (a head's, a baseline's, those of
    `yes_no`), or else computed under a progress bar.

    Args:
        predictions: what the classifier answered to the texts, or nothing where it was not asked.
    """
    known = [prediction.prob for prediction in predictions if prediction.prob is not None]
    if known:
        return np.array(known, dtype=np.float32)
    with bar(title, len(texts) * classifier.n_questions) as advance:
        return classifier.predict_proba(texts, progress=advance)
