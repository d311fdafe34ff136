"""Predictions and thresholds on disk: written once, read back to be scored and combined again without a model."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emogen import paths
from emogen.data import Rows
from emogen.errors import InputError
from emogen.labels import LabelSet

if TYPE_CHECKING:
    from emogen.predict import Prediction

PREDICTIONS, THRESHOLDS, METRICS = "predictions.jsonl", "thresholds.json", "metrics.json"
FOLDS, DATA = "folds.csv", "data"  # of a cross-validation: the fold of each id; the rows that each fold learns from
LOG = "train_log.jsonl"  # what the trainer logs, a line each time


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


class Growing:
    """Files that grow piece by piece, and get their names when they are complete. A kill costs at most one piece.

    Until then each is beside its place, as `NAME.partial`, and a note in `NAME.partial.json` of the first one says how
    far all of them are: what was written after the note is cut off before the work goes on.

    Args:
        files: what is to be written.
        job: what it is written of, ready for JSON. Another job does not go on with these files.
        overwrite: begin anew where another job left them.

    Raises:
        InputError: another job left them.
    """

    def __init__(self, files: Sequence[Path], job: Any, *, overwrite: bool = False):
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        self.partial = {file: file.with_name(f"{file.name}.partial") for file in files}
        self.note = files[0].with_name(f"{files[0].name}.partial.json")
        self.job, self.digest = job, hashlib.sha256()
        self.n_rows = 0  # that are written
        if not self.note.is_file():
            return
        note = json.loads(self.note.read_text(encoding="utf-8"))
        if note["job"] == job:
            self.n_rows, self.expected, self.sizes = note["n_rows"], note["sha256"], note["sizes"]
        elif not overwrite:
            raise InputError(
                f"{self.note}: of other work that was broken off ({', '.join(map(str, note['job'].values()))}); go on "
                "with that, or add --overwrite to begin anew"
            )

    def has(self, rows: Rows, n_before: int) -> bool:
        """Whether these rows, before which there are so many, are written already.

        Raises:
            InputError: the rows that are written were others: the input has changed.
        """
        said = "".join(f"{i}\n{text}\n" for i, text in zip(rows.ids, rows.texts, strict=True))
        self.digest.update(said.encode("utf-8", "surrogatepass"))
        n_after = n_before + len(rows)
        changed = n_after == self.n_rows and self.digest.hexdigest() != self.expected
        if changed or n_before < self.n_rows < n_after:
            raise self._changed()
        return n_after <= self.n_rows

    def _changed(self) -> InputError:
        return InputError(
            f"{self.note}: the first {self.n_rows:,} rows of the input are not those that were labelled; remove this "
            "file to begin anew"
        )

    def add(self, texts: Sequence[str], n_rows: int) -> None:
        """Write a text to each file, which brings so many rows."""
        sizes = []
        for k, (partial, text) in enumerate(zip(self.partial.values(), texts, strict=True)):
            with partial.open("r+b" if self.n_rows else "wb") as file:
                file.truncate(self.sizes[k] if self.n_rows else 0)
                file.seek(0, os.SEEK_END)
                file.write(text.encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
                sizes.append(file.tell())
        self.n_rows, self.sizes = self.n_rows + n_rows, sizes
        write_json(
            self.note, {"job": self.job, "n_rows": self.n_rows, "sha256": self.digest.hexdigest(), "sizes": sizes}
        )

    def finish(self, n_rows: int) -> None:
        """Give the files their names. Raises InputError if not so many rows are written: the input has changed."""
        if n_rows != self.n_rows:
            raise self._changed()
        for file, partial in self.partial.items():
            partial.replace(file)
        self.note.unlink()


def is_baseline(folder: Path) -> bool:
    """Whether a folder is that of `baseline.cross_validate_baseline`, whose folds leave nothing of their own."""
    return (folder / FOLDS).is_file() and not (folder / DATA).is_dir() and not any(folder.glob("fold-*/"))


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
    write_json(folder / THRESHOLDS, by_label)


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


def write_json(path: Path, value: Any) -> None:
    """A JSON file, all of it or nothing."""
    with paths.writing(path) as file:
        json.dump(value, file, indent=2)
