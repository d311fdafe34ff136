"""A job as files: what a pod needs of this checkout and of a recipe, packed, sent over SSH, and the run brought back.

Code and data go as one archive through the pod's SSH, not by a Git address: the data is in no repository, its licence
may forbid that, a template under work is not committed yet, and the pod needs no key to anybody's repository. Nothing
secret is in the archive.
"""

import gzip
import hashlib
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from emogen import paths
from emogen.errors import InputError, ModelError
from emogen.evaluation.run_folder import ADAPTER
from emogen.task.recipe import Recipe

WORKSPACE = "/workspace"  # where a pod's volume is mounted
CODE = ("pyproject.toml", "constraints.txt", "README.md", "emogen", "prompts", "recipes", "sample")
CONNECTION_LOST = 255  # ssh's own exit code; any other is that of the command
REFUSED = (b"Permission denied", b"Host key verification failed")  # what waiting does not mend


@dataclass(frozen=True)
class Job:
    """What is shipped. `name` is that of the recipe and eight hex digits of the content: the same job, the same name.

    Attributes:
        files: names in the archive -> files of this machine. recipe: the recipe's text, in which they have those names.
    """

    name: str
    files: dict[str, Path]
    recipe: str

    @property
    def size(self) -> int:
        """Bytes, before they are packed."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True)
class Address:
    """Where a pod's sshd listens.

    Attributes:
        known_hosts: the file that keeps its key, so that it cannot change unnoticed.
        poll: seconds between attempts to reach it. patience: how many in a row may fail.
    """

    host: str
    port: int
    user: str
    known_hosts: Path
    poll: float = 5.0
    patience: int = 60


def job_of(recipe: Recipe) -> Job:
    """Gather what the run of a recipe needs: emogen's code, the resolved recipe, and the files that it names.

    Raises:
        InputError: a file is missing, or emogen does not run from a checkout.
    """
    root = paths.shipped("pyproject.toml").parent
    if not (root / "runpod" / "start.sh").is_file():
        raise InputError("jobs are launched from a checkout of emogen: git clone it, and pip install -e '.[pods]'")
    files: dict[str, Path] = {}
    for name in CODE:
        for path in [root / name] if (root / name).is_file() else sorted((root / name).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                files[f"code/{path.relative_to(root)}"] = path

    changes: dict[str, str | None] = {"output_dir": None, "resume_from_checkpoint": None}
    named = {"train_file": recipe.train_file, "eval_file": recipe.eval_file, "prompt": recipe.prompt}
    if recipe.find(recipe.labels).is_file():  # else the name of a shipped label set
        named["labels"] = recipe.labels
    for key, value in named.items():
        if value is not None:
            source = recipe.find(value)
            changes[key] = f"files/{key}{source.suffix}"
            files[f"job/{changes[key]}"] = source
    if Path(recipe.model_name).expanduser().is_dir():
        changes["model_name_or_path"] = "files/model"
        files |= _folder("job/files/model", Path(recipe.model_name).expanduser())
    if recipe.init_adapter:
        changes["init_adapter"] = "files/init"
        files |= _folder(f"job/files/init/{ADAPTER}", recipe.find(recipe.init_adapter) / ADAPTER)
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise InputError(f"{', '.join(missing)}: no such file")

    text = recipe.to_yaml(**changes)
    digest = hashlib.sha256(text.encode())
    for name, path in sorted(files.items()):
        digest.update(f"\0{name}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    label = re.sub(r"[^a-z0-9.-]+", "_", recipe.name.lower())
    return Job(f"emogen-{label}-{digest.hexdigest()[:8]}", files, text)


def _folder(name: str, folder: Path) -> dict[str, Path]:
    return {f"{name}/{path.relative_to(folder)}": path for path in sorted(folder.rglob("*")) if path.is_file()}


def write_archive(job: Job, file: IO[bytes]) -> None:
    """Write a job as a .tar.gz, in which nothing tells of this machine: no owner, no times."""

    def bare(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o644
        return member

    with tempfile.TemporaryDirectory() as scratch, gzip.GzipFile("", "wb", 6, file, 0) as packed:
        recipe = Path(scratch) / "recipe.yaml"
        recipe.write_text(job.recipe, encoding="utf-8")
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(recipe, f"job/{job.name.split('-', 1)[1].rpartition('-')[0]}.yaml", filter=bare)
            for name, path in sorted(job.files.items()):
                archive.add(path, name, filter=bare)


def send(job: Job, pod_name: str, address: Address) -> None:
    """Unpack a job on a pod, unless it is there already, and tell the pod's start script so.

    Raises:
        ModelError: it could not be sent.
    """
    folder = shlex.quote(f"{WORKSPACE}/emogen/{job.name}")
    ready = shlex.quote(f"ready.{pod_name}")
    unpack = f"tar --no-same-owner -xzf - && touch {ready}"
    command = f"mkdir -p {folder} && cd {folder} && if [ ! -e {ready} ]; then {unpack}; fi"
    with tempfile.TemporaryFile() as archive:
        write_archive(job, archive)
        archive.seek(0)
        _ssh(address, command, stdin=archive)


def fetch(job_name: str, address: Address, folder: Path) -> None:
    """Bring the run folder of a job home, its checkpoints left out. All of it or nothing.

    Raises:
        InputError: the folder exists already.
        ModelError: there is no run on the pod, or it could not be fetched.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty, and nothing is overwritten; name another folder with --into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    remote = shlex.quote(f"{WORKSPACE}/emogen/{job_name}/run")
    with _scratch(folder) as scratch, tempfile.TemporaryFile() as archive:
        _ssh(address, f"tar -C {remote} --exclude='./checkpoint-*' -czf - .", stdout=archive)
        archive.seek(0)
        try:
            with tarfile.open(fileobj=archive, mode="r:gz") as packed:
                packed.extractall(scratch, filter="data")  # refuses what would land outside
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ModelError(f"{folder}: what came from the pod cannot be unpacked: {error}") from None
        scratch.chmod(0o755)
        scratch.replace(folder)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder beside another one, gone in the end unless it has got that one's name."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _ssh(address: Address, command: str, stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None) -> None:
    """Run a command on a pod; again if the connection is lost, or not yet there: sshd starts later than its pod."""
    address.known_hosts.parent.mkdir(parents=True, exist_ok=True)
    options = {
        "BatchMode": "yes",  # never ask
        "ConnectTimeout": "20",
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "4",
        "StrictHostKeyChecking": "accept-new",  # a new pod has a new key; from then on it must not change
        "UserKnownHostsFile": str(address.known_hosts),
        "LogLevel": "ERROR",
    }
    settings = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    words = ["ssh", *settings, "-p", str(address.port), "-l", address.user, "--", address.host, command]
    for attempt in range(address.patience):
        if attempt:
            time.sleep(address.poll)
        if stdin is not None:
            stdin.seek(0)
        if stdout is not None:
            stdout.seek(0)
            stdout.truncate()
        try:
            done = subprocess.run(
                words, stdin=stdin or subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, check=False
            )
        except FileNotFoundError:
            raise InputError("no ssh here; on Debian: apt-get install openssh-client") from None
        if done.returncode != CONNECTION_LOST or any(word in done.stderr for word in REFUSED):
            break
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        hint = "; is the private key of one of the account's SSH keys on this machine?" if "denied" in reason else ""
        raise ModelError(f"ssh {address.user}@{address.host} -p {address.port}: {reason}{hint}")
