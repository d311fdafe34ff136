"""The protocol of a classifier, and labels that are read off probabilities."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from emogen.console import Bar
from emogen.evaluation.metrics import apply_thresholds, most_probable
from emogen.evaluation.results import Prediction
from emogen.task.answer import answer_text
from emogen.task.labels import LabelSet
from emogen.task.parse import ParsedAnswer
from emogen.task.recipe import Recipe


class Classifier(Protocol):
    """A model that is ready to label texts.

    The implementations are `GenerativeClassifier`, `HeadClassifier` and `BaselineClassifier`.
    """

    @property
    def recipe(self) -> Recipe:
        """The recipe that the model was trained with."""
        ...

    @property
    def label_set(self) -> LabelSet:
        """The L labels."""
        ...

    @property
    def n_questions(self) -> int:
        """The number of questions per text: L for `yes_no` answers, otherwise 1."""
        ...

    def predict(
        self,
        texts: Sequence[str],
        *,
        with_prob: bool = False,
        batch_size: int = 32,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Prediction]:
        """Label n texts.

        Args:
            with_prob: compute probabilities, too, if they come from the same pass; see `prob_of`.
            progress: called with the number of questions that were answered since the last call.

        Returns:
            n predictions, in the order of the texts.
        """
        ...

    def predict_proba(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """Compute the probability of each label for n texts.

        Returns:
            float32 [n, L].
        """
        ...


def labels_from_prob(prob: np.ndarray, label_set: LabelSet) -> np.ndarray:
    """The labels with a probability above 0.5, or the most probable one with `exactly_one`: [n, L] -> int8 [n, L]."""
    return most_probable(prob) if label_set.exactly_one else apply_thresholds(prob, np.full(len(label_set), 0.5))


def predictions_from_prob(prob: np.ndarray, label_set: LabelSet, n_cut: Sequence[int]) -> list[Prediction]:
    """Predict the labels with a probability above 0.5, for a classifier that generates no answer.

    With `exactly_one` it is the most probable label.

    Args:
        prob: [n, L].
        n_cut: the number of tokens that were cut from each text, [n].
    """
    predictions = []
    for row, vector, cut in zip(prob, labels_from_prob(prob, label_set).tolist(), n_cut, strict=True):
        names = label_set.names_of(vector)
        parsed = ParsedAnswer(names, label_set.vector(names), "exact")
        predictions.append(Prediction(answer_text(names, label_set, "list"), parsed, cut, tuple(row.tolist())))
    return predictions


def prob_of(
    classifier: Classifier, texts: Sequence[str], predictions: Sequence[Prediction], bar: Bar, title: str
) -> np.ndarray:
    """The probability of each label for n texts.

    Predictions that were read off probabilities (of a head, of TF-IDF, of `yes_no` answers) or were made with them hold
    them. All others are computed here, under a progress bar.

    Args:
        predictions: what the classifier predicted for the texts, or nothing if `predict` was not called.

    Returns:
        float32 [n, L].
    """
    known = [prediction.prob for prediction in predictions if prediction.prob is not None]
    if known:
        return np.array(known, dtype=np.float32)
    with bar(title, len(texts) * classifier.n_questions) as advance:
        return classifier.predict_proba(texts, progress=advance)
