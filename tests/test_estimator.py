"""`emogen.EmogenClassifier` among scikit-learn's tools."""

import numpy as np
import pandas
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from tiny import POSTS

from emogen import EmogenClassifier
from emogen.errors import InputError
from emogen.estimator import _label_matrix
from emogen.evaluation.results import read_held_out

TEXTS = [text for text, _ in POSTS]
NAMES = [names for _, names in POSTS]
QUICK = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}


def test_parameters_are_the_recipe_and_the_overrides():
    classifier = EmogenClassifier("recipes/demo.yaml", lora_r=4)
    assert classifier.get_params() == {"recipe": "recipes/demo.yaml", "lora_r": 4}
    copy = clone(classifier.set_params(lora_r=8, seed=1))
    assert copy.get_params() == {"recipe": "recipes/demo.yaml", "lora_r": 8, "seed": 1}
    with pytest.raises(NotFittedError):
        copy.predict(["x"])


@pytest.mark.slow
def test_it_is_tuned_and_predicts(tiny_recipe, labels):
    classifier = EmogenClassifier(str(tiny_recipe()), **QUICK).fit(TEXTS, NAMES)
    pred, prob = classifier.predict(TEXTS), classifier.predict_proba(TEXTS)
    assert list(classifier.classes_) == list(labels.names)
    assert pred.shape == prob.shape == (len(TEXTS), len(labels))
    assert pred.dtype == np.int8
    gold = np.array([labels.vector(names) for names in NAMES])
    by_matrix = classifier.score(TEXTS, gold)
    assert 0 <= by_matrix <= 1
    assert classifier.score(TEXTS, NAMES) == by_matrix
    assert (classifier.run_ / "adapter").is_dir()
    with pytest.raises(TypeError, match="got a single string"):
        classifier.predict(TEXTS[0])
    with pytest.raises(TypeError, match="got a DataFrame"):
        classifier.predict_proba(pandas.DataFrame({"text": TEXTS}))


@pytest.mark.slow
def test_it_is_tuned_on_the_texts_as_they_are(tiny_recipe, labels):
    """Whatever they contain, and whatever the recipe says of the form of its own files."""
    texts = ['"quoted", and; more\nin two lines', "=1+1\rthen", "", "Tweet", *TEXTS[4:]]
    recipe = tiny_recipe(quoting="none", separator=";", text_column="Kommentar", encoding="latin-1")
    overrides = QUICK | {"eval_fraction": 0.5}
    classifier = EmogenClassifier(str(recipe), **overrides).fit(texts, NAMES)
    held_out = read_held_out(classifier.run_, labels)
    assert held_out.texts == [texts[int(row_id)] for row_id in held_out.ids]
    assert held_out.truth.tolist() == [list(labels.vector(NAMES[int(row_id)])) for row_id in held_out.ids]


def test_the_columns_of_a_table_are_taken_by_their_names(labels):
    names = list(reversed(labels.names))
    table = pandas.DataFrame(np.eye(len(names), dtype=int), columns=names)
    assert (_label_matrix(table, labels) == np.eye(len(names))[:, ::-1]).all()
    unnamed = pandas.DataFrame(np.eye(len(names), dtype=int))
    assert (_label_matrix(unnamed, labels) == np.eye(len(names))).all()
    with pytest.raises(InputError, match=r"y: expected a column for each label .*got the columns .*rage"):
        _label_matrix(table.rename(columns={"anger": "rage"}), labels)


def test_a_text_that_is_none_is_refused():
    with pytest.raises(TypeError, match="text 1: expected a string, got NoneType"):
        EmogenClassifier("recipes/demo.yaml").fit(["a", None], [["joy"], ["joy"]])


@pytest.mark.slow
def test_a_recipe_that_evaluates_on_its_own_file_is_fitted_without_it(tiny_recipe):
    recipe = tiny_recipe(eval_file="not/there.csv", eval_strategy="steps", eval_steps=1, quoting="none")
    texts = [f'{text}, "quoted"' for text in TEXTS]
    quick = {"max_steps": 2, "save_strategy": "no"}
    pred = EmogenClassifier(str(recipe), **quick).fit(texts, NAMES).predict(texts[:2])
    assert pred.shape == (2, 11)
    held = EmogenClassifier(str(recipe), eval_fraction=0.25, **quick).fit(texts, NAMES)
    assert held.loaded.decide == "thresholds"
    assert '"eval_loss"' in (held.run_ / "train_log.jsonl").read_text(encoding="utf-8")  # evaluated while it trained


@pytest.mark.slow
def test_it_works_in_pipelines_and_cross_validations(tiny_recipe, labels):
    gold = np.array([labels.vector(names) for names in NAMES])
    strip = FunctionTransformer(lambda texts: [text.strip() for text in texts])
    pipeline = make_pipeline(strip, EmogenClassifier(str(tiny_recipe()), **QUICK))
    for method in ("predict", "predict_proba"):
        found = cross_val_predict(pipeline, TEXTS, gold, cv=KFold(2), method=method)
        assert found.shape == gold.shape


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([("joy",), ("rage",)], "y: rage: not in the label set"),
        (np.zeros((2, 3)), r"expected 0/1 of shape \[n, 11\]"),
        (np.full((2, 11), 0.5), "expected 0/1"),
        (np.zeros((3, 11)), "2 texts and 3 rows of labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(y, message):
    with pytest.raises(InputError, match=message):
        EmogenClassifier("recipes/demo.yaml").fit(["a", "b"], y)
