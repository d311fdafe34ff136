"""The `emogen` command. Each command is thin: it calls one module and prints. Heavy imports stand inside functions."""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from emogen.errors import InputError, ModelError

app = typer.Typer(
    help="Tune an instruct model to name the labels of a text, and score what it generates.\n\n"
    "A first run: emogen check RECIPE, emogen show RECIPE, emogen train RECIPE, emogen predict RUN_DIR FILE -o OUT.csv",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe: a YAML file, such as recipes/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the recipe's keys, as in lora_r=8.")
]


@app.command(context_settings={"ignore_unknown_options": True})
def train(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Tune the model of a recipe. On one process, the same as accelerate launch emogen/train.py.

    Leaves a run folder (output_dir, runs/<recipe name> by default). resume_from_checkpoint=true goes on with a run that
    was interrupted. The keys: `emogen keys`.
    """
    from emogen import train

    train.main([recipe, *(overrides or [])])


@app.command()
def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Look for everything that is wrong with a recipe, its data, prompt and labels, without loading a model.

    Errors exit with 2; warnings do not.
    """
    from emogen.check import check

    with out.status("Checking ..."):
        findings = check(recipe, overrides or [])
    for fact in findings.facts:
        out.print(f"[green]ok[/]       {escape(fact)}", soft_wrap=True)
    for problem in findings.problems:
        colour = "red" if problem.level == "error" else "yellow"
        out.print(f"[{colour}]{problem.level:<8}[/] {escape(str(problem))}", soft_wrap=True)
    levels = [problem.level for problem in findings.problems]
    out.print(f"{recipe}: {levels.count('error')} errors, {levels.count('warning')} warnings")
    raise typer.Exit(2 if findings.failed else 0)


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows.")] = 3,
    tokens: Annotated[bool, typer.Option("--tokens", help="One token a line, with its id.")] = False,
) -> None:
    """Print training rows exactly as the model will see them; what is supervised is green and between ⟦ ⟧."""
    from emogen.recipe import load_recipe
    from emogen.show import show_rows
    from emogen.task import load_encoder, load_task

    with err.status("Loading the tokenizer ..."):
        task = load_task(load_recipe(recipe, overrides or []))
        encoder, _ = load_encoder(task)
    assert task.splits is not None
    show_rows(out, encoder, task.splits.train.take(range(min(rows, len(task.splits.train)))), tokens=tokens)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="A run folder; or a recipe, for its model without any tuning.")],
    input: Annotated[str, typer.Argument(help="A CSV, TSV, JSONL or Parquet file with texts.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV: ids and 0/1 columns, a submission.")
    ] = None,
    jsonl: Annotated[Path | None, typer.Option(help="JSONL: text, raw answer, how it was read, labels.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace output files that exist.")] = False,
) -> None:
    """Label the texts of a file."""
    from emogen import predict
    from emogen.data import checked, read_rows

    outputs = [path for path in (output, jsonl) if path is not None]
    if not outputs:
        raise typer.BadParameter("give -o OUT.csv, --jsonl OUT.jsonl, or both")
    for path in outputs:
        if path.exists() and not overwrite:
            raise typer.BadParameter(f"{path} exists; add --overwrite to replace it")
    with err.status("Loading the model ..."):
        loaded = predict.load_run(run, overrides or [])
    rows = checked(
        read_rows(
            input,
            loaded.label_set,
            text_column=loaded.recipe.text_column,
            id_column=loaded.recipe.id_column,
            separator=loaded.recipe.separator,
            encoding=loaded.recipe.encoding,
        )
    )
    with progress_bar("Predicting", len(rows) * len(loaded.encoder.question_ids)) as advance:
        predictions = predict.predict_texts(
            loaded.model,
            loaded.encoder,
            rows.texts,
            decode=loaded.recipe.decode,
            batch_size=batch_size,
            progress=advance,
        )
    if output:
        predict.write_csv(output, rows, predictions, loaded.label_set)
    if jsonl:
        predict.write_jsonl(jsonl, rows, predictions, loaded.label_set)
    audit = ", ".join(f"{name} {share:.1%}" for name, share in predict.parse_audit(predictions).items())
    err.print(f"{len(rows):,} texts -> {', '.join(map(str, outputs))}; answers: {audit}", highlight=False)
    if n_cut := sum(prediction.n_cut > 0 for prediction in predictions):
        err.print(f"{n_cut:,} texts were shortened to fit max_length={loaded.recipe.max_length}")


@app.command()
def score(
    gold: Annotated[str, typer.Argument(help="A file with the true labels.")],
    pred: Annotated[list[str], typer.Argument(help="One or more files with predicted labels, matched by id.")],
    labels: Annotated[str, typer.Option(help="The label set: a shipped one, or a YAML file.")] = "semeval2018",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Precision, recall and F1 for each label, macro- and micro-F1, Jaccard, exact match, Hamming loss.

    A label that no gold row has counts with an F1 of 0 in the macro average, and is named below the table.
    """
    from emogen.data import align, checked, read_rows
    from emogen.labels import load_label_set
    from emogen.score import footnote, score, table

    label_set = load_label_set(labels)
    gold_rows = checked(read_rows(gold, label_set, need_labels=True, need_text=False))
    systems = []
    for file in pred:
        rows = align(gold_rows, checked(read_rows(file, label_set, need_labels=True, need_text=False)))
        systems.append((file, score(gold_rows.truth, rows.truth, label_set.names)))
    if as_json:
        print(json.dumps(systems[0][1] if len(systems) == 1 else dict(systems), indent=2))
        return
    out.print(table([(Path(file).stem if len(systems) > 1 else "", metrics) for file, metrics in systems]))
    if note := footnote(systems[0][1]):
        out.print(note)


@app.command()
def keys() -> None:
    """List the keys of a recipe: emogen's own, and those of TRL that it takes."""
    from emogen.recipe import SETTLED, Recipe, field_types

    for name, field in Recipe.model_fields.items():
        if not field.exclude:
            default = "required" if field.is_required() else json.dumps(field.default)
            out.print(f"[bold]{name}[/] = {escape(default)}\n    {escape(field.description or '')}", highlight=False)
    sft, lm = field_types()
    out.print("\n[bold]of TRL's ModelConfig:[/] " + ", ".join(lm), highlight=False)
    out.print("\n[bold]of TRL's SFTConfig:[/] " + ", ".join(n for n in sft if n not in SETTLED), highlight=False)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar on standard error, with the rate; gives a function that moves it on."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="row", mininterval=0.5) as bar:
        yield bar.update


def set_up_logging() -> None:
    """emogen's messages to standard error, one line each; other libraries only from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)-8s %(message)s")
    logging.getLogger("emogen").setLevel(logging.INFO)
    # TRL 1.16 still sets it by its old name, in its own defaults.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
    # Says at every import that an optional kernel package is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def fail_clearly(command: Callable[[], Any]) -> None:
    """Run a command; what a user can mend becomes a message and an exit code, and no traceback.

    2: the input is wrong. 1: something outside gave way (a full disk, a model that cannot be fetched). 130: Ctrl-C.
    """
    set_up_logging()
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, ModelError, OSError) as error:
        err.print(f"[red]error[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2 if isinstance(error, InputError | FileNotFoundError) else 1)


def main() -> None:
    """The entry point of the `emogen` command."""
    fail_clearly(app)


if __name__ == "__main__":
    main()
