"""emogen as an estimator of scikit-learn: `emogen.EmogenClassifier`."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from emogen import train
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.metrics import score as score_labels
from emogen.prediction.loaded import LoadedClassifier, load, rows_of_texts
from emogen.task.labels import LabelSet
from emogen.task.recipe import load_recipe
from emogen.task.task import load_recipe_labels
from emogen.task.yaml_files import as_overrides


class EmogenClassifier(ClassifierMixin, BaseEstimator):
    """A multi-label classifier of texts that tunes the model of a recipe.

    It works with scikit-learn's `cross_val_predict`, `Pipeline`, `clone` and `GridSearchCV`. Labels are decided by the
    generated answers; with `eval_fraction` in the recipe or the overrides, a part of the rows is held out, and labels
    are decided by thresholds that are tuned on it. `predict_by` in the overrides says otherwise.

    Args:
        recipe: a recipe file. Its data files are not used, so nothing is evaluated during training unless the overrides
            hold rows out.
        overrides: keys of the recipe, such as `num_train_epochs=2` or `labels="my_labels.yaml"`. With `output_dir`, the
            run is kept there; otherwise it is in a temporary folder until the estimator is deleted.

    Attributes:
        classes_: after `fit`, the L label names in canonical order.
        run_: after `fit`, the run folder.
    """

    def __init__(self, recipe: str, **overrides: Any):
        self.recipe = recipe
        self.overrides = overrides

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The recipe and the overrides."""
        return {"recipe": self.recipe, **self.overrides}

    def set_params(self, **params: Any) -> "EmogenClassifier":
        """Set the recipe or overrides; a key of the recipe that was not set before is added."""
        self.recipe = params.pop("recipe", self.recipe)
        self.overrides = self.overrides | params
        return self

    def fit(self, X: Sequence[str], y: Any) -> "EmogenClassifier":
        """Tune the model.

        Args:
            X: n texts.
            y: the true labels: 0/1 [n, L] in canonical label order, a table with a 0/1 column for each label, in any
                order, or the label names of each text.

        Raises:
            InputError: the recipe is not valid; `y` does not fit the texts or the labels.
            TypeError: `X` is no list of texts, or a text is no string.
        """
        recipe = load_recipe(self.recipe, as_overrides(self._own_keys("rows.jsonl")))
        label_set = load_recipe_labels(recipe)
        rows, gold = rows_of_texts(X), _label_matrix(y, label_set)
        if len(rows) != len(gold):
            raise InputError(f"{len(rows)} texts and {len(gold)} rows of labels; they must be the same rows")
        self._scratch = tempfile.TemporaryDirectory(prefix="emogen-", ignore_cleanup_errors=True)
        file = Path(self._scratch.name) / "rows.jsonl"
        results.write_rows(file, replace(rows, gold=gold), label_set)
        self.run_ = Path(self.overrides.get("output_dir") or Path(self._scratch.name) / "run")
        keys = self._own_keys(str(file)) | {"output_dir": str(self.run_)}
        if not (recipe.eval_file or recipe.eval_fraction or recipe.select_best):
            keys.setdefault("eval_strategy", "no")  # a recipe evaluates on its own file, which is not used
        train.main([self.recipe, *as_overrides(keys)])
        self.classes_, self._label_set = np.array(label_set.names), label_set
        self._loaded = load(self.run_, decide=self.overrides.get("predict_by"))
        return self

    def _own_keys(self, train_file: str) -> dict[str, Any]:
        """The overrides, with all rows in one file and none held out unless that is asked for."""
        own = {"train_file": train_file, "eval_file": None, "eval_fraction": 0.0, "soft_labels": False}
        return dict.fromkeys(results.FORM) | own | self.overrides

    @property
    def loaded(self) -> LoadedClassifier:
        """The tuned classifier, as `emogen.load` returns it."""
        check_is_fitted(self, "run_")
        return self._loaded

    def predict(self, X: Sequence[str]) -> np.ndarray:
        """Label n texts: int8 [n, L], in the order of `classes_`."""
        names = self.loaded.predict(X)
        return np.array([np.isin(self.classes_, row) for row in names], dtype=np.int8).reshape(-1, len(self.classes_))

    def predict_proba(self, X: Sequence[str]) -> np.ndarray:
        """The probability of each label for n texts: float32 [n, L]."""
        return self.loaded.predict_proba(X)

    def score(self, X: Sequence[str], y: Any, sample_weight: None = None) -> float:
        """The macro-F1 of n texts, with `y` as for `fit`; see `emogen.score`."""
        pred = self.predict(X)
        return float(score_labels(_label_matrix(y, self._label_set), pred, self._label_set.names)["f1_macro"])


def _label_matrix(y: Any, label_set: LabelSet) -> np.ndarray:
    """0/1 [n, L], a table with a column for each label, or n collections of label names -> int8 [n, L].

    Raises:
        InputError: it is none of these.
    """
    columns = list(getattr(y, "columns", ()))
    if columns and columns != list(range(len(columns))):  # a table whose columns have names
        if len(columns) != len(label_set) or set(columns) != set(label_set.names):
            raise InputError(
                f"y: expected a column for each label ({', '.join(label_set.names)}), got the columns "
                f"{', '.join(map(str, columns))}"
            )
        y = y[list(label_set.names)]
    rows = list(y)
    if rows and all(
        isinstance(row, list | tuple | set | frozenset) and all(isinstance(v, str) for v in row) for row in rows
    ):
        if unknown := sorted({name for row in rows for name in row} - set(label_set.names)):
            raise InputError(f"y: {', '.join(unknown)}: not in the label set ({', '.join(label_set.names)})")
        return np.array([label_set.vector(list(row)) for row in rows], dtype=np.int8)
    gold = np.asarray(y)
    if gold.ndim != 2 or gold.shape[1] != len(label_set) or not np.isin(gold, (0, 1)).all():
        raise InputError(
            f"y: expected 0/1 of shape [n, {len(label_set)}] (columns: {', '.join(label_set.names)}), or the label "
            f"names of each text; got an array of shape {gold.shape}"
        )
    return gold.astype(np.int8)
