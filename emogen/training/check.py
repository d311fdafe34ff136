"""Everything that can be said about a recipe before a model is loaded: recipe, labels, prompt, data, lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emogen.errors import InputError, ModelError
from emogen.model.encode import load_encoder
from emogen.model.sources import locate
from emogen.model.tokenizer import encode_texts, load_tokenizer
from emogen.task.labels import load_label_set
from emogen.task.prompt import load_prompt, render
from emogen.task.recipe import Recipe, RecipeError, load_recipe
from emogen.task.rows import Problem, Rows
from emogen.task.splits import load_splits
from emogen.task.task import Task, draw_examples


@dataclass
class Findings:
    """What a check found: problems, and what was looked at and is well."""

    problems: list[Problem] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(problem.level == "error" for problem in self.problems)

    def error(self, where: str, message: str) -> None:
        self.problems.append(Problem("error", where, message))

    def warning(self, where: str, message: str) -> None:
        self.problems.append(Problem("warning", where, message))


def check(path: str | Path, overrides: Sequence[str] = ()) -> Findings:
    """Look at all of a recipe and collect every problem; never raises for what a user can get wrong."""
    findings = Findings()
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        for line in error.problems:
            findings.error(*_split(line))
        return findings
    for notice in recipe.notices:
        findings.warning(*_split(notice))
    if recipe.trusts_code:
        findings.warning(str(path), "trust_remote_code runs the model repository's own code on this machine")

    label_set = prompt = None
    try:
        label_set = load_label_set(recipe.find(recipe.labels))
        findings.facts.append(f"labels: {len(label_set)} ({', '.join(label_set.names)})")
    except InputError as error:
        findings.error(str(path), f"labels: {error}")
    try:
        prompt = load_prompt(recipe.find(recipe.prompt))
    except InputError as error:
        findings.error(str(path), f"prompt: {error}")
    if label_set is None:
        return findings
    splits, problems = load_splits(recipe, label_set)
    findings.problems += problems
    if splits is not None:
        held = f", {len(splits.eval):,} to score on" if splits.eval is not None else ", none to score on"
        findings.facts.append(f"data: {len(splits.train):,} rows to learn from{held}")
    parts = [] if splits is None else [rows for rows in (splits.train, splits.eval) if rows is not None]
    if recipe.answer == "head":
        _check_head(findings, recipe, parts)
        return findings
    if prompt is None:
        return findings

    examples = [] if splits is None else draw_examples(splits.examples, label_set, recipe.answer)
    asked = label_set.labels[0] if recipe.answer == "yes_no" else None
    try:
        render(prompt, label_set, examples, asked)
    except InputError as error:
        findings.error(str(path), f"prompt: {error}")
        return findings
    if "examples" in prompt.variables and not recipe.examples:
        findings.warning(str(path), f"{prompt.path} shows examples, but `examples` is 0")
    if recipe.examples and "examples" not in prompt.variables:
        findings.warning(str(path), f"`examples` is {recipe.examples}, but {prompt.path} shows none")

    try:
        encoder, plain = load_encoder(Task(recipe, label_set, prompt, examples))
    except ModelError as error:
        findings.warning(str(path), f"lengths were not checked: {error}")
        return findings
    except InputError as error:
        findings.error(str(path), str(error))
        return findings
    if plain:
        findings.warning(
            str(path), f"{recipe.model_name} has no chat template: it is a base model, and gets a plain one"
        )
    findings.facts.append(f"prompt: {prompt.path}, {len(encoder.prefix_ids)} tokens shared by all rows")
    for rows in parts:
        _warn_of_cuts(findings, recipe, rows, [max(r.n_cut for r in encoder.rows(text)) for text in rows.texts])
    return findings


def _check_head(findings: Findings, recipe: Recipe, parts: Sequence[Rows]) -> None:
    """What is left to look at where no answer is generated: how long the texts are."""
    try:
        location = locate(recipe.model_name, recipe.lm_config().model_revision)
        tokenizer = load_tokenizer(location, trust_remote_code=recipe.trusts_code)
    except ModelError as error:
        findings.warning(str(recipe.path), f"lengths were not checked: {error}")
        return
    findings.facts.append(f"head: {recipe.model_name} reads the text alone, and no prompt")
    for rows in parts:
        _warn_of_cuts(findings, recipe, rows, encode_texts(tokenizer, rows.texts, recipe.max_length)["n_cut"])


def _warn_of_cuts(findings: Findings, recipe: Recipe, rows: Rows, n_cut: Sequence[int]) -> None:
    cut = [line for line, n in zip(rows.lines, n_cut, strict=True) if n]
    if cut:
        shown = ", ".join(map(str, cut[:5])) + (f" and {len(cut) - 5:,} more" if len(cut) > 5 else "")
        message = f"{len(cut):,} texts are shortened to fit max_length={recipe.max_length}"
        findings.warning(f"{rows.path}:{shown}", message)


def _split(line: str) -> tuple[str, str]:
    where, _, message = line.partition(": ")
    return where, message
