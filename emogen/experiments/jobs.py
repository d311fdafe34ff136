"""Several runs of a recipe: each in a process of its own, on a GPU or cores of its own."""

import json
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emogen.errors import ModelError
from emogen.evaluation import results, run_folder
from emogen.task.recipe import Recipe

log = logging.getLogger(__name__)

# What does not hold of the files that are written for it.
_FORM = ("text_column", "id_column", "separator", "encoding", "dataset_name", "dataset_config", "dataset_test_split")


# What trains a fold, as Python's arguments: this machine, or a rented one that the run comes home from.
LOCAL = ("-m", "emogen.worker")
POD = ("-m", "emogen.cli", "pod", "launch", "--follow")


@dataclass
class RunProcess:
    """A fold under way: its run folder, and the last line of the run's log (`train_log.jsonl`)."""

    number: int
    folder: Path
    process: subprocess.Popen | None = None

    @property
    def done(self) -> bool:
        return (self.folder / run_folder.METRICS).is_file()

    def last_logged(self) -> dict[str, Any]:
        """The newest figures of the run, each under its own name; empty before the first."""
        figures: dict[str, Any] = {}
        for logged in results.read_log(self.folder):
            figures |= logged
        return figures


def own_folder(recipe: Recipe, overrides: Sequence[str], suffix: str) -> Path:
    """Where several runs of a recipe go: what `output_dir=` on the command line says, or runs/NAME-suffix."""
    named = any(override.startswith("output_dir=") for override in overrides)
    return recipe.output_dir if named else recipe.output_dir.with_name(f"{recipe.output_dir.name}-{suffix}")


def overrides_of(run: RunProcess, train_file: Path, eval_file: Path, more: dict[str, Any]) -> list[str]:
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


def run_all(
    runs: list[RunProcess],
    commands: list[list[str]],
    jobs: int,
    show: Callable[[list[RunProcess]], Any],
    where: Sequence[str] = LOCAL,
) -> None:
    """Run what is not done, `jobs` at once. All are stopped if one fails, or if this is interrupted."""
    waiting = deque(run for run in runs if not run.done)
    shares = _shares(jobs) if where == LOCAL else [{}] * jobs
    slots: list[RunProcess | None] = [None] * jobs
    try:
        while waiting or any(slots):
            for k, run in enumerate(slots):
                if run is not None and run.process is not None and run.process.poll() is not None:
                    if run.process.returncode or not run.done:
                        raise ModelError(failure(run))
                    run.process, slots[k] = None, None
                if slots[k] is None and waiting:
                    slots[k] = begun = waiting.popleft()
                    start(begun, commands[begun.number], where, **shares[k])
            show(runs)
            time.sleep(0.5)
        show(runs)
    finally:
        for run in slots:
            if run is not None and run.process is not None:
                run.process.terminate()
                run.process.wait()


def start(
    run: RunProcess, argv: list[str], where: Sequence[str] = LOCAL, *, gpu: int | None = None, cores: Sequence[int] = ()
) -> None:
    """Start the training script in a process of its own, which ends with this one; on a GPU or cores of its own."""
    run.folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    with _log(run).open("a", encoding="utf-8") as log:
        # Its standard input is a pipe that nobody writes to: it ends with this process, however that ends.
        run.process = subprocess.Popen(
            [sys.executable, *where, *argv], stdin=subprocess.PIPE, stdout=log, stderr=log, env=env
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


def _log(run: RunProcess) -> Path:
    return run.folder.with_name(f"{run.folder.name}.log")


def failure(run: RunProcess) -> str:
    """What to say of a run that failed."""
    lines = [line for line in _log(run).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    end = "\n".join(f"  {line}" for line in lines[-5:])
    return f"{run.folder.name} failed; the same command goes on there. The end of {_log(run)}:\n{end}"


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()
