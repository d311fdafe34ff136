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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from emogen import paths
from emogen.errors import InputError
from emogen.evaluation import results, run_folder
from emogen.evaluation.metrics import Metrics, bootstrap, evaluate, interval, nested_pred, score, tune_thresholds
from emogen.evaluation.run_folder import (
    BASELINE,
    CROSS_VALIDATION,
    DATA,
    FOLDS,
    LABELS,
    MANIFEST,
    PROMPT,
    RECIPE,
    write_manifest,
)
from emogen.experiments.jobs import LOCAL, RunProcess, overrides_of, own_folder, run_all
from emogen.prediction.tfidf import fit_tfidf
from emogen.report.figures import draw_reliability, save
from emogen.report.page import report_finished
from emogen.task.labels import LabelSet, load_label_set
from emogen.task.recipe import Recipe, load_recipe
from emogen.task.rows import Rows
from emogen.task.splits import all_rows, make_folds

# What a fold settles for itself, and how the machine is used: not what is being measured.
_OWN = ("train_file", "eval_file", "eval_fraction", "output_dir", "resume_from_checkpoint", "disable_tqdm")


def cross_validate(
    path: str | Path,
    n_folds: int = 5,
    overrides: Sequence[str] = (),
    *,
    jobs: int = 1,
    where: Sequence[str] = LOCAL,
    show: Callable[[list[RunProcess]], Any] = lambda folds: None,
) -> tuple[Path, Metrics]:
    """Run all folds of a recipe that are not done, and put together what they predicted.

    Args:
        path: a recipe. Its training rows are what is split; its `eval_file` and `eval_fraction` are not used.
        overrides: `key=value`; `output_dir` is the folder of the cross-validation (`runs/NAME-cv`).
        jobs: folds at once. Each has a GPU, or its part of the cores, for itself.
        where: `LOCAL`, or `POD`: each fold on a pod of its own, which ends with it.
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
    folds = claim(folder, CROSS_VALIDATION, recipe, label_set, rows, n_folds)
    runs = [RunProcess(k, folder / f"fold-{k}") for k in range(n_folds)]
    commands = [[str(path), *overrides, *_prepare(folder, recipe, rows, folds, run, label_set)] for run in runs]
    run_all(runs, commands, jobs, show, where)
    metrics = pool(folder, rows, folds, label_set)
    report_finished(folder)
    return folder, metrics


def cross_validate_baseline(
    path: str | Path,
    n_folds: int = 5,
    overrides: Sequence[str] = (),
    progress: Callable[[int], Any] = lambda n: None,
) -> tuple[Path, Metrics]:
    """Cross-validate the baseline on a recipe's rows; its folds are those of `crossval.cross_validate`.

    Words and pairs of words, and runs of two to five characters within words, weighted by TF-IDF (sublinear, seen in
    two texts or more); for each label a logistic regression of its own (C = 4). A label is given where its probability
    is above 0.5, or by thresholds.

    Args:
        progress: is told how many more folds are done.

    Returns:
        The folder (`runs/NAME-baseline`), and the figures.

    Raises:
        InputError: as `crossval.cross_validate`.
    """
    recipe = load_recipe(path, overrides)
    label_set = load_label_set(recipe.find(recipe.labels))
    rows = all_rows(recipe, label_set)
    folder = own_folder(recipe, overrides, "baseline")
    folds = claim(folder, BASELINE, recipe, label_set, rows, n_folds)
    texts = np.array(rows.texts, dtype=object)
    prob = np.zeros(rows.truth.shape, dtype=np.float32)
    for fold in range(n_folds):
        held = folds == fold
        prob[held] = fit_tfidf(texts[~held], rows.truth[~held])(texts[held])
        progress(1)
    pred = (prob > 0.5).astype(np.int8)
    results.write_jsonl(folder / run_folder.PREDICTIONS, rows, pred, prob, label_set, folds=folds)
    metrics = sum_up(folder, label_set)
    report_finished(folder)
    return folder, metrics


def claim(folder: Path, kind: str, recipe: Recipe, label_set: LabelSet, rows: Rows, n_folds: int) -> np.ndarray:
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
    if not (folder / MANIFEST).is_file():
        write_manifest(folder, kind, model=recipe.model_name, seed=recipe.seed)
    return folds


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _prepare(
    folder: Path, recipe: Recipe, rows: Rows, folds: np.ndarray, run: RunProcess, label_set: LabelSet
) -> list[str]:
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


def pool(folder: Path, rows: Rows, folds: np.ndarray, label_set: LabelSet) -> Metrics:
    """Put the folds' predictions together, in the order of the rows; tune thresholds on them; keep all figures.

    Returns:
        What `score.evaluate` says of all rows; with `folds` (of each its `f1_macro` and `f1_micro`, by answers and by
        nested thresholds), `mean` and `sd` of these over the folds, and the 95 % bootstrap `interval` of the pooled
        figures and of each label's F1.
    """
    records = {}
    for fold in np.unique(folds):
        for record in results.read_records(folder / f"fold-{fold}" / run_folder.PREDICTIONS):
            records[record["id"]] = record | {"fold": int(fold)}
    with paths.writing(folder / run_folder.PREDICTIONS) as file:
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
    paths.write_json(folder / run_folder.METRICS, metrics)
    save(draw_reliability(metrics["calibration"]), folder / "reliability.svg")
    return metrics
