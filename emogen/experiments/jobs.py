"""Several runs of a recipe, each in its own process and on its own GPU or cores."""

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
from emogen.task.yaml_files import as_overrides

# Where a run is trained, as the arguments of Python that start it. POD rents a GPU, waits, and fetches the run folder.
LOCAL = ("-m", "emogen.worker")
RAY = (*LOCAL, "--on-ray")  # what `on_ray.connect` returns for each run follows
POD = ("-m", "emogen.cli", "pod", "launch", "--follow")

POLL_SECONDS = 0.5


@dataclass
class RunProcess:
    """A run in its own process.

    Attributes:
        number: position among the runs that belong together.
        folder: the run folder. The output of the process goes to `<folder>.log`.
        process: the process while it runs.
    """

    number: int
    folder: Path
    process: subprocess.Popen | None = None

    @property
    def done(self) -> bool:
        return (self.folder / run_folder.METRICS).is_file()

    def last_logged(self) -> dict[str, Any]:
        """The newest value of every metric in `train_log.jsonl`; empty before the first."""
        newest: dict[str, Any] = {}
        for entry in results.read_log(self.folder):
            newest |= entry
        return newest


def own_folder(recipe: Recipe, overrides: Sequence[str], suffix: str) -> Path:
    """The folder of several runs of a recipe: `output_dir=` of the command line, or runs/NAME-suffix."""
    is_named = any(override.startswith("output_dir=") for override in overrides)
    return recipe.output_dir if is_named else recipe.output_dir.with_name(f"{recipe.output_dir.name}-{suffix}")


def overrides_of(run: RunProcess, train_file: Path, eval_file: Path, more: dict[str, Any]) -> list[str]:
    """The overrides that turn a recipe into a run on files of `write_rows`.

    Args:
        more: further keys and values.

    Returns:
        A list of `key=value`.
    """
    own = {
        "train_file": str(train_file.resolve()),
        "eval_file": str(eval_file.resolve()),
        "eval_fraction": 0,
        "output_dir": str(run.folder),
        "resume_from_checkpoint": True,
        "disable_tqdm": True,
    }
    return as_overrides(own | dict.fromkeys(results.FORM) | more)


def run_all(
    runs: list[RunProcess],
    commands: list[list[str]],
    jobs: int,
    show: Callable[[list[RunProcess]], Any],
    where: Sequence[str] = LOCAL,
) -> None:
    """Run everything that is not done. If one run fails, or this call is interrupted, all are stopped.

    Args:
        commands: for each run a recipe and its overrides.
        jobs: runs at a time. On this machine each has its own GPU, or its share of the cores.
        show: called every `POLL_SECONDS` with all runs.
        where: `LOCAL`, `POD`, or `RAY` with the share of a run.

    Raises:
        ModelError: a run failed; the message names its log.
    """
    waiting = deque(run for run in runs if not run.done)
    shares = shares_of(jobs, where)
    slots: list[RunProcess | None] = [None] * jobs
    try:
        while waiting or any(slots):
            for k, run in enumerate(slots):
                if run is not None and run.process is not None and run.process.poll() is not None:
                    if run.process.returncode or not run.done:
                        raise ModelError(failure(run))
                    run.process, slots[k] = None, None
                if slots[k] is None and waiting:
                    slots[k] = started = waiting.popleft()
                    start(started, commands[started.number], where, **shares[k])
            show(runs)
            time.sleep(POLL_SECONDS)
        show(runs)
    finally:
        for run in slots:
            if run is not None and run.process is not None:
                run.process.terminate()
                run.process.wait()


def start(
    run: RunProcess, argv: list[str], where: Sequence[str] = LOCAL, *, gpu: int | None = None, cores: Sequence[int] = ()
) -> None:
    """Start a run in its own process, which ends when this process does.

    Args:
        argv: a recipe and its overrides.
        gpu: the only GPU that the process sees, by its number among those that this process sees.
        cores: the only CPU cores that the process uses.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    env = os.environ.copy()
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # as a cluster sets it for the GPUs that are lent to this job
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu].strip() if visible else str(gpu)
    with _log(run).open("a", encoding="utf-8") as log:
        # Standard input is a pipe that nobody writes to. It closes when this process ends, however that happens.
        run.process = subprocess.Popen(
            [sys.executable, *where, *argv], stdin=subprocess.PIPE, stdout=log, stderr=log, env=env
        )
    if cores:  # the new process counts its cores when it loads torch, which takes it seconds
        os.sched_setaffinity(run.process.pid, cores)


def failure(run: RunProcess) -> str:
    """The message for a run that failed: its log, and the last lines of it."""
    lines = [line for line in _log(run).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    end = "\n".join(f"  {line}" for line in lines[-5:])
    return f"{run.folder.name} failed; the same command resumes it. The end of {_log(run)}:\n{end}"


def _log(run: RunProcess) -> Path:
    return run.folder.with_name(f"{run.folder.name}.log")


def shares_of(jobs: int, where: Sequence[str] = LOCAL) -> list[dict[str, Any]]:
    """What each of several jobs has of this machine, as arguments of `start`: a GPU, or a share of the cores.

    Without shares the threads of all jobs would wait for each other on the same cores, many times slower than one job.
    Jobs that run elsewhere have nothing of this machine.
    """
    if where == POD or tuple(where[: len(RAY)]) == RAY:
        return [{}] * jobs
    if jobs == 1:
        return [{}]
    if n_gpus := _count_gpus():
        return [{"gpu": k % n_gpus} for k in range(jobs)]
    if not hasattr(os, "sched_getaffinity"):
        return [{} for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    return [{"cores": cores[k::jobs] or [cores[k % len(cores)]]} for k in range(jobs)]


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()  # the environment variable that gives a job its GPU is CUDA's
