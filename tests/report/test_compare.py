import json

import numpy as np
import pytest
from rich.console import Console

from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.metrics import nested_pred, score, tune_thresholds
from emogen.evaluation.stack import nested_stack
from emogen.prediction.ensemble import load_rule
from emogen.report.compare import compare, published, rows_of, tables
from emogen.report.figures import draw_comparison, save
from emogen.task.labels import Label, LabelSet
from emogen.task.rows import Rows

N = 200


def write_system(folder, labels, noise, seed=0, order=None, folds=None):
    """A folder with predictions for N rows, the gold labels blurred by so much noise."""
    rng = np.random.default_rng(1)
    gold = (rng.random((N, 11)) < 0.3).astype(np.int8)
    prob = gold * (1 - noise) + np.random.default_rng(seed).random((N, 11)) * noise
    order = np.arange(N) if order is None else order
    rows = Rows("x", [f"r{i}" for i in range(N)], ["text"] * N, gold, list(range(N))).take(order)
    folds = np.arange(N) % 5 if folds is None else folds
    results.write_jsonl(folder / "predictions.jsonl", rows, (prob > 0.5).astype(np.int8)[order], prob[order], labels, folds=folds[order])  # fmt: skip
    return folder


def test_systems_on_the_same_rows_whatever_their_order(tmp_path, labels):
    shuffled = np.random.default_rng(3).permutation(N)
    runs = [
        write_system(tmp_path / "good", labels, 0.6),
        write_system(tmp_path / "same", labels, 0.6, order=shuffled),
        write_system(tmp_path / "bad", labels, 0.9, seed=5),
    ]
    good, same, bad, both = compare(runs, labels, ensemble=True)
    assert same.difference == 0
    assert same.difference_interval == (0, 0)
    assert same.metrics == good.metrics
    scored = results.read_scored(runs[0], labels)
    assert good.metrics == score(scored.gold, nested_pred(scored.gold, scored.prob, scored.folds), labels.names)
    assert bad.difference < -0.1
    assert bad.difference_interval[1] < 0
    assert bad.not_better == 1
    assert both.name == "mean of 3"
    answers = compare(runs, labels, by="answer")
    assert answers[0].metrics == score(scored.gold, scored.pred, labels.names)


def test_an_ensemble_of_different_errors_is_better_than_each(tmp_path, labels):
    runs = [write_system(tmp_path / str(k), labels, 0.75, seed=10 + k) for k in range(3)]
    *single, mean = compare(runs, labels, ensemble=True)
    assert mean.metrics["f1_macro"] > max(of.metrics["f1_macro"] for of in single) + 0.02
    scored = [results.read_scored(run, labels) for run in runs]
    average = np.mean([of.prob for of in scored], axis=0)
    rule = load_rule(runs, labels, "thresholds")
    assert rule.thresholds == pytest.approx(tune_thresholds(scored[0].gold, average))
    assert rule.combine(np.stack([of.prob for of in scored])) == pytest.approx(average)


def test_runs_are_stacked_each_as_the_mean_of_its_models(tmp_path, labels):
    runs = [write_system(tmp_path / str(k), labels, 0.75, seed=10 + k) for k in range(2)]
    first, _, both = compare(runs, labels, by="stack", ensemble=True)
    scored = [results.read_scored(run, labels) for run in runs]
    gold, folds, probs = scored[0].gold, scored[0].folds, np.stack([of.prob for of in scored])
    assert first.metrics == score(gold, nested_stack(gold, probs[:1], folds), labels.names)
    assert both.name == "stack of 2"
    assert both.metrics == score(gold, nested_stack(gold, probs, folds), labels.names)

    for k in range(3):  # the first is a cross-validation, of three models
        (runs[0] / f"fold-{k}").mkdir()
    combine = load_rule(runs, labels, "stack").combine
    apart = np.stack([probs[0] - 0.1, probs[0], probs[0] + 0.1, probs[1]])
    assert combine(apart) == pytest.approx(combine(np.stack([probs[0], probs[0], probs[0], probs[1]])), abs=1e-5)
    assert combine(apart) != pytest.approx(combine(np.stack([probs[0], probs[0], probs[1], probs[1]])))

    one_fold = write_system(tmp_path / "whole", labels, 0.5, folds=np.zeros(N, dtype=int))
    with pytest.raises(InputError, match="too few rows for predict_by=stack"):
        load_rule([one_fold], labels, "stack")
    with pytest.raises(InputError, match="too few rows or folds"):
        compare([one_fold], labels, by="stack")


def test_other_rows_and_other_folds_are_refused(tmp_path, labels):
    first = write_system(tmp_path / "first", labels, 0.5)
    fewer = write_system(tmp_path / "fewer", labels, 0.5, order=np.arange(50))
    other = write_system(tmp_path / "other", labels, 0.5, folds=np.arange(N) % 4)
    with pytest.raises(InputError, match="not the same rows"):
        compare([first, fewer], labels)
    with pytest.raises(InputError, match="not the same folds"):
        compare([first, other], labels)
    with pytest.raises(InputError, match="it has no predictions"):
        compare([first, tmp_path], labels)


def test_tables_fit_a_terminal_of_80_columns_with_all_their_figures(tmp_path, labels):
    runs = [
        write_system(tmp_path / f"a run with a rather long name, {k}", labels, 0.6 + k / 10, seed=k) for k in range(2)
    ]
    systems = compare(runs, labels)
    console = Console(width=80, record=True)
    for table in tables(systems, with_published=True):
        console.print(table)
    shown = console.export_text()
    low, high = systems[1].difference_interval
    assert f"{low:+.3f}..{high:+.3f}" in shown
    assert all(f"{label['f1']:.2f}" in shown for system in systems for label in system.metrics["per_label"].values())
    assert "…" not in shown


def test_many_labels_stand_below_each_other(tmp_path):
    many = LabelSet(name="many", labels=tuple(Label(name=f"{k:02d}-label") for k in range(25)))
    gold = np.eye(25, dtype=np.int8)
    rows = Rows("x", [f"r{i}" for i in range(25)], ["text"] * 25, gold, list(range(25)))
    results.write_jsonl(tmp_path / "predictions.jsonl", rows, gold, gold * 0.9, many, folds=np.arange(25) % 5)
    _, *by_label = tables(compare([tmp_path], many, by="answer"))
    headings = [[column.header for column in table.columns] for table in by_label]
    assert [len(of) for of in headings] == [12, 12, 4]
    assert [name for of in headings for name in of if name != "F1"] == [f"{k:02d}-la" for k in range(25)]


def test_published_figures_stand_beside(tmp_path, labels):
    systems = compare([write_system(tmp_path / "mine", labels, 0.5)], labels)
    console = Console(width=200, record=True)
    for table in tables(systems, with_published=True):
        console.print(table)
    shown = console.export_text()
    assert len(published()["systems"]) == 9
    assert all(system["id"] in shown for system in published()["systems"])
    assert "0.623" in shown
    assert json.dumps(published()["labels"]) == json.dumps(list(labels.names))
    save(draw_comparison(rows_of(systems, with_published=True)), tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert all(system["id"] in drawn for system in published()["systems"])
    assert all(name in drawn for name in labels.names)
    assert f"{systems[0].metrics['f1_macro']:.3f}" in drawn
