"""A search over the keys of a recipe: optuna proposes, a run of its own tries, and what does badly is stopped early.

runs/NAME-sweep/
    study.db           optuna's; the search goes on from it
    trial-1a2b3c4d/    a run folder for each combination of values, named by it
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from emogen.distribution import install_hint
from emogen.errors import InputError, ModelError
from emogen.evaluation import run_folder
from emogen.evaluation.run_folder import RECIPE
from emogen.experiments.jobs import RunProcess, failure, own_folder, start
from emogen.task.recipe import load_recipe, read_yaml

if TYPE_CHECKING:
    import optuna


class Range(BaseModel):
    """Numbers between two others: `{low: 1e-4, high: 1e-3, log: true}`; whole ones if both ends are."""

    model_config = ConfigDict(extra="forbid")

    low: int | float
    high: int | float
    log: bool = False


Choice = list[int | float | str | bool]
Space = dict[str, Range | Choice]


def sweep(
    path: str | Path,
    space_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    n_trials: int = 20,
    metric: str = "f1_macro",
    seeds: Sequence[Path] = (),
    show: Callable[["optuna.Study", RunProcess | None], Any] = lambda study, run: None,
) -> "optuna.Study":
    """Search until `n_trials` combinations have been tried, those of earlier calls included.

    Args:
        path: a recipe, with rows to score on (`eval_file` or `eval_fraction`).
        space_path: a YAML file: for each key a list of values, or `{low, high, log}`.
        metric: what is to be large, of a run's `metrics.json`; `by_thresholds.f1_macro` for that of nested thresholds.
        seeds: folders of earlier runs, whose values and figures the search begins with.
        show: called twice a second with the study and the run under way.

    Returns:
        The study; its best trial is the best of the rows that it was chosen by, and scores lower on others.

    Raises:
        InputError: recipe, space or a seed cannot be used.
        ModelError: a run failed; its log is named.
    """
    try:
        import optuna
    except ImportError:
        raise InputError(f"a sweep needs Optuna: {install_hint('sweep')}") from None
    recipe = load_recipe(path, overrides)
    space = load_space(space_path)
    for key, values in space.items():  # each end and each value has to be valid before anything is tried
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            load_recipe(path, [*overrides, f"{key}={json.dumps(value)}"])
    if not (recipe.eval_file or recipe.eval_fraction or recipe.dataset_test_split):
        raise InputError(f"{path}: nothing to score on: set eval_file or eval_fraction")
    folder = own_folder(recipe, overrides, "sweep")
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=recipe.name,
        storage=f"sqlite:///{folder / 'study.db'}",
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=recipe.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
    )
    _seed(study, space, seeds, metric)
    for left in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # by a search that was killed
        study.enqueue_trial(left.params)
        study.tell(left.number, state=optuna.trial.TrialState.FAIL)

    def tried() -> int:
        done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        return sum("seed" not in trial.user_attrs for trial in study.get_trials(states=done))

    while tried() < n_trials:
        trial = study.ask(_distributions(space))
        params = trial.params
        run = RunProcess(trial.number, folder / f"trial-{_digest(params)}")
        own = {**params, "output_dir": str(run.folder), "resume_from_checkpoint": True, "disable_tqdm": True}
        argv = [str(path), *overrides, *(f"{key}={json.dumps(value)}" for key, value in own.items())]
        try:
            value = _try(run, argv, trial, metric, partial(show, study, run))
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, value)
    show(study, None)
    return study


def load_space(path: str | Path) -> Space:
    """The keys to search over, and their values. Raises InputError with what is wrong."""
    values, where = read_yaml(path)
    try:
        return TypeAdapter(Space).validate_python(values)
    except ValidationError as error:
        lines = {str(e["loc"][0]) for e in error.errors()}
        raise InputError(
            "\n".join(
                f"{where[key]}: {key}: expected a list of values, or {{low: .., high: ..}}" for key in sorted(lines)
            )
        ) from None


def _distributions(space: Space) -> dict[str, Any]:
    """optuna's names for a space."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def of(values: Range | Choice) -> Any:
        if isinstance(values, list):
            return CategoricalDistribution(values)
        if isinstance(values.low, int) and isinstance(values.high, int):
            return IntDistribution(values.low, values.high, log=values.log)
        return FloatDistribution(values.low, values.high, log=values.log)

    return {key: of(values) for key, values in space.items()}


def _try(run: RunProcess, argv: list[str], trial: "optuna.Trial", metric: str, show: Callable[[], Any]) -> float:
    """Run to the end, or until the pruner stops it (raises TrialPruned). Gives the metric."""
    import optuna

    if not run.done:
        start(run, argv)
        assert run.process is not None
        reported = -1
        try:
            while run.process.poll() is None:
                seen = run.last_logged()
                if "eval_f1_macro" in seen and seen["step"] > reported:
                    reported = seen["step"]
                    trial.report(seen["eval_f1_macro"], reported)
                    if trial.should_prune():
                        raise optuna.TrialPruned
                show()
                time.sleep(0.5)
        finally:
            run.process.terminate()
            run.process.wait()
        if not run.done:
            raise ModelError(failure(run))
    return _metric_of(run.folder, metric)


def _seed(study: "optuna.Study", space: Space, seeds: Sequence[Path], metric: str) -> None:
    """Let a study know what earlier runs found, each once."""
    import optuna

    known = {trial.user_attrs.get("seed") for trial in study.get_trials()}
    for folder in seeds:
        if str(folder.resolve()) in known:
            continue
        if not (folder / RECIPE).is_file():
            raise InputError(f"{folder}: not a run folder: it has no {RECIPE}")
        before = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
        if missing := [key for key in space if key not in before]:
            raise InputError(f"{folder}: cannot seed this search: its recipe does not set {', '.join(missing)}")
        try:
            trial = optuna.create_trial(
                params={key: before[key] for key in space},
                distributions=_distributions(space),
                value=_metric_of(folder, metric),
                user_attrs={"seed": str(folder.resolve())},
            )
        except ValueError as error:
            raise InputError(f"{folder}: cannot seed this search: {error}") from None
        study.add_trial(trial)


def _metric_of(folder: Path, metric: str) -> float:
    path = folder / run_folder.METRICS
    if not path.is_file():
        raise InputError(f"{folder}: it has no {run_folder.METRICS}: the run has not finished")
    value: Any = json.loads(path.read_text(encoding="utf-8"))
    for key in metric.split("."):
        if key not in value:
            raise InputError(f"{path}: it has no {metric}")
        value = value[key]
    return float(value)


def _digest(params: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:8]
