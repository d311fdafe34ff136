"""Predictions and thresholds: formatted, written, read again and aligned."""

import json

import numpy as np
import pytest

from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.results import Prediction
from emogen.task.labels import Label, LabelSet
from emogen.task.parse import parse_answer
from emogen.task.readers import read_rows
from emogen.task.rows import Rows, checked

LABELS = LabelSet(name="three", labels=tuple(Label(name=name) for name in ("anger", "joy", "trust")))
GOLD = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1]], dtype=np.int8)
PRED = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 1]], dtype=np.int8)
PROB = np.array([[0.9, 0.6, 0.1234567], [0.1, 0.2, 0.3], [0.4, 0.4, 1.0]], dtype=np.float32)
ROWS = Rows("x.csv", ["r0", "r1", "r2"], ["first", "zweite – ü", 'say "no", twice'], GOLD, [2, 3, 4])
FOLDS = np.array([0, 1, 0])


def prediction(raw, n_cut=0):
    return Prediction(raw, parse_answer(raw, LABELS), n_cut)


PREDICTIONS = [prediction("anger, joy"), prediction("none"), prediction("TRUST, bliss", n_cut=4)]


def write_scored(folder, index=(0, 1, 2), folds=FOLDS):
    """Write the predictions of these rows; returns the folder."""
    rows, index = ROWS.take(index), list(index)
    results.write_jsonl(folder / "predictions.jsonl", rows, PRED[index], PROB[index], LABELS, folds=folds[index])
    return folder


def write_records(folder, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "predictions.jsonl").write_text("".join(f"{line}\n" for line in lines))


RECORD = {"id": "r0", "text": "t", "labels": ["joy"], "gold": [], "prob": dict.fromkeys(LABELS.names, 0.5)}


def test_predictions_as_csv_are_a_kaggle_submission():
    assert results.csv_lines(ROWS, PRED, LABELS) == "ID,anger,joy,trust\nr0,1,1,0\nr1,0,0,0\nr2,0,0,1\n"
    assert results.csv_lines(ROWS.take([2]), PRED[2:], LABELS, header=False) == "r2,0,0,1\n"


def test_predictions_as_jsonl_hold_all_that_is_known():
    lines = results.json_lines(ROWS, PRED, PROB, LABELS, PREDICTIONS, FOLDS).splitlines()
    assert json.loads(lines[0]) == {
        "id": "r0",
        "text": "first",
        "raw": "anger, joy",
        "status": "exact",
        "unknown": [],
        "labels": ["anger", "joy"],
        "prob": {"anger": 0.9, "joy": 0.6, "trust": 0.123457},  # rounded to six digits
        "gold": ["anger"],
        "fold": 0,
    }
    assert "zweite – ü" in lines[1]  # not escaped
    last = json.loads(lines[2])
    assert (last["status"], last["unknown"], last["tokens_cut"]) == ("repaired", ["bliss"], 4)


def test_predictions_as_jsonl_leave_out_what_is_unknown():
    unlabelled = Rows("x.csv", ["r0"], ["first"], None, [2])
    assert json.loads(results.json_lines(unlabelled, PRED[:1], None, LABELS)) == {
        "id": "r0",
        "text": "first",
        "labels": ["anger", "joy"],
    }


def test_predictions_as_a_matrix_and_their_parse_audit():
    assert results.pred_matrix(PREDICTIONS).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    audited = [*PREDICTIONS, prediction("bliss"), prediction("")]
    assert results.parse_audit(audited) == {
        "exact": 0.4,
        "repaired": 0.2,
        "unknown": 0.2,
        "empty": 0.2,
        "parse_failure": 0.4,
    }


def test_written_predictions_are_read_for_scoring(tmp_path):
    scored = results.read_scored(write_scored(tmp_path), LABELS)
    assert scored.path == tmp_path / "predictions.jsonl"
    assert scored.ids == ROWS.ids
    assert (scored.gold.tolist(), scored.pred.tolist()) == (GOLD.tolist(), PRED.tolist())
    assert scored.prob == pytest.approx(PROB, abs=1e-6)
    assert scored.folds.tolist() == FOLDS.tolist()
    assert (scored.gold.dtype, scored.pred.dtype, scored.prob.dtype) == (np.int8, np.int8, np.float32)


def test_rows_without_a_fold_are_all_in_fold_0(tmp_path):
    write_records(tmp_path, [RECORD, RECORD | {"id": "r1"}])
    assert results.read_scored(tmp_path, LABELS).folds.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({key: RECORD[key] for key in ("id", "text", "labels", "prob")}, "the row has no 'gold'"),
        ({key: RECORD[key] for key in ("id", "text", "labels", "gold")}, "the row has no 'prob'"),
        (RECORD | {"prob": {"anger": 0.5, "joy": 0.5}}, "the row has no 'trust'; .* the labels 'three'"),
        (RECORD | {"gold": ["bliss"]}, "not in the label set 'three': bliss"),
        ('{"id": "r1", "te', "not a JSON object: Unterminated string"),
        ("3", "not a JSON object: 3"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_with_its_line(tmp_path, bad, message):
    write_records(tmp_path, [RECORD, "", bad])
    with pytest.raises(InputError, match=rf"predictions\.jsonl:3: {message}"):
        results.read_scored(tmp_path, LABELS)


def test_a_folder_without_predictions_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"it has no predictions\.jsonl: no rows were scored"):
        results.read_scored(tmp_path, LABELS)


def test_held_out_rows_are_read_with_their_texts_and_gold_labels(tmp_path):
    rows = results.read_held_out(write_scored(tmp_path), LABELS)
    assert (rows.ids, rows.texts) == (ROWS.ids, ROWS.texts)
    assert rows.truth.tolist() == GOLD.tolist()


def test_written_rows_are_read_by_the_reader(tmp_path):
    results.write_rows(tmp_path / "rows.jsonl", ROWS, LABELS)
    rows = checked(read_rows(tmp_path / "rows.jsonl", LABELS, need_labels=True))
    assert (rows.ids, rows.texts, rows.truth.tolist()) == (ROWS.ids, ROWS.texts, GOLD.tolist())


def test_systems_are_put_into_the_order_of_the_first(tmp_path):
    first = results.read_scored(write_scored(tmp_path / "a"), LABELS)
    other = results.read_scored(write_scored(tmp_path / "b", (2, 0, 1)), LABELS)
    aligned = results.align_scored([first, other])
    assert aligned[0] is first
    assert aligned[1].path == tmp_path / "b" / "predictions.jsonl"
    assert aligned[1].ids == first.ids
    for name in ("gold", "pred", "prob", "folds"):
        assert (getattr(aligned[1], name) == getattr(first, name)).all()


@pytest.mark.parametrize(
    ("index", "gold", "folds", "message"),
    [
        ((0, 1), None, None, "not the same rows"),
        ((2, 1, 0), ["joy", "trust"], None, "not the same gold labels"),
        ((2, 1, 0), None, np.array([1, 1, 0]), "not the same folds"),
    ],
)
def test_systems_on_other_rows_gold_labels_or_folds_are_refused(tmp_path, index, gold, folds, message):
    first = results.read_scored(write_scored(tmp_path / "a"), LABELS)
    folder = write_scored(tmp_path / "b", index, FOLDS if folds is None else folds)
    if gold:
        records = results.read_records(folder / "predictions.jsonl")
        write_records(folder, [records[0] | {"gold": gold[:1]}, *records[1:]])
    with pytest.raises(InputError, match=rf"b/predictions\.jsonl: {message}.*a/predictions\.jsonl"):
        results.align_scored([first, results.read_scored(folder, LABELS)])


def test_thresholds_are_written_and_read_in_the_order_of_the_labels(tmp_path):
    results.write_thresholds(tmp_path, np.array([0.5, 0.1234567, 1.0]), LABELS)
    assert results.read_thresholds(tmp_path, LABELS).tolist() == [0.5, 0.123457, 1.0]
    reverse = LabelSet(name="reverse", labels=LABELS.labels[::-1])
    assert results.read_thresholds(tmp_path, reverse).tolist() == [1.0, 0.123457, 0.5]
    more = LabelSet(name="more", labels=(*LABELS.labels, Label(name="fear")))
    with pytest.raises(InputError, match=r"thresholds\.json: no threshold for fear"):
        results.read_thresholds(tmp_path, more)
    with pytest.raises(InputError, match=r"it has no thresholds\.json; .* predict_by=answer works without them"):
        results.read_thresholds(tmp_path / "none", LABELS)


def test_a_log_line_that_is_still_being_written_is_left_out(tmp_path):
    assert results.read_log(tmp_path) == []
    (tmp_path / "train_log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert results.read_log(tmp_path) == [{"step": 1}, {"step": 2}]
