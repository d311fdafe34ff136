"""Predictions and thresholds on disk: written once, and read back to be scored again without a model."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emogen import paths
from emogen.errors import InputError
from emogen.evaluation.run_folder import LOG, PREDICTIONS, THRESHOLDS
from emogen.task.labels import LabelSet
from emogen.task.parse import ParsedAnswer
from emogen.task.rows import Rows


@dataclass(frozen=True)
class Prediction:
    """What the model answered for one text, and how that was read. `n_cut` tokens of the text were left out. `prob` are
    the L probabilities that the answer was read off, where it was: see `prob_of`."""

    raw: str
    parsed: ParsedAnswer
    n_cut: int
    prob: tuple[float, ...] | None = None


def pred_matrix(predictions: Sequence[Prediction]) -> np.ndarray:
    """Predictions -> int8 [n, L]."""
    return np.array([prediction.parsed.vector for prediction in predictions], dtype=np.int8)


def parse_audit(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The share of answers by how they were read, and of those that could not be read (`parse_failure`)."""
    statuses = [prediction.parsed.status for prediction in predictions]
    shares = {status: statuses.count(status) / len(statuses) for status in dict.fromkeys(statuses)}
    return shares | {"parse_failure": sum(prediction.parsed.failed for prediction in predictions) / len(statuses)}


@dataclass(frozen=True)
class Scored:
    """n rows of a predictions file that can be scored again.

    Attributes:
        ids: n ids.
        gold, pred: int8 [n, L].
        prob: float32 [n, L].
        folds: int64 [n], the fold of each row: thresholds for it are tuned on the others. All 0 where there are too few
            rows for that.
    """

    path: Path
    ids: list[str]
    gold: np.ndarray
    pred: np.ndarray
    prob: np.ndarray
    folds: np.ndarray


def csv_lines(rows: Rows, pred: np.ndarray, label_set: LabelSet, *, header: bool = True) -> str:
    """The ids and the 0/1 columns of `pred` [n, L], in the form of a Kaggle submission."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow([rows.id_column, *label_set.names])
    for row_id, vector in zip(rows.ids, pred.tolist(), strict=True):
        writer.writerow([row_id, *vector])
    return text.getvalue()


def json_lines(
    rows: Rows,
    pred: np.ndarray,
    prob: np.ndarray | None,
    label_set: LabelSet,
    predictions: Sequence["Prediction"] | None = None,
    folds: np.ndarray | None = None,
) -> str:
    """One object a row: id, text, the labels of `pred` [n, L], `prob` [n, L] by label, the gold labels and the fold
    where they are known; and of one model's `predictions` the raw answer and how it was read."""
    lines = []
    for i, vector in enumerate(pred.tolist()):
        record: dict[str, Any] = {"id": rows.ids[i], "text": rows.texts[i]}
        if predictions is not None:
            said = predictions[i]
            record |= {"raw": said.raw, "status": said.parsed.status, "unknown": said.parsed.unknown}
            if said.n_cut:
                record["tokens_cut"] = said.n_cut
        record["labels"] = label_set.names_of(vector)
        if prob is not None:
            record["prob"] = {name: round(float(p), 6) for name, p in zip(label_set.names, prob[i], strict=True)}
        if rows.gold is not None:
            record["gold"] = label_set.names_of(rows.gold[i])
        if folds is not None:
            record["fold"] = int(folds[i])
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def write_jsonl(path: Path, *what: Any, **more: Any) -> None:
    """A file of `json_lines`."""
    with paths.writing(path) as file:
        file.write(json_lines(*what, **more))


def write_rows(path: Path, rows: Rows, label_set: LabelSet) -> None:
    """Rows with their gold labels, as JSONL that `data.read_rows` reads."""
    with paths.writing(path) as file:
        for row_id, text, vector in zip(rows.ids, rows.texts, rows.truth, strict=True):
            record = {"id": row_id, "text": text, "labels": label_set.names_of(vector)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_held_out(folder: Path, label_set: LabelSet) -> Rows:
    """The rows with gold labels that a run was scored on, which it had not learnt from.

    Raises:
        InputError: there are none.
    """
    scored = read_scored(folder, label_set)
    texts = [record["text"] for record in read_records(scored.path)]
    return Rows(str(scored.path), scored.ids, texts, scored.gold, list(range(1, len(texts) + 1)))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, one a line. Raises InputError, with the line, where one cannot be read."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line:
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"{path}:{number}: not a JSON object: {error}; was the file changed?") from None
    return records


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What the trainer of a run logged, in order; empty before the first. A line that is being written is left out."""
    path = folder / LOG
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def read_scored(folder: Path, label_set: LabelSet) -> Scored:
    """The predictions file of a run or a cross-validation.

    Raises:
        InputError: there is none, or it has no gold labels or no probabilities for this label set.
    """
    path = folder / PREDICTIONS
    if not path.is_file():
        raise InputError(f"{folder}: it has no {PREDICTIONS}: nothing was scored there, or not to the end")
    records = read_records(path)
    try:
        return Scored(
            path=path,
            ids=[record["id"] for record in records],
            gold=np.array([label_set.vector(record["gold"]) for record in records], dtype=np.int8),
            pred=np.array([label_set.vector(record["labels"]) for record in records], dtype=np.int8),
            prob=np.array([[record["prob"][name] for name in label_set.names] for record in records], dtype=np.float32),
            folds=np.array([record.get("fold", 0) for record in records]),
        )
    except KeyError as error:
        raise InputError(f"{path}: a row has no {error}; it cannot be scored again with these labels") from None


def aligned(systems: Sequence[Scored]) -> list[Scored]:
    """Systems that were scored on the same held-out rows, all in the order of the first one.

    Raises:
        InputError: the rows, their labels or their folds differ.
    """
    first, *others = systems
    in_order = [first]
    for other in others:
        if sorted(other.ids) != sorted(first.ids):
            raise InputError(f"{other.path}: not the same rows as in {first.path}")
        where = {row_id: i for i, row_id in enumerate(other.ids)}
        order = [where[row_id] for row_id in first.ids]
        other = Scored(
            other.path, first.ids, other.gold[order], other.pred[order], other.prob[order], other.folds[order]
        )
        if not np.array_equal(other.gold, first.gold):
            raise InputError(f"{other.path}: not the same gold labels as in {first.path}")
        if not np.array_equal(other.folds, first.folds):
            raise InputError(
                f"{other.path}: not the same folds as in {first.path}: what one was held out from, another has learnt"
            )
        in_order.append(other)
    return in_order


def write_thresholds(folder: Path, thresholds: Sequence[float] | np.ndarray, label_set: LabelSet) -> None:
    """Keep the threshold of each label."""
    by_label = {name: round(float(t), 6) for name, t in zip(label_set.names, thresholds, strict=True)}
    paths.write_json(folder / THRESHOLDS, by_label)


def read_thresholds(folder: Path, label_set: LabelSet) -> np.ndarray:
    """The thresholds of a run or a cross-validation, [L].

    Raises:
        InputError: there are none, or not for these labels.
    """
    path = folder / THRESHOLDS
    if not path.is_file():
        raise InputError(
            f"{folder}: it has no {THRESHOLDS}; thresholds are tuned where rows are scored (eval_file, eval_fraction, "
            "emogen cv). predict_by=answer takes what the model says"
        )
    by_label = json.loads(path.read_text(encoding="utf-8"))
    if missing := [name for name in label_set.names if name not in by_label]:
        raise InputError(f"{path}: no threshold for {', '.join(missing)}")
    return np.array([by_label[name] for name in label_set.names])
