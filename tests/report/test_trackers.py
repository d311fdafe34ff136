"""What trackers get, and that their failures cost nothing."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import invented_posts, write_posts
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from emogen.errors import InputError, ModelError
from emogen.experiments.crossval import cross_validate_baseline
from emogen.report.trackers import Tracker, load_trackers, log_results, scalars
from emogen.task.recipe import load_recipe
from emogen.train import main as train

METRICS = {
    "n": 40,
    "f1_macro": 0.5,
    "no_positives": ["trust"],
    "per_label": {"joy": {"f1": 0.25, "support": 3}},
    "by_thresholds": {"f1_macro": 0.75, "per_label": {"joy": {"f1": 1.0, "support": 3}}},
    "folds": {"answer": {"f1_macro": [0.4, 0.6]}},
    "mean": {"answer": {"f1_macro": 0.5}},
    "sd": {"answer": {"f1_macro": 0.1}},
}


class Failing(TrainerCallback):
    """A tracker that begins and then fails, with a message that holds secrets."""

    asked = 0

    def on_log(self, *args, **kwargs):
        self.asked += 1
        raise OSError("http://me:hunter2@there refuses the key abc-123\nmore")


def test_the_figures_of_a_cross_validation_have_the_names_that_trainings_use():
    assert scalars(METRICS) == {
        "n": 40,
        "f1_macro": 0.5,
        "f1/joy": 0.25,
        "by_thresholds/f1_macro": 0.75,
        "by_thresholds/f1/joy": 1.0,
        "mean/answer/f1_macro": 0.5,
        "sd/answer/f1_macro": 0.1,
    }


def test_a_tracker_that_fails_is_a_warning_without_secrets_and_is_left_alone(caplog, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "abc-123")
    tracker = Tracker("mine", Failing())
    tracker.on_train_begin(None, None, None)
    tracker.on_log(None, None, None, logs={})
    tracker.on_log(None, None, None, logs={})
    assert tracker.callback.asked == 1
    assert "report_to: mine: from here on, nothing is logged there: OSError: http" in caplog.text
    assert "//...@there refuses the key ..." in caplog.text
    assert "hunter2" not in caplog.text
    assert "abc-123" not in caplog.text


def test_a_tracker_that_cannot_begin_is_an_error():
    class Closed(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            raise RuntimeError("no account")

    with pytest.raises(ModelError, match="report_to: mine: RuntimeError: no account"):
        Tracker("mine", Closed()).on_train_begin(None, None, None)


def test_a_tracker_that_does_not_exist_is_an_error():
    with pytest.raises(InputError, match="report_to: nowhere: nowhere is not supported"):
        load_trackers(load_recipe("recipes/demo.yaml", ["report_to=nowhere"]))
    assert load_trackers(load_recipe("recipes/demo.yaml")) == []


@pytest.mark.slow
def test_a_baseline_is_one_run_with_its_metrics_and_pictures(tiny_recipe, tmp_path, labels, monkeypatch, caplog):
    recipe, board = str(tiny_recipe()), tmp_path / "board"
    write_posts(tmp_path / "train.csv", labels, invented_posts(40))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(board))
    words = ["report_to=tensorboard", f"output_dir={tmp_path / 'baseline'}"]
    folder, metrics = cross_validate_baseline(recipe, 2, words)
    assert len(list(board.iterdir())) == 1
    found = EventAccumulator(str(board)).Reload()
    kept = {name: found.Scalars(name)[0].value for name in found.Tags()["scalars"]}
    assert kept["eval/f1_macro"] == pytest.approx(metrics["f1_macro"])
    assert kept["eval/by_thresholds/f1/joy"] == pytest.approx(metrics["by_thresholds"]["per_label"]["joy"]["f1"])
    assert {"folds", "reliability"} <= set(found.Tags()["images"])
    (settings,) = found.Tensors("args/text_summary")[0].tensor_proto.string_val
    assert json.loads(settings)["features"] == ["tfidf"]

    caplog.clear()
    log_results([Tracker("mine", Failing())], folder, load_recipe(recipe, words), metrics)
    assert f"report_to: mine: the results of {folder} are not logged there: OSError" in caplog.text


@pytest.mark.slow
def test_a_tracker_that_fails_does_not_end_a_training(tiny_recipe, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(TensorBoardCallback, "on_log", Failing.on_log, raising=True)
    monkeypatch.setattr(TensorBoardCallback, "asked", 0, raising=False)
    train([str(tiny_recipe(max_steps=2, logging_steps=1, report_to="tensorboard"))])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train_rows"] > 0
    assert caplog.text.count("report_to: tensorboard: from here on, nothing is logged there") == 1
