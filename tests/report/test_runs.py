"""The facts of run folders, those of emogen 0.1 included."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emogen.evaluation.metrics import nested_thresholds
from emogen.report.compare import compare
from emogen.report.page import report
from emogen.report.runs import audit_answers, fold_table, notes, read_run, resources

pytestmark = pytest.mark.slow

OLD_RUN = Path(__file__).parent.parent / "data" / "old_run" / "run"  # written by emogen 0.1


def test_a_run_of_version_0_1_is_scored_compared_and_reported(tmp_path, labels):
    folder = shutil.copytree(OLD_RUN, tmp_path / "run")
    metrics = json.loads((OLD_RUN / "metrics.json").read_text())
    run = read_run(folder)
    answer, nested = run.scores.decisions
    assert answer.metrics == {key: metrics[key] for key in answer.metrics}
    # Newer versions name the labels whose positives are all in one fold.
    assert nested.metrics == metrics["by_thresholds"] | {"untuned": ["anticipation", "trust"]}
    assert run.scores.calibration["ece"] == pytest.approx(metrics["calibration"]["ece"], abs=1e-5)
    assert run.scores.audit.statuses == [("exact", 11, False)]
    assert [system.metrics for system in compare([folder], labels)] == [nested.metrics]
    assert [system.metrics for system in compare([folder], labels, by="answer")] == [answer.metrics]
    assert report([folder]) == [folder / "report.html", folder / "README.md"]
    for path in (folder / "report.html", folder / "README.md"):
        assert f"{metrics['f1_macro']:.3f}" in path.read_text()
        assert f"{metrics['by_thresholds']['f1_macro']:.3f}" in path.read_text()


def test_the_facts_of_a_run(small_run, reports, labels):
    run = small_run
    assert (run.name, run.folder, run.kind) == ("small", reports / "small", "run")
    assert run.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert run.generates
    assert run.label_set == labels
    assert list(run.files) == ["recipe.yaml", "prompt.jinja", "labels.yaml", "manifest.json"]
    assert run.manifest["seed"] == 42
    assert (run.fold_metrics, run.n_folds) == ({}, 0)
    assert [len(log) for log in run.logs] == [5]
    answer, nested = run.scores.decisions
    assert (answer.title, nested.title) == ("answer", "nested thresholds")
    assert answer.thresholds is None
    assert (answer.pred == run.scores.rows.pred).all()
    rows = run.scores.rows
    assert (nested.thresholds == nested_thresholds(rows.gold, rows.prob, rows.folds)).all()
    assert (nested.pred == (rows.prob > nested.thresholds)).all()
    low, high = answer.intervals["f1/joy"]
    assert low < answer.metrics["per_label"]["joy"]["f1"] < high
    assert notes(run) == []
    assert fold_table(run) is None


def test_scores_are_reordered_row_by_row(small_run):
    scores = small_run.scores
    order = np.random.default_rng(0).permutation(len(scores.rows.ids))
    shuffled = scores.in_order_of([scores.rows.ids[i] for i in order])
    assert [record["id"] for record in shuffled.records] == shuffled.rows.ids
    assert (shuffled.rows.gold == scores.rows.gold[order]).all()
    for before, after in zip(scores.decisions, shuffled.decisions, strict=True):
        assert (after.pred == before.pred[order]).all()
        assert after.metrics is before.metrics
    assert (shuffled.decisions[1].thresholds == scores.decisions[1].thresholds[order]).all()
    assert shuffled.in_order_of(scores.rows.ids).records == scores.records


def test_the_parse_audit_counts_statuses_and_unknown_words():
    records = [
        {"status": "exact", "unknown": []},
        {"status": "unknown", "unknown": ["bliss"]},
        {"status": "repaired", "unknown": ["bliss", "zeal"], "tokens_cut": 3},
        {"status": "exact", "unknown": []},
        {"status": "empty", "unknown": []},
    ]
    audit = audit_answers(records)
    assert audit.n == 5
    assert audit.statuses[0] == ("exact", 2, False)
    assert set(audit.statuses[1:]) == {("unknown", 1, True), ("repaired", 1, False), ("empty", 1, True)}
    assert audit.unknown == [("bliss", 2), ("zeal", 1)]
    assert (audit.n_failed, audit.n_cut) == (2, 1)


def test_resources_of_a_run(small_run):
    assert resources(small_run) == [
        ("training", "1 min"),
        ("training rows", "90"),
        ("answers and probabilities", "4.0 s, 10.0 rows/s"),
        ("peak memory", "1.5 GiB"),
        ("hardware", "CPU, 2 threads (x86_64)"),
    ]


def test_resources_of_a_cross_validation_are_sums_over_its_folds(small_run):
    folds = {
        k: {"train_seconds": 3600.0 * (k + 1), "train_rows": 4000, "n": 10, "prob_seconds": 5.0, "peak_memory_bytes": k * 2**30}
        for k in range(3)
    }  # fmt: skip
    logs = [[{"loss": 1.0}, {"train_samples_per_second": speed}] for speed in (2.0, 4.0)]
    hardware = {"gpus": ["H100", "H100"]}
    run = replace(small_run, fold_metrics=folds, logs=logs, manifest={"hardware": hardware})
    assert resources(run) == [
        ("training of 3 folds", "6 h 00 min"),
        ("training rows per fold", "4,000"),
        ("training speed", "3.0 rows/s"),
        ("probabilities of 3 folds", "15.0 s, 2.0 rows/s"),
        ("peak memory", "2.0 GiB"),
        ("hardware", "2 × H100"),
    ]


def test_the_table_of_the_folds_while_some_are_missing_and_at_the_end(small_run):
    unfinished = replace(small_run, kind="cross-validation", metrics={}, n_folds=3)
    assert fold_table(unfinished) is None
    assert notes(unfinished) == [
        "Not finished: there is no metrics.json. The command that started it resumes it; 0 of 3 folds are finished."
    ]
    folds = {2: {"f1_macro": 0.5, "f1_micro": 0.6}, 0: {"f1_macro": 0.25, "f1_micro": 0.75}}
    table = fold_table(replace(unfinished, fold_metrics=folds))
    assert table.numbers == [0, 2]
    assert table.values == {"answer": {"f1_macro": [0.25, 0.5], "f1_micro": [0.75, 0.6]}}
    assert (table.mean, table.sd) == ({}, {})

    by_decision = {"answer": {"f1_macro": [0.25, 0.5]}, "thresholds": {"f1_macro": [0.5, 0.75]}}
    means = {"answer": {"f1_macro": 0.375}, "thresholds": {"f1_macro": 0.625}}
    metrics = {"folds": by_decision, "mean": means, "sd": means}
    table = fold_table(replace(unfinished, metrics=metrics, generates=False))
    assert table.numbers == [0, 1]
    assert list(table.values) == ["threshold 0.5", "nested thresholds"]
    assert table.mean["nested thresholds"] == {"f1_macro": 0.625}
