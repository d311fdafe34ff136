"""The rows of a recipe, split: held-out rows, folds, samples and few-shot examples."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emogen.memo import remembered
from emogen.task.labels import LabelSet
from emogen.task.readers import read_hub, read_rows
from emogen.task.recipe import Recipe
from emogen.task.rows import DataError, Problem, Rows, check_overlap, check_rows, data_error, has_errors, normalise_text

log = logging.getLogger(__name__)

STRATIFIERS = ("iterative-stratification", "scikit-learn", "numpy")  # whose code makes the splits


@dataclass(frozen=True)
class Splits:
    """The rows of a recipe.

    Attributes:
        train: training rows, without the few-shot examples that are drawn: the prompt would contain their answers.
        eval: rows to evaluate on, if the recipe has any.
        examples: rows that the prompt shows as few-shot examples.
    """

    train: Rows
    eval: Rows | None
    examples: Rows


def load_splits(recipe: Recipe, label_set: LabelSet) -> tuple[Splits | None, list[Problem]]:
    """Read, check and split the data of a recipe.

    Returns:
        The splits, or None if an error makes them impossible; and every problem.
    """
    columns: dict[str, Any] = {
        "text_column": recipe.text_column,
        "id_column": recipe.id_column,
        "need_labels": True,
    }

    def read(file: str | None, split: str | None, **labels: Any) -> tuple[Rows, list[Problem]]:
        if file is not None:
            return read_rows(recipe.find(file), label_set, **columns, **recipe.file_form, **labels)
        return read_hub(str(recipe.dataset_name), recipe.dataset_config, str(split), label_set, **columns, **labels)

    # A teacher's probabilities have a column of their own, which rows labelled by people do not have.
    own_column = None if recipe.soft_labels else recipe.labels_column
    train, problems = read(
        recipe.train_file,
        recipe.dataset_train_split,
        soft_labels=recipe.soft_labels,
        labels_column=recipe.labels_column,
    )
    problems += check_rows(train)
    for key in ("soft_labels", "teacher_weight"):
        if getattr(recipe, key) and label_set.exactly_one:
            message = f"{key}: not for {label_set.name!r}, which says exactly_one; its rows need one certain label"
            problems.append(Problem("error", train.path, message))
    eval_rows = None
    if recipe.eval_file or recipe.dataset_test_split:
        eval_rows, more = read(recipe.eval_file, recipe.dataset_test_split, labels_column=own_column)
        problems += more + check_rows(eval_rows) + check_overlap(train, eval_rows)
    if has_errors(problems):
        return None, problems
    if recipe.eval_fraction:
        try:
            kept, held_out = hold_out(train, recipe.eval_fraction, recipe.seed)
        except DataError as error:
            return None, [*problems, *error.problems]
        train, eval_rows = train.take(kept), train.take(held_out)
    if train.prob is not None:
        train = draw_labels(train, recipe.seed)
    examples, train = draw_rows(train, recipe)
    if not len(train):
        return None, [*problems, Problem("error", train.path, "no training rows are left")]
    return Splits(train, eval_rows, examples), problems


def draw_labels(rows: Rows, seed: int) -> Rows:
    """Draw the labels of rows with probabilities, each on its own. Answers name these, and frequencies count them."""
    assert rows.prob is not None
    drawn = np.random.default_rng(seed).random(rows.prob.shape) < rows.prob
    return replace(rows, gold=drawn.astype(np.int8))


def draw_rows(rows: Rows, recipe: Recipe) -> tuple[Rows, Rows]:
    """Draw the few-shot examples that all texts share; none if each text has its nearest rows.

    Returns:
        The examples and the other rows, both in their order.
    """
    order = np.random.default_rng(recipe.seed).permutation(len(rows))
    if recipe.examples_by == "coverage":
        order = order[_cover(rows.truth[order], recipe.examples)]
    drawn = np.sort(order[: 0 if recipe.examples_by == "nearest" else recipe.examples])
    return rows.take(drawn), rows.take(np.setdiff1d(np.arange(len(rows)), drawn))


def _cover(gold: np.ndarray, n: int) -> list[int]:
    """Choose n rows that show every label, and a row without labels, before one is shown again.

    Each next row is the first one with the largest share of labels that were not shown yet. (A row with many labels is
    not preferred: examples with more labels than usual would teach the model to name too many.)

    Args:
        gold: [rows, L].

    Returns:
        Their positions, at most n.
    """
    shows = np.hstack([gold, ~gold.any(axis=1, keepdims=True)]).astype(bool)  # [rows, L + 1]
    missing = np.ones(shows.shape[1], dtype=bool)
    chosen: list[int] = []
    while len(chosen) < min(n, len(gold)):
        share = (shows & missing).sum(axis=1) / shows.sum(axis=1)
        share[chosen] = -1
        best = int(share.argmax())
        if share[best] == 0:
            missing[:] = True  # everything that can be shown was
            continue
        chosen.append(best)
        missing &= ~shows[best]
    return chosen


def all_rows(recipe: Recipe, label_set: LabelSet) -> Rows:
    """All training rows of a recipe, with none held out. Warnings are logged.

    Raises:
        DataError: every error in the data, or its labels are probabilities: nothing can be scored against them.
    """
    if recipe.soft_labels:
        message = "soft_labels: rows with probabilities in place of labels are trained on, and cannot be scored"
        raise DataError([Problem("error", str(recipe.path), message)])
    whole = recipe.model_copy(
        update={"eval_file": None, "eval_fraction": 0.0, "examples": 0, "dataset_test_split": None}
    )
    splits, problems = load_splits(whole, label_set)
    if splits is None:
        raise data_error(problems)
    for problem in problems:
        log.warning(str(problem))
    return splits.train


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into two parts, stratified by label, with all rows of the same text in one part.

    Uses iterative stratification (Sechidis et al. 2011).

    Returns:
        Positions of the kept and of the held-out rows, ascending.

    Raises:
        DataError: the rows have no labels, or too few different texts.
    """
    groups, gold = _group_by_text(rows)
    if len(groups) < 2:
        raise _impossible(rows, "cannot hold out rows: fewer than two different texts")

    def split() -> list[list[int]]:
        from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit

        splitter = MultilabelStratifiedShuffleSplit(n_splits=1, test_size=fraction, random_state=seed)
        return [part.tolist() for part in next(splitter.split(np.zeros(len(groups)), gold))]

    try:
        kept, held_out = remembered("splits", ["hold out", _digest(gold), fraction, seed], split, packages=STRATIFIERS)
    except ValueError as error:  # a part would be empty
        raise _impossible(rows, f"cannot hold out rows: {error}") from None
    if not len(kept) or not len(held_out):
        raise _impossible(rows, f"cannot hold out {fraction:.0%} of {len(groups)} different texts")
    return _positions(groups, kept), _positions(groups, held_out)


def make_folds(rows: Rows, n_folds: int, seed: int) -> np.ndarray:
    """Assign rows to folds, stratified by label, with all rows of the same text in one fold.

    Uses iterative stratification (Sechidis et al. 2011).

    Returns:
        The fold of each row, int64 [n].

    Raises:
        DataError: the rows have no labels, or fewer different texts than folds.
    """
    groups, gold = _group_by_text(rows)
    if len(groups) < n_folds:
        raise _impossible(rows, f"cannot make {n_folds} folds of {len(groups)} different texts")

    def split() -> list[list[int]]:
        from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

        splitter = MultilabelStratifiedKFold(n_splits=n_folds, shuffle=True, random_state=seed)
        return [held_out.tolist() for _, held_out in splitter.split(np.zeros(len(groups)), gold)]

    folds = np.empty(len(rows), dtype=np.int64)
    parts = remembered("splits", ["folds", _digest(gold), n_folds, seed], split, packages=STRATIFIERS)
    for fold, held_out in enumerate(parts):
        folds[_positions(groups, held_out)] = fold
    return folds


def sample_rows(rows: Rows, n: int, seed: int) -> Rows:
    """Draw n rows, stratified by label if the rows have labels and are enough; all rows if there are no more than n.

    The same rows, n and seed give the same sample.
    """
    if n >= len(rows):
        return rows
    order = np.random.default_rng(seed).permutation(len(rows))
    if rows.gold is not None:
        with suppress(DataError):  # a handful of rows cannot be split
            # Iterative stratification misses n by some rows. Random ones are added, or left out.
            order = order[np.argsort(~np.isin(order, hold_out(rows, n / len(rows), seed)[1]), kind="stable")]
    return rows.take(np.sort(order[:n]))


def _group_by_text(rows: Rows) -> tuple[list[list[int]], np.ndarray]:
    """The positions of the rows of each different text, and labels to stratify by: those of its first row, [groups, L].

    A single label gets a second column, its opposite: iterative stratification needs two, and then balances both.
    """
    if rows.gold is None:
        raise _impossible(rows, "no labels to stratify by")
    positions: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(rows.texts):
        positions[normalise_text(text)].append(i)
    groups = list(positions.values())
    gold = rows.gold[[group[0] for group in groups]]
    return groups, np.hstack([gold, 1 - gold]) if gold.shape[1] == 1 else gold


def _digest(gold: np.ndarray) -> str:
    return hashlib.sha256(f"{gold.shape} {gold.dtype}".encode() + gold.tobytes()).hexdigest()


def _impossible(rows: Rows, message: str) -> DataError:
    return DataError([Problem("error", rows.path, message)])


def _positions(groups: list[list[int]], chosen: Sequence[int]) -> np.ndarray:
    """The positions of all rows of the chosen groups, int64, ascending."""
    return np.sort([i for k in chosen for i in groups[k]])
