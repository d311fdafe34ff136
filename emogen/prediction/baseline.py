"""Features of texts and logistic regression: the baseline, and a member of ensembles that errs differently."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emogen.evaluation import results
from emogen.evaluation.results import Prediction
from emogen.prediction.classifier import predictions_from_prob
from emogen.prediction.features import Features, fit_tfidf, load_features
from emogen.task.labels import LabelSet
from emogen.task.recipe import Recipe

Fitted = Callable[[Sequence[str]], np.ndarray]  # m texts -> the probability of each label, float32 [m, L]


def fit_baseline(
    texts: Sequence[str], gold: np.ndarray, *, features: Sequence[str] = ("tfidf",), exactly_one: bool = False
) -> Fitted:
    """Fit one logistic regression per label to each kind of features. Their probabilities are averaged.

    Args:
        texts: n texts.
        gold: 0/1, [n, L].
        features: `tfidf` (`fit_tfidf`, what occurs in two texts or more; C = 4), or what `load_features` takes,
            whose arrays are standardised (C = 0.01).
        exactly_one: whether each text has one label. One multinomial regression then takes the place of the L others.

    Returns:
        A function from m texts to the probability of each label, float32 [m, L]. A label that all training texts have,
        or none, has no regression: its probability is 1 or 0.

    Raises:
        InputError, ModelError: see `load_features`.
    """
    return _fit_each([_load(name) for name in features], texts, gold, exactly_one)


def _load(name: str) -> Features | None:
    """A function from texts to an array; None for TF-IDF, which is fitted to texts."""
    return None if name == "tfidf" else load_features(name)


def _fit_each(features: Sequence[Features | None], texts: Sequence[str], gold: np.ndarray, exactly_one: bool) -> Fitted:
    fitted = [_fit(own, texts, gold, exactly_one) for own in features]

    def predict_proba(new_texts: Sequence[str]) -> np.ndarray:
        return np.stack([predict(new_texts) for predict in fitted]).mean(axis=0)

    return predict_proba


def cross_fit_baseline(
    texts: Sequence[str],
    gold: np.ndarray,
    folds: np.ndarray,
    *,
    features: Sequence[str] = ("tfidf",),
    exactly_one: bool = False,
    progress: Callable[[int], Any] = lambda n: None,
) -> np.ndarray:
    """The probabilities of each fold by a baseline that was fitted to the other folds, float32 [n, L].

    Args:
        texts, gold, features, exactly_one: see `fit_baseline`.
        folds: the fold of each row, [n].
        progress: called with the number of folds that were done since the last call.
    """
    loaded = [own and _remembered(own, texts) for own in map(_load, features)]
    array = np.array(texts, dtype=object)
    prob = np.zeros(gold.shape, dtype=np.float32)
    for fold in np.unique(folds):
        held = folds == fold
        prob[held] = _fit_each(loaded, array[~held], gold[~held], exactly_one)(array[held])
        progress(1)
    return prob


def _remembered(features: Features, texts: Sequence[str]) -> Features:
    """Features that are computed once for these texts, the only ones they are asked about."""
    row_of = dict(zip(texts, features(texts), strict=True))
    return lambda some: np.stack([row_of[text] for text in some])


def _fit(features: Features | None, texts: Sequence[str], gold: np.ndarray, exactly_one: bool) -> Fitted:
    """Fit the regressions to one kind of features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    if features is None:
        vectors, vectorise = fit_tfidf(texts, min_df=2)
        c = 4.0
    else:
        scaled = make_pipeline(FunctionTransformer(features), StandardScaler())
        vectors, vectorise, c = scaled.fit_transform(texts), scaled.transform, 0.01
    if exactly_one and len(np.unique(gold.argmax(axis=1))) > 1:
        multinomial = LogisticRegression(C=c, max_iter=1000).fit(vectors, gold.argmax(axis=1))

        def predict_one(new_texts: Sequence[str]) -> np.ndarray:
            prob = np.zeros((len(new_texts), gold.shape[1]), dtype=np.float32)
            prob[:, multinomial.classes_] = multinomial.predict_proba(vectorise(new_texts))
            return prob

        return predict_one
    regressions = [
        None if truth.min() == truth.max() else LogisticRegression(C=c, max_iter=1000).fit(vectors, truth)
        for truth in gold.T
    ]

    def predict_proba(new_texts: Sequence[str]) -> np.ndarray:
        new_vectors = vectorise(new_texts)
        columns = [
            np.full(len(new_texts), truth[0]) if regression is None else regression.predict_proba(new_vectors)[:, 1]
            for truth, regression in zip(gold.T, regressions, strict=True)
        ]
        return np.stack(columns, 1).astype(np.float32)

    return predict_proba


@dataclass(frozen=True)
class BaselineClassifier:
    """The baseline. `fitted` is what `fit_baseline` returned."""

    recipe: Recipe
    label_set: LabelSet
    fitted: Fitted
    n_questions: int = 1

    def predict(
        self,
        texts: Sequence[str],
        *,
        with_prob: bool = False,
        batch_size: int = 32,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Prediction]:
        """Predict the labels with a probability above 0.5, or the most probable label with `exactly_one`."""
        return predictions_from_prob(self.predict_proba(texts, progress=progress), self.label_set, [0] * len(texts))

    def predict_proba(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """The probability of each label, float32 [n, L]."""
        prob = self.fitted(texts)
        if progress:
            progress(len(texts))
        return prob


def load_baseline(folder: Path, recipe: Recipe, label_set: LabelSet) -> BaselineClassifier:
    """Fit the baseline to all rows of its folder. This takes seconds, so no model is stored.

    Raises:
        InputError: the folder has no rows.
    """
    rows = results.read_held_out(folder, label_set)
    fitted = fit_baseline(rows.texts, rows.truth, features=recipe.features, exactly_one=label_set.exactly_one)
    return BaselineClassifier(recipe, label_set, fitted)
