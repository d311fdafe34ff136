"""Run folders and a file of unlabelled rows -> the rows that would teach a model the most.

A row teaches where the model hesitates (Lewis and Gale 1994), where its members disagree (Seung et al. 1992), and where
rare labels are expected; and it teaches little beside a row that is nearly the same.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emogen.console import Bar
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.run_folder import PREDICTIONS
from emogen.prediction.classifier import prob_of
from emogen.prediction.ensemble import load_rule, load_runs, read_members
from emogen.prediction.features import fit_tfidf
from emogen.task.delimited import csv_text
from emogen.task.labels import LabelSet
from emogen.task.readers import read_rows
from emogen.task.rows import Rows, checked, normalise_text

log = logging.getLogger(__name__)

_CANDIDATES = 5  # the best rows by their own worth, in multiples of those that are chosen


@dataclass(frozen=True)
class Selection:
    """Rows to label.

    Attributes:
        rows: the chosen rows, the most instructive first.
        expected: the number of rows with each label that their probabilities promise, [L].
        expected_at_random: the same for as many rows at random, [L].
    """

    rows: Rows
    label_set: LabelSet
    expected: np.ndarray
    expected_at_random: np.ndarray


def select_rows(runs: Sequence[Path], source: Path, n: int, overrides: Sequence[str] = (), *, bar: Bar) -> Selection:
    """Choose n rows of a file; see `worth` and `choose`.

    Args:
        runs: runs, cross-validations (each of whose folds is a member) or baselines.
        source: a file with texts. Labels in it are not looked at.
        bar: makes a progress bar from a title and a number of rows.

    Raises:
        InputError: a folder is not a run, the labels of the runs differ, or the file cannot be read or has no rows
            that are left to label.
    """
    folders, recipe, label_set = read_members(runs, overrides)
    rows = checked(
        read_rows(
            source, label_set,
            text_column=recipe.text_column, id_column=recipe.id_column, **recipe.file_form, need_ids=False,
        )
    )  # fmt: skip
    thresholds = _thresholds(runs, label_set)  # before the models, which take the time
    probs = np.stack(
        [
            prob_of(classifier, rows.texts, [], bar, f"Probabilities, model {k} of {len(folders)}")
            for k, classifier in enumerate(load_runs(folders, overrides), start=1)
        ]
    )
    known = [text for run in runs if (run / PREDICTIONS).is_file() for text in _texts(run)]
    chosen = choose(rows.texts, worth(probs, thresholds), n, known)
    if not chosen:
        raise InputError(f"{source}: no row is left to label: all texts are empty or labelled already")
    if len(chosen) < n:
        log.warning(f"{source}: only {len(chosen):,} different rows are left to label")
    prob = probs.mean(axis=0)
    return Selection(rows.take(chosen), label_set, prob[chosen].sum(axis=0), prob.mean(axis=0) * len(chosen))


def _texts(run: Path) -> list[str]:
    return [str(record.get("text", "")) for record in results.read_records(run / PREDICTIONS)]


def _thresholds(runs: Sequence[Path], label_set: LabelSet) -> np.ndarray:
    """The thresholds of the runs, or one half for runs that were not scored."""
    tuned = None
    if all((run / PREDICTIONS).is_file() for run in runs):
        tuned = load_rule(runs, label_set, "thresholds").thresholds
    else:
        log.warning("Not all runs were scored on held-out rows: labels count as unsure where their probability is 0.5")
    return np.full(len(label_set), 0.5) if tuned is None else tuned


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
    vectors, _ = fit_tfidf([texts[i] for i in candidates], min_df=1)
    # The square of the length of a vector: 2 for words and characters, two unit vectors side by side.
    length = max(1, round(vectors.multiply(vectors).sum(axis=1).max()))
    own = worths[candidates].astype(np.float64)
    nearest = np.zeros(len(candidates))  # the cosine with the nearest chosen text
    chosen: list[int] = []
    for _ in range(n):
        product = own * (1 - nearest)
        product[chosen] = -1
        best = int(product.argmax())
        chosen.append(best)
        cosine = (vectors @ vectors[best].T).toarray()[:, 0] / length
        nearest = np.maximum(nearest, np.minimum(cosine, 1))
    return [candidates[k] for k in chosen]


def selection_csv(rows: Rows) -> str:
    """Rows as a CSV file with an empty column `labels`."""
    cells = ([row_id, row_text, ""] for row_id, row_text in zip(rows.ids, rows.texts, strict=True))
    return csv_text([[rows.id_column, rows.text_column, "labels"], *cells])
