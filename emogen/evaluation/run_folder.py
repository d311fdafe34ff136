"""The contents of a run folder: names of its files, format and kind, recipe and labels."""

import csv
import hashlib
import io
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from emogen import paths
from emogen.distribution import __version__
from emogen.errors import InputError, ModelError
from emogen.evaluation.metrics import Objective
from emogen.task.labels import LabelSet, load_label_set
from emogen.task.recipe import Recipe, load_recipe
from emogen.task.task import EXAMPLES
from emogen.task.yaml_files import as_overrides, read_value, read_yaml

# Read by prediction. A model that was tuned in full is in MODEL and has no ADAPTER.
RECIPE, PROMPT, LABELS, ADAPTER, MODEL = "recipe.yaml", "prompt.jinja", "labels.yaml", "adapter", "model"
# Written by scoring.
PREDICTIONS, THRESHOLDS, METRICS = "predictions.jsonl", "thresholds.json", "metrics.json"
FOLDS, DATA = "folds.csv", "data"  # cross-validations only: the fold of each id; the rows of each fold
LEARNED = ("labels", "prompt", "answer", "order", "examples", "examples_by", "features")  # keys of a recipe
LOG = "train_log.jsonl"  # the log entries of the trainer, one JSON object per line
AUDIT = "audit.json"  # what emogen audit says about the rows
PAGE, CARD = "report.html", "README.md"
MANIFEST = "manifest.json"

FORMAT = 1  # format of the files in a run folder; raised when an older emogen could no longer read them
RUN, CROSS_VALIDATION, BASELINE, PROMPTED, PROMPTS = "run", "cross-validation", "baseline", "prompted", "prompts"
UNTUNED = (BASELINE, PROMPTED)  # cross-validated without a run for each fold
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers")


def write_manifest(folder: Path, kind: str, **facts: Any) -> None:
    """Write the manifest of a folder.

    Args:
        kind: RUN, CROSS_VALIDATION, BASELINE, PROMPTED or PROMPTS.
        facts: further entries. The format, the versions of packages and the commit are added.
    """
    versions = {"emogen": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    manifest: dict[str, Any] = {"format": FORMAT, "kind": kind, **facts, "versions": versions, "commit": _commit()}
    paths.write_json(folder / MANIFEST, manifest)


def _commit() -> str | None:
    """The commit of the checkout that contains this file, or None for an installed package."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder; an empty one if there is none. Its `sha256` and `weights` are there, maybe empty.

    Raises:
        InputError: it is not valid, or a newer emogen wrote it in another format.
    """
    path = folder / MANIFEST
    manifest: dict[str, Any] = {"format": FORMAT, "sha256": {}, "weights": {}} | read_json(path)
    kinds = {"format": int, "kind": str, "sha256": dict, "weights": dict, "versions": dict, "hardware": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(manifest.get(key, kind()), kind)]:
        raise InputError(f"{path}: {', '.join(wrong)}: not what emogen writes; was the file changed?")
    if manifest["format"] > FORMAT:
        raise InputError(
            f"{path}: format {manifest['format']}, but this emogen ({__version__}) reads format {FORMAT}; install a "
            "newer emogen"
        )
    return manifest


def kind_of(folder: Path) -> str:
    """The kind of a folder: `run`, `cross-validation`, `baseline`, `prompted` or `prompts`.

    The kind is in the manifest. emogen 0.1 wrote manifests without a kind, and none for cross-validations and
    baselines; for its folders the kind is inferred from the files.

    Raises:
        InputError: the manifest is not valid, or a newer emogen wrote it in another format.
    """
    manifest = read_manifest(folder)
    if "kind" in manifest:
        return str(manifest["kind"])
    if not (folder / FOLDS).is_file():
        return RUN
    has_folds = (folder / DATA).is_dir() or bool(fold_folders(folder))
    return CROSS_VALIDATION if has_folds else BASELINE


def member_folders(runs: Sequence[Path]) -> list[Path]:
    """Replace each cross-validation in a list of run folders by the run folders of its folds.

    Raises:
        ModelError: folds of it are missing.
    """
    members = []
    for run in runs:
        folds, wanted = fold_folders(run), set(read_folds(run).values())
        if folds and wanted and len(folds) != len(wanted):
            raise ModelError(
                f"{run}: it has {len(folds)} folders of {len(wanted)} folds ({FOLDS}); the command that started the "
                "cross-validation completes it"
            )
        members += folds or [run]
    return members


def fold_folders(run: Path) -> list[Path]:
    """The run folders of the folds of a cross-validation, by number; a copy of one (`fold-0 old`) is none of them."""
    folders = [folder for folder in run.glob("fold-*/") if re.fullmatch(r"fold-\d+", folder.name)]
    return sorted(folders, key=fold_number)


def fold_number(folder: Path) -> int:
    """The number of a fold, of which this is the run folder."""
    return int(folder.name.removeprefix("fold-"))


def read_folds(run: Path) -> dict[str, str]:
    """The fold of each id, for a cross-validation or a baseline; empty for others."""
    lines = io.StringIO(read_text(run / FOLDS), newline="")
    return {row[0]: row[-1] for row in list(csv.reader(lines))[1:] if row}


def label_set_of(run: Path) -> LabelSet:
    """Load the labels of a run, a cross-validation or a baseline.

    Raises:
        InputError: the folder is none of these.
    """
    if not (run / LABELS).is_file():
        raise InputError(f"{run}: not the folder of a run, a cross-validation or a baseline: it has no {LABELS}")
    return load_label_set(run / LABELS)


def read_recipe(run: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, LabelSet]:
    """Read the recipe and the labels of a run folder, a baseline or a recipe file, without loading a model.

    Args:
        run: a folder or a recipe file.
        overrides: `key=value` pairs that replace values of the recipe; those of a folder see `_allowed`.

    Raises:
        InputError: the folder is not a run folder, or an override would change what its model learned.
        ModelError: the run has not finished.
    """
    if run.is_dir():
        if not (run / RECIPE).is_file():
            raise InputError(f"{run}: not a run folder: it has no {RECIPE}")
        overrides = _allowed(run, overrides)
        if kind_of(run) in UNTUNED:
            # The recipe of such a folder names no training data, which every recipe needs.
            train_file = f"train_file={run.resolve() / PREDICTIONS}"
            return load_recipe(run / RECIPE, [train_file, *overrides]), load_label_set(run / LABELS)
        if not (run / ADAPTER).is_dir() and not (run / MODEL).is_dir():
            raise ModelError(
                f"{run}: it has no {ADAPTER}/: the run has not finished; resume_from_checkpoint=true resumes it"
            )
    recipe = load_recipe(run / RECIPE if run.is_dir() else run, overrides)
    return recipe, load_label_set(recipe.find(recipe.labels))


def _allowed(run: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides of a finished run, which may not change what its model learned and its thresholds rest on.

    `features` allows the functions in it to run, those of several baselines at once; each keeps its own features.

    Raises:
        InputError: one of them does.
    """
    recorded, _ = read_yaml(run / RECIPE)
    allowed = []
    for override in overrides:
        key, _, text = override.partition("=")
        if key in LEARNED:
            own, value = recorded.get(key, Recipe.model_fields[key].default), read_value(text)
            if key == "features" and isinstance(value, list) and all(name in value for name in own):
                (override,) = as_overrides({"features": own})
            elif value != own:
                raise InputError(
                    f"{override!r}: {run} was made with {key}: {json.dumps(own, ensure_ascii=False)}, and its model "
                    f"knows nothing else; leave {key} out, or make another run"
                )
        allowed.append(override)
    return allowed


def tuned_for(run: Path) -> Objective:
    """What the thresholds of a folder were tuned for: `tune` of its recipe."""
    recipe = read_yaml(run / RECIPE)[0] if (run / RECIPE).is_file() else {}
    return "f1_micro" if recipe.get("tune") == "f1_micro" else "f1_macro"


def require_own_prob(run: Path, prob: str) -> None:
    """Refuse probabilities of another kind than those that the thresholds, or the stack, of a run rest on.

    Args:
        prob: `prob` of an override.

    Raises:
        InputError: they are.
    """
    own = read_yaml(run / RECIPE)[0].get("prob", Recipe.model_fields["prob"].default) if run.is_dir() else prob
    if own != prob:
        raise InputError(
            f"'prob={prob}': the decisions of {run} were tuned on probabilities with prob: {own}; leave prob out, or "
            "use predict_by=answer"
        )


def content_hash(run: Path) -> str:
    """The sha256 of everything that the predictions of a run, a cross-validation, a baseline or a recipe depend on.

    The base model of an adapter is in it by its name, not by its weights.
    """
    if not run.is_dir():
        recipe = load_recipe(run)
        files = [recipe.find(name) for name in (recipe.prompt, recipe.labels) if recipe.find(name).is_file()]
        return _sha256([recipe.path, *files])
    folders = [run, *fold_folders(run)]
    names = (RECIPE, PROMPT, LABELS, EXAMPLES, THRESHOLDS, PREDICTIONS)
    files = [folder / name for folder in folders for name in names]
    files += [file for folder in folders for weights in (ADAPTER, MODEL) for file in (folder / weights).rglob("*")]
    return _sha256([file for file in files if file.is_file()])


def _sha256(files: Sequence[Path]) -> str:
    """One sha256 of several files, which does not depend on their folder."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_text(path: Path) -> str | None:
    """The text of a file, or None if there is no such file.

    Raises:
        InputError: the file is not UTF-8.
    """
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8; was the file changed?") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file.

    Raises:
        InputError: the file is not valid JSON, or not an object.
    """
    text = read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}; was the file changed?") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object: {text[:60]}; was the file changed?")
    return value
