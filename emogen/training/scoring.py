"""Scores during training and at its end: metrics of generated answers, the best checkpoint, the log file."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from emogen import processes
from emogen.console import progress_bar
from emogen.evaluation import results, run_folder
from emogen.evaluation.caveats import constant_labels_of, is_collapsed, listed
from emogen.evaluation.metrics import Metrics, check_prob, evaluate, score, tune_thresholds
from emogen.evaluation.results import parse_audit, pred_matrix
from emogen.evaluation.tables import print_metrics
from emogen.prediction.classifier import Classifier, prob_of
from emogen.task.recipe import SelectBest
from emogen.task.rows import Rows
from emogen.task.splits import make_folds
from emogen.training.checkpoints import list_files

log = logging.getLogger(__name__)

LOSS_SUM = "loss_sum"  # in the state of a checkpoint, beside the states of callbacks


class ScoringMixin:
    """Adds to a transformers `Trainer`: metrics of the model's answers, another best checkpoint, the loss of all steps.

    transformers logs as `train_loss` the mean over the steps since a run was resumed, or 0.0 if there are none. Here it
    is the mean over all steps: each checkpoint keeps the sum so far, and has a list of its files.

    Attributes:
        model_metrics: computes metrics of the model. They are logged as `eval_...` beside the loss, and each of them
            can be `metric_for_best_model`. None for the loss alone.
        select_best: how the best checkpoint is chosen; None for `metric_for_best_model`.
    """

    model_metrics: Callable[[Any], dict[str, float]] | None
    select_best: SelectBest | None
    args: Any
    state: Any
    control: Any
    model: Any
    accelerator: Any
    _tr_loss: torch.Tensor
    _total_loss_scalar: float
    _initial_global_step: int

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss on the validation rows, then the metrics of the model's answers."""
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        if self.model_metrics is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            metrics = self.model_metrics(self.accelerator.unwrap_model(self.model))
            output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train for an epoch, unless all steps are done.

        A run that is resumed from its last checkpoint, in the middle of an epoch, would take another step otherwise.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        total = self._total_loss_scalar + self.accelerator.reduce(self._tr_loss.clone(), "mean").item()
        before = self._loss_before
        if before is not None:
            self.state.stateful_callbacks[LOSS_SUM] = {"args": {}, "attributes": {"value": before + total}}
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if processes.is_main_process() and checkpoint.exists():
            # The run started before it, because it is damaged. peft would read the old files before it replaces them.
            shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()
        # Older checkpoints are removed after this one is complete, which it is with the list of its files.
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()
        if processes.is_main_process():
            list_files(checkpoint)
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=keep,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the mean loss of all steps as `train_loss`; leave it out after an old checkpoint, which has no sum."""
        if "train_loss" in logs:
            before = self._loss_before
            if before is None:
                del logs["train_loss"]
            else:
                logs["train_loss"] = (before + self._total_loss_scalar) / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    @cached_property
    def _loss_before(self) -> float | None:
        """The sum of the losses of the steps before this call; None if the checkpoint does not have it."""
        if not self._initial_global_step:
            return 0.0
        kept = self.state.stateful_callbacks.get(LOSS_SUM)
        return None if kept is None else float(kept["attributes"]["value"])

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this step is the best so far. Called after each evaluation, before the checkpoint is saved."""
        if self.select_best is None:
            return bool(super()._determine_best_metric(metrics, trial))  # type: ignore[misc]
        step, n_since = best_step(self.state.log_history, self.select_best)
        self.state.best_global_step = step
        if self.select_best.patience and n_since >= self.select_best.patience:
            self.control.should_training_stop = True
        return step == self.state.global_step


def best_step(history: list[dict[str, Any]], rule: SelectBest) -> tuple[int, int]:
    """The best evaluation in the log of a trainer.

    Of the evaluations whose metric is within `within` of the best one, it is the one with the lowest `then`; of equal
    ones the first. For a metric that is a loss, the best one is the lowest.

    Returns:
        Its step, and the number of evaluations since.

    Raises:
        KeyError: an evaluation lacks one of the two metrics.
    """
    metric, then = (name if name.startswith("eval_") else f"eval_{name}" for name in (rule.metric, rule.then))
    sign = -1 if metric.endswith("loss") else 1
    evaluations = [logs for logs in history if "eval_loss" in logs]
    top = max(sign * logs[metric] for logs in evaluations)
    within = [k for k, logs in enumerate(evaluations) if sign * logs[metric] >= top - rule.within]
    best = min(within, key=lambda k: evaluations[k][then])
    return int(evaluations[best]["step"]), len(evaluations) - 1 - best


class LogFile(TrainerCallback):
    """Writes what the trainer logs to a file, one JSON object per line, for progress tables and for the report.

    Each object has its `step`, and `max_steps`. The log of a resumed run continues that of its checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the file with the log of the checkpoint, if there is one."""
        if state.is_world_process_zero:
            self.path.write_text("", encoding="utf-8")
            for logs in state.log_history:
                self._write(state, logs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append one entry."""
        if state.is_world_process_zero and logs:
            self._write(state, {**logs, "step": state.global_step})

    def _write(self, state: Any, logs: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**logs, "max_steps": state.max_steps}) + "\n")


def make_compute_metrics(val_rows: Rows | None) -> Callable[[Classifier], dict[str, float]] | None:
    """The function that labels the validation rows with a classifier and scores it; None without rows."""
    if val_rows is None:
        return None

    def compute_metrics(classifier: Classifier) -> dict[str, float]:
        predictions = classifier.predict(val_rows.texts)
        scores = score(val_rows.truth, pred_matrix(predictions), classifier.label_set.names)
        warn_of_constant_labels(scores)
        metrics = {name: scores[name] for name in ("f1_macro", "f1_micro", "jaccard_samples")}
        metrics["parse_failure"] = parse_audit(predictions)["parse_failure"]
        return metrics | {f"f1/{name}": label["f1"] for name, label in scores["per_label"].items()}

    return compute_metrics


def warn_of_constant_labels(metrics: Metrics) -> None:
    """Log a warning if most labels are wrongly predicted for all rows or for none.

    Args:
        metrics: the result of `score`.
    """
    if is_collapsed(metrics):
        always, never = constant_labels_of(metrics)
        constant = [name for name in metrics["per_label"] if name in always or name in never]
        log.warning(
            f"Most labels are given to every row or to none: {listed(constant)}. The model does not tell rows apart. "
            "This is normal early in training. If it persists, lower learning_rate, train longer, or weight the labels "
            "(label_weights: within)"
        )


def final_score(classifier: Classifier, rows: Rows, batch_size: int) -> dict[str, Any]:
    """Label the evaluation rows, write predictions and thresholds to the run folder, and print the metrics.

    All processes take part in labelling; the rest is done by the main one.

    Returns:
        The metrics; nothing in processes other than the main one.

    Raises:
        ModelError: a probability is not a number.
    """
    recipe, label_set, gold = classifier.recipe, classifier.label_set, rows.truth
    times = [time.perf_counter()]
    with progress_bar("Answers", len(rows) * classifier.n_questions) as advance:
        predictions = classifier.predict(rows.texts, with_prob=True, batch_size=batch_size, progress=advance)
    times.append(time.perf_counter())
    prob = prob_of(classifier, rows.texts, predictions, progress_bar, "Probabilities")
    check_prob(prob)
    times.append(time.perf_counter())
    if not processes.is_main_process():
        return {}
    pred = pred_matrix(predictions)
    try:
        # The thresholds of the run are tuned on all of these rows. Their score is that of thresholds nested in folds.
        folds = make_folds(rows, 5, recipe.seed)
    except ValueError:
        folds = None  # too few rows
    folder = recipe.output_dir
    results.write_jsonl(folder / run_folder.PREDICTIONS, rows, pred, prob, label_set, predictions, folds)
    if not label_set.exactly_one:  # else the answer is one label, and there is nothing to tune
        results.write_thresholds(folder, tune_thresholds(gold, prob, recipe.tune), label_set)
    metrics = evaluate(gold, pred, prob, folds, label_set.names, recipe.tune, exactly_one=label_set.exactly_one)
    print_metrics(metrics)
    answer_seconds, prob_seconds = np.diff(times).round(2).tolist()
    metrics |= {"parse": parse_audit(predictions), "answer_seconds": answer_seconds}
    came_apart = any(prediction.prob is None for prediction in predictions)
    return metrics | ({"prob_seconds": prob_seconds} if came_apart else {})
