"""Runs compared on the same rows: differences, ensembles, published results and their tables."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len

from emogen import paths
from emogen.console import PlainConsole
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.metrics import nested_pred, score, tune_thresholds
from emogen.evaluation.stack import nested_stack
from emogen.prediction.ensemble import load_rule
from emogen.report.compare import compare, names_of, published, published_rows, rows_of, share, tables, with_interval
from emogen.report.figures import draw_comparison, save
from emogen.task.labels import Label, LabelSet
from emogen.task.readers import read_rows
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
    assert same.difference_interval is None  # no resample tells the two apart
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


def test_an_ensemble_has_no_answer_and_says_how_it_decides(tmp_path, two_labels):
    runs = [write_system(tmp_path / str(k), two_labels, 0.75, seed=10 + k) for k in range(2)]
    *_, mean = compare(runs, two_labels, by="answer", ensemble=True)
    assert mean.name == "mean of 2, nested thresholds"
    assert mean.metrics == compare(runs, two_labels, ensemble=True)[-1].metrics


def test_with_exactly_one_label_no_folds_are_needed(tmp_path, two_labels):
    one = two_labels.model_copy(update={"exactly_one": True})
    runs = [write_system(tmp_path / str(k), one, 0.75, seed=k, folds=np.zeros(N, dtype=int)) for k in range(2)]
    first, _, mean = compare(runs, one, ensemble=True)
    prob = np.mean([results.read_scored(run, one).prob for run in runs], axis=0)
    gold = results.read_scored(runs[0], one).gold
    assert first.metrics["exactly_one"]
    assert mean.metrics["f1_macro"] == score(gold, np.eye(2, dtype=int)[prob.argmax(1)], one.names)["f1_macro"]
    with pytest.raises(InputError, match="too few rows or folds"):
        compare(runs, two_labels)


def test_runs_can_be_compared_by_micro_f1(tmp_path, two_labels):
    runs = [write_system(tmp_path / str(k), two_labels, 0.75, seed=10 + k) for k in range(2)]
    first, second = compare(runs, two_labels, objective="f1_micro")
    scored = results.read_scored(runs[0], two_labels)
    pred = nested_pred(scored.gold, scored.prob, scored.folds, "f1_micro")
    assert first.metrics == score(scored.gold, pred, two_labels.names)
    assert second.difference == second.metrics["f1_micro"] - first.metrics["f1_micro"]
    assert first.interval[0] < first.metrics["f1_micro"] < first.interval[1]
    headings = [column.header for column in tables([first, second])[0].columns]
    assert headings[1:3] == ["micro-F1, 95 %", "macro-F1"]


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


def shown(systems, published=(), width=80):
    console = PlainConsole(width=width, record=True)
    for table in tables(systems, published):
        console.print(table)
    text = console.export_text()
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    return text


def test_tables_fit_80_columns_without_cutting_anything(tmp_path, labels):
    runs = [
        write_system(tmp_path / f"a [red] run with a rather long name, {k}", labels, 0.6 + k / 10, seed=k)
        for k in range(2)
    ]
    systems = compare(runs, labels)
    text = shown(systems, published_rows(runs, labels))
    low, high = systems[1].difference_interval
    assert f"{low:+.3f}..{high:+.3f}" in text
    assert all(f"{label['f1']:.2f}" in text for system in systems for label in system.metrics["per_label"].values())
    assert all(re.search(rf"^{name} ", text, re.MULTILINE) for name in labels.names)
    assert "[red]" in text


@pytest.mark.parametrize(
    "names",
    [
        ["toxic", "severe_toxic", "toxicity", "insult"],
        [f"emotion number {k:02d}" for k in range(28)],
        ["非常に有害な投稿です", "非常に有害な投稿では", "радость", "(b)"],
        [
            "a label whose name is a whole sentence without a comma 1",
            "a label whose name is a whole sentence without a comma 2",
        ],
    ],
)
def test_label_names_are_shown_whole(tmp_path, names):
    label_set = LabelSet(name="other", labels=tuple(Label(name=name) for name in names))
    text = shown(compare([write_system(tmp_path / f"run{k}", label_set, 0.6, seed=k) for k in range(7)], label_set))
    _, *by_label = re.split(r"^F1 ", text, flags=re.MULTILINE)
    assert len(by_label) > 1
    for table in by_label:
        lines = [re.sub(r"\s+(\d+(\s+\d\.\d\d)+)?\s*$", "", line) for line in table.splitlines()]
        whole = "".join(lines).replace(" ", "")
        assert all(name.replace(" ", "") in whole for name in names)


def test_a_reference_is_beside_the_systems(tmp_path, two_labels):
    systems = compare([write_system(tmp_path / "run", two_labels, 0.6)], two_labels)
    gold = results.read_scored(tmp_path / "run", two_labels).gold
    every = score(gold, np.ones_like(gold), two_labels.names)
    reference = rows_of(systems)[1]
    assert reference.name == "all labels to every row (reference)"
    assert (reference.kind, reference.interval) == ("reference", None)
    assert reference.f1_macro == pytest.approx(every["f1_macro"])
    assert f"{every['f1_macro']:.3f}" in shown(systems)
    assert "(reference)" in shown(systems)


def test_few_rows_have_no_intervals_and_no_share_of_resamples(tmp_path, two_labels):
    few = np.arange(29)
    runs = [write_system(tmp_path / name, two_labels, 0.6, seed=k, order=few) for k, name in enumerate("ab")]
    first, second = compare(runs, two_labels)
    assert (first.interval, second.difference_interval, second.not_better) == (None, None, None)
    assert "(no interval)" in shown([first, second], width=100)
    assert with_interval(0.5, None) == "0.500 (no interval)"
    assert [share(value) for value in (None, 0.0, 0.0005, 1.0)] == ["too few rows", "<0.1%", "0.1%", "100.0%"]


@pytest.mark.parametrize("value", [float("nan"), 1.5, "0.5", None])
def test_a_probability_that_is_no_number_is_named(tmp_path, two_labels, value):
    run = write_system(tmp_path / "run", two_labels, 0.6)
    records = results.read_records(run / "predictions.jsonl")
    records[2]["prob"]["joy"] = value
    (run / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(InputError, match=r"predictions\.jsonl:3: a probability is not a number from 0 to 1"):
        compare([run], two_labels)


def test_a_part_of_a_cross_validation_is_not_compared(tmp_path, two_labels):
    run = write_system(tmp_path / "cv", two_labels, 0.6, order=np.flatnonzero(np.arange(N) % 5 < 3))
    (run / "folds.csv").write_text("id,fold\n" + "".join(f"r{i},{i % 5}\n" for i in range(N)))
    with pytest.raises(InputError, match=r"120 rows, but folds\.csv has 200; rows of the folds 3, 4 are missing"):
        compare([run], two_labels)
    (run / "predictions.jsonl").write_text("")
    with pytest.raises(InputError, match="it holds no rows"):
        compare([run], two_labels)


def test_published_systems_are_shown_in_tables_and_pictures(tmp_path, labels):
    run = write_system(tmp_path / "mine", labels, 0.5)
    systems, others = compare([run], labels), published_rows([run], labels)
    assert [row.name for row in others] == [f"{system['id']} (published)" for system in published()["systems"]]
    assert {row.interval for row in others} == {None}
    assert {row.kind for row in others} == {"published"}
    assert others[0].f1_by_label["anger"] == 0.5272
    text = shown(systems, others, width=200)
    assert len(published()["systems"]) == 9
    assert all(system["id"] in text for system in published()["systems"])
    assert "0.623" in text
    assert json.dumps(published()["labels"]) == json.dumps(list(labels.names))
    save(draw_comparison(rows_of(systems, others)), tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert all(system["id"] in drawn for system in published()["systems"])
    assert all(name in drawn for name in labels.names)
    assert f"{systems[0].metrics['f1_macro']:.3f}" in drawn


def test_published_systems_are_refused_for_other_labels_and_for_the_sample(tmp_path, labels, two_labels):
    run = write_system(tmp_path / "mine", two_labels, 0.5)
    with pytest.raises(
        InputError, match=r"the published results are for the labels anger, .*those of 'two' are others"
    ):
        published_rows([run], two_labels)
    sample, _ = read_rows(paths.shipped("sample/test.csv"), labels)
    results.write_jsonl(tmp_path / "predictions.jsonl", sample, sample.truth, sample.truth * 0.9, labels)
    with pytest.raises(InputError, match="scored on sample posts"):
        published_rows([tmp_path], labels)


def test_runs_are_named_by_as_many_folders_as_tell_them_apart():
    assert names_of([Path("/a/runs/one"), Path("/a/runs/two")]) == ["one", "two"]
    assert names_of([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert names_of([Path("/a/x/run"), Path("/b/x/run"), Path("/b/x/run")]) == ["a/x/run", "b/x/run", "b/x/run"]
