"""Scores during training and at its end: generated metrics at each evaluation, the best checkpoint, the log."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from emogen import processes
from emogen.console import progress_bar
from emogen.evaluation import results, run_folder
from emogen.evaluation.metrics import constant_labels, evaluate, score, tune_thresholds
from emogen.evaluation.results import parse_audit, pred_matrix
from emogen.evaluation.tables import print_metrics
from emogen.prediction.classifier import Classifier, prob_of
from emogen.task.recipe import SelectBest
from emogen.task.rows import Rows
from emogen.task.splits import make_folds

log = logging.getLogger(__name__)


class Scoring:
    """What a trainer of transformers' does at its evaluations here: score what the model says, and note the best step.

    `score`: called with the model; the figures that it returns are logged as `eval_...` beside the loss, and any of
    them can be `metric_for_best_model`. `select_best`: how the best checkpoint is chosen, if not by one metric alone.
    """

    score: Callable[[Any], dict[str, float]] | None
    select_best: SelectBest | None
    state: Any
    control: Any
    model: Any
    accelerator: Any

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss on the evaluation rows, then the score of what the model generates, logged together."""
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        if self.score is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            figures = self.score(self.accelerator.unwrap_model(self.model))
            output.metrics.update({f"{prefix}_{name}": value for name, value in figures.items()})
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Note which checkpoint is the best so far; called after each evaluation, before the checkpoint is saved."""
        if self.select_best is None:
            return bool(super()._determine_best_metric(metrics, trial))  # type: ignore[misc]
        step, waited = best_step(self.state.log_history, self.select_best)
        self.state.best_global_step = step
        if self.select_best.patience and waited >= self.select_best.patience:
            self.control.should_training_stop = True
        return step == self.state.global_step


def best_step(history: list[dict[str, Any]], rule: SelectBest) -> tuple[int, int]:
    """The best evaluation in a trainer's log, and how many came after it.

    Of those whose metric is no more than `within` below the best (or, for a loss, above it), the one whose `then` is
    lowest; of equal ones the first.

    Raises:
        KeyError: an evaluation without these figures.
    """
    metric, then = (name if name.startswith("eval_") else f"eval_{name}" for name in (rule.metric, rule.then))
    sign = -1 if metric.endswith("loss") else 1
    seen = [logs for logs in history if "eval_loss" in logs]
    top = max(sign * logs[metric] for logs in seen)
    k = min((k for k, logs in enumerate(seen) if sign * logs[metric] >= top - rule.within), key=lambda k: seen[k][then])
    return int(seen[k]["step"]), len(seen) - 1 - k


class LogFile(TrainerCallback):
    """Keeps what the trainer logs in a file, one JSON object a line, for whoever looks on and for the report.

    Each has the `step` that it was logged at, and `max_steps`. A run that is resumed goes on after the checkpoint's.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with what the checkpoint remembers."""
        if state.is_world_process_zero:
            self.path.write_text("", encoding="utf-8")
            for logs in state.log_history:
                self._write(state, logs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add what was logged."""
        if state.is_world_process_zero and logs:
            self._write(state, {**logs, "step": state.global_step})

    def _write(self, state: Any, logs: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**logs, "max_steps": state.max_steps}) + "\n")


def metrics_of(rows: Rows | None) -> Callable[[Classifier], dict[str, float]] | None:
    """What is called at each evaluation: label the rows, and score what comes out."""
    if rows is None:
        return None

    def figures(classifier: Classifier) -> dict[str, float]:
        predictions = classifier.predict(rows.texts)
        pred, names = pred_matrix(predictions), classifier.label_set.names
        metrics = score(rows.truth, pred, names)
        warn_of_collapse(pred, names)
        shown = {name: metrics[name] for name in ("f1_macro", "f1_micro", "jaccard_samples")}
        shown["parse_failure"] = parse_audit(predictions)["parse_failure"]
        return shown | {f"f1/{name}": label["f1"] for name, label in metrics["per_label"].items()}

    return figures


def warn_of_collapse(pred: np.ndarray, names: Sequence[str]) -> None:
    """Say so if most labels are given to all rows of `pred` [n, L], or to none."""
    stuck = constant_labels(pred, names)
    if len(stuck) > len(names) / 2:
        log.warning(
            f"{len(stuck)} of {len(names)} labels are given to every row or to none: {', '.join(stuck)}. The model "
            "does not tell rows apart. Early in training that passes; if it stays, lower learning_rate, train longer, "
            "or weigh the labels within themselves (label_weights: within)"
        )


def final_score(classifier: Classifier, rows: Rows, batch_size: int) -> dict[str, Any]:
    """Label all rows that are held out, keep what came out, print the table, and give the figures back.

    All processes label; the main one does the rest."""
    recipe, label_set, gold = classifier.recipe, classifier.label_set, rows.truth
    times = [time.perf_counter()]
    with progress_bar("Answers", len(rows) * classifier.n_questions) as advance:
        predictions = classifier.predict(rows.texts, batch_size=batch_size, progress=advance)
    times.append(time.perf_counter())
    prob = prob_of(classifier, rows.texts, predictions, progress_bar, "Probabilities")
    times.append(time.perf_counter())
    if not processes.is_main_process():
        return {}
    pred = pred_matrix(predictions)
    try:
        # The thresholds that are kept rest on all of these rows; what they are worth is said by nested ones.
        folds = make_folds(rows, 5, recipe.seed)
    except ValueError:
        folds = None  # too few rows
    folder = recipe.output_dir
    results.write_jsonl(folder / run_folder.PREDICTIONS, rows, pred, prob, label_set, predictions, folds)
    results.write_thresholds(folder, tune_thresholds(gold, prob), label_set)
    metrics = evaluate(gold, pred, prob, folds, label_set.names)
    print_metrics(metrics)
    warn_of_collapse(pred, label_set.names)
    answer_seconds, prob_seconds = np.diff(times).round(2).tolist()
    return metrics | {
        "parse": parse_audit(predictions),
        "answer_seconds": answer_seconds,
        "prob_seconds": prob_seconds,
    }
