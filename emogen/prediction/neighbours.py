"""Few-shot examples that resemble a text: the labelled rows with the nearest vectors.

Demonstrations near the question teach a prompted model more than drawn ones (Liu et al. 2022, arXiv 2101.06804).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from emogen.prediction.features import fit_tfidf, load_features
from emogen.task.rows import Rows, normalise_text


class Neighbours:
    """Labelled rows that can be asked for the ones nearest to a text.

    Args:
        rows: the rows; n of them.
        features: what the vectors are: `tfidf` (`fit_tfidf`), or what `load_features` takes. The cosines of
            several are averaged.

    Raises:
        InputError, ModelError: see `load_features`.
    """

    def __init__(self, rows: Rows, features: Sequence[str] = ("tfidf",)):
        self.rows = rows
        self._texts = np.array([normalise_text(text) for text in rows.texts], dtype=object)
        self._vectorise = [
            fit_tfidf(rows.texts, min_df=1)[1] if name == "tfidf" else load_features(name) for name in features
        ]
        self._vectors = self._unit_vectors(rows.texts)

    def nearest(self, texts: Sequence[str], k: int) -> list[Rows]:
        """For each text the k rows with the highest cosine, the nearest one last: it is then beside the question.

        A row with the same text, whatever its case and white space, is never among them, and no text is twice.
        """
        from sklearn.utils.extmath import safe_sparse_dot

        asked = self._unit_vectors(texts)
        found = []
        for i, text in enumerate(texts):
            cosines = [
                safe_sparse_dot(known, own[[i]].T, dense_output=True)[:, 0]
                for known, own in zip(self._vectors, asked, strict=True)
            ]
            found.append(self._best(np.mean(cosines, axis=0), text, k))
        return found

    def _unit_vectors(self, texts: Sequence[str]) -> list[Any]:
        """For each of the features an array or a sparse matrix of unit vectors, [n, d]."""
        from sklearn.preprocessing import normalize

        return [normalize(vectorise(texts)) for vectorise in self._vectorise]

    def _best(self, cosine: np.ndarray, text: str, k: int) -> Rows:
        found: list[int] = []
        seen = {normalise_text(text)}
        for i in np.argsort(-cosine, kind="stable").tolist():
            if len(found) == k:
                break
            if self._texts[i] not in seen:
                seen.add(self._texts[i])
                found.append(i)
        return self.rows.take(found[::-1])
