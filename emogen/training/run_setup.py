"""A run folder before and after training: claimed, resumed, and filled with what makes it self-contained."""

import hashlib
import json
import logging
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from emogen import paths
from emogen.evaluation.run_folder import ADAPTER, LABELS, MANIFEST, PROMPT, RECIPE, RUN, write_manifest
from emogen.task.recipe import Recipe, RecipeError
from emogen.task.rows import Rows
from emogen.task.splits import Splits, hold_out, sample_rows
from emogen.task.task import Task, write_examples

log = logging.getLogger(__name__)


def claim_folder(folder: Path, resume: bool, fingerprint: dict[str, str]) -> None:
    """Make sure that a run may write here.

    Raises:
        RecipeError: the folder holds another run, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with paths.writing(folder / ".writable") as file:
            file.write("x")
        (folder / ".writable").unlink()
    except OSError as error:
        raise RecipeError([f"output_dir: {folder}: cannot be written to: {error.strerror}"]) from None
    manifest = folder / MANIFEST
    if not resume:
        if any(path.name != "logs" for path in folder.iterdir()):
            raise RecipeError(
                [
                    f"output_dir: {folder}: not empty, and nothing is overwritten. Go on with that run: "
                    "resume_from_checkpoint=true; start another one: output_dir=FOLDER; or remove the folder"
                ]
            )
        return
    if manifest.is_file():
        before = json.loads(manifest.read_text(encoding="utf-8")).get("sha256", {})
        changed = [name for name, digest in fingerprint.items() if before.get(name, digest) != digest]
        if changed:
            raise RecipeError(
                [f"output_dir: {folder}: cannot go on with this run: {', '.join(changed)} changed since it was started"]
            )


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end. One that a kill cut short is passed over."""
    numbered = [(int(p.name.rpartition("-")[2]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # the file that is written last
        except (OSError, ValueError):
            log.warning(f"{path} is incomplete; passed over")
            continue
        return path
    return None


def split_rows(recipe: Recipe, splits: Splits) -> tuple[Rows, Rows | None]:
    """The rows to learn from, and those that are looked at during training; at the end all of `splits.eval` are scored.

    Where a checkpoint is chosen by them they are held out from the training rows: a choice by the rows that are scored
    in the end would flatter the score. Otherwise they are a fixed part of the evaluation rows.
    """
    if recipe.select_best:
        kept, held = hold_out(splits.train, recipe.select_best.fraction, recipe.seed)
        return splits.train.take(kept), splits.train.take(held)
    if splits.eval is None:
        return splits.train, None
    return splits.train, sample_rows(splits.eval, recipe.eval_samples or len(splits.eval), recipe.seed)


def fingerprint_of(recipe: Recipe) -> dict[str, str]:
    """sha256 of everything besides the recipe that a run depends on."""
    files = {"data": recipe.train_file, "eval data": recipe.eval_file, "prompt": recipe.prompt}
    if recipe.init_adapter:
        files["init_adapter"] = f"{recipe.init_adapter}/{ADAPTER}/adapter_model.safetensors"
    found = {name: recipe.find(file) for name, file in files.items() if file is not None}
    if missing := [f"{name}: {path}: no such file" for name, path in found.items() if not path.is_file()]:
        raise RecipeError(missing)
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


def write_run_files(task: Task, folder: Path, fingerprint: dict[str, str], argv: Sequence[str]) -> None:
    """Write what makes the folder self-contained: the resolved recipe, prompt, labels, examples, and the manifest."""
    import torch

    changes = {"prompt": PROMPT, "labels": LABELS, "output_dir": str(folder), "resume_from_checkpoint": None}
    files = {
        RECIPE: task.recipe.to_yaml(**changes),
        PROMPT: task.prompt.source,
        LABELS: task.label_set.to_yaml(),
    }
    for name, text in files.items():
        with paths.writing(folder / name) as file:
            file.write(text)
    write_examples(folder, task.examples)
    hardware = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
    }
    write_manifest(
        folder,
        RUN,
        command=["emogen", "train", *argv],
        model=task.recipe.model_name,
        seed=task.recipe.seed,
        sha256=fingerprint,
        hardware=hardware,
    )


def name_base_model(adapter: Path, model_name: str) -> None:
    """Let the saved adapter name its base model as the recipe does, not by the folder of this machine's cache."""
    path = adapter / "adapter_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": model_name}
        with paths.writing(path) as file:
            json.dump(config, file, indent=2)


def peak_memory_bytes() -> int:
    """The most memory that this process has had: of its GPU, where it has one, else of the machine."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes there, and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
