"""The entry point of the `emogen` command: it assembles the commands of the other files."""

from typing import Annotated

import typer

from emogen.cli import (
    cloud,
    curation,
    evaluation,
    experiments,
    exporting,
    prediction,
    prompts,
    serving,
    shared,
    training,
)
from emogen.console import out, run_command
from emogen.distribution import __version__

app = typer.Typer(
    help="Tune an instruct model to generate the labels of a text, and score it.\n\n"
    "First steps: emogen init FOLDER, emogen check RECIPE, emogen show RECIPE, emogen train RECIPE, "
    "emogen predict RUN_DIR FILE -o OUT.csv",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"emogen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


app.command()(training.init)
app.command()(training.check)
app.command()(training.show)
app.command(context_settings=shared.PASSES_OVERRIDES)(training.train)
app.command()(prediction.predict)
app.command(context_settings=shared.PASSES_OVERRIDES)(serving.serve)
app.command()(exporting.export)
app.command()(exporting.push)
app.command()(evaluation.score)
app.command()(evaluation.report)
app.command(context_settings=shared.PASSES_OVERRIDES)(experiments.cv)
app.command(context_settings=shared.PASSES_OVERRIDES)(experiments.baseline)
app.command(context_settings=shared.PASSES_OVERRIDES)(experiments.sweep)
app.command()(evaluation.compare)
app.command()(curation.audit)
app.command()(curation.select)
app.add_typer(prompts.app, name="prompts")
app.command()(prompts.lab)
app.command()(cloud.plan)
app.add_typer(cloud.app, name="pod")
app.command()(training.keys)


def main() -> None:
    """Run the command line, with exit codes as `run_command` says."""
    run_command(app)


if __name__ == "__main__":
    main()
