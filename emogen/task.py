"""A recipe -> what it names, loaded: label set, prompt, rows, few-shot examples; with the tokenizer, the encoder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emogen import paths
from emogen.data import Problem, Rows, Splits, errors_of, load_splits
from emogen.labels import LabelSet, load_label_set
from emogen.prompt import Example, Prompt, load_prompt, make_examples
from emogen.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from emogen.encode import Encoder

EXAMPLES = "examples.jsonl"  # in a run folder


@dataclass(frozen=True)
class Task:
    """What a recipe names. `splits` is None where the rows were not wanted; `warnings` are about the rows."""

    recipe: Recipe
    label_set: LabelSet
    prompt: Prompt
    examples: list[Example]
    splits: Splits | None
    warnings: list[Problem]


def load_task(recipe: Recipe, *, with_rows: bool = True) -> Task:
    """Load label set, prompt and rows.

    The recipe of a run folder brings its own few-shot examples; for another one they are drawn from the training rows.

    Raises:
        InputError: what is missing or wrong, and where.
    """
    label_set = load_label_set(recipe.find(recipe.labels))
    prompt = load_prompt(recipe.find(recipe.prompt))
    kept = recipe.path.parent / EXAMPLES
    splits: Splits | None = None
    problems: list[Problem] = []
    ordered = recipe.order == "canonical" or bool(label_set.order)
    if with_rows or not ordered or (recipe.examples and not kept.is_file()):
        splits, problems = load_splits(recipe, label_set)
        if splits is None:
            raise errors_of(problems)
        if not ordered:
            label_set = by_frequency(label_set, splits.train.truth, rare_first=recipe.order == "rare_first")
    if kept.is_file() and not with_rows:
        examples = _read_examples(kept, label_set, recipe.answer)
    else:
        examples = draw_examples(splits.examples, label_set, recipe.answer) if splits else []
    return Task(recipe, label_set, prompt, examples, splits if with_rows else None, problems)


def load_encoder(task: Task, location: str | None = None) -> tuple["Encoder", bool]:
    """The encoder of a task, and whether the model is a base model that was given the plain chat template.

    Args:
        location: where to load the tokenizer from, if not from the recipe's model.

    Raises:
        InputError: prompt, label set and `max_length` do not go together.
        ModelError: the tokenizer cannot be had.
    """
    tokenizer, plain = load_tokenizer(task.recipe, location)
    return encoder_of(task, tokenizer), plain


def load_tokenizer(recipe: Recipe, location: str | None = None) -> tuple["PreTrainedTokenizerBase", bool]:
    """The tokenizer of a recipe with a chat template, and whether that is the plain one; see `load_encoder`."""
    from emogen import modeling
    from emogen.encode import ensure_chat_template

    revision = recipe.lm_args.get("model_revision", "main")
    tokenizer = modeling.load_tokenizer(
        location or modeling.locate(recipe.model_name, revision),
        revision=revision,
        trust_remote_code=recipe.trusts_code,
    )
    return tokenizer, ensure_chat_template(tokenizer)


def encoder_of(task: Task, tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
    """The encoder of a task whose tokenizer is loaded; see `load_encoder`."""
    from emogen.encode import make_encoder

    recipe = task.recipe
    return make_encoder(tokenizer, task.prompt, task.label_set, recipe.answer, task.examples, recipe.max_length)


def by_frequency(label_set: LabelSet, gold: np.ndarray, *, rare_first: bool) -> LabelSet:
    """The label set with its order by how many rows of `gold` [n, L] have each label; equal ones stay as they were."""
    count = gold.sum(axis=0) * (1 if rare_first else -1)
    order = [label_set.names[i] for i in np.argsort(count, kind="stable")]
    return LabelSet.model_validate(label_set.model_dump() | {"order": order})


def draw_examples(rows: Rows, label_set: LabelSet, style: str) -> list[Example]:
    """Labelled rows -> few-shot examples."""
    named = [(text, label_set.names_of(vector)) for text, vector in zip(rows.texts, rows.truth, strict=True)]
    return make_examples(named, label_set, style)


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Keep a run's few-shot examples, so that prediction sees the prompt that was trained with."""
    with paths.writing(folder / EXAMPLES) as file:
        for example in examples:
            file.write(json.dumps({"text": example.text, "labels": example.labels}, ensure_ascii=False) + "\n")


def _read_examples(path: Path, label_set: LabelSet, style: str) -> list[Example]:
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    return make_examples([(row["text"], label_set.sort(row["labels"])) for row in rows], label_set, style)
