"""A teacher for a head: targets between the labels of the training rows and the probabilities of baselines.

Labels of people are noisy, and 0 and 1 make a head too sure of them. Probabilities say which labels of a row are
doubtful, and which missing ones were likely (Hinton et al. 2015, arXiv 1503.02531).
"""

import logging
from dataclasses import replace

import numpy as np

from emogen.evaluation.stack import cross_fit
from emogen.prediction.baseline import cross_fit_baseline
from emogen.task.recipe import Recipe
from emogen.task.rows import Rows
from emogen.task.splits import make_folds

log = logging.getLogger(__name__)

FOLDS = 5


def soften(rows: Rows, recipe: Recipe) -> Rows:
    """Mix the labels of training rows with the probabilities of a stack of baselines, one for each of the features.

    The baselines and the stack are cross-fitted to these rows: the regressions that speak of a row were fitted to
    others. No other rows are used, so validation rows stay unseen.

    Args:
        rows: n rows with labels.
        recipe: its `features`, `teacher_weight` and `seed`.

    Returns:
        The rows with `prob`, their targets: teacher_weight times the probabilities and the rest times the labels.

    Raises:
        DataError: there are fewer different texts than folds.
        InputError, ModelError: features cannot be computed.
    """
    log.info(f"The teacher is fitted to the training rows: {', '.join(recipe.features)}")
    folds = make_folds(rows, FOLDS, recipe.seed)
    probs = np.stack(
        [cross_fit_baseline(rows.texts, rows.truth, folds, features=[name]) for name in recipe.features]
    )  # [M, n, L]
    weight = recipe.teacher_weight
    targets = weight * cross_fit(rows.truth, probs, folds) + (1 - weight) * rows.truth
    return replace(rows, prob=targets.astype(np.float32))
