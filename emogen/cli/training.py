"""Commands before and during training: init, check, show, train, keys."""

import json
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from emogen import paths
from emogen.cli.shared import Overrides, RecipeArgument
from emogen.console import err, message, out
from emogen.errors import InputError

STARTER_FILES = {
    "recipe.yaml": "recipes/smollm2-135m.yaml",
    "prompt.jinja": "prompts/list.jinja",
    "labels.yaml": "prompts/labels/semeval2018.yaml",
    "train.csv": "sample/train.csv",
}


def init(folder: Annotated[Path, typer.Argument(help="The folder to create.")]) -> None:
    """Create a folder with a recipe, a prompt and labels to edit.

    The recipe of the new folder names the other three files. Replace the rows and the labels with your own, then run
    `emogen check FOLDER/recipe.yaml`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in STARTER_FILES.items():
        shutil.copyfile(paths.shipped(source), folder / name)
    recipe = folder / "recipe.yaml"
    _, _, body = recipe.read_text(encoding="utf-8").partition("\n")
    replacements = {
        "sample/train.csv": "train.csv",
        "labels: semeval2018": "labels: labels.yaml",
        "prompts/list.jinja": "prompt.jinja",
    }
    for old, new in replacements.items():
        assert body.count(old) == 1, f"{STARTER_FILES['recipe.yaml']} no longer contains {old!r} once"
        body = body.replace(old, new)
    recipe.write_text(f"# accelerate launch -m emogen.train {recipe}\n{body}", encoding="utf-8")
    out.print(f"{folder}: {', '.join(STARTER_FILES)}. Next: emogen check {shlex.quote(str(recipe))}", soft_wrap=True)


def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Report every problem of a recipe, its data and its prompt.

    No model is loaded. Errors exit with 2; warnings do not.
    """
    raise typer.Exit(2 if print_findings(out, recipe, overrides or []) else 0)


def print_findings(console: Console, recipe: str, overrides: Sequence[str]) -> bool:
    """Check a recipe and print the findings.

    Returns:
        Whether there are errors.
    """
    from emogen.training.check import check

    with console.status("Checking ..."):
        findings = check(recipe, overrides)
    for fact in findings.facts:
        console.print(message("ok      ", "green", fact), soft_wrap=True)
    for problem in findings.problems:
        color = "red" if problem.level == "error" else "yellow"
        console.print(message(f"{problem.level:<8}", color, str(problem)), soft_wrap=True)
    counts = Counter(problem.level for problem in findings.problems)
    said = ", ".join(f"{counts[level]} {level}{'' if counts[level] == 1 else 's'}" for level in ("error", "warning"))
    console.print(f"{recipe}: {said}", soft_wrap=True)
    return findings.failed


def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Number of rows.")] = 3,
    tokens: Annotated[bool, typer.Option("--tokens", help="Print one token per line, with its id.")] = False,
) -> None:
    """Print training rows exactly as the model sees them.

    The supervised tokens are green and between ⟦ ⟧.
    """
    from emogen.model.encode import load_encoder
    from emogen.task.recipe import load_recipe
    from emogen.task.task import load_task_with_rows
    from emogen.training.show import show_rows

    with err.status("Loading the tokenizer ..."):
        loaded = load_recipe(recipe, overrides or [])
        loaded.require_own_model("has no tokens to look at here")
        task, splits, _ = load_task_with_rows(loaded)
        if task.recipe.answer == "head":
            raise InputError(f"{recipe}: a head reads each text without a prompt; there is none to show")
        encoder = load_encoder(task)
    show_rows(out, encoder, splits.train.take(range(min(rows, len(splits.train)))), tokens=tokens)


def train(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Tune the model of a recipe, and score it.

    The same as accelerate launch emogen/train.py on one process.

    The result is a run folder: output_dir, or runs/<recipe name>. resume_from_checkpoint=true continues an interrupted
    run. `emogen keys` lists all keys.
    """
    from emogen import train

    train.main([recipe, *(overrides or [])])


def keys() -> None:
    """List the keys of a recipe: emogen's own and TRL's."""
    from emogen.task.recipe import Recipe
    from emogen.task.trl_fields import lm_fields, sft_fields
    from emogen.task.trl_keys import SETTLED

    for name, field in Recipe.model_fields.items():
        if not field.exclude:
            default = "required" if field.is_required() else json.dumps(field.default)
            out.print(Text.assemble((name, "bold"), f" = {default}\n    {field.description or ''}"))
    out.print(message("\nfrom TRL's ModelConfig:", "bold", ", ".join(lm_fields())))
    out.print(message("\nfrom TRL's SFTConfig:", "bold", ", ".join(n for n in sft_fields() if n not in SETTLED)))
