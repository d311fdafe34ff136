"""Cross-validation: a run per fold, each in its own process -> out-of-fold predictions -> thresholds and metrics.

Everything is kept in one folder, and finished work is not repeated: an interrupted cross-validation resumes from the
newest checkpoint of the fold that was running.

    runs/NAME-cv/
        recipe.yaml, prompt.jinja, labels.yaml
                           what is cross-validated; the folder accepts nothing else
        folds.csv          the fold of each id
        data/              the training rows and the held-out rows of each fold
        fold-0/ ...        a run folder per fold; fold-0.log is the output of its process
        predictions.jsonl  every row, as predicted by the model that was not trained on it
        thresholds.json    tuned on all of these rows; metrics.json has the scores of nested thresholds
        metrics.json       all metrics; reliability.svg shows the calibration
        report.html        all of this on a page; README.md is the model card
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from emogen import paths
from emogen.claims import claim_folder
from emogen.console import Bar, progress_bar
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.caveats import is_collapsed
from emogen.evaluation.metrics import (
    MIN_ROWS,
    Metrics,
    Objective,
    bootstrap,
    evaluate,
    intervals,
    nested_pred,
    score,
    tune_thresholds,
)
from emogen.evaluation.results import Prediction, pred_matrix
from emogen.evaluation.resume import changed_keys, digest_of
from emogen.evaluation.run_folder import (
    BASELINE,
    CROSS_VALIDATION,
    DATA,
    FOLDS,
    LABELS,
    MANIFEST,
    METRICS,
    PREDICTIONS,
    PROMPT,
    PROMPTED,
    RECIPE,
    read_manifest,
    read_text,
    write_manifest,
)
from emogen.experiments.jobs import LOCAL, RunProcess, overrides_of, own_folder, run_all
from emogen.prediction.baseline import cross_fit_baseline
from emogen.prediction.classifier import labels_from_prob
from emogen.prediction.remote import Endpoint, RemoteClassifier
from emogen.report.figures import draw_reliability, save
from emogen.report.page import report_finished
from emogen.report.trackers import load_trackers, log_results
from emogen.task.delimited import csv_text
from emogen.task.labels import LabelSet, load_label_set
from emogen.task.prompt import load_prompt
from emogen.task.recipe import Recipe, load_recipe
from emogen.task.rows import Rows
from emogen.task.splits import all_rows, draw_rows, make_folds
from emogen.task.task import make_task, prompt_warnings
from emogen.task.yaml_files import read_value, read_yaml

log = logging.getLogger(__name__)

# Recipe keys that may change between calls: each fold sets its own values, and they do not affect what is measured.
_SET_BY_FOLD = ("train_file", "eval_file", "eval_fraction", "output_dir", "resume_from_checkpoint", "disable_tqdm")


def cross_validate(
    path: str | Path,
    n_folds: int = 5,
    overrides: Sequence[str] = (),
    *,
    jobs: int = 1,
    where: Sequence[str] = LOCAL,
    show: Callable[[list[RunProcess]], Any] = lambda runs: None,
) -> tuple[Path, Metrics]:
    """Run all folds of a recipe that are not done, and pool their predictions.

    Args:
        path: a recipe. Its training rows are split; its `eval_file` and `eval_fraction` are not used.
        overrides: `key=value`. `output_dir` is the folder of the cross-validation (default: `runs/NAME-cv`).
        jobs: folds at a time. Each has its own GPU, or its share of the cores.
        where: `LOCAL`; `POD` for a rented GPU per fold, which is terminated when the fold is done; or `RAY`.
        show: called twice a second with all folds, while they run.

    Returns:
        The folder, and the metrics of `sum_up`.

    Raises:
        InputError: the recipe or its data cannot be used, or the folder holds another cross-validation.
        ModelError: a fold failed; the message names its log.
    """
    recipe = load_recipe(path, overrides)
    recipe.require_own_model("is not tuned, so it cannot be cross-validated")
    folder = own_folder(recipe, overrides, "cv")
    label_set = load_label_set(recipe.find(recipe.labels))
    rows = all_rows(recipe, label_set)
    trackers = load_trackers(recipe)
    with claim_folder(folder):
        folds = begin(folder, CROSS_VALIDATION, recipe, label_set, rows, n_folds)
        runs = [RunProcess(k, folder / f"fold-{k}") for k in range(n_folds)]
        commands = [[str(path), *overrides, *_prepare(folder, recipe, rows, folds, run, label_set)] for run in runs]
        run_all(runs, commands, jobs, show, where)
        metrics = pool(folder, rows, folds, label_set, recipe.tune)
        report_finished(folder)
        log_results(trackers, folder, recipe, metrics)
    return folder, metrics


def cross_validate_baseline(
    path: str | Path,
    n_folds: int = 5,
    overrides: Sequence[str] = (),
    progress: Callable[[int], Any] = lambda n: None,
) -> tuple[Path, Metrics]:
    """Cross-validate the baseline, see `cross_fit_baseline`, on the rows of a recipe; the folds are those of
    `cross_validate`.

    Args:
        progress: called with the number of folds that were done since the last call.

    Returns:
        The folder (default: `runs/NAME-baseline`), and the metrics of `sum_up`. Its answers are the labels with a
        probability above 0.5.

    Raises:
        InputError: as for `cross_validate`.
    """
    recipe = load_recipe(path, overrides)
    label_set = load_label_set(recipe.find(recipe.labels))
    rows = all_rows(recipe, label_set)
    folder = own_folder(recipe, overrides, "baseline")
    trackers = load_trackers(recipe)
    with claim_folder(folder):
        folds = begin(folder, BASELINE, recipe, label_set, rows, n_folds)
        prob = cross_fit_baseline(
            rows.texts, rows.truth, folds,
            features=recipe.features, exactly_one=label_set.exactly_one, progress=progress,
        )  # fmt: skip
        pred = labels_from_prob(prob, label_set)
        results.write_jsonl(folder / PREDICTIONS, rows, pred, prob, label_set, folds=folds)
        metrics = sum_up(folder, label_set, recipe.tune)
        report_finished(folder)
        log_results(trackers, folder, recipe, metrics)
    return folder, metrics


def cross_validate_prompted(
    path: str | Path,
    n_folds: int = 5,
    overrides: Sequence[str] = (),
    bar: Bar = progress_bar,
) -> tuple[Path, Metrics]:
    """Ask the model of an endpoint about all rows of a recipe, which is not tuned.

    The folds are those of `cross_validate`. Few-shot examples, drawn or nearest, and an order of labels by frequency
    come from the rows of the other folds alone.

    Returns:
        The folder (default: `runs/NAME-cv`), and the metrics of `sum_up`. A probability is 1 for a label of the answer
        and 0 for the others.

    Raises:
        InputError: as for `cross_validate`.
        ModelError: the endpoint fails. Its answers are kept, and the same command goes on from there.
    """
    recipe = load_recipe(path, overrides)
    label_set = load_label_set(recipe.find(recipe.labels))
    prompt = load_prompt(recipe.find(recipe.prompt))
    rows = all_rows(recipe, label_set)
    folder = own_folder(recipe, overrides, "cv")
    trackers = load_trackers(recipe)
    with claim_folder(folder):
        folds = begin(folder, PROMPTED, recipe, label_set, rows, n_folds)
        found: dict[str, Prediction] = {}
        endpoint = Endpoint(recipe)  # one for all folds, which share its limit
        with bar(f"Answers of {recipe.api_model}", len(rows)) as advance:
            for fold in range(n_folds):
                held, others = (rows.take(np.flatnonzero(chosen)) for chosen in (folds == fold, folds != fold))
                examples, others = draw_rows(others, recipe)
                task = make_task(recipe, label_set, prompt, others, examples)
                if fold == 0:
                    for warning in prompt_warnings(task):
                        log.warning(str(warning))
                answers = RemoteClassifier(task, others, endpoint).predict(held.texts, progress=advance)
                found |= zip(held.ids, answers, strict=True)
        predictions = [found[row_id] for row_id in rows.ids]
        pred = pred_matrix(predictions)
        prob = pred.astype(np.float32)
        results.write_jsonl(folder / PREDICTIONS, rows, pred, prob, label_set, predictions, folds)
        metrics = sum_up(folder, label_set, recipe.tune)
        report_finished(folder)
        log_results(trackers, folder, recipe, metrics)
    return folder, metrics


def begin(folder: Path, kind: str, recipe: Recipe, label_set: LabelSet, rows: Rows, n_folds: int) -> np.ndarray:
    """Make the folds, and write down in the folder what is cross-validated. A second call has to find the same.

    Args:
        kind: CROSS_VALIDATION, BASELINE or PROMPTED.

    Returns:
        The fold of each row, int64 [n].

    Raises:
        InputError: the folder holds something else, or the rows cannot be split into these folds.
    """
    try:
        folds = make_folds(rows, n_folds, recipe.seed)
    except ValueError as error:
        raise InputError(str(error)) from None
    folds_csv = csv_text([("id", "fold"), *zip(rows.ids, folds, strict=True)])
    if recipe.init_adapter and read_text(recipe.find(recipe.init_adapter) / FOLDS) != folds_csv:
        raise InputError(
            f"init_adapter: {recipe.init_adapter}: not a cross-validation with the same rows and folds; its adapters "
            "were trained on rows that these folds hold out"
        )
    if not (folder / RECIPE).is_file() and any(folder.glob("[!.]*")):
        raise InputError(f"{folder}: not empty, and not a cross-validation; name another folder with output_dir=FOLDER")
    values = {k: v for k, v in yaml.safe_load(recipe.to_yaml()).items() if k not in _SET_BY_FOLD}
    files = {
        RECIPE: yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        PROMPT: read_text(recipe.find(recipe.prompt)) or "",
        LABELS: label_set.to_yaml(),
        FOLDS: folds_csv,
    }
    digest = digest_of(rows)
    if changed := _changes(folder, files, digest):
        raise InputError(
            f"{folder}: cannot resume this cross-validation: {', '.join(changed)} changed since it was started; name "
            "another folder with output_dir=FOLDER, or remove this one"
        )
    for name, text in files.items():
        if not (folder / name).is_file():
            with paths.writing(folder / name) as file:
                file.write(text)
    if not (folder / MANIFEST).is_file():
        write_manifest(folder, kind, model=recipe.model_name, seed=recipe.seed, sha256={"rows": digest})
    return folds


def _changes(folder: Path, files: dict[str, str], rows: str) -> list[str]:
    """The files, rows and recipe keys that differ from those of the folder; what it lacks does not differ.

    Args:
        rows: the digest of the rows.
    """
    changed = [name for name, text in files.items() if name != RECIPE and read_text(folder / name) not in (text, None)]
    if read_manifest(folder)["sha256"].get("rows", rows) != rows:
        changed.append("the texts or labels of the rows")
    if not (folder / RECIPE).is_file():
        return changed
    before = {key: value for key, value in read_yaml(folder / RECIPE)[0].items() if key not in _SET_BY_FOLD}
    return changed + changed_keys(before, read_value(files[RECIPE]))


def _prepare(
    folder: Path, recipe: Recipe, rows: Rows, folds: np.ndarray, run: RunProcess, label_set: LabelSet
) -> list[str]:
    """Write the rows of a fold, and return the overrides that turn the recipe into the run of this fold."""
    held = folds == run.number
    train_file, eval_file = (folder / DATA / f"{run.folder.name}-{part}.jsonl" for part in ("train", "eval"))
    for file, is_included in ((train_file, ~held), (eval_file, held)):
        if not file.is_file():
            results.write_rows(file, rows.take(np.flatnonzero(is_included)), label_set)
    more = {}
    if recipe.init_adapter:
        more["init_adapter"] = str(recipe.find(recipe.init_adapter).resolve() / run.folder.name)
    return overrides_of(run, train_file, eval_file, more)


def pool(folder: Path, rows: Rows, folds: np.ndarray, label_set: LabelSet, objective: Objective) -> Metrics:
    """Write the predictions of all folds to one file, in the order of the rows, and score it; see `sum_up`."""
    records = {}
    for fold in np.unique(folds):
        for record in results.read_records(folder / f"fold-{fold}" / PREDICTIONS):
            records[record["id"]] = record | {"fold": int(fold)}
    if missing := [f"fold-{fold}" for row_id, fold in zip(rows.ids, folds, strict=True) if row_id not in records]:
        raise InputError(
            f"{folder}: {len(missing):,} rows have no prediction, the first one in {missing[0]}/{PREDICTIONS}; was a "
            "file changed? Remove the folder of that fold to run it again"
        )
    with paths.writing(folder / PREDICTIONS) as file:
        for row_id in rows.ids:
            file.write(json.dumps(records[row_id], ensure_ascii=False) + "\n")
    return sum_up(folder, label_set, objective)


def sum_up(folder: Path, label_set: LabelSet, objective: Objective = "f1_macro") -> Metrics:
    """Tune thresholds on the out-of-fold predictions of a folder, and write all metrics.

    A label set with `exactly_one` has no thresholds: its only system is `answer`.

    Args:
        objective: see `tune_thresholds`.

    Returns:
        The metrics of `evaluate` on all rows. Beside them, for the systems `answer` and `thresholds` (nested): `folds`,
        the `f1_macro` and `f1_micro` of each fold; `mean` and `sd` of these; `interval`, the 95 % bootstrap intervals
        of both, pooled, and of each label's F1 (null where there are too few rows for one); `collapsed_folds`, the
        numbers of the folds, of 30 rows or more, in which most labels are given to every row or to none; and
        `absent_in_folds`, the labels of which some folds, but not all, have no positive row.
    """
    scored, names = results.read_scored(folder, label_set), label_set.names
    gold, pred, prob, folds = scored.gold, scored.pred, scored.prob, scored.folds
    metrics = evaluate(gold, pred, prob, folds, names, objective, exactly_one=label_set.exactly_one)
    systems = {"answer": (pred, metrics)}
    if not label_set.exactly_one:
        results.write_thresholds(folder, tune_thresholds(gold, prob, objective), label_set)
        systems["thresholds"] = (nested_pred(gold, prob, folds, objective), metrics["by_thresholds"])
    by_fold = {system: _score_folds(gold, labels, folds, names) for system, (labels, _) in systems.items()}
    metrics["folds"] = {
        system: {key: [fold[key] for fold in scores.values()] for key in ("f1_macro", "f1_micro")}
        for system, scores in by_fold.items()
    }
    for name, statistic in (("mean", np.mean), ("sd", lambda values: np.std(values, ddof=1))):
        metrics[name] = {
            system: {key: float(statistic(values)) for key, values in of_folds.items()}
            for system, of_folds in metrics["folds"].items()
        }
    metrics["collapsed_folds"] = {
        system: collapsed
        for system, scores in by_fold.items()
        if (collapsed := [k for k, fold in scores.items() if fold["n"] >= MIN_ROWS and is_collapsed(fold)])
    }
    absent = {name for fold in by_fold["answer"].values() for name in fold["no_positives"]} - {*metrics["no_positives"]}
    metrics["absent_in_folds"] = [name for name in names if name in absent]
    resampled = bootstrap(gold, [labels for labels, _ in systems.values()], names)
    metrics["interval"] = {
        system: intervals(f1, own) for (system, (_, own)), f1 in zip(systems.items(), resampled, strict=True)
    }
    paths.write_json(folder / METRICS, metrics)
    save(draw_reliability(metrics["calibration"]), folder / "reliability.svg")
    return metrics


def _score_folds(gold: np.ndarray, pred: np.ndarray, folds: np.ndarray, names: Sequence[str]) -> dict[int, Metrics]:
    return {int(k): score(gold[folds == k], pred[folds == k], names) for k in np.unique(folds)}
