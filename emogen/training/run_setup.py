"""The run folder before and after training: claim it, find its checkpoints, write what makes it self-contained."""

import errno
import hashlib
import logging
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emogen import accelerators, paths, processes
from emogen.claims import claim_folder
from emogen.errors import InputError
from emogen.evaluation.resume import changed_keys, digest_of
from emogen.evaluation.run_folder import ADAPTER, LABELS, MANIFEST, PROMPT, RECIPE, RUN, read_manifest, write_manifest
from emogen.model.identity import identify
from emogen.model.sources import locate
from emogen.prediction.weights import BASE, hash_weights
from emogen.task.recipe import Recipe, RecipeError
from emogen.task.rows import Rows
from emogen.task.splits import Splits, hold_out, sample_rows
from emogen.task.task import Task, write_examples
from emogen.task.trl_keys import evaluates
from emogen.task.yaml_files import read_value, read_yaml
from emogen.training.checkpoints import flaw

log = logging.getLogger(__name__)


@contextmanager
def open_folder(task: Task, folder: Path, fingerprint: dict[str, str], *, resume: bool) -> Iterator[None]:
    """Hold the folder of a run for this process: a new one, or one whose run can be resumed.

    Args:
        fingerprint: see `fingerprint_of`.
        resume: whether the run in the folder is resumed.

    Raises:
        InputError: another process trains there; the folder cannot be written to; it is not empty (without `resume`);
            or something that the run in it depends on has changed (with `resume`).
    """
    with claim_folder(folder):
        if resume:
            _check_unchanged(task, folder, fingerprint)
        elif any(path.name != "logs" for path in folder.glob("[!.]*")):
            raise RecipeError(
                [
                    f"output_dir: {folder}: not empty, and nothing is overwritten; resume that run with "
                    "resume_from_checkpoint=true, name another folder with output_dir=FOLDER, or remove this one"
                ]
            )
        yield


def _check_unchanged(task: Task, folder: Path, fingerprint: dict[str, str]) -> None:
    if not (folder / MANIFEST).is_file() or not (folder / RECIPE).is_file():
        if any(folder.glob("checkpoint-*")):
            raise InputError(
                f"{folder}: cannot resume this run: {MANIFEST} or {RECIPE} is missing, so nothing says what it was; "
                "train into another folder with output_dir=FOLDER"
            )
        return  # a new folder, or a run that was killed before its first step
    manifest = read_manifest(folder)
    before = manifest["sha256"]
    # emogen 0.1 wrote fewer digests.
    names = before.keys() | fingerprint.keys() if _has_all_digests(manifest) else before.keys() & fingerprint.keys()
    changed = sorted(name for name in names - {BASE} if before.get(name) != fingerprint.get(name))
    if BASE in before and BASE in fingerprint:
        changed += [BASE] if before[BASE] != fingerprint[BASE] else []
    elif manifest.get("model") != task.recipe.model_name:
        changed.append(f"model_name_or_path ({manifest.get('model')} before, {task.recipe.model_name} now)")
    changed += changed_keys(read_yaml(folder / RECIPE)[0], read_value(task.recipe.to_yaml()))
    if changed:
        raise RecipeError(
            [
                f"output_dir: {folder}: cannot resume this run: {', '.join(changed)} changed since it was started; "
                "undo that, or train into another folder with output_dir=FOLDER"
            ]
        )


def _has_all_digests(manifest: dict[str, Any]) -> bool:
    return "labels" in manifest["sha256"]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Newer ones are passed over, with a warning."""
    numbered = [(int(p.name.rpartition("-")[2]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    has_lists = _has_all_digests(read_manifest(folder))
    for _, path in sorted(numbered, reverse=True):
        if not has_lists and (path / "trainer_state.json").is_file() and (path / "optimizer.pt").is_file():
            log.warning(f"{path}: an older emogen wrote it, without a list of its files, so it is not verified")
            return path
        if (reason := flaw(path)) is None:
            return path
        log.warning(f"{path}: not used: {reason}")
    if numbered:
        log.warning(f"{folder}: none of its checkpoints is complete; the training starts again")
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
        if evaluates(recipe):
            raise InputError(
                f"{recipe.path}: eval_strategy: there are no rows to evaluate on during training; set eval_file or "
                "eval_fraction, or eval_strategy: no"
            )
        return splits.train, None
    return splits.train, sample_rows(splits.eval, recipe.eval_samples or len(splits.eval), recipe.seed)


def fingerprint_of(task: Task, splits: Splits) -> dict[str, str]:
    """The digest of everything that a run depends on, besides the recipe: data, prompt, labels, and the base model.

    A base model that is not on this machine yet has none; `write_run_files` adds it.

    Raises:
        RecipeError: a file does not exist.
    """
    recipe = task.recipe
    files = {"data": recipe.train_file, "eval data": recipe.eval_file, "prompt": recipe.prompt}
    if recipe.init_adapter:
        files["init_adapter"] = f"{recipe.init_adapter}/{ADAPTER}/adapter_model.safetensors"
    found = {name: recipe.find(file) for name, file in files.items() if file is not None}
    if missing := [f"{name}: {path}: no such file" for name, path in found.items() if not path.is_file()]:
        raise RecipeError(missing)
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}
    if recipe.dataset_name:
        digests["data"] = digest_of(splits.train)
    digests["processes"] = str(processes.world_size())  # a step has rows of each of them
    digests["labels"] = hashlib.sha256(task.label_set.to_yaml().encode()).hexdigest()
    return digests | _identity_of_base(recipe)


def _identity_of_base(recipe: Recipe) -> dict[str, str]:
    identity = identify(locate(recipe.model_name, recipe.lm_args.get("model_revision", "main")))
    return {} if identity is None else {BASE: identity}


def record_weights(folder: Path) -> None:
    """Write into the manifest which weights a finished run has."""
    manifest = read_manifest(folder)
    manifest["weights"] = hash_weights(folder)
    paths.write_json(folder / MANIFEST, manifest)


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
        "gpus": accelerators.names(),
    }
    write_manifest(
        folder,
        RUN,
        command=["emogen", "train", *argv],
        model=task.recipe.model_name,
        seed=task.recipe.seed,
        sha256=fingerprint | _identity_of_base(task.recipe),
        hardware=hardware,
    )


def use_one_gpu(args: Any) -> None:
    """Let a process train on one GPU, and say so if it sees several.

    transformers would divide each batch among all of them (`DataParallel`): TRL refuses that, packed rows cannot be
    divided, and a head would train with larger batches than its recipe says.

    Args:
        args: TRL's `SFTConfig`.
    """
    if args.n_gpu > 1:
        log.warning(
            f"One process trains on one GPU, and this machine has {args.n_gpu}. To use all: accelerate launch "
            "--config_file recipes/accelerate/ddp.yaml emogen/train.py RECIPE"
        )
        args._n_gpu = 1  # there is no public way; transformers itself sets it for models on several GPUs


def disk_problem(error: Exception) -> str | None:
    """What is wrong with the disk, if an exception of a library says that a file could not be written."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO) else None
    signs = ("No space left", "I/O error", "PytorchStreamWriter", "inline_container", "Read-only file system")
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return text[:200] if any(sign in str(error) for sign in signs) else None


def peak_memory_bytes() -> int:
    """The peak memory of this process: on its accelerator, if it has one, otherwise on the machine."""
    import resource

    if (peak := accelerators.peak_memory_bytes()) is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage returns bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
