"""Trackers, such as trackio, wandb or mlflow (`report_to`): trainings, cross-validations and baselines log there.

They are reached through transformers' own callbacks, so that all of them find the same account, project and settings.
Once a tracker has begun, its failures are warnings: they cost no finished work.
"""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from emogen.errors import InputError, ModelError
from emogen.evaluation.metrics import Metrics
from emogen.report.figures import own_words_for_missing_glyphs
from emogen.report.pictures import draw_run
from emogen.report.runs import read_run
from emogen.task.recipe import Recipe

log = logging.getLogger(__name__)

_SECRET = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)$")  # names of environment variables


class Tracker:
    """One of transformers' callbacks, whose failures are warnings. One that has failed is not called again.

    Args:
        name: as in `report_to`.
        callback: the callback.
    """

    def __init__(self, name: str, callback: Any):
        self.name, self.callback = name, callback
        self._failed = False

    def __getattr__(self, event: str) -> Callable[..., Any]:
        """The method of the callback for an event. It raises a ModelError if the tracker cannot begin."""
        if not event.startswith("on_"):
            raise AttributeError(event)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._failed:
                return None
            try:
                return getattr(self.callback, event)(*args, **kwargs)
            except Exception as error:
                if event == "on_train_begin":
                    raise ModelError(f"report_to: {self.name}: {_reason(error)}") from error
                self._failed = True
                log.warning(f"report_to: {self.name}: from here on, nothing is logged there: {_reason(error)}")
                return None

        return call


def load_trackers(recipe: Recipe) -> list[Tracker]:
    """The trackers of a recipe. Nothing is sent yet.

    Raises:
        InputError: a tracker is not installed.
    """
    named = recipe.sft_args["report_to"] or "none"
    if named in ("none", ["none"]):
        return []
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    names = [named] if isinstance(named, str) else named
    if "all" in names:
        names = get_available_reporting_integrations()
    trackers = []
    for name in names:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
            trackers.append(Tracker(name, callback()))
        except (ImportError, RuntimeError, ValueError) as error:  # not installed, or not known
            raise InputError(f"report_to: {name}: {error}") from None
    return trackers


def guard_trackers(trainer: Any, trackers: list[Tracker]) -> None:
    """Put trackers in the place of those that a trainer has made for itself."""
    own = {type(tracker.callback) for tracker in trackers}
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [callback for callback in callbacks if type(callback) not in own] + trackers


def log_results(trackers: list[Tracker], folder: Path, recipe: Recipe, metrics: Metrics) -> None:
    """Send the metrics and the pictures of a cross-validation or a baseline to its trackers, as one run.

    The run has the name of the folder. A tracker that fails is a warning.

    Args:
        metrics: see `crossval.sum_up`.
    """
    for tracker in trackers:
        try:
            _log_results(tracker, folder, recipe, metrics)
        except Exception as error:
            log.warning(f"report_to: {tracker.name}: the results of {folder} are not logged there: {_reason(error)}")


def _log_results(tracker: Tracker, folder: Path, recipe: Recipe, metrics: Metrics) -> None:
    from transformers import TrainerControl, TrainerState

    args = recipe.sft_config(run_name=folder.name, output_dir=str(folder), use_cpu=True, bf16=False, fp16=False)
    values = recipe.model_dump() | recipe.lm_args | recipe.sft_args
    args.to_dict = lambda: values  # what is logged as the settings of the run
    state, control = TrainerState(), TrainerControl()
    callback = tracker.callback
    callback.on_train_begin(args, state, control, model=None)
    callback.on_log(args, state, control, logs={f"eval_{name}": value for name, value in scalars(metrics).items()})
    for picture in draw_run(read_run(folder)):
        with own_words_for_missing_glyphs(picture.name):
            _log_picture(tracker, picture.name, picture.figure)
    callback.on_train_end(args, state, control, model=None)


def scalars(metrics: Metrics) -> dict[str, float]:
    """The figures among the metrics of a cross-validation by their names; the F1 of a label as `f1/NAME`."""
    found: dict[str, float] = {}
    for place, own in (("", metrics), ("by_thresholds/", metrics.get("by_thresholds", {}))):
        found |= {
            f"{place}{name}": value
            for name, value in own.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        found |= {f"{place}f1/{name}": label["f1"] for name, label in own.get("per_label", {}).items()}
    for key in ("mean", "sd"):
        for system, values in metrics[key].items():
            found |= {f"{key}/{system}/{name}": value for name, value in values.items()}
    return found


def _log_picture(tracker: Tracker, name: str, figure: Any) -> None:
    """Send a picture to a tracker that is known to take pictures."""
    match tracker.name:
        case "mlflow":
            import mlflow

            mlflow.log_figure(figure, f"{name}.png")
        case "tensorboard":
            tracker.callback.tb_writer.add_figure(name, figure)
        case "trackio":
            import trackio

            trackio.log({name: trackio.Image(_pixels(figure))})
        case "wandb":
            import wandb

            wandb.log({name: wandb.Image(_pixels(figure))})


def _pixels(figure: Any) -> np.ndarray:
    """A picture as uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def _reason(error: Exception) -> str:
    """What went wrong, in a line without secrets: messages of trackers may repeat addresses and keys."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    secrets = [value for name, value in os.environ.items() if _SECRET.search(name) and len(value) > 3]
    for secret in secrets:
        text = text.replace(secret, "...")
    return re.sub(r"//[^/@\s]+@", "//...@", text)[:300]
