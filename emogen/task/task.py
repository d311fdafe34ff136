"""A recipe -> the parts that it names, loaded: label set, prompt, rows and few-shot examples."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emogen import paths
from emogen.errors import InputError
from emogen.task.labels import NEUTRAL_TASK, LabelSet, load_label_set
from emogen.task.prompt import Example, Prompt, PromptError, load_prompt, make_examples, warnings_about
from emogen.task.recipe import Recipe
from emogen.task.rows import Problem, Rows, data_error
from emogen.task.splits import Splits, load_splits

EXAMPLES = "examples.jsonl"  # in a run folder


@dataclass(frozen=True)
class Task:
    """The parts that a recipe names, except for its rows.

    Raises:
        PromptError: the prompt asks for another style of answer than the recipe.
    """

    recipe: Recipe
    label_set: LabelSet
    prompt: Prompt
    examples: list[Example]

    def __post_init__(self) -> None:
        answer, path = self.recipe.answer, self.prompt.path
        if answer == "head" or self.prompt.style is None:
            return
        style, line = self.prompt.style
        if style != answer:
            raise PromptError(
                f"{path}:{line}: the template asks for `answer: {style}`, but the recipe has `answer: {answer}`; "
                f"set answer to {style}, or prompt to a template for {answer}"
            )


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
        The task, the rows, and the warnings about the rows and the prompt.

    Raises:
        InputError: a part is missing or invalid.
    """
    label_set = load_recipe_labels(recipe)
    prompt = load_prompt(recipe.find(recipe.prompt))
    splits, problems = load_splits(recipe, label_set)
    if splits is None:
        raise data_error(problems)
    task = make_task(recipe, label_set, prompt, splits.train, splits.examples)
    return task, splits, [*problems, *prompt_warnings(task)]


def make_task(recipe: Recipe, label_set: LabelSet, prompt: Prompt, train: Rows, examples: Rows) -> Task:
    """The task of some training rows: their order of labels, if the recipe asks for one, and few-shot examples."""
    if _needs_order(recipe, label_set):
        label_set = by_frequency(label_set, train.truth, rare_first=recipe.order == "rare_first")
    return Task(recipe, label_set, prompt, draw_examples(examples, label_set, recipe.answer))


def prompt_warnings(task: Task) -> list[Problem]:
    """Find what the model is not told by the prompt of a task. A head has no prompt.

    Raises:
        PromptError: the prompt cannot be rendered for the labels of the task.
    """
    recipe, prompt = task.recipe, task.prompt
    if recipe.answer == "head":
        return []
    warnings = warnings_about(prompt, task.label_set, task.examples, recipe.answer)
    if "task" in prompt.variables and not task.label_set.task:
        message = (
            f'no `task` sentence; the prompt says "{NEUTRAL_TASK}"; add a line such as '
            "`task: Name the aspects that a product review talks about.`"
        )
        warnings.append(Problem("warning", str(recipe.find(recipe.labels)), message))
    if "examples" in prompt.variables and not recipe.examples:
        message = (
            "shows {{ examples }}, but `examples` is 0, so there are none; set `examples: 4`, or choose another prompt"
        )
        warnings.append(Problem("warning", prompt.at("examples"), message))
    if recipe.examples and "examples" not in prompt.variables:
        message = f"`examples` is {recipe.examples}, but {prompt.path} shows none"
        warnings.append(Problem("warning", str(recipe.path), message))
    return warnings


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
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((str(row["text"]), label_set.sort(row["labels"])))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not an example: {error!r}; was the file changed?") from None
    return make_examples(rows, label_set, style)
