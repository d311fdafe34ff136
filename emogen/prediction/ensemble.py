"""Run folders -> one or several classifiers, and how they decide together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emogen.console import Bar
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.metrics import Objective, apply_thresholds, most_probable, tune_thresholds
from emogen.evaluation.results import Prediction, pred_matrix
from emogen.evaluation.run_folder import (
    BASELINE,
    kind_of,
    member_folders,
    read_recipe,
    require_own_prob,
    tuned_for,
)
from emogen.evaluation.stack import cross_fit, fit_stack
from emogen.prediction.baseline import load_baseline
from emogen.prediction.classifier import Classifier, prob_of
from emogen.prediction.generator import GeneratorLoader
from emogen.prediction.remote import load_remote
from emogen.task.labels import LabelSet
from emogen.task.recipe import Recipe
from emogen.task.rows import Rows


def load_runs(runs: Sequence[Path], overrides: Sequence[str] = (), *, force: bool = False) -> Iterator[Classifier]:
    """Load run folders, baselines or recipe files (their untuned models), one after another.

    Generative classifiers share their base model, so use each classifier before you ask for the next one.

    Args:
        force: see `check_weights`.

    Raises:
        InputError, ModelError: something is missing or broken.
    """
    generators = GeneratorLoader(force=force)
    for run in runs:
        recipe, label_set = read_recipe(run, overrides)
        if kind_of(run) == BASELINE:
            yield load_baseline(run, recipe, label_set)
        elif recipe.api_base:
            yield load_remote(run, recipe, label_set)
        elif recipe.answer == "head":
            from emogen.prediction.head import load_head

            yield load_head(run, recipe, label_set, force=force)
        else:
            yield generators.load(run, recipe)


def read_members(runs: Sequence[Path], overrides: Sequence[str] = ()) -> tuple[list[Path], Recipe, LabelSet]:
    """The folders of all members of some runs, and the recipe and the labels of the first one. No model is loaded.

    Raises:
        InputError: a folder is not a run, or the labels of the members differ.
    """
    folders = member_folders(runs)
    recipe, label_set = read_recipe(folders[0], overrides)
    for folder in folders[1:]:
        other = read_recipe(folder, overrides)[1]
        if sorted(other.names) == sorted(label_set.names) and other.names != label_set.names:
            raise InputError(f"{folder}: its labels are in another order than those of {folders[0]}")
        if other.names != label_set.names:
            raise InputError(f"{folder}: its labels are not those of {folders[0]}")
        if other.exactly_one != label_set.exactly_one:
            single, several = (folder, folders[0]) if other.exactly_one else (folders[0], folder)
            raise InputError(
                f"{folder}: {single} gives exactly one label to a text (exactly_one), and {several} any number: they "
                "cannot decide together"
            )
    return folders, recipe, label_set


def load_run(run: str | Path, overrides: Sequence[str] = (), *, force: bool = False) -> Classifier:
    """Load one run folder, baseline, or recipe file (its untuned model); see `load_runs`.

    Raises:
        InputError, ModelError: something is missing or broken.
    """
    return next(load_runs([Path(run)], overrides, force=force))


@dataclass(frozen=True)
class DecisionRule:
    """How the probabilities of K models become labels.

    Attributes:
        combine: [K, n, L] -> [n, L].
        thresholds: [L]. A label is given if its combined probability is above its threshold. None for label sets with
            `exactly_one`: the most probable label is given.
    """

    combine: Callable[[np.ndarray], np.ndarray]
    thresholds: np.ndarray | None

    def decide(self, prob: np.ndarray) -> np.ndarray:
        """Combined probabilities [n, L] -> labels, int8 [n, L]."""
        return most_probable(prob) if self.thresholds is None else apply_thresholds(prob, self.thresholds)


def load_rule(runs: Sequence[Path], label_set: LabelSet, by: str, objective: Objective | None = None) -> DecisionRule:
    """Tune how one or several runs (or cross-validations) decide, on the rows that were held out from all of them.

    Args:
        by: `thresholds`: thresholds on the mean of the runs. `stack`: thresholds on a stack of the runs. With
            `exactly_one` the most probable label takes the place of thresholds. The mean of its models stands for a
            cross-validation: it is one of the runs here, as on the rows that it was scored on.
        objective: what thresholds are tuned for. Default: the recipe of the first run says it (`tune`).

    Raises:
        InputError: a run has not been scored, the runs were scored on different rows, or there are too few rows.
    """
    ends = np.cumsum([len(member_folders([run])) for run in runs])[:-1]

    def of_runs(probs: np.ndarray) -> np.ndarray:
        """The probabilities of K models -> those of the runs, [R, n, L]."""
        return np.stack([_mean(members) for members in np.split(probs, ends)])

    def mean_of_runs(probs: np.ndarray) -> np.ndarray:
        return _mean(of_runs(probs))

    if by == "thresholds" and label_set.exactly_one:
        return DecisionRule(mean_of_runs, None)
    objective = objective or tuned_for(runs[0])
    if by == "thresholds" and len(runs) == 1 and objective == tuned_for(runs[0]):
        return DecisionRule(mean_of_runs, results.read_thresholds(runs[0], label_set))
    systems = results.align_scored([results.read_scored(run, label_set) for run in runs])
    gold, folds, probs = systems[0].gold, systems[0].folds, np.stack([system.prob for system in systems])
    if by == "thresholds":
        return DecisionRule(mean_of_runs, tune_thresholds(gold, _mean(probs), objective))
    if len(np.unique(folds)) < 2:
        raise InputError(f"{systems[0].path}: too few rows for predict_by=stack; use predict_by=answer")
    stack = fit_stack(gold, probs)
    thresholds = None if label_set.exactly_one else tune_thresholds(gold, cross_fit(gold, probs, folds), objective)
    return DecisionRule(lambda probs: stack.predict_proba(of_runs(probs)), thresholds)


def _mean(probs: np.ndarray) -> np.ndarray:
    return probs.mean(axis=0)


@dataclass(frozen=True)
class BatchPrediction:
    """The labels that one or several models give to n rows.

    Attributes:
        pred: int8 [n, L].
        prob: the combined probabilities, [n, L]; None if they were not computed.
        predictions: n answers; None if several models were asked, or probabilities decided.
    """

    pred: np.ndarray
    prob: np.ndarray | None
    predictions: list[Prediction] | None


def predict_rows(
    classifiers: Iterable[Classifier],
    rows: Rows,
    *,
    rule: DecisionRule | None = None,
    exactly_one: bool = False,
    with_prob: bool = False,
    batch_size: int = 32,
    bar: Bar,
) -> BatchPrediction:
    """Label rows with one or several models.

    Args:
        classifiers: models with the same labels, as from `load_runs`. Each is used before the next is asked for.
        rule: how probabilities become labels. Without a rule a label is given if half of the models' answers or more
            name it, and probabilities are averaged.
        exactly_one: without a rule, give each row the label that most answers name; of equals, the first. A row of
            which no answer could be read stays without a label.
        with_prob: compute probabilities even if they decide nothing.
        bar: makes a progress bar from a title and a number of rows.
    """
    answers: list[list[Prediction]] = []  # of each model
    probs = []
    for k, classifier in enumerate(classifiers, start=1):
        suffix = f", model {k}" if k > 1 else ""
        predictions: list[Prediction] = []
        if rule is None:
            with bar(f"Answers{suffix}", len(rows) * classifier.n_questions) as advance:
                predictions = classifier.predict(
                    rows.texts, with_prob=with_prob, batch_size=batch_size, progress=advance
                )
            answers.append(predictions)
        if rule is not None or with_prob:
            probs.append(prob_of(classifier, rows.texts, predictions, bar, f"Probabilities{suffix}"))
    if rule is not None:
        prob = rule.combine(np.stack(probs))
        return BatchPrediction(rule.decide(prob), prob, None)
    votes = np.mean([pred_matrix(predictions) for predictions in answers], axis=0)
    return BatchPrediction(
        pred=most_probable(votes) if exactly_one else (votes >= 0.5).astype(np.int8),
        prob=_mean(np.stack(probs)) if with_prob else None,
        predictions=answers[0] if len(answers) == 1 else None,
    )


class Ensemble:
    """One or several runs that label rows together. Their models are loaded when the first rows come.

    Args:
        runs: run folders, cross-validations, baselines, or a recipe file.
        overrides: `key=value`, applied to each recipe.
        force: see `check_weights`.

    Raises:
        InputError: a folder is not a run, the labels of the runs differ, or `predict_by` needs files that are missing.
    """

    def __init__(self, runs: Sequence[Path], overrides: Sequence[str] = (), *, force: bool = False):
        self.overrides, self.force = overrides, force
        self.folders, self.recipe, self.label_set = read_members(runs, overrides)
        by = self.recipe.predict_by
        self.rule = None if by == "answer" else load_rule(runs, self.label_set, by, self.recipe.tune)
        if self.rule and any(override.startswith("prob=") for override in overrides):
            for folder in self.folders:
                require_own_prob(folder, self.recipe.prob)
        self._single: list[Classifier] = []

    def predict(self, rows: Rows, *, with_prob: bool, batch_size: int, bar: Bar) -> BatchPrediction:
        """See `predict_rows`. The model of a single run stays loaded; several are loaded one after another."""
        if not len(rows):
            pred = np.zeros((0, len(self.label_set)), dtype=np.int8)
            return BatchPrediction(pred, pred.astype(np.float32), [])
        if len(self.folders) == 1 and not self._single:
            self._single.append(load_run(self.folders[0], self.overrides, force=self.force))
        classifiers = self._single or load_runs(self.folders, self.overrides, force=self.force)
        return predict_rows(
            classifiers, rows, rule=self.rule, exactly_one=self.label_set.exactly_one,
            with_prob=with_prob, batch_size=batch_size, bar=bar,
        )  # fmt: skip
