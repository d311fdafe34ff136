"""What every tuned model has to beat: TF-IDF and logistic regression, on the same folds and by the same thresholds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emogen import results
from emogen.crossval import all_rows, claim, own_folder, sum_up
from emogen.labels import load_label_set
from emogen.recipe import load_recipe
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
        prob[held] = fit_and_predict(texts[~held], rows.truth[~held], texts[held])
        progress(1)
    pred = (prob > 0.5).astype(np.int8)
    results.write_jsonl(folder / results.PREDICTIONS, rows, pred, prob, label_set, folds=folds)
    metrics = sum_up(folder, label_set)
    report_finished(folder)
    return folder, metrics


def fit_and_predict(texts: Sequence[str], gold: np.ndarray, new: Sequence[str]) -> np.ndarray:
    """Learn from texts and gold [n, L], and give the probability of each label for new texts, float32 [m, L].

    A label that all rows have, or none, has no regression: its probability is 1 or 0.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_union

    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True),
    )
    learnt, asked = features.fit_transform(texts), features.transform(new)
    prob = np.zeros((len(new), gold.shape[1]), dtype=np.float32)
    for k in range(gold.shape[1]):
        if len(np.unique(gold[:, k])) == 1:
            prob[:, k] = gold[0, k]
            continue
        model = LogisticRegression(C=4.0, max_iter=1000)
        prob[:, k] = model.fit(learnt, gold[:, k]).predict_proba(asked)[:, 1]
    return prob
