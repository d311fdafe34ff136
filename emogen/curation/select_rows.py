"""Run folders and a file of texts -> the rows to label next."""

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emogen.console import Bar
from emogen.curation.selection import choose, worth
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.run_folder import PREDICTIONS, member_folders, read_recipe
from emogen.prediction.classifier import prob_of
from emogen.prediction.ensemble import load_rule, load_runs
from emogen.task.labels import LabelSet
from emogen.task.readers import read_rows
from emogen.task.rows import Rows, checked

log = logging.getLogger(__name__)


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


def select_rows(
    runs: Sequence[Path], source: Path, n: int, overrides: Sequence[str] = (), *, batch_size: int = 32, bar: Bar
) -> Selection:
    """Choose n rows of a file; see `worth` and `choose`.

    Args:
        runs: runs, cross-validations (each of whose folds is a member) or baselines.
        source: a file with texts. Labels in it are not looked at.
        bar: makes a progress bar from a title and a number of rows.

    Raises:
        InputError: a folder is not a run, the labels of the runs differ, or the file cannot be read or has no rows
            that are left to label.
    """
    folders = member_folders(runs)
    recipe, label_set = read_recipe(folders[0], overrides)
    for folder in folders[1:]:
        if read_recipe(folder)[1].names != label_set.names:
            raise InputError(f"{folder}: its labels are not those of {folders[0]}")
    columns = {key: getattr(recipe, key) for key in ("text_column", "id_column", "separator", "quoting", "encoding")}
    rows = checked(read_rows(source, label_set, **columns, need_ids=False))
    probs = np.stack(
        [
            prob_of(classifier, rows.texts, [], bar, f"Probabilities, model {k} of {len(folders)}")
            for k, classifier in enumerate(load_runs(folders, overrides), start=1)
        ]
    )
    known = [text for run in runs if (run / PREDICTIONS).is_file() for text in _texts(run)]
    chosen = choose(rows.texts, worth(probs, _thresholds(runs, label_set)), n, known)
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
    if not all((run / PREDICTIONS).is_file() for run in runs):
        log.warning("Not all runs were scored on held-out rows: labels count as unsure where their probability is 0.5")
        return np.full(len(label_set), 0.5)
    tuned = load_rule(runs, label_set, "thresholds").thresholds
    return np.full(len(label_set), 0.5) if tuned is None else tuned


def selection_csv(rows: Rows) -> str:
    """Rows as a CSV file with an empty column `labels`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([rows.id_column, rows.text_column, "labels"])
    writer.writerows([row_id, row_text, ""] for row_id, row_text in zip(rows.ids, rows.texts, strict=True))
    return text.getvalue()
