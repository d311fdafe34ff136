"""Publish a run on the Hugging Face Hub: what a model needs, and nothing of its data or of this machine."""

import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import yaml

from emogen import paths
from emogen.errors import InputError, ModelError
from emogen.evaluation.run_folder import (
    ADAPTER,
    CARD,
    LABELS,
    MODEL,
    PROMPT,
    RECIPE,
    RUN,
    THRESHOLDS,
    kind_of,
    read_recipe,
)
from emogen.model.sources import TOKENIZER_FILES, is_path
from emogen.prediction.weights import name_base_model
from emogen.task.task import EXAMPLES

# Everything else stays here: rows, predictions, logs, reports, manifests with commands, checkpoints.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json")
FILES = (PROMPT, LABELS, THRESHOLDS, CARD)
FILE_KEYS = ("train_file", "eval_file", "prompt", "labels")


def stage(run: Path, folder: Path, *, with_examples: bool = False) -> list[Path]:
    """Copy what may be published to a folder.

    Args:
        run: a finished run, or an export of one.
        with_examples: also the training rows that the prompt shows.

    Returns:
        The files, relative to the folder.

    Raises:
        InputError: it is not a finished run; or its prompt shows training rows, and `with_examples` is false.
    """
    recipe, _ = read_recipe(run)
    if kind_of(run) != RUN or not run.is_dir():
        raise InputError(f"{run}: not a single run; push the run of one training, or an export of it")
    lines = (run / EXAMPLES).read_text(encoding="utf-8").splitlines() if (run / EXAMPLES).is_file() else []
    examples = [line for line in lines if line.strip()]
    if examples and not with_examples:
        raise InputError(
            f"{run}: its prompt shows {len(examples)} of the training rows, without which it predicts otherwise; "
            "--with-examples publishes them"
        )
    for weights in (ADAPTER, MODEL):
        for path in sorted((run / weights).glob("*")):  # folders in it, such as those of checkpoints, stay here
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in (*WEIGHTS, *TOKENIZER_FILES)):
                _copy(path, folder / weights / path.name)
    for name in (*FILES, *((EXAMPLES,) if examples else ())):
        if (run / name).is_file():
            _copy(run / name, folder / name)
    _write_recipe(run, folder)
    name_base_model(folder / ADAPTER, _public(recipe.model_name))
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_recipe(run: Path, folder: Path) -> None:
    """The recipe, with the names of files and of a local model in the place of their paths."""
    values = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    for key in FILE_KEYS:
        if values.get(key):
            values[key] = Path(values[key]).name
    values["model_name_or_path"] = _public(values["model_name_or_path"])
    kept = {key: value for key, value in values.items() if key not in ("output_dir", "init_adapter")}
    (folder / RECIPE).write_text(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _public(model_name: str) -> str:
    """The name of a base model on the Hub, or of its folder on this machine without the folders above it."""
    is_local = paths.expand(model_name).is_dir() or is_path(model_name)
    return Path(model_name).name if is_local else model_name


def push(staged: Path, name: str, repository: str, *, private: bool = False) -> str:
    """Publish a folder that `stage` has filled.

    Args:
        name: of the run, for the message of the commit.
        repository: `owner/name`. It is created if it is not there; the files of one that is are replaced.

    Returns:
        The address of the commit.

    Raises:
        ModelError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=staged, commit_message=f"{name}, by emogen")
    except Exception as error:  # the library raises anything from OSError to its own errors
        raise ModelError(f"{repository}: the Hub refuses, or cannot be reached: {error}") from error
    return str(commit.commit_url)


def check_repository(name: str) -> None:
    """Refuse what is no `owner/name`.

    Raises:
        InputError: it is none.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise InputError(f"{name}: expected the name of a repository on the Hub, OWNER/NAME")


def sizes(folder: Path, files: Sequence[Path]) -> list[tuple[str, int]]:
    """The names and sizes in bytes of files in a folder."""
    return [(str(file), (folder / file).stat().st_size) for file in files]
