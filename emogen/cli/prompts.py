"""Commands for work on prompt templates: prompts show, prompts compare, lab."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live

from emogen.cli.shared import Overrides, RecipeArgument, runs_table, split_overrides
from emogen.console import err, message, out, progress_bar
from emogen.errors import InputError

app = typer.Typer(help="Show and compare prompt templates.", no_args_is_help=True)

TemplatesAndRecipe = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE TEMPLATE.jinja... [KEY=VALUE]...", help="A recipe, templates and overrides, in any order."
    ),
]
TunedOption = Annotated[Path | None, typer.Option(help="Use the adapter of this run folder, on its held-out rows.")]


@app.command("show")
def show(
    words: TemplatesAndRecipe,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Number of rows.")] = 1,
    tokens: Annotated[bool, typer.Option("--tokens", help="Print one token per line, with its id.")] = False,
) -> None:
    """Print the chats of templates, and how they differ.

    The shared instruction is dim; the supervised tokens are green and between ⟦ ⟧. Each further template is compared
    with the first one, as the model sees them.
    """
    from emogen.experiments.prompts import load_templates, open_benchmark
    from emogen.training.show import show_templates

    recipe, templates, overrides = _split_words(words)
    with err.status("Loading the tokenizer ..."):
        benchmark = open_benchmark(recipe, overrides, limit=max(rows, 200))  # as compare, to refuse the same templates
        benchmark.recipe.require_own_model("has no tokens to look at here")
        accepted, refused = load_templates(benchmark, templates)
    _report_refused(refused, accepted)
    shown = benchmark.rows.take(range(min(rows, len(benchmark.rows))))
    encoded = [(template.prompt.path, template.encoder) for template in accepted if template.encoder]
    show_templates(out, encoded, shown, tokens=tokens)


@app.command("compare")
def compare(
    words: TemplatesAndRecipe,
    limit: Annotated[int, typer.Option(min=10, help="Number of rows: a fixed stratified sample.")] = 200,
    tuned: TunedOption = None,
    train_steps: Annotated[
        int | None, typer.Option(min=1, help="Tune the model with each template for this many steps first.")
    ] = None,
    by: Annotated[str, typer.Option(help="How labels are decided: thresholds (nested) or answer.")] = "thresholds",
) -> None:
    """Score templates on the same rows.

    The model is used untuned, with the adapter of a run (--tuned), or after a short tuning with each template
    (--train-steps).

    "real": the 95 % interval of the difference to the best template excludes 0; "?" if there are too few rows for an
    interval. "tokens": those of the instruction, which all rows share, + the mean of the rest. "ln P": the mean
    log-likelihood of the true answers, which varies less than F1 on few rows.

    Scores are kept in runs/<recipe name>-prompts, where the lab finds them, too: a row is scored once with a template.
    A page there, grid.html, shows what each template answers for each row.
    """
    from emogen.evaluation.tables import print_notes
    from emogen.experiments.grid import write_grid
    from emogen.experiments.prompts import load_generator, load_templates, open_benchmark, tune_templates
    from emogen.experiments.scores import ranking_table, score_template

    if by not in ("thresholds", "answer"):
        raise typer.BadParameter(f"--by is thresholds or answer, not {by}")
    if tuned and train_steps:
        raise typer.BadParameter("--tuned and --train-steps exclude each other; give one of them")
    recipe, templates, overrides = _split_words(words)
    with err.status("Loading the tokenizer ..."):
        benchmark = open_benchmark(recipe, overrides, limit=limit, tuned=tuned)
        accepted, refused = load_templates(benchmark, templates)
    _report_refused(refused, accepted)
    if train_steps:
        with Live(console=err, refresh_per_second=2) as live:
            folders = tune_templates(benchmark, accepted, train_steps, show=lambda runs: live.update(runs_table(runs)))
    else:
        if not all(template.done for template in accepted):
            with err.status("Loading the model ..."):
                generator = load_generator(benchmark)
            for template in accepted:
                score_template(benchmark, template, generator, progress_bar)
        folders = [template.folder for template in accepted]
    table, notes = ranking_table(accepted, folders, by)
    out.print(table)
    print_notes(notes)
    decided = "nested thresholds" if by == "thresholds" else "answer"
    grid = write_grid(benchmark, [template.name for template in accepted], folders)
    out.print(f"{len(benchmark.rows):,} rows; labels decided by {decided}. Row by row: {grid}", soft_wrap=True)


def lab(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option(min=10, help="Number of rows to score on: a stratified sample.")] = 100,
    tuned: TunedOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 7860,
) -> None:
    """Open a local page to work on a prompt template.

    The page is served to this machine only, to whoever has the address that is printed, and sends nothing anywhere. It
    needs Gradio; without it, the command says
    how to install it.
    """
    from emogen.experiments.lab_page import serve
    from emogen.experiments.prompts import open_benchmark

    with err.status("Loading the tokenizer ..."):
        benchmark = open_benchmark(recipe, overrides or [], limit=limit, tuned=tuned)
        benchmark.recipe.require_own_model("has no tokens to look at here")
    with err.status("Loading the model ..."):
        page, address = serve(benchmark, port)
    out.print(f"emogen lab is at {address}\nStop it with Ctrl-C.", soft_wrap=True)
    page.block_thread()


def _split_words(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The words of a command -> recipe, templates, overrides."""
    named, overrides = split_overrides(words)
    templates = [word for word in named if word.endswith(".jinja")]
    recipes = [word for word in named if word.endswith((".yaml", ".yml"))]
    if unknown := [word for word in named if word not in templates and word not in recipes]:
        raise typer.BadParameter(f"{unknown[0]}: neither a recipe (.yaml), nor a template (.jinja), nor KEY=VALUE")
    if len(recipes) != 1 or not templates:
        raise typer.BadParameter("name one recipe (.yaml) and at least one template (.jinja)")
    return recipes[0], list(dict.fromkeys(templates)), overrides


def _report_refused(refused: Sequence[str], accepted: Sequence[Any]) -> None:
    for problem in refused:
        err.print(message("refused", "red", problem), soft_wrap=True)
    if not accepted:
        raise InputError("no valid template is left")
