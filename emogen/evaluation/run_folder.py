"""What a run folder holds: the names of its files, its kind and format, its recipe and labels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emogen.errors import InputError, ModelError
from emogen.task.labels import LabelSet, load_label_set
from emogen.task.recipe import Recipe, load_recipe

# The files of a run folder that prediction reads. MODEL in place of ADAPTER holds a model that was tuned in full.
RECIPE, PROMPT, LABELS, ADAPTER, MODEL = "recipe.yaml", "prompt.jinja", "labels.yaml", "adapter", "model"
PREDICTIONS, THRESHOLDS, METRICS = "predictions.jsonl", "thresholds.json", "metrics.json"
FOLDS, DATA = "folds.csv", "data"  # of a cross-validation: the fold of each id; the rows that each fold learns from
LOG = "train_log.jsonl"  # what the trainer logs, a line each time
PAGE, CARD = "report.html", "README.md"
MANIFEST = "manifest.json"


def is_baseline(folder: Path) -> bool:
    """Whether a folder is that of `baseline.cross_validate_baseline`, whose folds leave nothing of their own."""
    return (folder / FOLDS).is_file() and not (folder / DATA).is_dir() and not any(folder.glob("fold-*/"))


def members(runs: Sequence[Path]) -> list[Path]:
    """Run folders, with each cross-validation replaced by the folds that it consists of."""
    return [member for run in runs for member in (sorted(run.glob("fold-*/")) or [run])]


def label_set_of(run: Path) -> LabelSet:
    """The labels of a run, of a cross-validation or of a baseline. Raises InputError if the folder is none."""
    if not (run / LABELS).is_file():
        raise InputError(f"{run}: not the folder of a run, of a cross-validation or of a baseline: it has no {LABELS}")
    return load_label_set(run / LABELS)


def read_recipe(run: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, LabelSet]:
    """The recipe of a run folder, of a baseline or of a file, and its labels, without any model.

    Raises:
        InputError: it is no run folder, or the run has not finished.
    """
    if run.is_dir():
        if not (run / RECIPE).is_file():
            raise InputError(f"{run}: not a run folder: it has no {RECIPE}")
        if is_baseline(run):
            rows = f"train_file={run.resolve() / PREDICTIONS}"
            return load_recipe(run / RECIPE, [rows, *overrides]), load_label_set(run / LABELS)
        if not (run / ADAPTER).is_dir() and not (run / MODEL).is_dir():
            raise ModelError(
                f"{run}: it has no {ADAPTER}/: the run has not finished (resume_from_checkpoint=true goes on)"
            )
    recipe = load_recipe(run / RECIPE if run.is_dir() else run, overrides)
    return recipe, load_label_set(recipe.find(recipe.labels))


def read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file. Raises InputError."""
    try:
        return json.loads(read_text(path) or "{}")
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}; was the file changed?") from None
