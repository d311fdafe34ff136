"""TF-IDF and logistic regression: the baseline, and a member of ensembles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emogen.evaluation import results
from emogen.evaluation.results import Prediction
from emogen.prediction.classifier import predictions_from_prob
from emogen.task.labels import LabelSet
from emogen.task.recipe import Recipe


def fit_tfidf(texts: Sequence[str], gold: np.ndarray) -> Callable[[Sequence[str]], np.ndarray]:
    """Learn from texts and gold [n, L].

    Returns:
        What gives the probability of each label for m texts, float32 [m, L]. A label that all rows have, or none, has
        no regression: its probability is 1 or 0.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_union

    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True),
    )
    learnt = features.fit_transform(texts)
    models = [
        None if truth.min() == truth.max() else LogisticRegression(C=4.0, max_iter=1000).fit(learnt, truth)
        for truth in gold.T
    ]

    def prob(new: Sequence[str]) -> np.ndarray:
        asked = features.transform(new)
        columns = [
            np.full(len(new), truth[0]) if model is None else model.predict_proba(asked)[:, 1]
            for truth, model in zip(gold.T, models, strict=True)
        ]
        return np.stack(columns, 1).astype(np.float32)

    return prob


@dataclass(frozen=True)
class TfidfClassifier:
    """A baseline that is ready to label texts; a `predict.Labeller`. `fitted` is what `fit` returned."""

    recipe: Recipe
    label_set: LabelSet
    fitted: Callable[[Sequence[str]], np.ndarray]
    n_questions: int = 1

    def predict(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
    ) -> list[Prediction]:
        """The labels with a probability above 0.5."""
        return predictions_from_prob(self.predict_proba(texts, progress=progress), self.label_set, [0] * len(texts))

    def predict_proba(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """The probability of each label, float32 [n, L]."""
        prob = self.fitted(texts)
        if progress:
            progress(len(texts))
        return prob


def load_tfidf(folder: Path, recipe: Recipe, label_set: LabelSet) -> TfidfClassifier:
    """Fit the baseline of a folder to all of its rows: that takes seconds, and no model has to be kept.

    Raises:
        InputError: the folder has no rows.
    """
    rows = results.read_held_out(folder, label_set)
    return TfidfClassifier(recipe, label_set, fit_tfidf(rows.texts, rows.truth))
