"""Unlabelled rows -> those that would teach a model the most.

A row teaches where the model hesitates (Lewis and Gale 1994), where its members disagree (Seung et al. 1992), and where
rare labels are expected; and it teaches little beside a row that is nearly the same. Pure numpy and scikit-learn.
"""

from collections.abc import Sequence

import numpy as np

from emogen.prediction.baseline import make_vectorizer
from emogen.task.rows import normalise_text

_CANDIDATES = 5  # the best rows by their own worth, in multiples of those that are chosen


def worth(probs: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How much the labels of each row would teach, float64 [n].

    For each label, the nearness of the mean probability to its threshold (1 at the threshold, 0 at certainty) and the
    range of the members' probabilities are added. A label counts by one over the square root of its mean probability,
    so that rare ones are not lost in the sum.

    Args:
        probs: the probabilities of K members, [K, n, L].
        thresholds: [L].
    """
    prob = probs.mean(axis=0).astype(np.float64)
    threshold = np.clip(thresholds, 1e-3, 1 - 1e-3)
    distance = np.where(prob < threshold, (threshold - prob) / threshold, (prob - threshold) / (1 - threshold))
    disagreement = probs.max(axis=0) - probs.min(axis=0)
    weight = 1 / np.sqrt(np.maximum(prob.mean(axis=0), 1e-3))
    return (1 - distance + disagreement) @ (weight / weight.sum())


def choose(texts: Sequence[str], worths: np.ndarray, n: int, known: Sequence[str] = ()) -> list[int]:
    """Choose n texts that are worth much and differ from each other; fewer if there are not so many.

    One after another, the text with the highest product of its worth and its distance to the nearest chosen text (one
    minus the TF-IDF cosine) is taken.

    Args:
        texts: m texts.
        worths: [m].
        known: texts that are labelled already. They are never chosen, and no text twice.

    Returns:
        Positions, in the order in which they were chosen.
    """
    seen = {normalise_text(text) for text in known}
    candidates: list[int] = []
    for i in np.argsort(-worths, kind="stable").tolist():
        key = normalise_text(texts[i])
        if key and key not in seen and len(candidates) < _CANDIDATES * n:
            seen.add(key)
            candidates.append(i)
    if len(candidates) <= n:
        return candidates
    vectors = make_vectorizer(min_df=1).fit_transform([texts[i] for i in candidates])
    own = worths[candidates].astype(np.float64)
    nearest = np.zeros(len(candidates))  # the cosine with the nearest chosen text
    chosen: list[int] = []
    for _ in range(n):
        product = own * (1 - nearest)
        product[chosen] = -1
        best = int(product.argmax())
        chosen.append(best)
        cosine = (vectors @ vectors[best].T).toarray()[:, 0] / 2  # two unit vectors side by side
        nearest = np.maximum(nearest, np.minimum(cosine, 1))
    return [candidates[k] for k in chosen]
