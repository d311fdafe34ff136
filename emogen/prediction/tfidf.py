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


def make_vectorizer(*, min_df: int) -> Any:
    """TF-IDF of words and pairs of words, and of sequences of two to five characters within words, both sublinear.

    Args:
        min_df: the number of texts in which a feature has to occur.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    return make_union(
        TfidfVectorizer(ngram_range=(1, 2), min_df=min_df, sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=min_df, sublinear_tf=True),
    )


def fit_tfidf(
    texts: Sequence[str], gold: np.ndarray, *, exactly_one: bool = False
) -> Callable[[Sequence[str]], np.ndarray]:
    """Fit one logistic regression per label (C = 4) on TF-IDF features.

    The features are those of `make_vectorizer` that occur in two texts or more.

    Args:
        texts: n texts.
        gold: 0/1, [n, L].
        exactly_one: whether each text has one label. One multinomial regression then takes the place of the L others.

    Returns:
        A function from m texts to the probability of each label, float32 [m, L]. A label that all training texts have,
        or none, has no regression: its probability is 1 or 0.
    """
    from sklearn.linear_model import LogisticRegression

    vectorizer = make_vectorizer(min_df=2)
    features = vectorizer.fit_transform(texts)
    if exactly_one and len(np.unique(gold.argmax(axis=1))) > 1:
        multinomial = LogisticRegression(C=4.0, max_iter=1000).fit(features, gold.argmax(axis=1))

        def predict_one(new_texts: Sequence[str]) -> np.ndarray:
            prob = np.zeros((len(new_texts), gold.shape[1]), dtype=np.float32)
            prob[:, multinomial.classes_] = multinomial.predict_proba(vectorizer.transform(new_texts))
            return prob

        return predict_one
    regressions = [
        None if truth.min() == truth.max() else LogisticRegression(C=4.0, max_iter=1000).fit(features, truth)
        for truth in gold.T
    ]

    def predict_proba(new_texts: Sequence[str]) -> np.ndarray:
        new_features = vectorizer.transform(new_texts)
        columns = [
            np.full(len(new_texts), truth[0]) if regression is None else regression.predict_proba(new_features)[:, 1]
            for truth, regression in zip(gold.T, regressions, strict=True)
        ]
        return np.stack(columns, 1).astype(np.float32)

    return predict_proba


@dataclass(frozen=True)
class TfidfClassifier:
    """The baseline. `fitted` is what `fit_tfidf` returned."""

    recipe: Recipe
    label_set: LabelSet
    fitted: Callable[[Sequence[str]], np.ndarray]
    n_questions: int = 1

    def predict(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
    ) -> list[Prediction]:
        """Predict the labels with a probability above 0.5, or the most probable label with `exactly_one`."""
        return predictions_from_prob(self.predict_proba(texts, progress=progress), self.label_set, [0] * len(texts))

    def predict_proba(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """The probability of each label, float32 [n, L]."""
        prob = self.fitted(texts)
        if progress:
            progress(len(texts))
        return prob


def load_tfidf(folder: Path, recipe: Recipe, label_set: LabelSet) -> TfidfClassifier:
    """Fit the baseline to all rows of its folder. This takes seconds, so no model is stored.

    Raises:
        InputError: the folder has no rows.
    """
    rows = results.read_held_out(folder, label_set)
    return TfidfClassifier(recipe, label_set, fit_tfidf(rows.texts, rows.truth, exactly_one=label_set.exactly_one))
