"""Few-shot examples that resemble a text: the labelled rows with the nearest TF-IDF vectors.

Demonstrations near the question teach a prompted model more than drawn ones (Liu et al. 2022, arXiv 2101.06804).
"""

from typing import Any

import numpy as np

from emogen.prediction.baseline import make_vectorizer
from emogen.task.rows import Rows, normalise_text


class Neighbours:
    """Labelled rows that can be asked for the ones nearest to a text.

    Args:
        rows: the rows; n of them.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self._vectorizer = make_vectorizer(min_df=1)
        self._vectors: Any = self._vectorizer.fit_transform(rows.texts)  # two unit vectors side by side
        self._texts = np.array([normalise_text(text) for text in rows.texts], dtype=object)

    def nearest(self, text: str, k: int) -> Rows:
        """The k rows with the highest cosine, the nearest one last: it is then beside the question.

        A row with the same text, whatever its case and white space, is never among them, and no text is twice.
        """
        cosine = (self._vectors @ self._vectorizer.transform([text]).T).toarray()[:, 0]
        found: list[int] = []
        seen = {normalise_text(text)}
        for i in np.argsort(-cosine, kind="stable").tolist():
            if len(found) == k:
                break
            if self._texts[i] not in seen:
                seen.add(self._texts[i])
                found.append(i)
        return self.rows.take(found[::-1])
