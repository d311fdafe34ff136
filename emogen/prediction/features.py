"""Arrays that describe texts: the baseline is fitted to them, and they say which texts resemble each other."""

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from emogen.errors import InputError
from emogen.model.emoji import emoji_features
from emogen.task.recipe import is_encoder

Features = Callable[[Sequence[str]], np.ndarray]  # n texts -> [n, d], the same for a text whatever the others are


def fit_tfidf(texts: Sequence[str], *, min_df: int) -> tuple[Any, Callable[[Sequence[str]], Any]]:
    """TF-IDF of words and pairs of words, and of sequences of two to five characters within words, both sublinear.

    One of the two is left out if the texts have none of it: no words are in texts of emoji alone.

    Args:
        texts: n texts.
        min_df: the number of texts in which a feature has to occur.

    Returns:
        The vectors of the texts, a sparse matrix [n, d], and a function from m texts to theirs, [m, d].

    Raises:
        InputError: the texts have neither.
    """
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    fitted, vectors = [], []
    for vectorizer in (
        TfidfVectorizer(ngram_range=(1, 2), min_df=min_df, sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=min_df, sublinear_tf=True),
    ):
        with suppress(ValueError):  # no feature occurs in so many texts
            vectors.append(vectorizer.fit_transform(texts))
            fitted.append(vectorizer)
    if not fitted:
        raise InputError(
            f"TF-IDF: no word and no sequence of characters is in {min_df} or more of {len(texts):,} texts; more rows "
            "are needed, or other `features`"
        )
    return hstack(vectors).tocsr(), lambda new: hstack([one.transform(new) for one in fitted]).tocsr()


def load_features(name: str) -> Features:
    """The function behind an entry of the key `features`, other than `tfidf`, which has to be fitted.

    Args:
        name: `emoji` (`emoji_features`), a sentence encoder (`encoder_features`), or `MODULE:FUNCTION`, a function of
            the user from texts to an array.

    Raises:
        InputError: there is no such function, or what it needs is not installed; or, when it is called, it does not
            return an array with a row of finite numbers for each text.
        ModelError: the encoder cannot be loaded.
    """
    if name == "emoji":
        return _checked(name, emoji_features)
    if is_encoder(name):
        from emogen.model.sentence_encoder import encoder_features

        return encoder_features(name)
    return _checked(name, _own_features(name))


def _own_features(name: str) -> Features:
    """Import a function of the user, `MODULE:FUNCTION`, from the current folder or an installed package.

    That this may be done has been said on the command line; see `load_recipe`.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"features: {name}: {error}") from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise InputError(f"features: {name}: not a function")
    return found


def _checked(name: str, features: Features) -> Features:
    def array_of(texts: Sequence[str]) -> np.ndarray:
        array = np.asarray(features(list(texts)), dtype=np.float64)
        if array.ndim != 2 or len(array) != len(texts) or not np.isfinite(array).all():
            raise InputError(
                f"features: {name}: expected an array of {len(texts)} rows of finite numbers, got one of shape "
                f"{array.shape}{'' if np.isfinite(array).all() else ' with others in it'}"
            )
        return array

    return array_of
