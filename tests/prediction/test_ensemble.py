import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from tiny import write_recipe, write_run

from emogen.errors import InputError, ModelError
from emogen.evaluation import results
from emogen.evaluation.metrics import tune_thresholds
from emogen.evaluation.results import Prediction
from emogen.model import loading
from emogen.prediction.ensemble import (
    DecisionRule,
    Ensemble,
    load_rule,
    load_run,
    load_runs,
    predict_rows,
    read_members,
)
from emogen.task.answer import answer_text
from emogen.task.labels import Label, LabelSet
from emogen.task.parse import parse_answer
from emogen.task.rows import Rows
from emogen.train import main as train

pytestmark = pytest.mark.slow


def silent(title, n_rows):
    return nullcontext(lambda n_done: None)


@pytest.fixture(scope="module")
def pair():
    return LabelSet(name="pair", labels=(Label(name="red"), Label(name="blue")))


def write_scored(folder, label_set, gold, prob, folds):
    """Write the predictions of a run on n rows."""
    gold, prob = np.array(gold, dtype=np.int8), np.array(prob)
    rows = Rows("x", [f"r{i}" for i in range(len(gold))], ["text"] * len(gold), gold, list(range(len(gold))))
    pred = (prob > 0.5).astype(np.int8)
    results.write_jsonl(folder / "predictions.jsonl", rows, pred, prob, label_set, folds=np.array(folds))
    return folder


SIX = [("text", ("red",)), ("text", ("blue",))] * 3

# By hand: red is best told apart at (0.8 + 0.4) / 2 = 0.6, blue at (0.9 + 0.3) / 2 = 0.6. Both reach F1 1 with one
# positive, so both are drawn to 1/2: (1 * 0.6 + 50 * 1/2) / 51.
GOLD = [[1, 0], [0, 1]]
DRAWN = (0.6 + 50 / 2) / 51


def test_a_single_run_decides_by_its_own_thresholds(tmp_path, pair):
    results.write_thresholds(tmp_path, [0.25, 0.75], pair)
    rule = load_rule([tmp_path], pair, "thresholds")
    assert rule.thresholds.tolist() == [0.25, 0.75]
    probs = np.array([[[0.2, 0.4]], [[0.4, 0.8]]])  # of two models (folds) for one row
    np.testing.assert_allclose(rule.combine(probs), [[0.3, 0.6]])


def test_a_single_run_needs_thresholds(tmp_path, pair):
    with pytest.raises(InputError, match=r"thresholds\.json"):
        load_rule([tmp_path], pair, "thresholds")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((("blue", "red"), False), "b: its labels are in another order than those of .*a"),
        ((("red", "green"), False), "b: its labels are not those of .*a"),
        ((("red", "blue"), True), "b gives exactly one label .* and .*a any number"),
    ],
)
def test_runs_with_other_labels_do_not_decide_together(tmp_path, pair, other, message):
    names, single = other
    others = LabelSet(name="other", labels=tuple(Label(name=name) for name in names), exactly_one=single)
    runs = [
        write_run(tmp_path / "a", pair, posts=SIX, labels="labels.yaml"),
        write_run(tmp_path / "b", others, posts=[("x", names[:1])] * 6, labels="labels.yaml"),
    ]
    with pytest.raises(InputError, match=message):
        read_members(runs)
    assert read_members([runs[0], runs[0]])[2].names == ("red", "blue")


@pytest.mark.parametrize(
    "override", ["labels=other.yaml", "prompt=other.jinja", "answer=json", "order=rare_first", "examples=3"]
)
def test_a_run_keeps_what_its_model_learned(tmp_path, pair, override):
    """With labels in another order, a head would name each column by another label."""
    run = write_run(tmp_path / "a", pair, posts=SIX, labels="labels.yaml")
    key = override.partition("=")[0]
    with pytest.raises(InputError, match=rf"{override}.*a was made with {key}: .* leave {key} out"):
        read_members([run], [override])
    read_members([run], ["labels=labels.yaml", "answer=list", "order=canonical", "max_length=99"])


def test_thresholds_are_for_the_probabilities_that_they_were_tuned_on(tmp_path, pair):
    run = write_run(tmp_path / "a", pair, posts=SIX, labels="labels.yaml")
    message = "'prob=maximum': the decisions of .*a were tuned on probabilities with prob: marginal; leave prob out"
    with pytest.raises(InputError, match=message):
        Ensemble([run], ["predict_by=thresholds", "prob=maximum"])
    assert Ensemble([run], ["predict_by=thresholds", "prob=marginal"]).rule is not None
    assert Ensemble([run], ["prob=maximum"]).recipe.prob == "maximum"


def test_several_runs_decide_by_thresholds_on_their_mean(tmp_path, pair):
    runs = [
        write_scored(tmp_path / "a", pair, GOLD, [[0.9, 0.2], [0.5, 0.8]], [0, 1]),
        write_scored(tmp_path / "b", pair, GOLD, [[0.7, 0.4], [0.3, 1.0]], [0, 1]),
    ]
    rule = load_rule(runs, pair, "thresholds")
    assert rule.thresholds == pytest.approx([DRAWN, DRAWN], abs=1e-6)
    np.testing.assert_allclose(rule.combine(np.array([[[0.2, 0.4]], [[0.4, 0.8]]])), [[0.3, 0.6]])


def test_thresholds_are_tuned_again_if_another_metric_is_asked_for(tmp_path, pair):
    run = write_scored(tmp_path, pair, GOLD, [[0.9, 0.2], [0.5, 0.8]], [0, 1])
    results.write_thresholds(run, [0.25, 0.75], pair)
    common = (2 * 0.65 + 50 / 2) / 52  # both labels together: (0.8 + 0.5) / 2, F1 1, two positives
    assert load_rule([run], pair, "thresholds", "f1_micro").thresholds == pytest.approx([common, common], abs=1e-6)
    (run / "recipe.yaml").write_text("tune: f1_micro\n")
    assert load_rule([run], pair, "thresholds").thresholds.tolist() == [0.25, 0.75]  # these are for micro-F1
    assert load_rule([run], pair, "thresholds", "f1_macro").thresholds[0] == pytest.approx((0.7 + 25) / 51, abs=1e-6)


def test_a_stack_weighs_the_runs_by_a_regression_on_their_logits(tmp_path, pair):
    rng = np.random.default_rng(0)
    gold = (rng.random((40, 2)) < 0.5).astype(int)
    good, noise = gold * 0.6 + 0.2 + rng.random((40, 2)) * 0.2, rng.random((40, 2))
    folds = np.arange(40) % 2
    runs = [
        write_scored(tmp_path / "good", pair, gold, good, folds),
        write_scored(tmp_path / "noise", pair, gold, noise, folds),
    ]
    rule = load_rule(runs, pair, "stack")

    def fit_and_predict(train, new):
        """Fit to the rows `train`, and return the probabilities of new logits [2, m, 2]."""
        kept = [results.read_scored(run, pair).prob for run in runs]
        logits = [np.log(prob / (1 - prob)) for prob in np.clip(kept, 1e-6, 1 - 1e-6).astype(float)]
        columns = []
        for k in range(2):
            features = np.stack([system[train, k] for system in logits], axis=1)
            fitted = LogisticRegression().fit(features, gold[train, k])
            columns.append(fitted.predict_proba(new[:, :, k].T)[:, 1])
        return np.stack(columns, axis=1)

    probs = np.array([[[0.3, 0.7], [0.9, 0.5]], [[0.6, 0.2], [0.4, 0.5]]])  # two runs, two new rows
    logits = np.log(probs / (1 - probs))
    everything = np.ones(40, dtype=bool)
    np.testing.assert_allclose(rule.combine(probs), fit_and_predict(everything, logits), atol=1e-5)

    # The thresholds are tuned on probabilities of regressions that were fitted to the other fold.
    kept = np.clip([results.read_scored(run, pair).prob for run in runs], 1e-6, 1 - 1e-6).astype(float)
    cross_fitted = np.zeros((40, 2))
    for fold in (0, 1):
        held = folds == fold
        cross_fitted[held] = fit_and_predict(~held, np.log(kept / (1 - kept))[:, held])
    assert rule.thresholds == pytest.approx(tune_thresholds(gold, cross_fitted), abs=1e-5)

    # The noise hardly counts: red follows the good run.
    assert rule.combine(probs)[1, 0] > 0.9
    assert rule.combine(probs)[0, 0] < 0.1


@pytest.mark.parametrize("by", ["thresholds", "stack"])
def test_a_cross_validation_among_runs_is_the_mean_of_its_folds(tmp_path, pair, by):
    rng = np.random.default_rng(0)
    gold = (rng.random((40, 2)) < 0.5).astype(int)
    folds = np.arange(40) % 2
    runs = [
        write_scored(tmp_path / name, pair, gold, gold * 0.5 + rng.random((40, 2)) * 0.5, folds) for name in ("cv", "b")
    ]
    for k in range(2):
        (runs[0] / f"fold-{k}").mkdir()
    rule = load_rule(runs, pair, by)
    fold_0, fold_1, other = [[0.2, 0.4]], [[0.4, 0.8]], [[0.7, 0.1]]
    mean = [[0.3, 0.6]]
    combined = rule.combine(np.array([fold_0, fold_1, other]))
    np.testing.assert_allclose(combined, rule.combine(np.array([mean, mean, other])))
    if by == "thresholds":
        np.testing.assert_allclose(combined, [[0.5, 0.35]])  # of the two runs: (0.3 + 0.7) / 2, (0.6 + 0.1) / 2
        one = pair.model_copy(update={"exactly_one": True})
        np.testing.assert_allclose(load_rule(runs, one, by).combine(np.array([fold_0, fold_1, other])), combined)


def test_a_stack_needs_two_folds(tmp_path, pair):
    run = write_scored(tmp_path / "a", pair, GOLD, [[0.9, 0.2], [0.5, 0.8]], [0, 0])
    with pytest.raises(InputError, match="too few rows for predict_by=stack"):
        load_rule([run, run], pair, "stack")


def fake_classifier(label_set, answers, prob):
    """A classifier with given answers (label names of each row) and probabilities."""
    raws = [answer_text(names, label_set, "list") for names in answers]
    return SimpleNamespace(
        n_questions=1,
        predict=lambda texts, **options: [Prediction(raw, parse_answer(raw, label_set), 0) for raw in raws],
        predict_proba=lambda texts, **options: np.array(prob, dtype=np.float32),
    )


ROWS = Rows("x", ["a", "b"], ["first", "second"], None, [1, 2])


def test_without_a_rule_half_of_the_answers_decide(pair):
    red = fake_classifier(pair, [["red"], []], [[0.9, 0.1], [0.3, 0.3]])
    both = fake_classifier(pair, [["red", "blue"], ["blue"]], [[0.7, 0.6], [0.1, 0.7]])
    none = fake_classifier(pair, [[], []], [[0.2, 0.2], [0.2, 0.2]])
    two = predict_rows([red, both], ROWS, with_prob=True, bar=silent)
    assert two.pred.tolist() == [[1, 1], [0, 1]]  # one of two is half
    np.testing.assert_allclose(two.prob, [[0.8, 0.35], [0.2, 0.5]])
    assert two.predictions is None
    three = predict_rows([red, both, none], ROWS, bar=silent)
    assert three.pred.tolist() == [[1, 0], [0, 0]]
    assert three.pred.dtype == np.int8
    assert three.prob is None


def test_the_answers_of_a_single_model_are_returned(pair):
    batch = predict_rows([fake_classifier(pair, [["red"], []], None)], ROWS, bar=silent)
    assert [prediction.raw for prediction in batch.predictions] == ["red", "none"]
    assert batch.prob is None


def test_with_a_rule_probabilities_decide_and_no_answers_are_generated(pair):
    classifiers = [
        fake_classifier(pair, [["blue"], ["blue"]], [[0.9, 0.1], [0.3, 0.25]]),
        fake_classifier(pair, [["blue"], ["blue"]], [[0.7, 0.5], [0.1, 0.75]]),
    ]
    for classifier in classifiers:
        del classifier.predict
    rule = DecisionRule(lambda probs: probs.mean(axis=0), np.array([0.75, 0.5]))
    batch = predict_rows(classifiers, ROWS, rule=rule, bar=silent)
    np.testing.assert_allclose(batch.prob, [[0.8, 0.3], [0.2, 0.5]])
    assert batch.pred.tolist() == [[1, 0], [0, 0]]  # 0.5 is not above 0.5
    assert batch.predictions is None


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, labels):
    """Two runs of the same base model. Tests do not change them."""
    folder = tmp_path_factory.mktemp("two")
    recipe = str(write_recipe(folder, labels, max_steps=2))
    for seed in (1, 2):
        train([recipe, f"seed={seed}", f"output_dir={folder / str(seed)}"])
    return [folder / "1", folder / "2"]


def test_runs_share_their_base_model_and_keep_their_adapters(two_runs, monkeypatch):
    texts = ["what a lovely morning by the sea", "the bus leaves at nine"]
    expected = [load_run(run).predict_proba(texts) for run in two_runs]
    assert not np.allclose(*expected, atol=1e-4)
    loaded = []
    load_model = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *args, **how: loaded.append(args) or load_model(*args, **how))
    again = [classifier.predict_proba(texts) for classifier in load_runs([*two_runs, two_runs[0]])]
    assert len(loaded) == 1
    for prob, other in zip(again, [*expected, expected[0]], strict=True):
        np.testing.assert_allclose(prob, other, atol=1e-6)


def test_a_cross_validation_is_an_ensemble_of_its_folds(two_runs, tmp_path):
    cross_validation = tmp_path / "cv"
    for k, run in enumerate(two_runs):
        shutil.copytree(run, cross_validation / f"fold-{k}")
    ensemble = Ensemble([cross_validation, two_runs[0]])
    assert ensemble.folders == [cross_validation / "fold-0", cross_validation / "fold-1", two_runs[0]]
    assert ensemble.rule is None
    rows = Rows("x", ["a"], ["the bus leaves at nine"], None, [1])
    batch = ensemble.predict(rows, with_prob=True, batch_size=4, bar=silent)
    first, second = (load_run(run).predict_proba(rows.texts) for run in two_runs)
    np.testing.assert_allclose(batch.prob, (first + second + first) / 3, atol=1e-6)


def test_the_model_of_a_single_run_stays_loaded(two_runs, monkeypatch):
    ensemble = Ensemble(two_runs[:1])
    rows = Rows("x", ["a"], ["the bus leaves at nine"], None, [1])
    first = ensemble.predict(rows, with_prob=False, batch_size=4, bar=silent)
    monkeypatch.setattr(loading, "load_model", None)
    again = ensemble.predict(rows, with_prob=False, batch_size=4, bar=silent)
    assert first.predictions == again.predictions


def test_runs_with_different_labels_are_refused(two_runs, tmp_path):
    other = shutil.copytree(two_runs[1], tmp_path / "other")
    text = (other / "labels.yaml").read_text()
    (other / "labels.yaml").write_text(text.replace("name: anger", "name: zeal"))
    with pytest.raises(InputError, match="other: its labels are not those of"):
        Ensemble([two_runs[0], other])


def test_a_folder_that_is_not_a_run_is_refused(two_runs, tmp_path):
    with pytest.raises(InputError, match=r"not a run folder: it has no recipe\.yaml"):
        Ensemble([tmp_path])
    unfinished = shutil.copytree(two_runs[0], tmp_path / "unfinished")
    shutil.rmtree(unfinished / "adapter")
    with pytest.raises(ModelError, match="the run has not finished"):
        load_run(unfinished)
