"""Checks of a recipe that need no model: its keys, labels, prompt, data, and the lengths of its texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from emogen.accelerators import BF16_CAPABILITY, nvidia_gpus
from emogen.errors import InputError, ModelError
from emogen.model.encode import load_encoder
from emogen.model.sources import locate_tokenizer
from emogen.model.tokenizer import read_tokenizer
from emogen.task.labels import LabelSet
from emogen.task.prompt import Prompt, load_prompt
from emogen.task.recipe import Recipe, RecipeError, load_recipe
from emogen.task.rows import Problem, Rows
from emogen.task.splits import Splits, load_splits
from emogen.task.task import Task, draw_examples, load_recipe_labels, prompt_warnings


@dataclass
class Findings:
    """The result of a check.

    Attributes:
        recipe: the path of the recipe as the user gave it.
        problems: errors and warnings.
        facts: what was checked and is in order.
    """

    recipe: str
    problems: list[Problem] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether there are errors."""
        return any(problem.level == "error" for problem in self.problems)

    def error(self, message: str) -> None:
        """Add an error of the recipe."""
        self.problems.append(Problem("error", self.recipe, message))

    def warning(self, message: str) -> None:
        """Add a warning about the recipe."""
        self.problems.append(Problem("warning", self.recipe, message))


def check(path: str | Path, overrides: Sequence[str] = ()) -> Findings:
    """Check a recipe and all that it names, and collect every problem. Invalid input raises nothing."""
    findings = Findings(str(path))
    recipe = _check_keys(findings, path, overrides)
    if recipe is None:
        return findings
    label_set, prompt = _check_labels(findings, recipe), _check_prompt(findings, recipe)
    if label_set is None:
        return findings
    splits = _check_data(findings, recipe, label_set)
    if recipe.answer == "head":
        _check_head(findings, recipe, splits)
    elif prompt is not None:
        task = _check_task(findings, recipe, label_set, prompt, splits)
        if task is not None:
            _check_generation(findings, task, splits)
    return findings


def _check_keys(findings: Findings, path: str | Path, overrides: Sequence[str]) -> Recipe | None:
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        findings.problems += [_problem("error", line) for line in error.problems]
        return None
    findings.problems += [_problem("warning", line) for line in recipe.notices]
    _check_precision(findings, recipe)
    if recipe.trusts_code:
        findings.warning("trust_remote_code runs code from the model's repository on this machine")
    return recipe


def _check_precision(findings: Findings, recipe: Recipe) -> None:
    """Warn of a precision that the GPUs of this machine only emulate."""
    wants_bf16 = recipe.sft_args.get("bf16") or recipe.lm_args.get("dtype") == "bfloat16"
    for gpu in nvidia_gpus() if wants_bf16 else ():
        if gpu.capability < BF16_CAPABILITY:
            findings.warning(
                f"bf16: {gpu.name} (compute capability {gpu.capability}) only emulates it; add bf16=false fp16=true "
                "dtype=float16, as in recipes/t4.yaml"
            )
            return


def _problem(level: Literal["error", "warning"], line: str) -> Problem:
    """`file:line: message` -> a problem."""
    where, _, message = line.partition(": ")
    return Problem(level, where, message)


def _check_labels(findings: Findings, recipe: Recipe) -> LabelSet | None:
    try:
        label_set = load_recipe_labels(recipe)
    except InputError as error:
        findings.error(f"labels: {error}")
        return None
    findings.facts.append(f"labels: {len(label_set)} ({', '.join(label_set.names)})")
    return label_set


def _check_prompt(findings: Findings, recipe: Recipe) -> Prompt | None:
    try:
        return load_prompt(recipe.find(recipe.prompt))
    except InputError as error:
        findings.error(f"prompt: {error}")
        return None


def _check_data(findings: Findings, recipe: Recipe, label_set: LabelSet) -> Splits | None:
    splits, problems = load_splits(recipe, label_set)
    findings.problems += problems
    if splits is not None:
        held_out = "no evaluation rows" if splits.eval is None else f"{len(splits.eval):,} evaluation rows"
        findings.facts.append(f"data: {len(splits.train):,} training rows, {held_out}")
    return splits


def _check_task(
    findings: Findings, recipe: Recipe, label_set: LabelSet, prompt: Prompt, splits: Splits | None
) -> Task | None:
    """Check the prompt with the labels, the answer style and the examples of the recipe."""
    examples = [] if splits is None else draw_examples(splits.examples, label_set, recipe.answer)
    try:
        task = Task(recipe, label_set, prompt, examples)
        findings.problems += prompt_warnings(task)
    except InputError as error:
        findings.error(f"prompt: {error}")
        return None
    return task


def _check_generation(findings: Findings, task: Task, splits: Splits | None) -> None:
    """Check the encoded prompt, and the lengths of the texts within it."""
    recipe, prompt = task.recipe, task.prompt
    if recipe.api_base:
        findings.facts.append(f"prompt: {prompt.path}, for {recipe.api_model} at {recipe.api_base}, which is not asked")
        return
    try:
        encoder = load_encoder(task)
    except ModelError as error:
        findings.warning(f"lengths were not checked: {error}")
        return
    except InputError as error:
        findings.error(str(error))
        return
    if encoder.has_plain_template:
        findings.warning(f"{recipe.model_name} has no chat template: it is a base model, and gets a plain one")
    findings.facts.append(f"prompt: {prompt.path}, {len(encoder.prefix_ids)} tokens shared by all rows")
    for rows in _parts(splits):
        _warn_of_cuts(findings, recipe, rows, [max(r.n_cut for r in encoder.rows(text)) for text in rows.texts])


def _check_head(findings: Findings, recipe: Recipe, splits: Splits | None) -> None:
    """Check the lengths of the texts, which a classification head reads without a prompt."""
    try:
        location = locate_tokenizer(recipe.model_name, recipe.lm_args.get("model_revision", "main"))
        tokenizer = read_tokenizer(location, trust_remote_code=recipe.trusts_code)
    except ModelError as error:
        findings.warning(f"lengths were not checked: {error}")
        return
    findings.facts.append(f"head: {recipe.model_name} reads the text without a prompt")
    for rows in _parts(splits):
        _warn_of_cuts(findings, recipe, rows, tokenizer.encode_texts(rows.texts, recipe.max_length)["n_cut"])


def _parts(splits: Splits | None) -> list[Rows]:
    """The training rows and the evaluation rows, as far as there are any."""
    return [] if splits is None else [rows for rows in (splits.train, splits.eval) if rows is not None]


def _warn_of_cuts(findings: Findings, recipe: Recipe, rows: Rows, n_cut: Sequence[int]) -> None:
    """Warn of the texts that lose tokens, naming the lines of the first five.

    Args:
        n_cut: for each row the number of tokens that are cut off.
    """
    cut = [line for line, n in zip(rows.lines, n_cut, strict=True) if n]
    if cut:
        lines = ", ".join(map(str, cut[:5])) + (f" and {len(cut) - 5:,} more" if len(cut) > 5 else "")
        message = f"{len(cut):,} texts are shortened to fit max_length={recipe.max_length}"
        findings.problems.append(Problem("warning", f"{rows.path}:{lines}", message))
