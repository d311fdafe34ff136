import json
from types import SimpleNamespace

import numpy as np
import pytest

from emogen.evaluation.metrics import score
from emogen.evaluation.results import Prediction
from emogen.task.parse import parse_answer
from emogen.task.recipe import SelectBest
from emogen.task.rows import Rows
from emogen.training.scoring import LogFile, best_step, make_compute_metrics, warn_of_constant_labels

HISTORY = [
    {"step": 1, "loss": 9.0},
    {"step": 10, "eval_loss": 0.30, "eval_f1_macro": 0.500},
    {"step": 20, "eval_loss": 0.35, "eval_f1_macro": 0.501},
    {"step": 30, "eval_loss": 0.40, "eval_f1_macro": 0.5025},
    {"step": 40, "eval_loss": 0.35, "eval_f1_macro": 0.490},
]


@pytest.mark.parametrize(
    ("rule", "step", "n_since"),
    [
        (SelectBest(within=0.0), 30, 1),
        (SelectBest(within=0.002), 20, 2),  # 0.500 is 0.0025 below the best
        (SelectBest(within=0.003), 10, 3),
        (SelectBest(metric="macro_f1", within=1.0), 10, 3),
        (SelectBest(metric="eval_loss", within=0.06, then="eval_loss"), 10, 3),
    ],
)
def test_the_best_step_has_the_lowest_loss_within_the_tolerance(rule, step, n_since):
    assert best_step(HISTORY, rule) == (step, n_since)


def test_of_equal_evaluations_the_first_is_the_best():
    history = [{"step": step, "eval_loss": 0.3, "eval_f1_macro": 0.5} for step in (10, 20)]
    assert best_step(history, SelectBest()) == (10, 1)


def test_a_rule_with_an_unknown_metric_is_an_error():
    with pytest.raises(KeyError, match="eval_f2_macro"):
        best_step(HISTORY, SelectBest(metric="f2_macro"))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_file_has_each_entry_with_its_step(tmp_path):
    log, state = LogFile(tmp_path / "log.jsonl"), SimpleNamespace(is_world_process_zero=True, log_history=[], global_step=2, max_steps=8)  # fmt: skip
    log.on_train_begin(None, state, None)
    assert read(log.path) == []
    log.on_log(None, state, None, logs={"loss": 0.5})
    log.on_log(None, state, None, logs=None)
    assert read(log.path) == [{"loss": 0.5, "step": 2, "max_steps": 8}]


def test_the_log_of_a_resumed_run_continues_that_of_its_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"loss": 9, "step": 3, "max_steps": 8}\n')  # logged after the checkpoint, before the kill
    state = SimpleNamespace(is_world_process_zero=True, log_history=[{"loss": 0.5, "step": 2}], global_step=3, max_steps=8)  # fmt: skip
    log = LogFile(path)
    log.on_train_begin(None, state, None)
    log.on_log(None, state, None, logs={"loss": 0.4})
    assert [(entry["step"], entry["loss"]) for entry in read(path)] == [(2, 0.5), (3, 0.4)]


def test_only_the_main_process_writes_the_log(tmp_path):
    state = SimpleNamespace(is_world_process_zero=False, log_history=[{"loss": 0.5}], global_step=2, max_steps=8)
    log = LogFile(tmp_path / "log.jsonl")
    log.on_train_begin(None, state, None)
    log.on_log(None, state, None, logs={"loss": 0.5})
    assert not log.path.exists()


NAMES = ("joy", "fear", "anger", "trust")


def test_a_warning_names_the_constant_labels_if_most_are(caplog):
    pred = np.array([[1, 0, 1, 0], [1, 0, 0, 0]], dtype=np.int8)
    warn_of_constant_labels(score(1 - pred, pred, NAMES))
    assert "Most labels are given to every row or to none: joy, fear, trust." in caplog.text
    assert "label_weights: within" in caplog.text


def test_no_warning_if_half_of_the_labels_are_constant(caplog):
    pred = np.array([[1, 0, 1, 0], [1, 0, 0, 1]], dtype=np.int8)
    warn_of_constant_labels(score(1 - pred, pred, NAMES))
    pred = np.array([[1, 0, 1, 0], [1, 0, 0, 0]], dtype=np.int8)
    warn_of_constant_labels(score(pred, pred, NAMES))  # they are right
    assert caplog.text == ""


class EchoClassifier:
    """Answers each text with itself."""

    def __init__(self, label_set):
        self.label_set = label_set

    def predict(self, texts):
        return [Prediction(text, parse_answer(text, self.label_set), 0) for text in texts]


def test_the_metrics_of_an_evaluation_are_those_of_the_predicted_labels(labels):
    gold = np.array([labels.vector(names) for names in (("joy",), ("joy", "anger"), ())], dtype=np.int8)
    rows = Rows("x", ["a", "b", "c"], ["joy", "joy, trust", "hm?"], gold, [1, 2, 3])
    metrics = make_compute_metrics(rows)(EchoClassifier(labels))
    assert metrics["f1/joy"] == 1
    assert metrics["f1/anger"] == metrics["f1/trust"] == 0
    assert metrics["f1_micro"] == pytest.approx(
        2 * 2 / (2 * 2 + 1 + 1)
    )  # two true positives, anger missed, trust wrong
    assert metrics["f1_macro"] == pytest.approx(1 / 11)
    assert metrics["jaccard_samples"] == pytest.approx((1 + 1 / 3 + 1) / 3)  # the last row: nothing, and rightly so
    assert metrics["parse_failure"] == pytest.approx(1 / 3)
    assert len(metrics) == 4 + len(labels)


def test_without_validation_rows_there_are_no_metrics():
    assert make_compute_metrics(None) is None
