"""Commands for work on prompt templates: prompts show, prompts compare, prompts improve, lab."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from emogen.cli.shared import Overrides, RecipeArgument, runs_table, split_overrides
from emogen.console import err, message, out, progress_bar
from emogen.errors import InputError

if TYPE_CHECKING:
    from emogen.evaluation.metrics import Interval
    from emogen.experiments.improve import Improvement

SHOWN_CANDIDATES = 12

app = typer.Typer(help="Show, compare and improve prompt templates.", no_args_is_help=True)

TemplatesAndRecipe = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE TEMPLATE.jinja... [KEY=VALUE]...", help="A recipe, templates and overrides, in any order."
    ),
]
TemplateAndRecipe = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE TEMPLATE.jinja [KEY=VALUE]...", help="A recipe, a template and overrides, in any order."
    ),
]
ByOption = Annotated[str, typer.Option(help="How labels are decided: thresholds (nested) or answer.")]
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
    by: ByOption = "thresholds",
) -> None:
    """Score templates on the same rows.

    The model is used untuned, with the adapter of a run (--tuned), or after a short tuning with each template
    (--train-steps).

    "real": the 95 % interval of the difference to the best template excludes 0; "?" if there are too few rows, or
    too few answers that differ, for an interval. "tokens": those of the instruction, which all rows share, + the mean
    of the rest. "ln P": the mean log-likelihood of the true answers, which varies less than F1 on few rows.

    Scores are kept in runs/<recipe name>-prompts, where the lab finds them, too: a row is scored once with a template.
    A page there, grid.html, shows what each template answers for each row.
    """
    from emogen.evaluation.tables import print_notes
    from emogen.experiments.grid import write_grid
    from emogen.experiments.prompts import load_generator, load_templates, open_benchmark, tune_templates
    from emogen.experiments.scores import ranking_table, score_template
    from emogen.report.compare import decision_title

    _check_by(by)
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
    decided = decision_title(by, benchmark.task.label_set)
    grid = write_grid(benchmark, [template.name for template in accepted], folders)
    out.print(f"{len(benchmark.rows):,} rows; labels decided by {decided}. Row by row: {grid}", soft_wrap=True)


@app.command("improve")
def improve(
    words: TemplateAndRecipe,
    limit: Annotated[int, typer.Option(min=20, help="Number of rows of the search.")] = 200,
    unseen: Annotated[int, typer.Option(min=20, help="Number of rows of the final score, at most.")] = 1000,
    minutes: Annotated[float | None, typer.Option(min=0, help="End the search after this time.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="Use the adapter of this run folder.")] = None,
    rewriter: Annotated[
        str | None, typer.Option(help="A recipe with an endpoint (api_base) that proposes wordings.")
    ] = None,
    by: ByOption = "thresholds",
) -> None:
    """Search for a better wording of a template.

    It tries other wordings of the blocks that the template marks, and the keys order, examples and examples_by of the
    recipe, unless KEY=VALUE sets them. With an endpoint (api_base, or --rewriter), its model proposes wordings for rows
    that are wrong. Candidates are dropped on ever more rows of the training data (of half of the held-out rows of the
    run with --tuned), by "ln P", the log-likelihood of the true answer among all valid ones, and the last ones by
    macro-F1.

    The best one is scored once on rows that the search never saw. It is a new file: no template is changed.

    The same command continues an interrupted search. max_dollars=N limits what an endpoint may cost.
    """
    from emogen.experiments.improve import improve as search

    _check_by(by)
    recipe, templates, overrides = _split_words(words)
    if len(templates) > 1:
        raise typer.BadParameter("name one template to start from")
    found = search(
        recipe, templates[0], overrides, limit=limit, unseen=unseen, tuned=tuned, minutes=minutes, rewriter=rewriter,
        by=by, bar=progress_bar,
    )  # fmt: skip
    _print_improvement(found, recipe, overrides, tuned)


def _print_improvement(found: "Improvement", recipe: str, overrides: Sequence[str], tuned: Path | None) -> None:
    """Print what a search found: the candidates, the final score, and how to use the best one."""
    from emogen.evaluation.caveats import caveats, reference_line
    from emogen.evaluation.tables import print_notes
    from emogen.report.compare import with_interval
    from emogen.task.recipe import load_recipe

    tried = [candidate for candidate in found.tried if not candidate.refused]
    view = Table(box=None, pad_edge=False)
    view.add_column("candidate", overflow="fold")
    for heading in ("rows", f"{found.figure}, 95 %", "macro-F1, 95 %"):
        view.add_column(heading, justify="right")
    for candidate in tried[:SHOWN_CANDIDATES]:
        gain = "" if candidate.gain is None else with_interval(candidate.gain, candidate.gain_interval, "+z")
        system = candidate.system
        f1 = with_interval(system.metrics["f1_macro"], system.interval) if system else ""
        view.add_row(candidate.name, str(candidate.rows), gain, f1)
    out.print(view)
    n_refused = len(found.tried) - len(tried)
    refused = f", {n_refused} refused" if n_refused else ""
    out.print(
        f"{len(tried)} candidates{refused}; {found.n_rows:,} rows. {found.figure}: the difference to the template as "
        f"it is, on the rows that both were tried on. Kept in {found.folder}",
        soft_wrap=True,
    )
    if found.stopped:
        print_notes([f"The search was stopped: {found.stopped}"])
    if not found.unseen:
        out.print("Nothing better was found. The rows for the final score were not looked at.")
        return
    start, best = found.unseen
    n_rows = best.metrics["n"]
    out.print(f"\nThe best one is: {found.best}. On {n_rows:,} rows that the search never saw:", soft_wrap=True)
    for title, system in (("as it is", start), ("best", best)):
        out.print(f"  {title:<10} macro-F1 {with_interval(system.metrics['f1_macro'], system.interval)}")
    difference = with_interval(best.difference, best.difference_interval, "+z")
    out.print(f"  difference {difference}: {_verdict(best.difference_interval)}")
    out.print(reference_line(best.metrics), soft_wrap=True)
    print_notes(caveats([("as it is", start.metrics), ("best", best.metrics)]))
    if found.n_looks > 1:
        print_notes([f"{found.n_looks} prompts were scored on these rows so far; the best of them looks too good."])
    command = ["train", recipe]
    if not tuned and load_recipe(recipe, overrides).api_base:
        command = ["predict", recipe, "YOUR.csv", "-o", "OUT.csv"]
    command += [f"prompt={found.template}", *overrides, *found.overrides]
    out.print(f"Next: {shlex.join(['emogen', *command])}", soft_wrap=True)


def _verdict(difference: "Interval") -> str:
    """What the 95 % interval of a difference says."""
    if difference is None:
        return "too few rows, or too few answers that differ, to tell it from chance"
    low, high = difference
    return "better" if low > 0 else "worse" if high < 0 else "it may be chance"


def _check_by(by: str) -> None:
    if by not in ("thresholds", "answer"):
        raise typer.BadParameter(f"--by is thresholds or answer, not {by}")


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
