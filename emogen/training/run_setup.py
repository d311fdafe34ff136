"""The run folder before and after training: claim it, find its checkpoints, write what makes it self-contained."""

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
    """Create the folder of a run, or make sure that the run in it can be resumed.

    Args:
        resume: whether the run in the folder is resumed.
        fingerprint: see `fingerprint_of`.

    Raises:
        RecipeError: the folder cannot be written to; it is not empty (without `resume`); or the files that the run in
            it depends on have changed (with `resume`).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with paths.writing(folder / ".writable") as file:
            file.write("x")
        (folder / ".writable").unlink()
    except OSError as error:
        raise RecipeError([f"output_dir: {folder}: cannot be written to: {error.strerror}"]) from None
    if not resume:
        if any(path.name != "logs" for path in folder.iterdir()):
            raise RecipeError(
                [
                    f"output_dir: {folder}: not empty, and nothing is overwritten; resume that run with "
                    "resume_from_checkpoint=true, name another folder with output_dir=FOLDER, or remove this one"
                ]
            )
        return
    manifest = folder / MANIFEST
    if manifest.is_file():
        before = json.loads(manifest.read_text(encoding="utf-8")).get("sha256", {})
        changed = [name for name, digest in fingerprint.items() if before.get(name, digest) != digest]
        if changed:
            raise RecipeError(
                [f"output_dir: {folder}: cannot resume this run: {', '.join(changed)} changed since it was started"]
            )


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. A checkpoint is incomplete if the run was killed meanwhile."""
    numbered = [(int(p.name.rpartition("-")[2]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # the file that is written last
        except (OSError, ValueError):
            log.warning(f"{path}: an incomplete checkpoint; skipped")
            continue
        return path
    return None


def split_rows(recipe: Recipe, splits: Splits) -> tuple[Rows, Rows | None]:
    """The training rows, and the validation rows of the evaluations during training.

    The validation rows are a fixed part of the evaluation rows, all of which are scored at the end. With `select_best`
    they are held out from the training rows instead: if the rows of the final score chose the checkpoint, the score
    would be too high.
    """
    if recipe.select_best:
        kept, held = hold_out(splits.train, recipe.select_best.fraction, recipe.seed)
        return splits.train.take(kept), splits.train.take(held)
    if splits.eval is None:
        return splits.train, None
    return splits.train, sample_rows(splits.eval, recipe.eval_samples or len(splits.eval), recipe.seed)


def fingerprint_of(recipe: Recipe) -> dict[str, str]:
    """The sha256 of each file that a run depends on, besides the recipe, by the role of the file.

    Raises:
        RecipeError: a file does not exist.
    """
    files = {"data": recipe.train_file, "eval data": recipe.eval_file, "prompt": recipe.prompt}
    if recipe.init_adapter:
        files["init_adapter"] = f"{recipe.init_adapter}/{ADAPTER}/adapter_model.safetensors"
    found = {name: recipe.find(file) for name, file in files.items() if file is not None}
    if missing := [f"{name}: {path}: no such file" for name, path in found.items() if not path.is_file()]:
        raise RecipeError(missing)
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


def write_run_files(task: Task, folder: Path, fingerprint: dict[str, str], argv: Sequence[str]) -> None:
    """Write what makes a run folder self-contained: the resolved recipe, prompt, labels, examples and the manifest.

    Args:
        fingerprint: see `fingerprint_of`.
        argv: the arguments of the command that started the run.
    """
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
    """Replace the base model in the configuration of an adapter, a folder of this machine, by its name."""
    path = adapter / "adapter_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": model_name}
        with paths.writing(path) as file:
            json.dump(config, file, indent=2)


def peak_memory_bytes() -> int:
    """The peak memory of this process: on its GPU, if it has one, otherwise on the machine."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage returns bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
