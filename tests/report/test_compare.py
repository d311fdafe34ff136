"""Runs compared on the same rows: differences, ensembles, published results and their tables."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.metrics import nested_pred, score, tune_thresholds
from emogen.evaluation.stack import nested_stack
from emogen.prediction.ensemble import load_rule
from emogen.report.compare import compare, names_of, published, published_rows_for, rows_of, tables
from emogen.report.figures import draw_comparison, save
from emogen.task.labels import Label, LabelSet
from emogen.task.rows import Rows

N = 200


def write_system(folder, labels, noise, seed=0, order=None, folds=None):
    """Write predictions for N rows whose probabilities are the gold labels with noise. Returns the folder."""
    rng = np.random.default_rng(1)
    gold = (rng.random((N, len(labels))) < 0.3).astype(np.int8)
    prob = gold * (1 - noise) + np.random.default_rng(seed).random(gold.shape) * noise
    order = np.arange(N) if order is None else order
    rows = Rows("x", [f"r{i}" for i in range(N)], ["text"] * N, gold, list(range(N))).take(order)
    folds = np.arange(N) % 5 if folds is None else folds
    results.write_jsonl(folder / "predictions.jsonl", rows, (prob > 0.5).astype(np.int8)[order], prob[order], labels, folds=folds[order])  # fmt: skip
    return folder


def test_systems_are_compared_on_the_same_rows_whatever_their_order(tmp_path, two_labels):
    shuffled = np.random.default_rng(3).permutation(N)
    runs = [
        write_system(tmp_path / "good", two_labels, 0.6),
        write_system(tmp_path / "same", two_labels, 0.6, order=shuffled),
        write_system(tmp_path / "bad", two_labels, 0.9, seed=5),
    ]
    good, same, bad, mean = compare(runs, two_labels, ensemble=True)
    assert same.difference == 0
    assert same.difference_interval == (0, 0)
    assert same.metrics == good.metrics
    scored = results.read_scored(runs[0], two_labels)
    assert good.metrics == score(scored.gold, nested_pred(scored.gold, scored.prob, scored.folds), two_labels.names)
    assert bad.difference < -0.1
    assert bad.difference_interval[1] < 0
    assert bad.not_better == 1
    assert mean.name == "mean of 3"
    answers = compare(runs, two_labels, by="answer")
    assert answers[0].metrics == score(scored.gold, scored.pred, two_labels.names)


def test_an_ensemble_of_systems_with_different_errors_beats_each_of_them(tmp_path, two_labels):
    runs = [write_system(tmp_path / str(k), two_labels, 0.75, seed=10 + k) for k in range(3)]
    *single, mean = compare(runs, two_labels, ensemble=True)
    assert mean.metrics["f1_macro"] > max(system.metrics["f1_macro"] for system in single) + 0.02
    scored = [results.read_scored(run, two_labels) for run in runs]
    average = np.mean([rows.prob for rows in scored], axis=0)
    rule = load_rule(runs, two_labels, "thresholds")
    assert rule.thresholds == pytest.approx(tune_thresholds(scored[0].gold, average))
    assert rule.combine(np.stack([rows.prob for rows in scored])) == pytest.approx(average)


def test_a_stack_takes_each_run_as_the_mean_of_its_models(tmp_path, two_labels):
    runs = [write_system(tmp_path / str(k), two_labels, 0.75, seed=10 + k) for k in range(2)]
    first, _, stack = compare(runs, two_labels, by="stack", ensemble=True)
    scored = [results.read_scored(run, two_labels) for run in runs]
    gold, folds, probs = scored[0].gold, scored[0].folds, np.stack([rows.prob for rows in scored])
    assert first.metrics == score(gold, nested_stack(gold, probs[:1], folds), two_labels.names)
    assert stack.name == "stack of 2"
    assert stack.metrics == score(gold, nested_stack(gold, probs, folds), two_labels.names)

    for k in range(3):  # the first run is a cross-validation with three models
        (runs[0] / f"fold-{k}").mkdir()
    combine = load_rule(runs, two_labels, "stack").combine
    apart = np.stack([probs[0] - 0.1, probs[0], probs[0] + 0.1, probs[1]])
    assert combine(apart) == pytest.approx(combine(np.stack([probs[0], probs[0], probs[0], probs[1]])), abs=1e-5)
    assert combine(apart) != pytest.approx(combine(np.stack([probs[0], probs[0], probs[1], probs[1]])))

    one_fold = write_system(tmp_path / "whole", two_labels, 0.5, folds=np.zeros(N, dtype=int))
    with pytest.raises(InputError, match="too few rows for predict_by=stack"):
        load_rule([one_fold], two_labels, "stack")
    with pytest.raises(InputError, match="too few rows or folds"):
        compare([one_fold], two_labels, by="stack")


def test_systems_on_other_rows_or_folds_are_refused(tmp_path, two_labels):
    first = write_system(tmp_path / "first", two_labels, 0.5)
    fewer = write_system(tmp_path / "fewer", two_labels, 0.5, order=np.arange(50))
    other = write_system(tmp_path / "other", two_labels, 0.5, folds=np.arange(N) % 4)
    with pytest.raises(InputError, match="not the same rows"):
        compare([first, fewer], two_labels)
    with pytest.raises(InputError, match="not the same folds"):
        compare([first, other], two_labels)
    with pytest.raises(InputError, match="it has no predictions"):
        compare([first, tmp_path], two_labels)


def test_tables_fit_80_columns_without_cutting_anything(tmp_path, labels):
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


def test_many_labels_are_split_into_several_tables(tmp_path):
    many = LabelSet(name="many", labels=tuple(Label(name=f"{k:02d}-label") for k in range(25)))
    gold = np.eye(25, dtype=np.int8)
    rows = Rows("x", [f"r{i}" for i in range(25)], ["text"] * 25, gold, list(range(25)))
    results.write_jsonl(tmp_path / "predictions.jsonl", rows, gold, gold * 0.9, many, folds=np.arange(25) % 5)
    _, *by_label = tables(compare([tmp_path], many, by="answer"))
    headings = [[column.header for column in table.columns] for table in by_label]
    assert [len(row) for row in headings] == [12, 12, 4]
    assert [name for row in headings for name in row if name != "F1"] == [f"{k:02d}-la" for k in range(25)]


def test_published_systems_are_shown_in_tables_and_pictures(tmp_path, labels):
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


def test_published_systems_are_offered_only_for_their_labels(labels):
    rows = published_rows_for(labels.names[::-1])
    assert [row.name for row in rows] == [f"{system['id']} (published)" for system in published()["systems"]]
    assert {row.interval for row in rows} == {None}
    assert rows[0].f1_by_label["anger"] == 0.5272
    assert published_rows_for(labels.names[1:]) == []


def test_runs_are_named_by_as_many_folders_as_tell_them_apart():
    assert names_of([Path("/a/runs/one"), Path("/a/runs/two")]) == ["one", "two"]
    assert names_of([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert names_of([Path("/a/x/run"), Path("/b/x/run"), Path("/b/x/run")]) == ["a/x/run", "b/x/run", "b/x/run"]
