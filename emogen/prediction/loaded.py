"""Finished runs as one object in Python: `emogen.load`."""

import logging
import os
import threading
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import numpy as np

from emogen import processes
from emogen.console import no_bar, progress_bar, quiet_libraries
from emogen.errors import InputError
from emogen.evaluation.run_folder import CROSS_VALIDATION, THRESHOLDS, UNTUNED, kind_of
from emogen.prediction.ensemble import BatchPrediction, Ensemble
from emogen.task.columns import whole_characters
from emogen.task.rows import Rows
from emogen.task.yaml_files import as_overrides

log = logging.getLogger(__name__)

_ONE_AT_A_TIME = threading.Lock()  # a model has parts that belong to the call that it computes

Decision = Literal["answer", "thresholds", "stack"]


class LoadedClassifier:
    """One or several finished runs that label texts together; made by `emogen.load`.

    Threads may share it: their calls are computed one after another.

    Attributes:
        labels: the L label names, in the order of the columns of `predict_proba`.
        decide: `answer`, `thresholds` or `stack`.
    """

    def __init__(self, ensemble: Ensemble, decide: Decision):
        self._ensemble, self.decide = ensemble, decide
        self.labels = ensemble.label_set.names

    def __repr__(self) -> str:
        runs = ", ".join(str(folder) for folder in self._ensemble.folders)
        return f"<LoadedClassifier of {runs}: {len(self.labels)} labels by {self.decide}>"

    def predict(self, texts: Sequence[str], *, batch_size: int = 32, progress: bool = False) -> list[tuple[str, ...]]:
        """Label texts.

        Args:
            texts: n strings.
            batch_size: texts that a model computes together.
            progress: show a progress bar.

        Returns:
            The label names of each text, in canonical order; an empty tuple for a text without labels.

        Raises:
            TypeError: `texts` is a single string or no list of texts, or one of its items is no string.
        """
        pred = self._run(texts, False, batch_size, progress).pred
        return [self._ensemble.label_set.names_of(vector) for vector in pred.tolist()]

    def predict_proba(self, texts: Sequence[str], *, batch_size: int = 32, progress: bool = False) -> np.ndarray:
        """Compute the probability of each label. Arguments and errors are those of `predict`.

        Returns:
            float32 [n, L]; the columns are in the order of `labels`.
        """
        prob = self._run(texts, True, batch_size, progress).prob
        assert prob is not None
        return prob.astype(np.float32)

    def classify(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: bool = False
    ) -> tuple[list[tuple[str, ...]], np.ndarray]:
        """The results of `predict` and of `predict_proba`, in one pass."""
        found = self._run(texts, True, batch_size, progress)
        assert found.prob is not None
        names = [self._ensemble.label_set.names_of(vector) for vector in found.pred.tolist()]
        return names, found.prob.astype(np.float32)

    def _run(self, texts: Sequence[str], with_prob: bool, batch_size: int, progress: bool) -> BatchPrediction:
        rows, bar = rows_of_texts(texts), progress_bar if progress else no_bar
        with _ONE_AT_A_TIME:
            return self._ensemble.predict(rows, with_prob=with_prob, batch_size=batch_size, bar=bar)


def load(*runs: str | os.PathLike[str], decide: Decision | None = None, **overrides: Any) -> LoadedClassifier:
    """Load finished runs, cross-validations or baselines for use in Python; or a recipe file, for its untuned model.

    Several runs label texts together. The model of a single run is loaded at the first call and stays loaded; those of
    several runs are loaded one after another at each call, so give them many texts at once.

    Args:
        runs: run folders, as `emogen predict` takes them.
        decide: how labels are decided: by the generated `answer`, by the run's `thresholds`, or by a `stack` of several
            runs. By default thresholds if every run has them, otherwise answers. `emogen predict` decides by answers
            unless it is told otherwise (`predict_by`).
        overrides: keys of the recipe, such as `max_length=256`; but `decide` takes the place of `predict_by`.

    Raises:
        InputError: a folder is not a finished run, the labels of the runs differ, or `decide` needs what a run lacks.
    """
    quiet_libraries()
    processes.share_machine()
    if not runs:
        raise InputError("emogen.load: name at least one run folder")
    if "predict_by" in overrides:
        raise InputError(
            f"predict_by={overrides['predict_by']}: here `decide` says how labels are decided: decide=... in "
            "emogen.load, --decide ... in emogen serve"
        )
    folders = [Path(run) for run in runs]
    if decide is None:
        decide = "thresholds" if all(map(_has_thresholds, folders)) else "answer"
    return LoadedClassifier(Ensemble(folders, as_overrides(overrides | {"predict_by": decide})), decide)


def _has_thresholds(run: Path) -> bool:
    return run.is_dir() and ((run / THRESHOLDS).is_file() or kind_of(run) in (CROSS_VALIDATION, *UNTUNED))


def rows_of_texts(texts: Sequence[str]) -> Rows:
    """Rows without labels, whose ids are the positions of the texts.

    Raises:
        TypeError: `texts` is a single string or no list of texts, or one of its items is no string.
    """
    if isinstance(texts, str):
        raise TypeError("expected a list of texts, got a single string; write [text]")
    if isinstance(texts, Mapping | Set) or hasattr(texts, "columns"):  # whose items are names, or in any order
        raise TypeError(f"expected a list or a column of texts, got a {type(texts).__name__}; name its column of texts")
    texts = list(texts)
    for k, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {k}: expected a string, got {type(text).__name__}: {text!r:.80}")
    whole = [whole_characters(text) for text in texts]
    if n_broken := sum(text != own for text, own in zip(whole, texts, strict=True)):
        log.warning(f"{n_broken:,} texts with half a character (such as half an emoji), which is replaced by \ufffd")
    numbers = list(range(len(texts)))
    return Rows("texts", [str(k) for k in numbers], whole, None, numbers)
