"""Commands that make many runs: cv, baseline, sweep."""

import math
import shlex
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


def cv(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    folds: Annotated[int, typer.Option(min=2, help="Number of folds; 5 and 10 are usual.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Folds at a time; each gets its own GPU or cores.")] = 1,
    pods: Annotated[
        bool, typer.Option("--pods", help="Train each fold on a rented GPU, with the limits of emogen pod launch.")
    ] = False,
) -> None:
    """Cross-validate a recipe.

    Each fold is scored by a model that was trained on all other folds. The folds are stratified over the labels, and
    equal texts are in the same fold. The result is a folder, runs/<recipe name>-cv, with a run for each fold, one file
    with the out-of-fold prediction of every row, and thresholds. `emogen predict` takes the folder as an ensemble.

    The model of an endpoint (api_base) is asked about all rows and not tuned; its few-shot examples come from the other
    folds.

    The same command continues an interrupted one. With --pods each fold is an `emogen pod launch --follow`: its log is
    beside its folder, and its pod is terminated when the fold is done.
    """
    from emogen.evaluation.tables import print_metrics, print_spread
    from emogen.experiments.crossval import cross_validate, cross_validate_prompted
    from emogen.experiments.jobs import LOCAL, POD
    from emogen.task.recipe import load_recipe

    if load_recipe(recipe, overrides or []).api_base:
        folder, metrics = cross_validate_prompted(recipe, folds, overrides or [])
    else:
        with Live(console=err, refresh_per_second=2) as live:
            folder, metrics = cross_validate(
                recipe, folds, overrides or [], jobs=jobs, where=POD if pods else LOCAL,
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

    features=[tfidf,emoji] adds the emoji that a model of social media would put to a text (it comes from PyPI), and
    features=[tfidf,MODULE:FUNCTION] a function of yours from a list of texts to an array. Their probabilities are
    averaged.

    The result is a folder, runs/<recipe name>-baseline, for `emogen compare` and `emogen predict`: on its own, or with
    other runs, which predict_by=stack combines.
    """
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
) -> None:
    """Search over recipe keys for the best metric.

    Each trial is a run, and a bad one stops early. The same command continues an interrupted search.

    The best trial was selected on the rows that it was scored on: cross-validate its recipe for an unbiased metric.
    """
    from emogen.experiments.sweep import sweep as search
    from emogen.experiments.sweep import verdict

    with Live(console=err, refresh_per_second=2) as live:
        study = search(
            recipe, space, overrides or [], n_trials=trials, metric=metric, seeds=seed_with or [],
            show=lambda study, run: live.update(_trials_table(study, run)),
        )  # fmt: skip
    out.print(_trials_table(study, None))
    for sentence in verdict(study, metric):
        out.print(sentence)


def _trials_table(study: "optuna.Study", run: "RunProcess | None") -> Table:
    """The trials of a search, the best first, with the progress of the current run.

    A trial that was stopped early has the value of its last evaluation; it comes after the finished ones. A collapsed
    one has a figure that needs no model.
    """
    keys = list(study.trials[-1].distributions) if study.trials else []
    view = Table("trial", "", "value", *keys, box=None, pad_edge=False)

    def rank(trial: "optuna.trial.FrozenTrial") -> tuple[bool, float]:
        return trial.state.name != "COMPLETE", math.inf if trial.value is None else -trial.value

    best_first = sorted(study.trials, key=rank)
    for trial in best_first[:SHOWN_TRIALS]:
        state = "seed" if "seed" in trial.user_attrs else trial.state.name.lower()
        state += ", collapsed" if trial.user_attrs.get("needs_no_model") else ""
        if run and run.number == trial.number:
            logged = run.last_logged()
            state = f"step {logged['step']:,} of {logged['max_steps']:,}" if logged else "starting"
        value = "" if trial.value is None else f"{trial.value:.3f}"
        view.add_row(str(trial.number), state, value, *(_short(trial.params.get(key, "")) for key in keys))
    return view


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
