"""What several commands share: arguments, and the tables that show runs in progress."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

if TYPE_CHECKING:
    from emogen.experiments.jobs import RunProcess

RecipeArgument = Annotated[str, typer.Argument(help="A recipe: a YAML file, such as recipes/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe keys, such as lora_r=8.")
]
RunsArgument = Annotated[
    list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs, cross-validations or baselines.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
# Commands whose overrides may begin with a dash, as in `learning_rate=-1`, pass on what they do not know.
PASSES_OVERRIDES: dict[str, Any] = {"ignore_unknown_options": True}


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of a command line -> (paths, overrides).

    A word that begins with a key and an equals sign (`lora_r=8`) is an override. Every other word is a path; a path
    with such a name is written with its folder (`./a=1.csv`).

    Raises:
        typer.BadParameter: a word is both an override and the name of an existing file.
    """
    overrides = [word for word in words if re.match(r"[A-Za-z_]\w*=", word)]
    for word in overrides:
        if Path(word).exists():
            raise typer.BadParameter(f"{word} is a file and also reads as KEY=VALUE; write ./{word} to name the file")
    return [word for word in words if word not in overrides], overrides


def runs_table(runs: "Sequence[RunProcess]") -> Table:
    """The progress of several runs, one line each."""
    view = Table("run", "", "step", "loss", "macro-F1", box=None, pad_edge=False)
    for run in runs:
        logged = run.last_logged()
        state = "done" if run.done else "running" if run.process else "waiting"
        if run.process and logged.get("step", 0) == logged.get("max_steps"):
            state = "scoring"
        steps = f"{logged['step']:,} of {logged['max_steps']:,}" if logged else ""
        values = [f"{logged[key]:.3f}" if key in logged else "" for key in ("loss", "eval_f1_macro")]
        view.add_row(run.folder.name, state, steps, *values)
    return view
