"""Run folders -> one or several classifiers, and how they decide together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emogen.console import Bar
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.metrics import apply_thresholds, tune_thresholds
from emogen.evaluation.results import Prediction, pred_matrix
from emogen.evaluation.run_folder import ADAPTER, BASELINE, kind_of, member_folders, read_recipe
from emogen.evaluation.stack import cross_fit, fit_stack
from emogen.model.encode import load_encoder
from emogen.model.sources import locate
from emogen.prediction.classifier import Classifier, prob_of
from emogen.prediction.generator import GenerativeClassifier
from emogen.prediction.tfidf import load_tfidf
from emogen.task.labels import LabelSet
from emogen.task.rows import Rows
from emogen.task.task import load_task


def load_runs(runs: Sequence[Path], overrides: Sequence[str] = ()) -> Iterator[Classifier]:
    """Load run folders or baselines one after another; a recipe file stands for its base model without any tuning.

    As long as the base model stays the same it is loaded once, and only the adapter on it changes: use each one before
    you ask for the next.

    Raises:
        InputError, ModelError: what is missing or broken, and where.
    """
    from emogen.model.loading import load_adapter, load_model, to_device, use_own_gpu
    from emogen.model.onednn import use_onednn
    from emogen.model.shared_prefix import share_prefix

    use_own_gpu()
    model: Any = None
    base = None
    for run in runs:
        recipe, label_set = read_recipe(run, overrides)
        if kind_of(run) == BASELINE:
            yield load_tfidf(run, recipe, label_set)
            continue
        if recipe.answer == "head":
            from emogen.prediction.head import load_head

            yield load_head(recipe, label_set, run if run.is_dir() else None)
            continue
        adapter = run / ADAPTER if run.is_dir() else None
        task = load_task(recipe)
        lm_config = recipe.lm_config()
        location = locate(recipe.model_name, lm_config.model_revision)
        encoder, _ = load_encoder(task, str(adapter) if adapter else location)
        wanted = (location, lm_config.dtype, lm_config.load_in_4bit, lm_config.load_in_8bit, recipe.shared_prefix)
        if wanted != base:
            model, base = load_model(location, lm_config, trust_remote_code=recipe.trusts_code), wanted
            model = to_device(model)
            if recipe.shared_prefix:
                share_prefix(model)
        elif hasattr(model, "unload"):
            model = model.unload()  # the adapter of the run before
        if adapter:
            model = load_adapter(model, adapter)
        use_onednn(model)
        yield GenerativeClassifier(recipe, task.label_set, encoder, model)


def load_run(run: str | Path, overrides: Sequence[str] = ()) -> Classifier:
    """Load one run folder, or the base model of a recipe; see `load_runs`."""
    return next(load_runs([Path(run)], overrides))


@dataclass(frozen=True)
class DecisionRule:
    """How probabilities become labels: `combine` makes one of those of K models, [K, n, L] -> [n, L], and a label is
    given where it is above its threshold, [L]."""

    combine: Callable[[np.ndarray], np.ndarray]
    thresholds: np.ndarray


def load_rule(runs: Sequence[Path], label_set: LabelSet, by: str) -> DecisionRule:
    """How one or several runs (or cross-validations) decide, as they learnt it from the rows held out from all of them.

    Args:
        by: `thresholds`: above the mean of all models. `stack`: above what `stack.Stack` makes of the runs, each of
            which is the mean of its models.

    Raises:
        InputError: a run has not been scored, the runs were not scored on the same rows, or these are too few.
    """
    if by == "thresholds" and len(runs) == 1:
        return DecisionRule(_mean, results.read_thresholds(runs[0], label_set))
    systems = results.aligned([results.read_scored(run, label_set) for run in runs])
    gold, folds, probs = systems[0].gold, systems[0].folds, np.stack([of.prob for of in systems])
    if by == "thresholds":
        return DecisionRule(_mean, tune_thresholds(gold, _mean(probs)))
    if len(np.unique(folds)) < 2:
        raise InputError(f"{systems[0].path}: too few rows for predict_by=stack; predict_by=answer takes what is said")
    fitted = fit_stack(gold, probs)
    ends = np.cumsum([len(member_folders([run])) for run in runs])[:-1]

    def combine(probs: np.ndarray) -> np.ndarray:
        return fitted.predict_proba(np.stack([_mean(of_run) for of_run in np.split(probs, ends)]))

    return DecisionRule(combine, tune_thresholds(gold, cross_fit(gold, probs, folds)))


def _mean(probs: np.ndarray) -> np.ndarray:
    return probs.mean(axis=0)


@dataclass(frozen=True)
class BatchPrediction:
    """The labels that one or several models came to: `pred` int8 [n, L]; the `prob` [n, L] that they have together,
    where that was wanted; and, of one model that was asked for answers, these."""

    pred: np.ndarray
    prob: np.ndarray | None
    predictions: list[Prediction] | None


def predict_rows(
    classifiers: Iterable[Classifier],
    rows: Rows,
    *,
    rule: DecisionRule | None = None,
    with_answers: bool = False,
    with_prob: bool = False,
    batch_size: int = 32,
    bar: Bar,
) -> BatchPrediction:
    """Label rows with one or several models.

    Args:
        classifiers: models with the same labels, as `load_runs` gives them; each is used before the next is asked for.
        rule: how a label is given by probabilities. Without one it is, where half of the models' answers or more name
            it, and probabilities are averaged.
        with_answers, with_prob: compute answers, or probabilities, also where nothing is decided by them.
        bar: makes a progress bar of a title and a number of rows.
    """
    answers, probs = [], []
    for k, classifier in enumerate(classifiers, start=1):
        predictions: list[Prediction] = []
        of = f", model {k}" if k > 1 else ""
        if rule is None or with_answers:
            with bar(f"Answers{of}", len(rows) * classifier.n_questions) as advance:
                predictions = classifier.predict(rows.texts, batch_size=batch_size, progress=advance)
            answers.append(pred_matrix(predictions))
        if rule is not None or with_prob:
            probs.append(prob_of(classifier, rows.texts, predictions, bar, f"Probabilities{of}"))
    prob = (rule.combine if rule else _mean)(np.stack(probs)) if probs else None
    if rule is None:
        pred = (np.mean(answers, axis=0) >= 0.5).astype(np.int8)
    else:
        assert prob is not None
        pred = apply_thresholds(prob, rule.thresholds)
    return BatchPrediction(pred, prob, predictions if len(answers) == 1 else None)


class Ensemble:
    """One or several runs that label rows together; their models are loaded when rows come.

    Args:
        runs: run folders, cross-validations, or a recipe.
        overrides: of their recipes.

    Raises:
        InputError: a folder is no run, their labels differ, or there is nothing to decide by as `predict_by` wants.
    """

    def __init__(self, runs: Sequence[Path], overrides: Sequence[str] = ()):
        self.folders, self.overrides = member_folders(runs), overrides
        self.recipe, self.label_set = read_recipe(self.folders[0], overrides)
        for folder in self.folders[1:]:
            if read_recipe(folder, overrides)[1].names != self.label_set.names:
                raise InputError(f"{folder}: its labels are not those of {self.folders[0]}")
        by = self.recipe.predict_by
        self.rule = None if by == "answer" else load_rule(runs, self.label_set, by)
        self._only: list[Classifier] = []

    def predict(self, rows: Rows, *, with_prob: bool, batch_size: int, bar: Bar) -> BatchPrediction:
        """See `predict_rows`. The model of a single run stays loaded; several are loaded one after another."""
        if len(self.folders) == 1 and not self._only:
            self._only.append(next(load_runs(self.folders, self.overrides)))
        classifiers = self._only or load_runs(self.folders, self.overrides)
        return predict_rows(classifiers, rows, rule=self.rule, with_prob=with_prob, batch_size=batch_size, bar=bar)
