"""A recipe's rows, split: held-out rows, folds, samples, few-shot examples."""

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from emogen.task.labels import LabelSet
from emogen.task.readers import read_hub, read_rows
from emogen.task.recipe import Recipe
from emogen.task.rows import Problem, Rows, check_overlap, check_rows, errors_of, normalise_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """A recipe's rows: to learn from, to score on (if any), and those that the prompt shows as examples.

    Rows that stand in the prompt are not among the training rows: the model would be asked what it is shown.
    """

    train: Rows
    eval: Rows | None
    examples: Rows


def load_splits(recipe: "Recipe", label_set: LabelSet) -> tuple[Splits | None, list[Problem]]:
    """Read a recipe's data, check it, and split it. The splits are None if an error makes them impossible."""
    columns: dict[str, Any] = {"text_column": recipe.text_column, "id_column": recipe.id_column, "need_labels": True}
    form: dict[str, Any] = {"separator": recipe.separator, "encoding": recipe.encoding}

    def read(file: str | None, split: str | None) -> tuple[Rows, list[Problem]]:
        if file is not None:
            return read_rows(recipe.find(file), label_set, **columns, **form)
        return read_hub(str(recipe.dataset_name), recipe.dataset_config, str(split), label_set, **columns)

    train, problems = read(recipe.train_file, recipe.dataset_train_split)
    problems = problems + check_rows(train)
    held = None
    if recipe.eval_file or recipe.dataset_test_split:
        held, more = read(recipe.eval_file, recipe.dataset_test_split)
        problems += more + check_rows(held) + check_overlap(train, held)
    if any(problem.level == "error" for problem in problems):
        return None, problems
    if recipe.eval_fraction:
        try:
            kept, out = hold_out(train, recipe.eval_fraction, recipe.seed)
        except ValueError as error:
            return None, [*problems, Problem("error", train.path, str(error))]
        train, held = train.take(kept), train.take(out)
    shown = np.sort(np.random.default_rng(recipe.seed).permutation(len(train))[: recipe.examples])
    examples = train.take(shown)
    train = train.take(np.setdiff1d(np.arange(len(train)), shown))
    if not len(train):
        problems.append(Problem("error", train.path, "no rows are left to learn from"))
    return Splits(train, held, examples), problems


def all_rows(recipe: Recipe, label_set: LabelSet) -> Rows:
    """The training rows of a recipe, none held out. Raises DataError; warnings are logged."""
    whole = recipe.model_copy(
        update={"eval_file": None, "eval_fraction": 0.0, "examples": 0, "dataset_test_split": None}
    )
    splits, problems = load_splits(whole, label_set)
    if splits is None:
        raise errors_of(problems)
    for problem in problems:
        log.warning(str(problem))
    return splits.train


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of (kept, held-out) rows, stratified over the labels; the same text never stands on both sides.

    Uses iterative stratification (Sechidis et al. 2011). Needs gold labels.

    Raises:
        ValueError: fewer than two different texts, or no labels.
    """
    from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit

    members, gold = _same_texts(rows)
    if len(members) < 2:
        raise ValueError(f"{rows.path}: cannot hold out rows: fewer than two different texts")
    splitter = MultilabelStratifiedShuffleSplit(n_splits=1, test_size=fraction, random_state=seed)
    kept, held = next(splitter.split(np.zeros(len(members)), gold))
    return tuple(np.sort([i for g in part for i in members[g]]) for part in (kept, held))  # type: ignore[return-value]


def make_folds(rows: Rows, n_folds: int, seed: int) -> np.ndarray:
    """The fold of each row, int64 [n], stratified over the labels; rows with the same text are in the same fold.

    Uses iterative stratification (Sechidis et al. 2011). Needs gold labels.

    Raises:
        ValueError: fewer different texts than folds, or no labels.
    """
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

    members, gold = _same_texts(rows)
    if len(members) < n_folds:
        raise ValueError(f"{rows.path}: cannot make {n_folds} folds of {len(members)} different texts")
    splitter = MultilabelStratifiedKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    folds = np.empty(len(rows), dtype=np.int64)
    for k, (_, held) in enumerate(splitter.split(np.zeros(len(members)), gold)):
        folds[[i for g in held for i in members[g]]] = k
    return folds


def _same_texts(rows: Rows) -> tuple[list[list[int]], np.ndarray]:
    """The positions of the rows of each different text, and the gold labels [groups, L] of its first row."""
    if rows.gold is None:
        raise ValueError(f"{rows.path}: no labels to stratify by")
    groups: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(rows.texts):
        groups[normalise_text(text)].append(i)
    members = list(groups.values())
    return members, rows.gold[[group[0] for group in members]]


def sample_rows(rows: Rows, n: int, seed: int) -> Rows:
    """A fixed stratified subset of n rows, or all of them if there are no more than n."""
    if n >= len(rows):
        return rows
    if rows.gold is None:
        index = np.sort(np.random.default_rng(seed).permutation(len(rows))[:n])
    else:
        index = hold_out(rows, n / len(rows), seed)[1]
    return rows.take(index)
