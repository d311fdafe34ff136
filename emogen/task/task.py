"""A recipe -> the parts that it names, loaded: label set, prompt, rows and few-shot examples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emogen import paths
from emogen.errors import InputError
from emogen.task.labels import LabelSet, load_label_set
from emogen.task.prompt import Example, Prompt, load_prompt, make_examples
from emogen.task.recipe import Recipe
from emogen.task.rows import Problem, Rows, data_error
from emogen.task.splits import Splits, load_splits

EXAMPLES = "examples.jsonl"  # in a run folder


@dataclass(frozen=True)
class Task:
    """The parts that a recipe names, except for its rows."""

    recipe: Recipe
    label_set: LabelSet
    prompt: Prompt
    examples: list[Example]


def load_task(recipe: Recipe) -> Task:
    """Load the parts of a recipe for prediction.

    A run folder contains its few-shot examples and its label order. For any other recipe they are taken from the
    training rows, which are read only if they are needed.

    Raises:
        InputError: a part is missing or invalid.
    """
    label_set = load_recipe_labels(recipe)
    kept = recipe.path.parent / EXAMPLES
    if _needs_order(recipe, label_set) or (recipe.examples and not kept.is_file()):
        task, _, _ = load_task_with_rows(recipe)
        label_set, examples = task.label_set, task.examples
    else:
        examples = []
    if kept.is_file():
        examples = _read_examples(kept, label_set, recipe.answer)
    return Task(recipe, label_set, load_prompt(recipe.find(recipe.prompt)), examples)


def load_task_with_rows(recipe: Recipe) -> tuple[Task, Splits, list[Problem]]:
    """Load the parts of a recipe and its rows for training.

    Returns:
        The task, the rows, and the warnings about the rows.

    Raises:
        InputError: a part is missing or invalid.
    """
    label_set = load_recipe_labels(recipe)
    prompt = load_prompt(recipe.find(recipe.prompt))
    splits, problems = load_splits(recipe, label_set)
    if splits is None:
        raise data_error(problems)
    if _needs_order(recipe, label_set):
        label_set = by_frequency(label_set, splits.train.truth, rare_first=recipe.order == "rare_first")
    examples = draw_examples(splits.examples, label_set, recipe.answer)
    return Task(recipe, label_set, prompt, examples), splits, problems


def load_recipe_labels(recipe: Recipe) -> LabelSet:
    """The label set of a recipe.

    Raises:
        InputError: there is no valid label set of that name, or it does not fit the answer style.
    """
    label_set = load_label_set(recipe.find(recipe.labels))
    if label_set.exactly_one and recipe.answer == "count":
        raise InputError(
            f"{recipe.labels}: `exactly_one` does not go with `answer: count`: every count would be 1; use answer: list"
        )
    return label_set


def _needs_order(recipe: Recipe, label_set: LabelSet) -> bool:
    """Whether the label order depends on the training rows."""
    return recipe.order != "canonical" and not label_set.order


def by_frequency(label_set: LabelSet, gold: np.ndarray, *, rare_first: bool) -> LabelSet:
    """The label set, ordered by the number of rows with each label. Ties keep the canonical order.

    Args:
        gold: int8 [n, L].
        rare_first: ascending order, instead of descending.
    """
    count = gold.sum(axis=0) * (1 if rare_first else -1)
    order = [label_set.names[i] for i in np.argsort(count, kind="stable")]
    return LabelSet.model_validate(label_set.model_dump() | {"order": order})


def draw_examples(rows: Rows, label_set: LabelSet, style: str) -> list[Example]:
    """Few-shot examples from labelled rows."""
    named = [(text, label_set.names_of(vector)) for text, vector in zip(rows.texts, rows.truth, strict=True)]
    return make_examples(named, label_set, style)


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Write few-shot examples to a run folder, so that prediction uses the prompt of the training."""
    with paths.writing(folder / EXAMPLES) as file:
        for example in examples:
            file.write(json.dumps({"text": example.text, "labels": example.labels}, ensure_ascii=False) + "\n")


def _read_examples(path: Path, label_set: LabelSet, style: str) -> list[Example]:
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    return make_examples([(row["text"], label_set.sort(row["labels"])) for row in rows], label_set, style)
