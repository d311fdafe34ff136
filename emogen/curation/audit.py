"""Out-of-fold probabilities -> labels that are probably wrong.

A model that was not trained on a row doubts its labels for one of two reasons: the row is hard, or a label is wrong.
Confident learning (Northcutt et al. 2021, arXiv 1911.00068) tells how many labels are wrong by the model's own mean
confidence, label by label. Its implementation is cleanlab's.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from emogen.distribution import install_hint
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.audit_file import AuditedRelation, AuditedRow, AuditFile, predictions_digest
from emogen.evaluation.run_folder import PROMPTED, kind_of
from emogen.evaluation.stack import cross_fit
from emogen.task.delimited import csv_text
from emogen.task.labels import LabelSet
from emogen.task.readers import read_rows
from emogen.task.rows import Rows, checked, normalise_text, repeated_ids

ID, TEXT, CORRECT = "ID", "Tweet", "correct"  # columns of the list that --apply reads
SIMILAR = 0.8  # cosine of near-duplicate texts
_MIN_ROWS = 20  # rows that a relation between two labels rests on
_RULE = 0.95  # share of rows that obey a relation
_CHUNK = 1024  # rows whose similarities are computed at once


@dataclass(frozen=True)
class Twin:
    """Two texts that are nearly the same and have different labels.

    Attributes:
        first, second: their positions, first < second.
        cosine: their similarity, 0 to 1.
    """

    first: int
    second: int
    cosine: float


@dataclass(frozen=True)
class Relation:
    """Two labels of which nearly every row obeys a rule.

    Attributes:
        first, second: the positions of the labels.
        implies: whether `first` implies `second`; otherwise they exclude each other.
        n: rows with `first`, for an implication; rows expected to have both if the labels were independent.
        exceptions: positions of the rows that break the rule.
    """

    first: int
    second: int
    implies: bool
    n: int
    exceptions: tuple[int, ...]

    def sentence(self, names: Sequence[str]) -> str:
        """What the rule says, and how many rows break it."""
        first, second = names[self.first], names[self.second]
        if self.implies:
            return f"{first} nearly implies {second}: {len(self.exceptions):,} of {self.n:,} rows do not have it"
        both = f"{len(self.exceptions):,} {'row has' if len(self.exceptions) == 1 else 'rows have'} both"
        return f"{first} and {second} nearly exclude each other: {both}; by chance {self.n:,}"


@dataclass(frozen=True)
class Audit:
    """The labels of n rows, doubted.

    Attributes:
        rows: the rows with their labels.
        prob: the probability of each label by models that were not trained on the row, [n, L].
        quality: how much the models believe in what the row says of each label, [n, L], 0 to 1: its probability where
            it is given, and one minus that where it is not.
        suspected: whether that is probably wrong, bool [n, L].
        twins: near-duplicate texts with different labels, the most similar first.
        relations: labels that nearly imply or exclude each other.
    """

    rows: Rows
    label_set: LabelSet
    prob: np.ndarray
    quality: np.ndarray
    suspected: np.ndarray
    twins: list[Twin]
    relations: list[Relation]

    @property
    def suggested(self) -> np.ndarray:
        """The labels with every suspected one turned round, int8 [n, L]."""
        gold = self.rows.truth
        if not self.label_set.exactly_one:
            return np.where(self.suspected, 1 - gold, gold)
        likely = np.eye(gold.shape[1], dtype=np.int8)[self.prob.argmax(axis=1)]
        return np.where(self.suspected.any(axis=1, keepdims=True), likely, gold)

    @cached_property
    def worst_first(self) -> list[int]:
        """The positions of the rows that something is said about: suspected labels by quality, then all others."""
        worst = np.where(self.suspected, self.quality, 2).min(axis=1)  # 2: after all suspected ones
        order = np.argsort(worst, kind="stable").tolist()
        return [i for i in order if self.suspected[i].any() or i in self._remarks]

    def reasons(self, i: int) -> list[str]:
        """What is said about a row."""
        names, gold = self.label_set.names, self.rows.truth
        found = [
            f"{names[k]} is {'given but improbable' if gold[i, k] else 'missing but probable'} ({self.prob[i, k]:.2f})"
            for k in np.argsort(self.quality[i], kind="stable")
            if self.suspected[i, k]
        ]
        return found + self._remarks.get(i, [])

    @cached_property
    def _remarks(self) -> dict[int, list[str]]:
        """What twins and relations say about rows, by position."""
        names, gold = self.label_set.names, self.rows.truth
        remarks = defaultdict(list)
        for twin in self.twins:
            for i, other in ((twin.first, twin.second), (twin.second, twin.first)):
                labels = self.label_set.cell(gold[other].tolist())
                remarks[i].append(f"nearly the text of {self.rows.ids[other]}, which has {labels}")
        for relation in self.relations:
            link = "without" if relation.implies else "with"
            for i in relation.exceptions:
                remarks[i].append(f"{names[relation.first]} {link} {names[relation.second]}")
        return remarks


def audit(runs: Sequence[Path], label_set: LabelSet) -> Audit:
    """Doubt the labels of the rows that runs, cross-validations or baselines were scored on.

    Args:
        runs: their folders. The probabilities of several are stacked, nested over the folds.

    Raises:
        InputError: a run has not been scored, the runs were scored on different rows or folds, or cleanlab is missing.
    """
    if find_spec("cleanlab") is None:
        raise InputError(f"emogen audit needs cleanlab: {install_hint('audit')}")
    if len(runs) == 1 and kind_of(runs[0]) == PROMPTED:
        raise InputError(
            f"{runs[0]}: an endpoint gives answers without probabilities, which cannot be ranked; audit a tuned "
            "cross-validation or a baseline, alone or together with it"
        )
    systems = results.align_scored([results.read_scored(run, label_set) for run in runs])
    probs = np.stack([system.prob for system in systems])
    gold, folds = systems[0].gold, systems[0].folds
    if len(runs) == 1 or label_set.exactly_one or len(np.unique(folds)) < 2:
        prob = probs.mean(axis=0)
    else:
        prob = cross_fit(gold, probs, folds)
    rows = results.held_out_rows(systems[0])
    find = _find_one if label_set.exactly_one else find_issues
    suspected, quality = find(gold, prob)
    return Audit(
        rows=rows,
        label_set=label_set,
        prob=prob,
        quality=quality,
        suspected=suspected,
        twins=find_twins(rows.texts, gold),
        relations=[] if label_set.exactly_one else find_relations(gold),
    )


def find_issues(gold: np.ndarray, prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which labels are probably wrong, and the quality of all, both [n, L]. Each label is a question of its own.

    A label that all rows have, or none, cannot be doubted: there is nothing to compare it with.
    """
    from cleanlab.multilabel_classification.filter import find_multilabel_issues_per_class
    from cleanlab.multilabel_classification.rank import get_label_quality_scores_per_class

    suspected, quality = np.zeros(gold.shape, dtype=bool), np.ones(gold.shape)
    (varied,) = np.nonzero(gold.min(axis=0) != gold.max(axis=0))
    if len(varied):
        given = [np.flatnonzero(row).tolist() for row in gold[:, varied]]
        own = prob[:, varied].astype(np.float64)
        suspected[:, varied] = find_multilabel_issues_per_class(given, own, n_jobs=1)
        quality[:, varied] = get_label_quality_scores_per_class(given, own)
    return suspected, quality


def _find_one(gold: np.ndarray, prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `find_issues`, for rows that have one label each: if it is wrong, the suspected one is the given one."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    suspected, quality = np.zeros(gold.shape, dtype=bool), np.ones(gold.shape)
    given = gold.argmax(axis=1)
    (used,) = np.nonzero(gold.any(axis=0))
    if len(used) > 1:
        classes = np.searchsorted(used, given)
        own = prob[:, used].astype(np.float64)
        shares = own / np.maximum(own.sum(axis=1, keepdims=True), 1e-12)
        row = np.arange(len(gold))
        suspected[row, given] = find_label_issues(classes, shares, n_jobs=1)
        quality[row, given] = get_label_quality_scores(classes, shares)
    return suspected, quality


def find_twins(texts: Sequence[str], gold: np.ndarray) -> list[Twin]:
    """Pairs of texts whose sequences of four and five characters have a TF-IDF cosine of `SIMILAR` or more.

    Args:
        texts: n texts.
        gold: 0/1, [n, L]. Pairs with the same labels are left out.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(text.strip() for text in texts):
        return []
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(4, 5), sublinear_tf=True)
    vectors = vectorizer.fit_transform([normalise_text(text) for text in texts])
    twins = []
    for start in range(0, len(texts), _CHUNK):
        cosine = (vectors[start : start + _CHUNK] @ vectors.T).tocoo()
        near = (cosine.data >= SIMILAR) & (cosine.row + start < cosine.col)
        for i, j, value in zip(cosine.row[near] + start, cosine.col[near], cosine.data[near], strict=True):
            if (gold[i] != gold[j]).any():
                twins.append(Twin(int(i), int(j), min(float(value), 1.0)))
    return sorted(twins, key=lambda twin: (-twin.cosine, twin.first, twin.second))


def find_relations(gold: np.ndarray) -> list[Relation]:
    """Labels of which 95 % of 20 rows or more obey a rule, and some do not.

    A label implies another if rows with the first have the second, and half of all rows at most have the second. Two
    labels exclude each other if they are in the same row twenty times less than by chance.

    Args:
        gold: 0/1, [n, L].
    """
    relations = []
    n_rows, n_labels = gold.shape
    count = gold.sum(axis=0)
    for a in range(n_labels):
        for b in range(n_labels):
            both = int((gold[:, a] & gold[:, b]).sum())
            if a != b and count[a] >= _MIN_ROWS and count[b] * 2 <= n_rows and _RULE * count[a] <= both < count[a]:
                exceptions = np.flatnonzero((gold[:, a] == 1) & (gold[:, b] == 0))
                relations.append(Relation(a, b, True, int(count[a]), tuple(exceptions.tolist())))
            expected = count[a] * count[b] / n_rows
            if a < b and expected >= _MIN_ROWS and 0 < both <= (1 - _RULE) * expected:
                exceptions = np.flatnonzero(gold[:, a] & gold[:, b])
                relations.append(Relation(a, b, False, round(expected), tuple(exceptions.tolist())))
    return relations


def audit_file(found: Audit, runs: Sequence[Path], target: Path) -> AuditFile:
    """What was found, as the report shows it.

    Args:
        found: the result of `audit`.
        runs: the folders that were audited. The report is that of the first.
        target: where the list to correct is.
    """
    ids, names = [str(row_id) for row_id in found.rows.ids], found.label_set.names
    twins = defaultdict(list)
    for twin in found.twins:
        twins[twin.first].append(ids[twin.second])
        twins[twin.second].append(ids[twin.first])
    rows = [
        AuditedRow(
            id=ids[i],
            suspected={names[k]: round(float(found.prob[i, k]), 6) for k in np.flatnonzero(found.suspected[i])},
            suggested=found.label_set.names_of(found.suggested[i].tolist()),
            twins=tuple(twins[i]),
            reasons=tuple(found.reasons(i)),
        )
        for i in found.worst_first
    ]
    relations = [
        AuditedRelation(sentence=relation.sentence(names), exceptions=tuple(ids[i] for i in relation.exceptions))
        for relation in found.relations
    ]
    return AuditFile(
        predictions=predictions_digest(runs[0]),
        systems=tuple(map(str, runs)),
        rows=tuple(rows),
        relations=tuple(relations),
        list_file=os.path.relpath(target, runs[0]),
    )


def audit_csv(found: Audit) -> str:
    """The rows that something is said about, the worst first, as a CSV file.

    Returns:
        Its columns are the id, the text, `correct`, `given`, `suggested`, `quality` (of the worst label) and `why`.
        `correct` holds the given labels until somebody changes it. The list is made for a spreadsheet, so other cells
        are those of `spreadsheet_cell`.
    """
    lines = [[ID, TEXT, CORRECT, "given", "suggested", "quality", "why"]]
    rows, suggested = found.rows, found.suggested
    for i in found.worst_first:
        given = found.label_set.cell(rows.truth[i].tolist())
        quality = f"{found.quality[i].min():.3f}"
        suggestion = found.label_set.cell(suggested[i].tolist())
        why = "; ".join(found.reasons(i))
        cells = (str(rows.ids[i]), rows.texts[i], given, suggestion, quality, why)
        row_id, row_text, *others = map(spreadsheet_cell, cells)
        lines.append([row_id, row_text, given, *others])
    return csv_text(lines)


def spreadsheet_cell(text: str) -> str:
    """A text that a spreadsheet does not take for a formula: an apostrophe stands before what would be one."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def apply_corrections(rows: Rows, file: str | Path, label_set: LabelSet) -> Rows:
    """The rows with the labels of the column `correct` of a list that `audit_csv` made.

    Rows that the list does not have keep their labels.

    Raises:
        InputError: the list cannot be read, names a label that does not exist or an id twice, or is about other rows.
    """
    corrected = checked(
        read_rows(file, label_set, id_column=ID, text_column=TEXT, labels_column=CORRECT, need_labels=True)
    )
    checked((corrected, repeated_ids(corrected)))
    position = {spreadsheet_cell(row_id): i for i, row_id in enumerate(rows.ids)}
    position |= {row_id: i for i, row_id in enumerate(rows.ids)}
    gold = rows.truth.copy()
    for row_id, text, line, labels in zip(
        corrected.ids, corrected.texts, corrected.lines, corrected.truth, strict=True
    ):
        if row_id not in position:
            raise InputError(f"{file}:{line}: no row of {rows.path} has the id {row_id!r}")
        own = rows.texts[position[row_id]]
        if normalise_text(text) not in (normalise_text(own), normalise_text(spreadsheet_cell(own))):
            raise InputError(f"{file}:{line}: another text than that of {row_id!r} in {rows.path}")
        gold[position[row_id]] = labels
    return replace(rows, gold=gold)
