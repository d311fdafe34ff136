"""Cross-validation: folds -> a run for each, in a process of its own -> out-of-fold predictions -> thresholds, figures.

Everything is in one folder, and each piece of work that is done stays done: started again, it goes on in the middle of
the fold where it was stopped.

    runs/NAME-cv/
        recipe.yaml, prompt.jinja, labels.yaml
                           what is run: going on with anything else is refused
        folds.csv          the fold of each id
        data/              the rows that each fold learns from and is scored on
        fold-0/ ...        a run folder for each; fold-0.log is what it said
        predictions.jsonl  every row, as said by the model that had not seen it
        thresholds.json    tuned on all of these rows; metrics.json says what thresholds are worth on rows unseen
        reliability.svg    how far the probabilities can be taken at their word
        report.html        all of this on a page; README.md is the model card
"""

import csv
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml

from emogen import paths, results
from emogen.data import Rows, errors_of, load_splits, make_folds
from emogen.errors import InputError, ModelError
from emogen.figures import draw_reliability, save
from emogen.labels import LabelSet, load_label_set
from emogen.predict import LABELS, PROMPT, RECIPE
from emogen.recipe import Recipe, load_recipe
from emogen.report import report_finished
from emogen.results import DATA, FOLDS
from emogen.score import Metrics, bootstrap, evaluate, interval, nested_pred, score, tune_thresholds

log = logging.getLogger(__name__)

# What a fold settles for itself, and how the machine is used: not what is being measured.
_OWN = ("train_file", "eval_file", "eval_fraction", "output_dir", "resume_from_checkpoint", "disable_tqdm")
# What does not hold of the files that are written for it.
_FORM = ("text_column", "id_column", "separator", "encoding", "dataset_name", "dataset_config", "dataset_test_split")

# What trains a fold, as Python's arguments: this machine, or a rented one that the run comes home from.
HERE = ("-m", "emogen.crossval")
POD = ("-m", "emogen.cli", "pod", "launch", "--follow")


@dataclass
class Fold:
    """A fold under way: its run folder, and the last line of the run's log (`train_log.jsonl`)."""

    number: int
    folder: Path
    process: subprocess.Popen | None = None

    @property
    def done(self) -> bool:
        return (self.folder / results.METRICS).is_file()

    def last_logged(self) -> dict[str, Any]:
        """The newest figures of the run, each under its own name; empty before the first."""
        figures: dict[str, Any] = {}
        for logged in results.read_log(self.folder):
            figures |= logged
        return figures


def cross_validate(
    path: str | Path,
    n_folds: int = 5,
    overrides: Sequence[str] = (),
    *,
    jobs: int = 1,
    on: Sequence[str] = HERE,
    show: Callable[[list[Fold]], Any] = lambda folds: None,
) -> tuple[Path, Metrics]:
    """Run all folds of a recipe that are not done, and put together what they predicted.

    Args:
        path: a recipe. Its training rows are what is split; its `eval_file` and `eval_fraction` are not used.
        overrides: `key=value`; `output_dir` is the folder of the cross-validation (`runs/NAME-cv`).
        jobs: folds at once. Each has a GPU, or its part of the cores, for itself.
        on: `HERE`, or `POD`: each fold on a pod of its own, which ends with it.
        show: called twice a second with all folds, while they run.

    Returns:
        The folder, and what `pool` says.

    Raises:
        InputError: the recipe or its data cannot be used, or the folder holds another cross-validation.
        ModelError: a fold failed; its log is named.
    """
    recipe = load_recipe(path, overrides)
    folder = own_folder(recipe, overrides, "cv")
    label_set = load_label_set(recipe.find(recipe.labels))
    rows = all_rows(recipe, label_set)
    folds = claim(folder, recipe, label_set, rows, n_folds)
    runs = [Fold(k, folder / f"fold-{k}") for k in range(n_folds)]
    commands = [[str(path), *overrides, *_prepare(folder, recipe, rows, folds, run, label_set)] for run in runs]
    run_all(runs, commands, jobs, show, on)
    metrics = pool(folder, rows, folds, label_set)
    report_finished(folder)
    return folder, metrics


def own_folder(recipe: Recipe, overrides: Sequence[str], suffix: str) -> Path:
    """Where several runs of a recipe go: what `output_dir=` on the command line says, or runs/NAME-suffix."""
    named = any(override.startswith("output_dir=") for override in overrides)
    return recipe.output_dir if named else recipe.output_dir.with_name(f"{recipe.output_dir.name}-{suffix}")


def all_rows(recipe: Recipe, label_set: LabelSet) -> Rows:
    """The training rows of a recipe, none held out. Raises DataError; warnings are logged."""
    whole = recipe.model_copy(
        update={"eval_file": None, "eval_fraction": 0.0, "examples": 0, "dataset_test_split": None}
    )
    splits, problems = load_splits(whole, label_set)
    if splits is None:
        raise errors_of(problems)
    for problem in problems:
        log.warning(str(problem))
    return splits.train


def claim(folder: Path, recipe: Recipe, label_set: LabelSet, rows: Rows, n_folds: int) -> np.ndarray:
    """The fold of each row, [n]; and, in the folder, what is cross-validated. Going on, it has to be the same.

    Raises:
        InputError: the folder holds something else, or the rows cannot be folded so.
    """
    try:
        folds = make_folds(rows, n_folds, recipe.seed)
    except ValueError as error:
        raise InputError(str(error)) from None
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("id", "fold"), *zip(rows.ids, folds, strict=True)])
    if recipe.init_adapter and _text(recipe.find(recipe.init_adapter) / FOLDS) != table.getvalue():
        # A fold may only go on from what has not seen the rows that it is scored on.
        raise InputError(
            f"init_adapter: {recipe.init_adapter}: not a cross-validation with the same rows and folds: what it holds "
            "has learnt the rows that the folds are scored on"
        )
    values = {k: v for k, v in yaml.safe_load(recipe.to_yaml()).items() if k not in _OWN}
    files = {
        RECIPE: yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        PROMPT: _text(recipe.find(recipe.prompt)) or "",
        LABELS: label_set.to_yaml(),
        FOLDS: table.getvalue(),
    }
    if _text(folder / RECIPE) is None and any(folder.glob("[!.]*")):
        raise InputError(f"{folder}: not empty, and no cross-validation; name another folder with output_dir=FOLDER")
    changed = [name for name, text in files.items() if name != RECIPE and _text(folder / name) not in (text, None)]
    before = yaml.safe_load(_text(folder / RECIPE) or files[RECIPE])
    defaults = {name: field.default for name, field in Recipe.model_fields.items()}  # of keys that came later
    changed += sorted(k for k in before.keys() | values if before.get(k, defaults.get(k)) != values.get(k))
    if changed:
        raise InputError(
            f"{folder}: cannot go on with this cross-validation: {', '.join(changed)} changed since it was begun; "
            "name another folder with output_dir=FOLDER, or remove this one"
        )
    for name, text in files.items():
        if not (folder / name).is_file():
            with paths.writing(folder / name) as file:
                file.write(text)
    return folds


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _prepare(folder: Path, recipe: Recipe, rows: Rows, folds: np.ndarray, run: Fold, label_set: LabelSet) -> list[str]:
    """Write the rows of a fold, and give the overrides that make a recipe its."""
    held = folds == run.number
    train_file, eval_file = (folder / DATA / f"{run.folder.name}-{part}.jsonl" for part in ("train", "eval"))
    for file, which in ((train_file, ~held), (eval_file, held)):
        if not file.is_file():
            results.write_rows(file, rows.take(np.flatnonzero(which)), label_set)
    more = {}
    if recipe.init_adapter:
        more["init_adapter"] = str(recipe.find(recipe.init_adapter).resolve() / run.folder.name)
    return overrides_of(run, train_file, eval_file, more)


def overrides_of(run: Fold, train_file: Path, eval_file: Path, more: dict[str, Any]) -> list[str]:
    """What makes a recipe that of a run on these files of rows, as `key=value`; `more` of them."""
    own = {
        "train_file": str(train_file.resolve()),
        "eval_file": str(eval_file.resolve()),
        "eval_fraction": 0,
        "output_dir": str(run.folder),
        "resume_from_checkpoint": True,
        "disable_tqdm": True,
    }
    return [f"{key}={json.dumps(value)}" for key, value in (own | dict.fromkeys(_FORM) | more).items()]


# ---------------------------------------------------------------------------------------------- processes


def run_all(
    runs: list[Fold],
    commands: list[list[str]],
    jobs: int,
    show: Callable[[list[Fold]], Any],
    on: Sequence[str] = HERE,
) -> None:
    """Run what is not done, `jobs` at once. All are stopped if one fails, or if this is interrupted."""
    waiting = deque(run for run in runs if not run.done)
    shares = _shares(jobs) if on == HERE else [{}] * jobs
    slots: list[Fold | None] = [None] * jobs
    try:
        while waiting or any(slots):
            for k, run in enumerate(slots):
                if run is not None and run.process is not None and run.process.poll() is not None:
                    if run.process.returncode or not run.done:
                        raise ModelError(failure(run))
                    run.process, slots[k] = None, None
                if slots[k] is None and waiting:
                    slots[k] = begun = waiting.popleft()
                    start(begun, commands[begun.number], on, **shares[k])
            show(runs)
            time.sleep(0.5)
        show(runs)
    finally:
        for run in slots:
            if run is not None and run.process is not None:
                run.process.terminate()
                run.process.wait()


def start(
    run: Fold, argv: list[str], on: Sequence[str] = HERE, *, gpu: int | None = None, cores: Sequence[int] = ()
) -> None:
    """Start the training script in a process of its own, which ends with this one; on a GPU or cores of its own."""
    run.folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    with _log(run).open("a", encoding="utf-8") as log:
        # Its standard input is a pipe that nobody writes to: it ends with this process, however that ends.
        run.process = subprocess.Popen(
            [sys.executable, *on, *argv], stdin=subprocess.PIPE, stdout=log, stderr=log, env=env
        )
    if cores:  # it takes as many threads as it may use cores, and has not got to that yet
        os.sched_setaffinity(run.process.pid, cores)


def _shares(jobs: int) -> list[dict[str, Any]]:
    """What each of several jobs has for itself, as arguments of `start`: a GPU, or else its part of the cores. Threads
    of several jobs that wait for each other on the same cores would be many times slower than one job alone."""
    if jobs == 1:
        return [{}]
    if n_gpus := _count_gpus():
        return [{"gpu": k % n_gpus} for k in range(jobs)]
    if not hasattr(os, "sched_getaffinity"):
        return [{} for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    return [{"cores": cores[k::jobs] or [cores[k % len(cores)]]} for k in range(jobs)]


def _log(run: Fold) -> Path:
    return run.folder.with_name(f"{run.folder.name}.log")


def failure(run: Fold) -> str:
    """What to say of a run that failed."""
    lines = [line for line in _log(run).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    end = "\n".join(f"  {line}" for line in lines[-5:])
    return f"{run.folder.name} failed; the same command goes on there. The end of {_log(run)}:\n{end}"


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _train_one() -> None:
    """What runs in a fold's process: the training script, until its parent is gone."""
    from emogen import train
    from emogen.cli import fail_clearly

    def watch() -> NoReturn:
        sys.stdin.read()
        os._exit(1)  # a kill of the parent is a kill of this: what was not checkpointed is done again

    threading.Thread(target=watch, daemon=True).start()
    fail_clearly(train.main)


# ---------------------------------------------------------------------------------------------- results


def pool(folder: Path, rows: Rows, folds: np.ndarray, label_set: LabelSet) -> Metrics:
    """Put the folds' predictions together, in the order of the rows; tune thresholds on them; keep all figures.

    Returns:
        What `score.evaluate` says of all rows; with `folds` (of each its `f1_macro` and `f1_micro`, by answers and by
        nested thresholds), `mean` and `sd` of these over the folds, and the 95 % bootstrap `interval` of the pooled
        figures and of each label's F1.
    """
    records = {}
    for fold in np.unique(folds):
        for record in results.read_records(folder / f"fold-{fold}" / results.PREDICTIONS):
            records[record["id"]] = record | {"fold": int(fold)}
    with paths.writing(folder / results.PREDICTIONS) as file:
        for row_id in rows.ids:
            file.write(json.dumps(records[row_id], ensure_ascii=False) + "\n")
    return sum_up(folder, label_set)


def sum_up(folder: Path, label_set: LabelSet) -> Metrics:
    """Tune thresholds on a folder's out-of-fold predictions, and keep all figures; returns what `pool` does."""
    scored, names = results.read_scored(folder, label_set), label_set.names
    gold, pred, prob, folds = scored.gold, scored.pred, scored.prob, scored.folds
    results.write_thresholds(folder, tune_thresholds(gold, prob), label_set)
    metrics = evaluate(gold, pred, prob, folds, names)
    systems = {"answer": pred, "thresholds": nested_pred(gold, prob, folds)}
    by_fold = {
        system: [score(gold[folds == k], of[folds == k], names) for k in np.unique(folds)]
        for system, of in systems.items()
    }
    metrics["folds"] = {
        system: {key: [of[key] for of in scores] for key in ("f1_macro", "f1_micro")}
        for system, scores in by_fold.items()
    }
    for name, statistic in (("mean", np.mean), ("sd", lambda values: np.std(values, ddof=1))):
        metrics[name] = {
            system: {key: float(statistic(values)) for key, values in of.items()}
            for system, of in metrics["folds"].items()
        }
    resampled = bootstrap(gold, list(systems.values()), names)
    metrics["interval"] = {
        system: {key: interval(values) for key, values in of.items()}
        for system, of in zip(systems, resampled, strict=True)
    }
    results.write_json(folder / results.METRICS, metrics)
    save(draw_reliability(metrics["calibration"]), folder / "reliability.svg")
    return metrics


if __name__ == "__main__":
    _train_one()
