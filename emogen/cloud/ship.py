"""A job as files: packed, sent to a pod over SSH, and its run fetched.

Code and data go as one archive over the pod's SSH, not as the address of a Git repository: the data is in no
repository, its licence may forbid that, a template may not be committed yet, and the pod needs no key to anybody's
repository. The archive contains no secrets.
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
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from emogen import paths
from emogen.errors import InputError, ModelError
from emogen.evaluation.run_folder import ADAPTER
from emogen.task.recipe import Recipe

WORKSPACE = "/workspace"  # where a pod's volume is mounted
CODE = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "emogen", "prompts", "recipes", "sample")
CONNECTION_LOST = 255  # ssh's own exit code; any other one is that of the remote command
# What a model folder is loaded from. Nothing else of it is sent, such as .git/config or .env. Code of others (*.py) is
# sent if the command line of this call trusts it.
MODEL_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "modules.json", "chat_template*",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "*.safetensors", "*.safetensors.index.json",
)  # fmt: skip
REFUSED = (b"Permission denied", b"Host key verification failed")  # waiting does not help


@dataclass(frozen=True)
class Job:
    """The files of a job.

    Attributes:
        name: the recipe's name and eight hex digits of the content: the same job always has the same name.
        files: names in the archive -> files of this machine.
        recipe: the text of the recipe; it names the files as they are named in the archive.
        overrides: words for the command line on the pod: what no file may say.
    """

    name: str
    files: dict[str, Path]
    recipe: str
    overrides: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes before compression."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True)
class Address:
    """The address of a pod's sshd.

    Attributes:
        known_hosts: the file that keeps the key of the pod, so that it cannot change unnoticed.
        poll: seconds between attempts to connect.
        patience: failed attempts in a row that are tolerated.
    """

    host: str
    port: int
    user: str
    known_hosts: Path
    poll: float
    patience: int


def make_job(recipe: Recipe) -> Job:
    """Collect what the run of a recipe needs: emogen's code, the resolved recipe, and the files that it names.

    Raises:
        InputError: a file is missing, or emogen is not installed from a checkout.
    """
    files, changes = recipe_files(recipe)
    files |= _code_files()
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise InputError(f"{', '.join(missing)}: no such file")
    files = {name: path.resolve() for name, path in files.items()}  # the Hub's cache consists of links
    overrides = ("trust_remote_code=true",) if recipe.trusts_code else ()
    text = recipe.to_yaml(**changes)
    digest = hashlib.sha256(text.encode())
    for name, path in sorted(files.items()):
        digest.update(f"\0{name}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    label = re.sub(r"[^a-z0-9.-]+", "_", recipe.name.lower())
    return Job(f"emogen-{label}-{digest.hexdigest()[:8]}", files, text, overrides)


def _code_files() -> dict[str, Path]:
    """The files of emogen itself: names in the archive -> files of this machine."""
    root = paths.shipped("pyproject.toml").parent
    if not (root / "runpod" / "start.sh").is_file():
        raise InputError(
            "jobs are launched from a checkout of emogen: clone its repository, and run pip install -e '.[pods]' there"
        )
    files = {}
    for name in CODE:
        for path in [root / name] if (root / name).is_file() else sorted((root / name).rglob("*")):
            inner = path.relative_to(root)
            if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in inner.parts):
                files[f"code/{inner}"] = path
    return files


def recipe_files(recipe: Recipe) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files that a recipe names, and the keys of the recipe that name them in the archive."""
    files: dict[str, Path] = {}
    changes: dict[str, Any] = {"output_dir": None, "resume_from_checkpoint": None}
    if recipe.trusts_code:
        changes["trust_remote_code"] = False  # no file may say so; see `Job.overrides`
    named = {"train_file": recipe.train_file, "eval_file": recipe.eval_file, "prompt": recipe.prompt}
    if recipe.find(recipe.labels).is_file():  # otherwise the name of a shipped label set
        named["labels"] = recipe.labels
    for key, value in named.items():
        if value is not None:
            source = recipe.find(value)
            changes[key] = f"files/{key}{source.suffix}"
            files[f"job/{changes[key]}"] = source
    model = paths.expand(recipe.model_name)
    if model.is_dir():
        changes["model_name_or_path"] = "files/model"
        files |= _model_files("job/files/model", model, with_code=recipe.trusts_code)
    if recipe.init_adapter:
        changes["init_adapter"] = "files/init"
        files |= _model_files(f"job/files/init/{ADAPTER}", recipe.find(recipe.init_adapter) / ADAPTER)
    return files, changes


def _model_files(name: str, folder: Path, *, with_code: bool = False) -> dict[str, Path]:
    """The files of a model or an adapter: names in the archive -> files of this machine.

    Raises:
        InputError: there are no weights among them.
    """
    patterns = (*MODEL_FILES, "*.py") if with_code else MODEL_FILES
    found = [path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, pattern) for pattern in patterns)]
    if not any(path.name.endswith(".safetensors") for path in found):
        raise InputError(f"{folder}: no weights in the format of safetensors (*.safetensors)")
    return {f"{name}/{path.name}": path for path in found}


def write_archive(job: Job, file: IO[bytes]) -> None:
    """Write a job as a .tar.gz without owners and times, so that nothing in it identifies this machine."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o644
        return member

    with tempfile.TemporaryDirectory() as scratch, gzip.GzipFile("", "wb", 6, file, 0) as packed:
        recipe = Path(scratch) / "recipe.yaml"
        recipe.write_text(job.recipe, encoding="utf-8")
        with tarfile.open(fileobj=packed, mode="w") as archive:
            if job.overrides:
                overrides = Path(scratch) / "overrides"
                overrides.write_text("".join(f"{word}\n" for word in job.overrides), encoding="utf-8")
                archive.add(overrides, "job/overrides", filter=anonymous)
            archive.add(recipe, f"job/{job.name.split('-', 1)[1].rpartition('-')[0]}.yaml", filter=anonymous)
            for name, path in sorted(job.files.items()):
                archive.add(path, name, filter=anonymous)


def send(job: Job, pod_name: str, address: Address) -> None:
    """Unpack a job on a pod, unless it is there already, and mark it as ready for the pod's start script.

    Raises:
        ModelError: the job could not be sent.
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
    """Fetch the run folder of a job, without its checkpoints: all of it or nothing.

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
                packed.extractall(scratch, filter="data")  # refuses paths outside the folder
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ModelError(f"{folder}: the archive from the pod cannot be unpacked: {error}") from None
        scratch.chmod(0o755)
        scratch.replace(folder)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder beside another one. It is removed at the end, unless it was renamed."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _ssh(address: Address, command: str, stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None) -> None:
    """Run a command on a pod.

    It is repeated if the connection is lost or not yet possible: sshd starts later than its pod.

    Raises:
        InputError: ssh is not installed.
        ModelError: the command failed, or there was no connection.
    """
    address.known_hosts.parent.mkdir(parents=True, exist_ok=True)
    words = _ssh_command(address, command)
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
            raise InputError("ssh is not installed; on Debian: apt-get install openssh-client") from None
        if done.returncode != CONNECTION_LOST or any(word in done.stderr for word in REFUSED):
            break
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        hint = "; is the private key of one of the account's SSH keys on this machine?" if "denied" in reason else ""
        raise ModelError(f"ssh {address.user}@{address.host} -p {address.port}: {reason}{hint}")


def _ssh_command(address: Address, command: str) -> list[str]:
    options = {
        "BatchMode": "yes",  # never ask
        "ConnectTimeout": "20",
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "4",
        "StrictHostKeyChecking": "accept-new",  # a new pod has a new key, which must not change afterwards
        "UserKnownHostsFile": str(address.known_hosts),
        "LogLevel": "ERROR",
    }
    settings = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return ["ssh", *settings, "-p", str(address.port), "-l", address.user, "--", address.host, command]
