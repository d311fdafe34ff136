"""Commands that make many runs: cv, baseline, sweep."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from emogen.cli.shared import Overrides, RecipeArgument, runs_table
from emogen.console import err, out, progress_bar

if TYPE_CHECKING:
    import optuna

    from emogen.experiments.jobs import RunProcess

SHOWN_TRIALS = 15

JobsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Runs at a time; each gets its own GPU or cores. Default: 1; on Ray one for each GPU."),
]
OnOption = Annotated[str | None, typer.Option("--on", help="ray: on the machines of a Ray cluster.")]


def cv(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    folds: Annotated[int, typer.Option(min=2, help="Number of folds; 5 and 10 are usual.")] = 5,
    jobs: JobsOption = None,
    pods: Annotated[
        bool, typer.Option("--pods", help="Train each fold on a rented GPU, with the limits of emogen pod launch.")
    ] = False,
    on: OnOption = None,
) -> None:
    """Cross-validate a recipe.

    Each fold is scored by a model that was trained on all other folds. The folds are stratified over the labels, and
    equal texts are in the same fold. The result is a folder, runs/<recipe name>-cv, with a run for each fold, one file
    with the out-of-fold prediction of every row, and thresholds. `emogen predict` takes the folder as an ensemble.

    The model of an endpoint (api_base) is asked about all rows and not tuned; its few-shot examples come from the other
    folds.

    The same command continues an interrupted one. With --pods each fold is an `emogen pod launch --follow`: its log is
    beside its folder, and its pod is terminated when the fold is done. With --on ray the folds are spread over the Ray
    cluster of RAY_ADDRESS, or of this machine.
    """
    from emogen.task.recipe import load_recipe

    if pods and on:
        raise typer.BadParameter("--pods and --on exclude each other; give one of them")
    has_endpoint = load_recipe(recipe, overrides or []).api_base
    from emogen.evaluation.tables import print_metrics, print_spread
    from emogen.experiments.crossval import cross_validate, cross_validate_prompted
    from emogen.experiments.jobs import POD

    if has_endpoint:
        if pods or on or jobs:
            raise typer.BadParameter("the model of an endpoint is not tuned: --jobs, --pods and --on are not for it")
        folder, metrics = cross_validate_prompted(recipe, folds, overrides or [])
    else:
        n_jobs, where = _place(on, jobs)
        with Live(console=err, refresh_per_second=2) as live:
            folder, metrics = cross_validate(
                recipe, folds, overrides or [], jobs=n_jobs, where=POD if pods else where,
                show=lambda runs: live.update(runs_table(runs)),
            )  # fmt: skip
    print_metrics(metrics)
    print_spread(metrics)
    command = f"emogen predict {shlex.quote(str(folder))} YOUR.csv -o OUT.csv predict_by=thresholds"
    out.print(f"The folds are in {folder}. Next: {command}", soft_wrap=True)


def baseline(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    folds: Annotated[int, typer.Option(min=2, help="Number of folds, as for cv.")] = 5,
) -> None:
    """Cross-validate TF-IDF and logistic regression.

    features=[tfidf,emoji] adds the emoji that a model of social media would put to a text (it comes from PyPI),
    features=[tfidf,sentence-transformers/all-MiniLM-L6-v2] the embeddings of a sentence encoder, and
    features=[tfidf,MODULE:FUNCTION] a function of yours from a list of texts to an array. Their probabilities are
    averaged.

    The result is a folder, runs/<recipe name>-baseline, for `emogen compare` and `emogen predict`: on its own, or with
    other runs, which predict_by=stack combines.
    """
    from emogen.task.recipe import load_recipe

    load_recipe(recipe, overrides or [])  # refuses a recipe before the libraries are loaded, which takes seconds
    from emogen.evaluation.tables import print_metrics, print_spread
    from emogen.experiments.crossval import cross_validate_baseline

    with progress_bar("Folds", folds, "fold") as advance:
        folder, metrics = cross_validate_baseline(recipe, folds, overrides or [], advance)
    print_metrics(metrics)
    print_spread(metrics)
    out.print(
        f"Its predictions are in {folder}. Next: emogen compare {shlex.quote(str(folder))} RUN_DIR", soft_wrap=True
    )


def sweep(
    recipe: RecipeArgument,
    space: Annotated[
        str, typer.Argument(help="YAML: for each key a list of values, or {low: 1e-4, high: 1e-3, log: true}.")
    ],
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option(min=1, help="Number of trials, including those of earlier calls.")] = 20,
    metric: Annotated[
        str, typer.Option(help="Metric to maximise, a key of metrics.json: f1_macro, by_thresholds.f1_macro ...")
    ] = "f1_macro",
    seed_with: Annotated[
        list[Path] | None, typer.Option("--from", help="Runs whose metrics the search starts from.")
    ] = None,
    jobs: JobsOption = None,
    on: OnOption = None,
) -> None:
    """Search over recipe keys for the best metric.

    Each trial is a run, and a bad one stops early. The same command continues an interrupted search. With --on ray the
    trials are spread over the Ray cluster of RAY_ADDRESS, or of this machine.

    The best trial was selected on the rows that it was scored on: cross-validate its recipe for an unbiased metric.
    """
    from emogen.experiments.sweep import sweep as search
    from emogen.experiments.sweep import verdict

    n_jobs, where = _place(on, jobs)
    with Live(console=err, refresh_per_second=2) as live:
        study = search(
            recipe, space, overrides or [], n_trials=trials, metric=metric, seeds=seed_with or [],
            jobs=n_jobs, where=where, show=lambda study, runs: live.update(_trials_table(study, runs)),
        )  # fmt: skip
    out.print(_trials_table(study, []))
    for sentence in verdict(study, metric):
        out.print(sentence)


def _place(on: str | None, jobs: int | None) -> tuple[int, tuple[str, ...]]:
    """The runs at a time, and where they run."""
    from emogen.experiments.jobs import LOCAL, RAY

    if on is None:
        return jobs or 1, LOCAL
    if on != "ray":
        raise typer.BadParameter(f"--on is ray, not {on}")
    from emogen.experiments.on_ray import connect

    with err.status("Connecting to Ray ..."):
        n_jobs, share = connect(jobs)
    return n_jobs, (*RAY, share)


def _trials_table(study: "optuna.Study", runs: "Sequence[RunProcess]") -> Table:
    """The trials of a search, the best first, with the progress of the current runs.

    A trial that was stopped early has the value of its last evaluation; it comes after the finished ones. A collapsed
    one has a figure that needs no model.
    """
    keys = list(study.trials[-1].distributions) if study.trials else []
    view = Table("trial", "", "value", *keys, box=None, pad_edge=False)

    def rank(trial: "optuna.trial.FrozenTrial") -> tuple[bool, float]:
        return trial.state.name != "COMPLETE", math.inf if trial.value is None else -trial.value

    running = {run.number: run for run in runs}
    best_first = sorted(study.trials, key=rank)
    for trial in best_first[:SHOWN_TRIALS]:
        state = "seed" if "seed" in trial.user_attrs else trial.state.name.lower()
        state += ", collapsed" if trial.user_attrs.get("needs_no_model") else ""
        if run := running.get(trial.number):
            logged = run.last_logged()
            state = f"step {logged['step']:,} of {logged['max_steps']:,}" if logged else "starting"
        value = "" if trial.value is None else f"{trial.value:.3f}"
        view.add_row(str(trial.number), state, value, *(_short(trial.params.get(key, "")) for key in keys))
    return view


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
