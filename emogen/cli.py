"""The `emogen` command. Each command is thin: it calls one module and prints. Heavy imports stand inside functions."""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emogen import ranks
from emogen.errors import InputError, ModelError

if TYPE_CHECKING:
    import optuna

    from emogen.crossval import Fold
    from emogen.plan import Plan

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
    raise typer.Exit(2 if _check_fails(out, recipe, overrides or []) else 0)


def _check_fails(console: Console, recipe: str, overrides: Sequence[str]) -> bool:
    """Check a recipe, print what was found, and tell whether there are errors."""
    from emogen.check import check

    with console.status("Checking ..."):
        findings = check(recipe, overrides)
    for fact in findings.facts:
        console.print(f"[green]ok[/]       {escape(fact)}", soft_wrap=True)
    for problem in findings.problems:
        colour = "red" if problem.level == "error" else "yellow"
        console.print(f"[{colour}]{problem.level:<8}[/] {escape(str(problem))}", soft_wrap=True)
    levels = [problem.level for problem in findings.problems]
    console.print(f"{recipe}: {levels.count('error')} errors, {levels.count('warning')} warnings")
    return findings.failed


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Work out what a run takes before paying for it: GPU memory by its parts, hours and dollars on each GPU type.

    Prices are today's if there is a key for Runpod, and remembered ones otherwise. Memory and hours are estimates; a
    finished run of the same model beside this one's output_dir is a measurement, and used as such.
    """
    from emogen.plan import plan
    from emogen.pods import open_api, quotes, read_keys

    keys, live = read_keys(), None
    with err.status("Counting tokens ..."):
        if "RUNPOD_API_KEY" in keys:
            try:
                with open_api(keys) as api:
                    live = quotes(api)
            except ModelError as error:
                err.print(f"[yellow]no live prices[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        planned = plan(recipe, overrides or [], live)
    if as_json:
        print(json.dumps(planned.as_json(), indent=2))
    else:
        show_plan(out, planned)


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
        if task.recipe.answer == "head":
            raise InputError(f"{recipe}: a head reads each text as it stands; there is no prompt to show")
        encoder, _ = load_encoder(task)
    assert task.splits is not None
    show_rows(out, encoder, task.splits.train.take(range(min(rows, len(task.splits.train)))), tokens=tokens)


@app.command()
def predict(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_DIR... FILE [KEY=VALUE]...",
            help="Run folders, and last a CSV, TSV, JSONL or Parquet file with texts.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV: ids and 0/1 columns, a submission.")
    ] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="JSONL: text, raw answer, how it was read, labels, probabilities.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace output files that exist.")] = False,
    engine: Annotated[
        str, typer.Option(help="here; or ray: FILE is Parquet, or a folder of it, -o a folder, on a Ray cluster.")
    ] = "here",
) -> None:
    """Label the texts of a file, with one run or with several together.

    A recipe stands for its model without any tuning; the folder of a cross-validation for all its folds; that of a
    baseline for one that is fitted to all of its rows. Several models' answers are put to the vote; with
    predict_by=thresholds, which takes the labels that are more probable than the threshold tuned for them, their
    probabilities are averaged; with predict_by=stack they are weighed by what the runs said of rows that none of them
    had learnt.

    The file can be of any size: it is read, labelled and written a chunk at a time. Interrupted, the same command goes
    on. Over several processes: accelerate launch -m emogen.cli predict ...
    """
    from emogen.predict import predict_file

    outputs = [path for path in (output, jsonl) if path is not None]
    if not outputs:
        raise typer.BadParameter("give -o OUT.csv, --jsonl OUT.jsonl, or both")
    for path in outputs:
        if path.exists() and not overwrite:
            raise typer.BadParameter(f"{path} exists; add --overwrite to replace it")
    overrides = [word for word in files if "=" in word and not Path(word).exists()]
    *runs, input = [Path(word) for word in files if word not in overrides]
    if not runs:
        raise typer.BadParameter("name a run folder (or a recipe), and then a file of texts")
    if engine not in ("here", "ray"):
        raise typer.BadParameter(f"--engine is here or ray, not {engine}")
    if engine == "ray":
        from emogen.fleet import predict_on_ray

        if output is None or jsonl:
            raise typer.BadParameter("--engine ray writes Parquet: give -o FOLDER, and no --jsonl")
        n_rows = predict_on_ray(runs, input, output, overrides, batch_size=batch_size)
        err.print(f"{n_rows:,} texts -> {output}", highlight=False)
        return
    done = predict_file(
        runs, input, overrides,
        csv_file=output, jsonl_file=jsonl, batch_size=batch_size, overwrite=overwrite, bar=progress_bar,
    )  # fmt: skip
    if not ranks.is_main():
        return
    err.print(f"{done.n_rows:,} texts -> {', '.join(map(str, outputs))}", highlight=False)
    if n_read := done.statuses.total():
        shares = ", ".join(f"{status} {count / n_read:.1%}" for status, count in done.statuses.most_common())
        err.print(f"{n_read:,} answers: {shares}", highlight=False)
    if done.n_cut:
        err.print(f"{done.n_cut:,} texts were shortened to fit max_length")


@app.command(context_settings={"ignore_unknown_options": True})
def cv(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    folds: Annotated[int, typer.Option(min=2, help="How many folds; 5 and 10 are usual.")] = 5,
    jobs: Annotated[
        int, typer.Option(min=1, help="Folds at once; each has a GPU, or its part of the cores, for itself.")
    ] = 1,
    pods: Annotated[
        bool, typer.Option("--pods", help="Each fold on a rented GPU, with the limits of emogen pod launch.")
    ] = False,
) -> None:
    """Cross-validate a recipe: train it on all folds but one, in turn, and score what it says of the one left out.

    The folds are stratified over the labels, and the same text is never in two of them. Leaves a folder,
    runs/<recipe name>-cv: a run for each fold, one file with the prediction for every row by the model that had not
    seen it, and thresholds. `emogen predict` takes it as an ensemble. Interrupted, the same command goes on. With
    --pods each fold is an `emogen pod launch --follow`: its log is beside its folder, and its pod ends with it.
    """
    from rich.live import Live

    from emogen.crossval import HERE, POD, cross_validate

    with Live(console=err, refresh_per_second=2) as live:
        folder, metrics = cross_validate(
            recipe, folds, overrides or [], jobs=jobs, on=POD if pods else HERE,
            show=lambda runs: live.update(_progress_of(runs)),
        )  # fmt: skip
    show_metrics(metrics)
    show_spread(metrics)
    out.print(f"The folds are in {folder}. Next: emogen predict {folder} YOUR.csv -o OUT.csv predict_by=thresholds")


@app.command(context_settings={"ignore_unknown_options": True})
def baseline(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    folds: Annotated[int, typer.Option(min=2, help="How many folds, as for cv.")] = 5,
) -> None:
    """Cross-validate TF-IDF with logistic regression on a recipe's rows, in the same folds as cv: what is to be beaten.

    Leaves a folder, runs/<recipe name>-baseline, that `emogen compare` takes, and `emogen predict`: alone, or beside
    other runs, which gain from it with predict_by=stack.
    """
    from emogen.baseline import cross_validate_baseline

    with progress_bar("Folds", folds, "fold") as advance:
        folder, metrics = cross_validate_baseline(recipe, folds, overrides or [], advance)
    show_metrics(metrics)
    show_spread(metrics)
    out.print(f"Its predictions are in {folder}. Next: emogen compare {folder} RUN_DIR")


@app.command(context_settings={"ignore_unknown_options": True})
def sweep(
    recipe: RecipeArgument,
    space: Annotated[
        str, typer.Argument(help="YAML: for each key a list of values, or {low: 1e-4, high: 1e-3, log: true}.")
    ],
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option(min=1, help="How many combinations, those of earlier calls included.")] = 20,
    metric: Annotated[
        str, typer.Option(help="What is to be large, of metrics.json: f1_macro, by_thresholds.f1_macro ...")
    ] = "f1_macro",
    seed_with: Annotated[
        list[Path] | None, typer.Option("--from", help="Runs whose figures the search begins with.")
    ] = None,
) -> None:
    """Search over the keys of a recipe: each combination is a run, and what does badly is stopped early.

    The same command goes on with a search that was interrupted. The best run is the best on the rows that it was chosen
    by: cross-validate its recipe for a figure to believe.
    """
    from rich.live import Live

    from emogen.sweep import sweep as search

    with Live(console=err, refresh_per_second=2) as live:
        study = search(
            recipe, space, overrides or [], n_trials=trials, metric=metric, seeds=seed_with or [],
            show=lambda study, run: live.update(_progress_of_sweep(study, run)),
        )  # fmt: skip
    out.print(_progress_of_sweep(study, None))
    best = " ".join(f"{key}={value}" for key, value in study.best_params.items())
    out.print(f"The best: {metric} {study.best_value:.3f} with {best}", highlight=False)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, cross-validations or baselines.")],
    by: Annotated[
        str, typer.Option(help="What decides the labels: thresholds, stack (both nested) or answer.")
    ] = "thresholds",
    ensemble: Annotated[bool, typer.Option("--ensemble", help="Add all of them together.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Add what others report on SemEval-2018 E-c.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Draw them: an .svg, .png or .pdf file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Runs against each other on the rows that all of them were scored on, with paired bootstrap intervals.

    Differences are to the first run. "Not better" is the share of resamples in which a run does not beat it.
    """
    from dataclasses import asdict

    from emogen.compare import compare, label_set_of, rows_of, tables

    if figure and figure.suffix not in (".svg", ".png", ".pdf"):
        raise typer.BadParameter(f"--figure {figure}: the name of an .svg, .png or .pdf file is needed")
    titles = {"answer": "answer", "thresholds": "nested thresholds", "stack": "nested stacks and thresholds"}
    if by not in titles:
        raise typer.BadParameter(f"--by is one of {', '.join(titles)}, not {by}")
    systems = compare(runs, label_set_of(runs[0]), by=by, ensemble=ensemble)
    if figure:
        from emogen.figures import draw_comparison, save

        save(draw_comparison(rows_of(systems, with_published=published)), figure)
    if as_json:
        print(json.dumps([asdict(system) for system in systems], indent=2))
        return
    out.print(f"{systems[0].metrics['n']:,} rows; labels by {titles[by]}")
    for table in tables(systems, with_published=published):
        out.print(table)
        out.print()
    if published:
        out.print("Published figures are their authors', on rows of their own; see published_results.yaml for sources.")


prompts = typer.Typer(help="Look at prompt templates, and hold them against each other.", no_args_is_help=True)
app.add_typer(prompts, name="prompts", rich_help_panel=None)

TemplatesAndRecipe = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE TEMPLATE.jinja... [KEY=VALUE]...", help="A recipe, templates, and overrides, in any order."
    ),
]


@prompts.command("show")
def prompts_show(
    files: TemplatesAndRecipe,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows.")] = 1,
    tokens: Annotated[bool, typer.Option("--tokens", help="One token a line, with its id.")] = False,
) -> None:
    """Print the chat that templates make of some rows of a recipe, their tokens, and how they differ.

    The shared instruction is dim; what is supervised is green and between ⟦ ⟧. Of several templates the differences to
    the first one are shown as the model sees them.
    """
    from emogen.show import show_templates
    from emogen.templates import load_templates, open_bench

    recipe, templates, overrides = _sorted_out(files)
    with err.status("Loading the tokenizer ..."):
        bench = open_bench(recipe, overrides, limit=max(rows, 200))  # what compare refuses is refused
        good, refused = load_templates(bench, templates)
    _refuse(refused, good)
    shown = bench.rows.take(range(min(rows, len(bench.rows))))
    show_templates(out, [(of.prompt.path, of.encoder) for of in good], shown, tokens=tokens)


@prompts.command("compare")
def prompts_compare(
    files: TemplatesAndRecipe,
    limit: Annotated[int, typer.Option(min=10, help="How many rows: a stratified sample, always the same.")] = 200,
    tuned: Annotated[
        Path | None, typer.Option(help="A run folder: with its adapter, on rows that it held out.")
    ] = None,
    train_steps: Annotated[
        int | None, typer.Option(min=1, help="Tune with each template for so many steps first.")
    ] = None,
    by: Annotated[str, typer.Option(help="What decides the labels: thresholds (nested) or answer.")] = "thresholds",
) -> None:
    """Score templates on the same rows: macro-F1, which differences are real, likelihood, tokens, speed.

    Without training, or with the adapter of a run (--tuned), or after a short tuning of each (--train-steps). "ln P" is
    the mean log-likelihood of the true answers, which is steadier than F1 on few rows. "real": the 95 % interval of the
    difference to the best leaves out 0. What has been computed is kept, in runs/<recipe name>-prompts, and not computed
    again.
    """
    from rich.live import Live

    from emogen.templates import (
        load_generator,
        load_templates,
        open_bench,
        ranking_table,
        score_template,
        tune_templates,
    )

    if by not in ("thresholds", "answer"):
        raise typer.BadParameter(f"--by is thresholds or answer, not {by}")
    if tuned and train_steps:
        raise typer.BadParameter("--tuned takes a run as it is, and --train-steps makes one: give one or the other")
    recipe, templates, overrides = _sorted_out(files)
    with err.status("Loading the tokenizer ..."):
        bench = open_bench(recipe, overrides, limit=limit, tuned=tuned)
        good, refused = load_templates(bench, templates)
    _refuse(refused, good)
    if train_steps:
        with Live(console=err, refresh_per_second=2) as live:
            folders = tune_templates(bench, good, train_steps, show=lambda runs: live.update(_progress_of(runs)))
    else:
        if not all(of.done for of in good):
            with err.status("Loading the model ..."):
                generator = load_generator(bench)
            for of in good:
                score_template(bench, of, generator, progress_bar)
        folders = [of.folder for of in good]
    out.print(ranking_table(good, folders, by))
    title = "nested thresholds" if by == "thresholds" else "answer"
    out.print(f"{len(bench.rows):,} rows; labels by {title}. Kept in {bench.folder}", highlight=False)


@app.command()
def lab(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option(min=10, help="How many rows to score on: a stratified sample.")] = 100,
    tuned: Annotated[
        Path | None, typer.Option(help="A run folder: with its adapter, on rows that it held out.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where on 127.0.0.1.")] = 7860,
) -> None:
    """Open a page to work on a prompt: edit a template, see its tokens, try a text, score it, keep what is good.

    It is served to this machine alone, and nothing is sent anywhere. Needs the extra: pip install 'emogen[lab]'.
    """
    from emogen.lab import serve
    from emogen.templates import open_bench

    with err.status("Loading the tokenizer ..."):
        bench = open_bench(recipe, overrides or [], limit=limit, tuned=tuned)
    with err.status("Loading the model ..."):
        page = serve(bench, port)
    out.print(f"emogen lab on http://127.0.0.1:{port} - Ctrl-C ends it", highlight=False)
    page.block_thread()


def _sorted_out(files: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The recipe, the templates and the overrides among the words of a command."""
    templates = [word for word in files if word.endswith(".jinja")]
    recipes = [word for word in files if word.endswith((".yaml", ".yml")) and "=" not in word]
    overrides = [word for word in files if word not in templates and word not in recipes]
    if len(recipes) != 1 or not templates:
        raise typer.BadParameter("name one recipe (.yaml) and at least one template (.jinja)")
    if strange := [word for word in overrides if "=" not in word]:
        raise typer.BadParameter(f"{strange[0]}: neither a recipe (.yaml), nor a template (.jinja), nor KEY=VALUE")
    return recipes[0], list(dict.fromkeys(templates)), overrides


def _refuse(refused: Sequence[str], good: Sequence[Any]) -> None:
    for problem in refused:
        err.print(f"[red]refused[/] {escape(problem)}", soft_wrap=True, highlight=False)
    if not good:
        raise InputError("no template is left")


pod = typer.Typer(
    help="Train on a GPU rented from Runpod. Needs the extra: pip install 'emogen[pods]'.\n\n"
    "The key is read from RUNPOD_API_KEY or from ~/.config/emogen/keys (lines of KEY=VALUE, mode 600), and so is "
    "HF_TOKEN, for models that ask for it. Not yet run on a real pod: tested against a copy of the API's document.",
    no_args_is_help=True,
)
app.add_typer(pod, name="pod", rich_help_panel=None)

PodArgument = Annotated[str, typer.Argument(help="A pod: its id, its name, or the beginning of its name.")]


@pod.command("launch")
def pod_launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[
        list[str] | None, typer.Option(help="Consider this GPU type alone, as in 'NVIDIA L40S'; can be repeated.")
    ] = None,
    volume: Annotated[
        str | None, typer.Option(help="A network volume's id: models and checkpoints outlive the pod.")
    ] = None,
    max_hours: Annotated[float, typer.Option(min=0.5, help="The pod ends after so many hours.")] = 6.0,
    max_dollars: Annotated[float, typer.Option(min=0.1, help="... or when its GPU has cost so much.")] = 10.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the first request that would be sent, and send none that costs.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the log to the end, bring the run home, end the pod.")
    ] = False,
) -> None:
    """Check and plan a recipe, rent the cheapest GPU that fits it and that can be had, and train there.

    Code, recipe, prompt and data go to the pod as one archive over SSH with your own key, not by a Git address: data is
    in no repository, and neither is a template under work. Keys go in the request that creates the pod, and nowhere
    else. With --follow the pod is terminated in the end, and also after an error, Ctrl-C or a lost connection; it is
    stopped instead if a finished run cannot be brought home. Without it, it stops by itself. The same job is never
    launched twice: a second launch finds the pod of the first.
    """
    from contextlib import ExitStack

    from emogen import pods
    from emogen.recipe import load_recipe

    words, limits = overrides or [], pods.Limits(max_hours, max_dollars)
    if _check_fails(err, recipe, words):
        raise typer.Exit(2)
    keys = pods.read_keys()
    with ExitStack() as stack:
        api = stack.enter_context(pods.open_api(keys)) if not dry_run or "RUNPOD_API_KEY" in keys else None
        with err.status("Planning ..."):
            planned, job, bodies = pods.prepare(recipe, words, limits, gpus=gpu or [], volume=volume, api=api)
        show_plan(err, planned)
        if dry_run:
            start = f"{len(bodies[0]['env']['EMOGEN_START']):,} characters of base64: runpod/start.sh"
            shown = bodies[0]["env"] | {"EMOGEN_START": start} | dict.fromkeys(keys, "***")
            print(json.dumps(bodies[0] | {"env": shown}, indent=2))
            types = ", ".join(body["gpu"]["id"] for body in bodies)
            err.print(
                f"{job.name}: {len(job.files)} files, {job.size / 1e6:.1f} MB; GPU types in turn: {types}",
                soft_wrap=True,
            )
            return
        assert api is not None
        folder = load_recipe(recipe, words).output_dir if follow else None
        running = pods.launch(api, job, bodies, keys, _say, folder=folder)
        if not folder:
            _say(f"It trains. Next: emogen pod logs {running.id}, emogen pod fetch {running.id}, and then "
                 f"emogen pod terminate {running.id}")  # fmt: skip


@pod.command("list")
def pod_list() -> None:
    """The pods of this project: what they do, what they cost, when they have to end."""
    import time

    from emogen import pods

    with pods.open_api(pods.read_keys()) as api:
        found = pods.list_pods(api)
    view = Table("pod", "id", "", "GPU", "$/h", "hours", "limit in", box=None, pad_edge=False)
    view.columns[0].overflow = "fold"  # the end of a name tells pods of one job apart
    for pod in found:
        age, left = (time.time() - pod.started) / 3600, (pod.deadline - time.time()) / 3600
        limit = f"{left:.1f} h" if left > 0 else "[red]overdue[/]"
        gpu = pod.gpu.id if pod.gpu else ""
        view.add_row(pod.name, pod.id, pod.status.lower(), gpu, f"{pod.cost:.2f}", f"{age:.1f}", limit)
    out.print(view if found else "no pods")


@pod.command("logs")
def pod_logs(name: PodArgument) -> None:
    """Print what a pod's job prints, from the beginning, until the pod ends. Ctrl-C ends the printing alone."""
    from emogen import pods

    with pods.open_api(pods.read_keys()) as api:
        for line in pods.logs(api, pods.find_pod(api, name)):
            _say(line)


@pod.command("fetch")
def pod_fetch(
    name: PodArgument,
    into: Annotated[Path | None, typer.Option(help="The folder of the run; runs/<recipe name> by default.")] = None,
) -> None:
    """Bring a job's run folder home, its checkpoints left out. A pod that is stopped is started for it."""
    from emogen import pods

    with pods.open_api(pods.read_keys()) as api:
        pod = pods.find_pod(api, name)
        folder = into or Path("runs") / pod.recipe
        pods.fetch(api, pod, folder)
    _say(f"The run is in {folder}. The pod is still there: emogen pod terminate {pod.id}")


@pod.command("stop")
def pod_stop(name: PodArgument) -> None:
    """Stop a pod: its GPU is released, its storage kept and paid for."""
    from emogen import pods

    with pods.open_api(pods.read_keys()) as api:
        pod = pods.find_pod(api, name)
        pods.act(api, pod, "stop")
    _say(f"{pod.name}: stopped")


@pod.command("terminate")
def pod_terminate(name: PodArgument) -> None:
    """End a pod for good, with all that is on it; what is on a network volume stays."""
    from emogen import pods

    with pods.open_api(pods.read_keys()) as api:
        pod = pods.find_pod(api, name)
        pods.terminate(api, pod.name)
    _say(f"{pod.name}: terminated")


@pod.command("reap")
def pod_reap(dry_run: Annotated[bool, typer.Option("--dry-run", help="Only name them.")] = False) -> None:
    """Terminate the pods of this project that are older than their limit, stopped ones too: fetch their runs first."""
    import time

    from emogen import pods

    with pods.open_api(pods.read_keys()) as api:
        late = pods.overdue(pods.list_pods(api), time.time())
        failed = False
        for pod in late:
            try:
                if not dry_run:
                    pods.terminate(api, pod.name)
            except pods.ApiError as error:  # the others cost, too
                err.print(f"[red]error[/] {pod.name}: {escape(str(error))}", soft_wrap=True, highlight=False)
                failed = True
            else:
                _say(f"{pod.name} ({pod.id}): {'would be ' if dry_run else ''}terminated")
    if not late:
        _say("no pod is older than its limit")
    if failed:
        raise typer.Exit(1)


def _say(line: str) -> None:
    out.print(line, soft_wrap=True, highlight=False, markup=False)


def show_plan(console: Console, planned: "Plan") -> None:
    """Print what a run takes, part by part."""
    tokens = planned.tokens
    counted = "" if tokens.exact else " (estimated: the tokenizer cannot be had here)"
    console.print(
        f"{planned.model}: {tokens.rows:,} rows to learn from, {tokens.scored:,} to label; {tokens.prefix} tokens "
        f"shared, {tokens.rest:.0f} of each row{counted}; {planned.train_tokens:,} to train on",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in planned.memory.items() if size)
    console.print(f"GPU memory: {planned.peak / 2**30:.1f} GiB = {parts}", highlight=False, soft_wrap=True)
    stock = ["stock"] if any(option.stock for option in planned.options) else []
    view = Table("GPU", "memory", "fits", "hours", "$/h", "dollars", *stock, "speed", box=None, pad_edge=False)
    view.columns[0].no_wrap = True
    for option in planned.options:
        cost = [f"{option.price:.2f}", f"{option.dollars:.2f}"] if option.price is not None else ["", ""]
        memory = f"{option.memory:.0f} GB" if option.memory else ""
        fits = "yes" if option.fits else "[red]no[/]"
        left = [(option.stock or "").lower()] if stock else []
        view.add_row(option.gpu, memory, fits, f"{option.total_hours:.2f}", *cost, *left, option.basis.split(":")[0])
    console.print(view)
    for option in planned.options:
        if ":" in option.basis:
            console.print(f"{option.gpu}: {option.basis}", highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"Prices: {planned.prices}. Estimated speeds can be wrong by a factor of two.", highlight=False, soft_wrap=True
    )
    if planned.fitting:
        best = planned.fitting[0]
        hours = " + ".join(f"{hours:.2f} {part}" for part, hours in best.hours.items())
        console.print(
            f"The cheapest that fits: {best.gpu}, {hours} = {best.total_hours:.2f} hours, about ${best.dollars:.2f}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs, cross-validations or baselines.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page; by default RUN_DIR/report.html, or of several folders comparison.html."
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also draw every picture there, as .svg and .png.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that emogen did not write.")] = False,
) -> None:
    """One HTML page that says all there is to say of a run, and opens anywhere; beside it, the model card (README.md).

    Figures with intervals, curves, calibration, confusions, and every scored row with what was wrong with it. Of a
    cross-validation, also its folds. Several folders are set against each other: which rows one has right and the other
    wrong. Training writes the report of its run by itself; this writes it again, without a model.
    """
    from emogen.report import report

    page, *others = report(runs, output, pictures=figures, overwrite=overwrite)
    out.print(f"The report is in {page}", soft_wrap=True, highlight=False)
    drawn = [path for path in others if path.suffix in (".svg", ".png")]
    for card in (path for path in others if path not in drawn):
        err.print(f"Beside it: {card}", soft_wrap=True, highlight=False)
    if drawn:
        err.print(f"{len(drawn)} pictures are in {figures}", soft_wrap=True, highlight=False)


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


def show_metrics(metrics: dict[str, Any]) -> None:
    """Print the table of what `score.evaluate` returned: the answers, and the thresholds beside them."""
    from emogen.score import footnote, table

    nested = metrics.get("by_thresholds")
    out.print(table([("answer", metrics), ("thresholds, nested", nested)] if nested else metrics))
    if note := footnote(metrics):
        out.print(note)


def show_spread(metrics: dict[str, Any]) -> None:
    """Print how the figures of a cross-validation vary, over the folds and by the bootstrap."""
    for system, title in (("answer", "answers"), ("thresholds", "thresholds, nested")):
        for key, name in (("f1_macro", "macro-F1"), ("f1_micro", "micro-F1")):
            low, high = metrics["interval"][system][key]
            spread = f"{metrics['mean'][system][key]:.3f} ± {metrics['sd'][system][key]:.3f} over the folds"
            out.print(f"{name} by {title}: {spread}; pooled, 95 %: {low:.3f} to {high:.3f}", highlight=False)


def _progress_of_sweep(study: "optuna.Study", run: "Fold | None") -> Table:
    """The trials of a search, the best first, and the one under way."""
    keys = list(study.trials[-1].distributions) if study.trials else []
    view = Table("trial", "", "value", *keys, box=None, pad_edge=False)
    order = sorted(study.trials, key=lambda trial: -(trial.value if trial.value is not None else -1))
    for trial in order[:15]:
        value = "" if trial.value is None else f"{trial.value:.3f}"
        state = "seed" if "seed" in trial.user_attrs else trial.state.name.lower()
        if run and run.number == trial.number:
            seen = run.last_logged()
            state = f"step {seen['step']:,} of {seen['max_steps']:,}" if seen else "starting"
        shown = [trial.params.get(key, "") for key in keys]
        view.add_row(str(trial.number), state, value, *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in shown))
    return view


def _progress_of(runs: "Sequence[Fold]") -> Table:
    """One line for each run that is under way or waits."""
    view = Table("run", "", "step", "loss", "macro-F1", box=None, pad_edge=False)
    for run in runs:
        seen = run.last_logged()
        state = "done" if run.done else "running" if run.process else "waiting"
        if run.process and seen.get("step", 0) == seen.get("max_steps"):
            state = "scoring"
        steps = f"{seen['step']:,} of {seen['max_steps']:,}" if seen else ""
        shown = [f"{seen[key]:.3f}" if key in seen else "" for key in ("loss", "eval_f1_macro")]
        view.add_row(run.folder.name, state, steps, *shown)
    return view


@contextmanager
def progress_bar(what: str, total: int, unit: str = "row") -> Iterator[Callable[[int], Any]]:
    """A progress bar on standard error, with the rate; gives a function that moves it on.

    Of several processes the main one shows it, as if the others kept pace.
    """
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, mininterval=0.5, disable=not ranks.is_main()) as bar:
        yield lambda n: bar.update(min(n * ranks.count(), total - bar.n))


def set_up_logging() -> None:
    """emogen's messages to standard error, one line each; other libraries only from warnings on. Of several processes
    the main one speaks."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)-8s %(message)s")
    logging.getLogger("emogen").setLevel(logging.INFO if ranks.is_main() else logging.ERROR)
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
    finally:
        ranks.leave()


def main() -> None:
    """The entry point of the `emogen` command."""
    fail_clearly(app)


if __name__ == "__main__":
    main()
