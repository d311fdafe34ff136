"""Predictions and thresholds on disk. They can be read again and scored without a model."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from emogen import paths
from emogen.errors import InputError
from emogen.evaluation.caveats import listed
from emogen.evaluation.run_folder import FOLDS, LOG, PREDICTIONS, THRESHOLDS, read_folds, read_json, read_text
from emogen.task.delimited import csv_text
from emogen.task.labels import LabelSet
from emogen.task.parse import ParsedAnswer
from emogen.task.rows import Rows

log = logging.getLogger(__name__)

# Keys of a recipe that describe the form of the user's data files, which does not apply to files of `write_rows`.
FORM = (
    "text_column", "id_column", "labels_column", "separator", "quoting", "encoding",
    "dataset_name", "dataset_config", "dataset_test_split",
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """The prediction of one model for one text.

    Attributes:
        raw: the generated answer.
        parsed: the labels that were parsed from it.
        n_cut: number of tokens that were cut from the text to fit `max_length`.
        prob: the L probabilities, if the answer was read off them (a head, TF-IDF, `yes_no`) or made with them.
    """

    raw: str
    parsed: ParsedAnswer
    n_cut: int
    prob: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ScoredRows:
    """n rows of a predictions file, with what is needed to score them.

    Attributes:
        path: the predictions file, for messages.
        ids: n ids.
        gold, pred: int8 [n, L].
        prob: float32 [n, L].
        folds: int64 [n], the fold of each row: its nested thresholds are tuned on the other folds. All 0 if there were
            too few rows for folds.
    """

    path: Path
    ids: list[str]
    gold: np.ndarray
    pred: np.ndarray
    prob: np.ndarray
    folds: np.ndarray

    def take(self, index: Sequence[int]) -> "ScoredRows":
        """The rows at the given positions."""
        arrays = {name: getattr(self, name)[index] for name in ("gold", "pred", "prob", "folds")}
        return replace(self, ids=[self.ids[i] for i in index], **arrays)

    def positions(self, ids: Sequence[str]) -> list[int]:
        """The position of each of the given ids."""
        position = {row_id: i for i, row_id in enumerate(self.ids)}
        return [position[row_id] for row_id in ids]


def pred_matrix(predictions: Sequence[Prediction]) -> np.ndarray:
    """The labels of predictions as int8 [n, L]."""
    return np.array([prediction.parsed.vector for prediction in predictions], dtype=np.int8)


def as_strings(matrix: np.ndarray) -> list[str]:
    """A 0/1 matrix [n, L] as n strings of L digits, for pages."""
    return ["".join(map(str, row)) for row in matrix.tolist()]


def parse_audit(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The share of answers with each parse status, and the share of parse failures (`parse_failure`)."""
    statuses = [prediction.parsed.status for prediction in predictions]
    shares = {status: statuses.count(status) / len(statuses) for status in dict.fromkeys(statuses)}
    return shares | {"parse_failure": sum(prediction.parsed.failed for prediction in predictions) / len(statuses)}


def csv_lines(rows: Rows, pred: np.ndarray, label_set: LabelSet, *, header: bool = True) -> str:
    """Format predictions as a Kaggle submission: the id and a 0/1 column for each label of `pred` [n, L]."""
    first = [[rows.id_column, *label_set.names]] if header else []
    return csv_text([*first, *([row_id, *vector] for row_id, vector in zip(rows.ids, pred.tolist(), strict=True))])


def json_lines(
    rows: Rows,
    pred: np.ndarray,
    prob: np.ndarray | None,
    label_set: LabelSet,
    predictions: Sequence[Prediction] | None = None,
    folds: np.ndarray | None = None,
) -> str:
    """Format predictions as JSONL.

    Args:
        rows: n rows; their gold labels are written if they are known.
        pred: [n, L].
        prob: [n, L], or None if no probabilities were computed.
        predictions: the predictions of a single model, for the raw answers and how they were parsed.
        folds: the fold of each row, [n].

    Returns:
        One JSON object per line: `id`, `text`, `labels`, and what is known of `raw`, `status`, `unknown`, `tokens_cut`,
        `prob` (label -> probability), `gold` and `fold`.
    """
    lines = []
    for i, vector in enumerate(pred.tolist()):
        record: dict[str, Any] = {"id": rows.ids[i], "text": rows.texts[i]}
        if predictions is not None:
            raw, parsed, n_cut = predictions[i].raw, predictions[i].parsed, predictions[i].n_cut
            record |= {"raw": raw, "status": parsed.status, "unknown": parsed.unknown}
            if n_cut:
                record["tokens_cut"] = n_cut
        record["labels"] = label_set.names_of(vector)
        if prob is not None:
            record["prob"] = {name: round(float(p), 6) for name, p in zip(label_set.names, prob[i], strict=True)}
        if rows.gold is not None:
            record["gold"] = label_set.names_of(rows.gold[i])
        if folds is not None:
            record["fold"] = int(folds[i])
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def write_jsonl(
    path: Path,
    rows: Rows,
    pred: np.ndarray,
    prob: np.ndarray | None,
    label_set: LabelSet,
    predictions: Sequence[Prediction] | None = None,
    folds: np.ndarray | None = None,
) -> None:
    """Write a predictions file. The arguments are those of `json_lines`."""
    with paths.writing(path) as file:
        file.write(json_lines(rows, pred, prob, label_set, predictions, folds))


def write_rows(path: Path, rows: Rows, label_set: LabelSet) -> None:
    """Write rows with gold labels as JSONL that `readers.read_rows` reads."""
    with paths.writing(path) as file:
        for row_id, text, vector in zip(rows.ids, rows.texts, rows.truth, strict=True):
            record = {"id": row_id, "text": text, "labels": label_set.names_of(vector)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file.

    Raises:
        InputError: a line is not a JSON object.
    """
    return [record for _, record in _numbered_records(path)]


def _numbered_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers, from 1."""
    for number, line in enumerate((read_text(path) or "").split("\n"), start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not a JSON object: {error}; was the file changed?") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: not a JSON object: {line[:60]}; was the file changed?")
        yield number, record


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The log entries of a run's trainer, in order. A last line that is still being written is left out.

    Raises:
        InputError: a line is not a JSON object.
    """
    path = folder / LOG
    lines = (read_text(path) or "").split("\n")[:-1]
    try:
        entries = [json.loads(line) for line in lines if line]
        if all(isinstance(entry, dict) for entry in entries):
            return entries
    except (ValueError, RecursionError):
        pass
    raise InputError(f"{path}: not the log of a training: a line is not a JSON object; was the file changed?")


def read_scored(folder: Path, label_set: LabelSet) -> ScoredRows:
    """Read the predictions file of a run, a cross-validation or a baseline.

    Raises:
        InputError: there is no such file, it is empty or lacks rows of the folds, or a row lacks its gold labels or its
            probabilities for this label set.
    """
    path = folder / PREDICTIONS
    if not path.is_file():
        raise InputError(f"{folder}: it has no {PREDICTIONS}: no rows were scored, or the scoring has not finished")
    ids, gold, pred, prob, folds = [], [], [], [], []
    for number, record in _numbered_records(path):
        try:
            ids.append(record["id"])
            gold.append(label_set.vector(record["gold"]))
            pred.append(label_set.vector(record["labels"]))
            prob.append([record["prob"][name] for name in label_set.names])
        except KeyError as error:
            raise InputError(
                f"{path}:{number}: the row has no {error}; it cannot be scored with the labels {label_set.name!r}"
            ) from None
        except ValueError as error:  # a label that is not in the label set
            raise InputError(f"{path}:{number}: {error}") from None
        if not all(isinstance(p, int | float) and -1e-3 <= p <= 1 + 1e-3 for p in prob[-1]):  # false for NaN
            raise InputError(f"{path}:{number}: a probability is not a number from 0 to 1: {record['prob']}")
        folds.append(record.get("fold", 0))
    if not ids:
        raise InputError(f"{path}: it holds no rows, so there is nothing to score")
    _check_complete(folder, ids)
    return ScoredRows(
        path=path,
        ids=ids,
        gold=np.array(gold, dtype=np.int8),
        pred=np.array(pred, dtype=np.int8),
        prob=np.array(prob, dtype=np.float32),
        folds=np.array(folds),
    )


def _check_complete(folder: Path, ids: Sequence[str]) -> None:
    """Refuse the predictions of a cross-validation or a baseline if rows of its folds are missing or were added."""
    if not (folder / FOLDS).is_file():
        return
    fold_of = read_folds(folder)
    missing = {fold_of[row_id] for row_id in fold_of.keys() - set(ids)}
    if missing or len(ids) != len(fold_of):
        raise InputError(
            f"{folder / PREDICTIONS}: {len(ids):,} rows, but {FOLDS} has {len(fold_of):,}"
            + (f"; rows of the folds {', '.join(sorted(missing))} are missing" if missing else "")
            + ". Metrics of a part of the rows are not those of the cross-validation: the command that started it "
            "completes it"
        )


def read_held_out(folder: Path, label_set: LabelSet) -> Rows:
    """Read the rows that a run was scored on, with their gold labels. The run was not trained on them.

    Raises:
        InputError: as `read_scored`.
    """
    return held_out_rows(read_scored(folder, label_set))


def held_out_rows(scored: ScoredRows) -> Rows:
    """The rows of a predictions file, in its order."""
    texts = [record["text"] for record in read_records(scored.path)]
    return Rows(str(scored.path), scored.ids, texts, scored.gold, list(range(1, len(texts) + 1)))


def align_scored(systems: Sequence[ScoredRows]) -> list[ScoredRows]:
    """Put the rows of all systems into the order of the first one.

    Raises:
        InputError: the systems were scored on different rows, gold labels or folds.
    """
    first, *others = systems
    aligned = [first]
    for other in others:
        if sorted(other.ids) != sorted(first.ids):
            raise InputError(f"{other.path}: not the same rows as in {first.path}")
        other = other.take(other.positions(first.ids))
        if not np.array_equal(other.gold, first.gold):
            raise InputError(f"{other.path}: not the same gold labels as in {first.path}")
        if not np.array_equal(other.folds, first.folds):
            raise InputError(
                f"{other.path}: not the same folds as in {first.path}: one run was trained on rows that are held out "
                "from the other"
            )
        aligned.append(other)
    return aligned


def write_thresholds(folder: Path, thresholds: Sequence[float] | np.ndarray, label_set: LabelSet) -> None:
    """Write the threshold of each label, [L]. A label that they never predict is a warning."""
    if never := [name for name, value in zip(label_set.names, thresholds, strict=True) if value >= 1]:
        log.warning(
            f"{folder / THRESHOLDS}: the threshold of {listed(never)} is 1.0, since no scored row has the label: "
            "predict_by=thresholds never predicts it"
        )
    by_label = {name: round(float(threshold), 6) for name, threshold in zip(label_set.names, thresholds, strict=True)}
    paths.write_json(folder / THRESHOLDS, by_label)


def read_thresholds(folder: Path, label_set: LabelSet) -> np.ndarray:
    """Read the thresholds of a run or a cross-validation, float64 [L].

    Raises:
        InputError: there is no such file, or it lacks a label.
    """
    path = folder / THRESHOLDS
    if not path.is_file():
        raise InputError(
            f"{folder}: it has no {THRESHOLDS}; thresholds are tuned when rows are scored (eval_file, eval_fraction, "
            "emogen cv). predict_by=answer works without them"
        )
    by_label = read_json(path)
    if missing := [name for name in label_set.names if name not in by_label]:
        raise InputError(f"{path}: no threshold for {', '.join(missing)}")
    if wrong := [name for name in label_set.names if not _is_number(by_label[name])]:
        raise InputError(f"{path}: the threshold of {', '.join(wrong)} is not a number; was the file changed?")
    return np.array([by_label[name] for name in label_set.names], dtype=np.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
