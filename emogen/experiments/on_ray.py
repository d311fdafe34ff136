"""A run on a Ray cluster: its files are sent to a worker, and its log and its folder are brought home while it runs.

`emogen.worker --on-ray` is the process at home, one for each run. emogen has to be installed on the machines of the
cluster; no file system is shared. Checkpoints come home, too: when a worker is lost, another one goes on from the
newest checkpoint, and so does an interrupted command.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emogen import processes
from emogen.cloud.ship import recipe_files
from emogen.distribution import install_hint
from emogen.errors import InputError, ModelError
from emogen.evaluation.run_folder import METRICS
from emogen.task.recipe import load_recipe
from emogen.task.yaml_files import as_overrides

POLL_SECONDS = 2.0  # how often the run folder comes home
WORKERS = 4  # that a run may lose, less one


@dataclass
class News:
    """What has changed at the worker.

    Attributes:
        files: new contents of the run folder, by name.
        gone: names that are no longer there.
        log: new output of the run.
        code: the exit code of the run, when it has ended.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    log: bytes = b""
    code: int | None = None


def connect(jobs: int | None) -> tuple[int, str]:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine; processes of this one find it, too.

    Args:
        jobs: runs at a time; by default one for each GPU of the cluster, or a single one.

    Returns:
        The runs at a time, and what each of them has for itself: `gpus=1`, or `cpus=K`.

    Raises:
        InputError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics are sent
    try:
        import ray
    except ImportError:
        raise InputError(f"--on ray needs Ray: {install_hint('ray')}") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    n_gpus = int(resources.get("GPU", 0))
    jobs = jobs or max(1, n_gpus)
    return jobs, "gpus=1" if n_gpus else f"cpus={max(1, int(resources.get('CPU', 1)) // jobs)}"


def train_on_ray(argv: Sequence[str]) -> None:
    """Run a recipe on the cluster of RAY_ADDRESS, and bring its folder home.

    Args:
        argv: `gpus=1` or `cpus=K`, a recipe, and overrides.

    Raises:
        InputError: the recipe is not valid.
        ModelError: the run failed, or lost too many workers.
    """
    import ray
    from ray.exceptions import RayError

    share, path, *overrides = argv
    recipe = load_recipe(path, overrides)
    named, changes = recipe_files(recipe)
    job = {name.removeprefix("job/"): file.read_bytes() for name, file in named.items()}
    job[f"{recipe.name}.yaml"] = recipe.to_yaml(**changes).encode()
    words = [f"{recipe.name}.yaml", *(["trust_remote_code=true"] if recipe.trusts_code else [])]
    kind, _, amount = share.partition("=")
    needs: dict[str, Any] = {"num_gpus": int(amount)} if kind == "gpus" else {"num_cpus": int(amount)}
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    work: Any = ray.remote(num_returns="streaming", max_retries=0, **needs)(_train_here)
    cores = amount if kind == "cpus" else None
    for lost in range(WORKERS):
        try:
            news = News()
            for arrived in work.remote(job, words, str(recipe.output_dir), _contents(recipe.output_dir), cores):
                news = ray.get(arrived)
                _bring_home(news, recipe.output_dir)
        except RayError as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"The worker was lost ({reason}); {WORKERS - lost - 1} more tries.", flush=True)
            continue
        if news.code:
            raise ModelError(f"the run failed at the worker with exit code {news.code}")
        return
    raise ModelError(f"{recipe.output_dir}: {WORKERS} workers were lost")


def _train_here(
    job: dict[str, bytes], words: list[str], home: str, before: dict[str, bytes], cores: str | None
) -> Iterator[News]:
    """Train at the worker; yield what has changed every few seconds.

    Args:
        job: the recipe and the files that it names.
        words: the recipe and overrides.
        home: the run folder at home, which the log names.
        before: the contents of the run folder, from which the run goes on.
        cores: how many the run may use; None for all.
    """
    with tempfile.TemporaryDirectory(prefix="emogen-") as scratch:
        folder, run, log = Path(scratch) / "job", Path(scratch) / Path(home).name, Path(scratch) / "log"
        for root, files in ((folder, job), (run, before)):
            for file, content in files.items():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).write_bytes(content)
        own = as_overrides({"output_dir": str(run), "resume_from_checkpoint": True, "disable_tqdm": True})
        command = [sys.executable, "-m", "emogen.worker", *words, *own]
        env = os.environ | ({processes.CORES: cores} if cores else {})
        with log.open("wb") as written:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=written, stderr=written, env=env
            )
        known = {file: _state(run / file) for file in before}
        n_read = 0
        try:
            while True:
                code = process.poll()
                now = {str(path.relative_to(run)): _state(path) for path in run.rglob("*") if path.is_file()}
                news = News(gone=[file for file in known if file not in now], code=code)
                for file in now:
                    found = _read(run / file) if known.get(file) != now[file] else None
                    if found is not None:
                        news.files[file] = found
                with log.open("rb") as lines:
                    lines.seek(n_read)
                    output = lines.read()
                if code is None:
                    output = output[: output.rfind(b"\n") + 1]  # whole lines
                news.log = output.replace(str(run).encode(), home.encode()).replace(f"{folder}/".encode(), b"")
                known, n_read = now, n_read + len(output)
                yield news
                if code is not None:
                    return
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()


def _state(path: Path) -> tuple[int, int] | None:
    """The time and size of a file; None if it has just been removed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _contents(folder: Path) -> dict[str, bytes]:
    """The files of a run folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _bring_home(news: News, folder: Path) -> None:
    """Write the news into the run folder, the metrics last, since a run with metrics is done; and print the log."""
    sys.stdout.buffer.write(news.log)
    sys.stdout.flush()
    for name in news.gone:
        (folder / name).unlink(missing_ok=True)
    for name in sorted(news.files, key=lambda name: name == METRICS):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(news.files[name])
        partial.replace(path)
