"""Which model is in a folder: a digest that another model of the same shapes does not have."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path

N_SAMPLES, SAMPLE_BYTES = 64, 4096  # of each file of weights
# What tokens and the architecture are read from. Weights are sampled, since those of 14B parameters take a minute.
_CONFIGURATION = ("*.json", "*.jinja", "*.model", "*.py", "vocab.txt", "merges.txt")


def identify(location: str | Path) -> str | None:
    """A digest of the model in a folder: its configuration, its tokenizer, and its weights.

    Of each file of weights it reads the size, the header of safetensors (names, types and shapes) and samples of the
    values. So it takes a fraction of a second for any size, and a single changed value may stay unseen.

    Returns:
        The sha256; None if `location` is not a folder, as a name on the Hub.
    """
    folder = Path(location)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in _CONFIGURATION):
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin", ".gguf"):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + _sampled(path))
    return digest.hexdigest()


def _sampled(path: Path) -> bytes:
    """The header of a file of weights, and evenly spread samples of what follows it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        found = [file.read(8)]
        n_header = int.from_bytes(found[0], "little")
        if path.suffix == ".safetensors" and n_header < size:
            found.append(_shapes(file.read(n_header)))
        start = file.tell()
        step = max((size - start) // N_SAMPLES, SAMPLE_BYTES)
        for position in range(start, size, step):
            file.seek(position)
            found.append(file.read(SAMPLE_BYTES))
    return hashlib.sha256(b"".join(found)).digest()


def _shapes(header: bytes) -> bytes:
    """A header of safetensors without its metadata, which differ between versions of the library that wrote it."""
    try:
        tensors = json.loads(header)
    except ValueError:
        return header
    tensors.pop("__metadata__", None)
    return json.dumps(tensors, sort_keys=True).encode()
