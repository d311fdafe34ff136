"""What every tuned model has to beat, and what many gain from: TF-IDF and logistic regression, on the same folds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emogen import results
from emogen.crossval import all_rows, claim, own_folder, sum_up
from emogen.labels import LabelSet, load_label_set
from emogen.predict import Prediction, named
from emogen.recipe import Recipe, load_recipe
from emogen.report import report_finished
from emogen.score import Metrics


def cross_validate_baseline(
    path: str | Path,
    n_folds: int = 5,
    overrides: Sequence[str] = (),
    progress: Callable[[int], Any] = lambda n: None,
) -> tuple[Path, Metrics]:
    """Cross-validate the baseline on a recipe's rows; its folds are those of `crossval.cross_validate`.

    Words and pairs of words, and runs of two to five characters within words, weighted by TF-IDF (sublinear, seen in
    two texts or more); for each label a logistic regression of its own (C = 4). A label is given where its probability
    is above 0.5, or by thresholds.

    Args:
        progress: is told how many more folds are done.

    Returns:
        The folder (`runs/NAME-baseline`), and the figures.

    Raises:
        InputError: as `crossval.cross_validate`.
    """
    recipe = load_recipe(path, overrides)
    label_set = load_label_set(recipe.find(recipe.labels))
    rows = all_rows(recipe, label_set)
    folder = own_folder(recipe, overrides, "baseline")
    folds = claim(folder, recipe, label_set, rows, n_folds)
    texts = np.array(rows.texts, dtype=object)
    prob = np.zeros(rows.truth.shape, dtype=np.float32)
    for fold in range(n_folds):
        held = folds == fold
        prob[held] = fit(texts[~held], rows.truth[~held])(texts[held])
        progress(1)
    pred = (prob > 0.5).astype(np.int8)
    results.write_jsonl(folder / results.PREDICTIONS, rows, pred, prob, label_set, folds=folds)
    metrics = sum_up(folder, label_set)
    report_finished(folder)
    return folder, metrics


def fit(texts: Sequence[str], gold: np.ndarray) -> Callable[[Sequence[str]], np.ndarray]:
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
class Baseline:
    """A baseline that is ready to label texts; a `predict.Labeller`. `fitted` is what `fit` returned."""

    recipe: Recipe
    label_set: LabelSet
    fitted: Callable[[Sequence[str]], np.ndarray]
    n_questions: int = 1

    def answers(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
    ) -> list[Prediction]:
        """The labels with a probability above 0.5."""
        return named(self.prob(texts, progress=progress), self.label_set, [0] * len(texts))

    def prob(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """The probability of each label, float32 [n, L]."""
        prob = self.fitted(texts)
        if progress:
            progress(len(texts))
        return prob


def load(folder: Path, recipe: Recipe, label_set: LabelSet) -> Baseline:
    """Fit the baseline of a folder to all of its rows: that takes seconds, and no model has to be kept.

    Raises:
        InputError: the folder has no rows.
    """
    rows = results.read_held_out(folder, label_set)
    return Baseline(recipe, label_set, fit(rows.texts, rows.truth))
