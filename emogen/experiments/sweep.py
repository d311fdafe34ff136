"""A search over recipe keys: optuna proposes values, a run tries them, and a bad run is stopped early.

runs/NAME-sweep/
    sweep.json         what all trials have in common; the folder accepts nothing else
    study.db           optuna's study; the same command continues the search from it
    trial-1a2b3c4d/    a run folder for each combination of values, named by a digest of them
"""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from emogen import paths
from emogen.claims import claim_folder
from emogen.distribution import install_hint
from emogen.errors import InputError, ModelError
from emogen.evaluation.caveats import caveats, needs_no_model
from emogen.evaluation.resume import changed_keys
from emogen.evaluation.run_folder import METRICS, RECIPE, read_json
from emogen.experiments.jobs import LOCAL, POLL_SECONDS, RunProcess, failure, own_folder, shares_of, start
from emogen.task.recipe import Recipe, load_recipe
from emogen.task.yaml_files import as_overrides, read_value, read_yaml

if TYPE_CHECKING:
    import optuna


class Range(BaseModel):
    """Numbers from low to high: `{low: 1e-4, high: 1e-3, log: true}`. If both ends are integers, so are the values."""

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
    jobs: int = 1,
    where: Sequence[str] = LOCAL,
    show: Callable[["optuna.Study", Sequence[RunProcess]], Any] = lambda study, runs: None,
) -> "optuna.Study":
    """Search until `n_trials` combinations have been tried, including those of earlier calls.

    Args:
        path: a recipe with rows to score on (`eval_file` or `eval_fraction`).
        space_path: a YAML file: for each key a list of values, or `{low, high, log}`.
        overrides: `key=value`. `output_dir` is the folder of the search (default: `runs/NAME-sweep`).
        metric: the metric to maximise, a key of `metrics.json`, such as `by_thresholds.f1_macro`.
        seeds: folders of earlier runs, whose values and metrics the search starts from.
        jobs, where: trials at a time, and where they run; see `run_all`.
        show: called twice a second for each running trial, with the study and all of them.

    Returns:
        The study; `verdict` says what it found. Its best value is too high by selection: it is the best on the rows
        that it was selected on.

    Raises:
        InputError: optuna is not installed, the recipe, the space or a seed cannot be used, or the metric is one of
            which a lower value is better.
        ModelError: a run failed; the message names its log.
    """
    try:
        import optuna
    except ImportError:
        raise InputError(f"a sweep needs Optuna: {install_hint('sweep')}") from None
    if metric.rpartition(".")[2] in LOWER_IS_BETTER:
        raise InputError(f"--metric {metric}: a lower value is better, and a sweep looks for the highest; name another")
    recipe = load_recipe(path, overrides)
    recipe.require_own_model("is not tuned")
    space = load_space(space_path)
    _check_values(path, space, overrides)
    if not (recipe.eval_file or recipe.eval_fraction or recipe.dataset_test_split):
        raise InputError(f"{path}: nothing to score on: set eval_file or eval_fraction")
    folder = own_folder(recipe, overrides, "sweep")
    with claim_folder(folder):
        study = _open_study(folder, recipe)
        _check_unchanged(study, folder, recipe, space, metric)
        _add_seeds(study, space, seeds, metric)
        _requeue_interrupted(study)
        lock, stop = threading.Lock(), threading.Event()
        running: dict[int, RunProcess] = {}

        def show_all() -> None:
            with lock:
                show(study, list(running.values()))

        def is_tried_elsewhere(run: RunProcess) -> bool:
            with lock:
                return any(run.folder == other.folder and run.number > other.number for other in running.values())

        def work(share: dict[str, Any]) -> None:
            """Try one combination after another."""
            while not stop.is_set():
                with lock:
                    n_begun = _n_tried(study) + len(running)
                    if n_begun >= n_trials:
                        return
                    study.sampler = _sampler(recipe.seed + n_begun)
                    trial = study.ask(_distributions(space))
                    run = running[trial.number] = RunProcess(trial.number, folder / f"trial-{_digest(trial.params)}")
                own = {**trial.params, "output_dir": str(run.folder), "resume_from_checkpoint": True}
                argv = [str(path), *overrides, *as_overrides(own | {"disable_tqdm": True})]
                while is_tried_elsewhere(run):  # the same combination twice at a time: the second reads the first
                    if stop.wait(POLL_SECONDS):
                        return
                try:
                    if not run.done:
                        start(run, argv, where, **share)
                        watch(run, trial, show_all, stop)
                    state = optuna.trial.TrialState.COMPLETE
                except optuna.TrialPruned:
                    state = optuna.trial.TrialState.PRUNED
                except BaseException:
                    stop.set()
                    raise
                with lock:
                    del running[trial.number]
                    if state == optuna.trial.TrialState.PRUNED:
                        study.tell(trial, state=state)
                        continue
                    value = _metric_of(run.folder, metric)
                    for name, attribute in _attributes(run.folder, metric).items():
                        trial.set_user_attr(name, attribute)
                    study.tell(trial, value)

        with ThreadPoolExecutor(jobs) as pool:
            workers = [pool.submit(work, share) for share in shares_of(jobs, where)]
            try:
                for worker in as_completed(workers):
                    worker.result()
            except BaseException:
                stop.set()
                raise
    show(study, [])
    return study


def verdict(study: "optuna.Study", metric: str) -> list[str]:
    """What a search found, in sentences: its best trial, or why none of them can be called the best."""
    from optuna.trial import TrialState

    finished = study.get_trials(states=[TrialState.COMPLETE])
    n_stopped = len(study.get_trials(states=[TrialState.PRUNED]))
    if not finished:
        return [f"No best trial: none has finished, {n_stopped} stopped early."]
    best, values = study.best_trial, {trial.value for trial in finished}
    notes = [f"Trial {best.number}: {caveat}" for caveat in best.user_attrs.get("caveats", [])]
    if study.best_value <= 0:
        return [f"No best trial: {metric} is {study.best_value:.3f} in the best of {len(finished)}.", *notes]
    if len(values) == 1 and len({str(trial.params) for trial in finished}) > 1:
        same = f"No best trial: all {len(finished)} have the same {metric}, {study.best_value:.3f}."
        return [f"{same} The keys of the search made no difference.", *notes]
    if best.user_attrs.get("needs_no_model"):
        return [f"No best trial: the highest {metric}, {study.best_value:.3f}, needs no model.", *notes]
    params = " ".join(f"{key}={value}" for key, value in study.best_params.items())
    selected = "" if len(finished) == 1 else f" It was selected from {len(finished)} on the rows that scored it."
    return [f"Best trial: {metric} {study.best_value:.3f} with {params}.{selected}", *notes]


def load_space(path: str | Path) -> Space:
    """Load the keys to search over, and their values.

    Raises:
        InputError: a key has neither a list of values nor a range.
    """
    values, where = read_yaml(path)
    try:
        return TypeAdapter(Space).validate_python(values)
    except ValidationError as error:
        keys = sorted({str(e["loc"][0]) for e in error.errors()})
        raise InputError(
            "\n".join(f"{where[key]}: {key}: expected a list of values, or {{low: .., high: ..}}" for key in keys)
        ) from None


def _check_values(path: str | Path, space: Space, overrides: Sequence[str]) -> None:
    """Check the recipe with every value of a choice and both ends of a range, before anything is tried."""
    for key, values in space.items():
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            load_recipe(path, [*overrides, *as_overrides({key: value})])


def _check_unchanged(study: "optuna.Study", folder: Path, recipe: Recipe, space: Space, metric: str) -> None:
    """Write down what a search depends on, besides the values of its space.

    Once a trial is finished, a second call has to find the same.

    Raises:
        InputError: something has changed. The trials of before could not be compared with new ones.
    """
    keys = {key: value for key, value in read_value(recipe.to_yaml()).items() if key not in space}
    files = {
        "train_file": recipe.train_file,
        "eval_file": recipe.eval_file,
        "prompt": recipe.prompt,
        "labels": recipe.labels,
    }
    found = {name: recipe.find(file) for name, file in files.items() if file is not None}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items() if path.is_file()}
    now = {"metric": metric, "sha256": digests, "recipe": keys}
    kept = folder / "sweep.json"
    if not kept.is_file() or not _n_tried(study):
        paths.write_json(kept, now)
        return
    before = read_json(kept)
    changed = changed_keys(before["recipe"], keys)
    changed += [name for name in digests if before["sha256"].get(name) != digests[name]]
    if before["metric"] != metric:
        changed.append(f"--metric ({before['metric']} before, {metric} now)")
    if changed:
        raise InputError(
            f"{folder}: cannot continue this search: {', '.join(changed)} changed since it was started; its trials "
            "could not be compared. Name another folder with output_dir=FOLDER, or remove this one"
        )


def _open_study(folder: Path, recipe: Recipe) -> "optuna.Study":
    """Open the study of a folder, or create it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=recipe.name,
        storage=f"sqlite:///file:{quote(str((folder / 'study.db').resolve()))}?uri=true",  # a folder may have a `?`
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
    )


def _sampler(seed: int) -> "optuna.samplers.BaseSampler":
    """The sampler of one trial. Each trial has a seed of its own, so that a continued search goes on as one call would.

    One generator for all trials would begin again in each call, and draw the first trials twice.
    """
    import optuna

    return optuna.samplers.TPESampler(seed=seed)


def _add_seeds(study: "optuna.Study", space: Space, seeds: Sequence[Path], metric: str) -> None:
    """Add earlier runs to a study, each once."""
    import optuna

    known = {trial.user_attrs.get("seed") for trial in study.get_trials()}
    for folder in seeds:
        if str(folder.resolve()) in known:
            continue
        if not (folder / RECIPE).is_file():
            raise InputError(f"{folder}: not a run folder: it has no {RECIPE}")
        values = read_yaml(folder / RECIPE)[0]
        if missing := [key for key in space if key not in values]:
            raise InputError(f"{folder}: cannot seed this search: its recipe does not set {', '.join(missing)}")
        try:
            trial = optuna.create_trial(
                params={key: values[key] for key in space},
                distributions=_distributions(space),
                value=_metric_of(folder, metric),
                user_attrs={"seed": str(folder.resolve()), **_attributes(folder, metric)},
            )
        except ValueError as error:
            raise InputError(f"{folder}: cannot seed this search: {error}") from None
        study.add_trial(trial)


def _requeue_interrupted(study: "optuna.Study") -> None:
    """Queue the trials again that a killed search left running."""
    import optuna

    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def _n_tried(study: "optuna.Study") -> int:
    """The number of finished trials, without the seeds."""
    import optuna

    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return sum("seed" not in trial.user_attrs for trial in study.get_trials(states=finished))


def _distributions(space: Space) -> dict[str, Any]:
    """A space in optuna's terms."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def distribution(values: Range | Choice) -> Any:
        if isinstance(values, list):
            return CategoricalDistribution(values)
        if isinstance(values.low, int) and isinstance(values.high, int):
            return IntDistribution(values.low, values.high, log=values.log)
        return FloatDistribution(values.low, values.high, log=values.log)

    return {key: distribution(values) for key, values in space.items()}


def watch(run: RunProcess, trial: "optuna.Trial", show: Callable[[], Any], stop: threading.Event) -> None:
    """Report the evaluations of a running process to its trial, until the process ends or the pruner stops it.

    Args:
        stop: set when the search ends, by a failure or Ctrl-C; the process is then stopped, and tried again next time.

    Raises:
        optuna.TrialPruned: the pruner stopped it.
        ModelError: it failed; the message names its log.
    """
    import optuna

    assert run.process is not None
    reported_step = -1
    try:
        while run.process.poll() is None:
            logged = run.last_logged()
            if "eval_f1_macro" in logged and logged["step"] > reported_step:
                reported_step = logged["step"]
                trial.report(logged["eval_f1_macro"], reported_step)
                if trial.should_prune():
                    raise optuna.TrialPruned
            show()
            if stop.wait(POLL_SECONDS):
                raise ModelError(f"{run.folder.name} was stopped")
    finally:
        run.process.terminate()
        run.process.wait()
    if not run.done:
        raise ModelError(failure(run))


# Of these metrics the lowest value is the best one; a search maximises.
LOWER_IS_BETTER = ("hamming_loss", "brier", "ece", "parse_failure", "answer_seconds", "prob_seconds", "train_seconds")


def _metric_of(folder: Path, metric: str) -> float:
    path = folder / METRICS
    if not path.is_file():
        raise InputError(f"{folder}: it has no {METRICS}: the run has not finished")
    value: Any = read_json(path)
    for key in metric.split("."):
        if not isinstance(value, dict) or key not in value:
            few = "; too few rows are held out for nested thresholds, or each has one label"
            raise InputError(f"{path}: it has no {metric}{few if key == 'by_thresholds' else ''}; name another metric")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{path}: {metric} is not a number, so no trial can be the best; name another metric")
    return float(value)


def _attributes(folder: Path, metric: str) -> dict[str, Any]:
    """What a reader has to know before the metric of a run can be believed, as attributes of its trial."""
    metrics = read_json(folder / METRICS)
    scored = metrics.get("by_thresholds", {}) if metric.startswith("by_thresholds.") else metrics
    if "per_label" not in scored:
        return {}
    return {"caveats": caveats([("", scored)]), "needs_no_model": needs_no_model(scored)}


def _digest(params: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:8]
