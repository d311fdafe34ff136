"""The tables of metrics in a terminal."""

import io

import numpy as np
import pytest

from emogen.console import PlainConsole
from emogen.evaluation.metrics import evaluate, score
from emogen.evaluation.tables import metrics_table, print_metrics, print_scores, print_spread
from emogen.task.labels import LabelSet

NAMES = ["a", "b", "c"]
GOLD = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=np.int8)
PRED = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]], dtype=np.int8)


def shown(*args) -> list[str]:
    console = PlainConsole(width=80, file=io.StringIO())
    console.print(metrics_table(*args))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    return [line.rstrip() for line in lines]


def test_table_of_one_system():
    result = score(GOLD, PRED, NAMES)
    lines = shown(result)
    assert shown([("", result)]) == lines
    assert [line.split() for line in lines] == [
        ["label", "support", "P", "R", "F1"],
        ["a", "2", "0.500", "0.500", "0.500"],
        ["b", "2", "1.000", "1.000", "1.000"],
        ["c", "0", "0.000", "0.000", "0.000"],
        [],
        ["macro", "average", "0.500", "0.500", "0.500"],
        ["micro-F1", "0.667"],
        ["Jaccard", "(samples)", "0.708"],
        ["exact", "match", "0.500"],
        ["Hamming", "loss", "0.250"],
        ["4", "rows"],
    ]
    assert len({len(line) for line in lines[:-1] if line}) == 1  # right-aligned


def test_table_of_two_systems_shows_the_difference():
    lines = shown([("zero-shot", score(GOLD, PRED, NAMES)), ("fine-tuned", score(GOLD, GOLD, NAMES))])
    cells = [line.split() for line in lines]
    assert cells[0] == ["zero-shot", "fine-tuned"]
    assert cells[1] == ["label", "support", *["P", "R", "F1"] * 2, "ΔF1"]
    assert cells[2] == ["a", "2", *["0.500"] * 3, *["1.000"] * 3, "+0.500"]
    assert ["macro", "average", *["0.500"] * 3, *["0.667"] * 3, "+0.167"] in cells
    assert ["micro-F1", "0.667", "1.000", "+0.333"] in cells
    assert ["Hamming", "loss", "0.250", "0.000"] in cells  # not an F1: no difference


def test_a_difference_of_zero_has_no_minus_sign():
    result = score(GOLD, PRED, NAMES)
    lines = shown([("one", result), ("other", result | {"f1_micro": result["f1_micro"] - 1e-6})])
    assert not any("-0.000" in line for line in lines)


@pytest.mark.parametrize("n_systems", [1, 2, 3])
@pytest.mark.parametrize("title", ["tuned", "runs/qwen14b/predictions.csv", "odd [red] one"])
def test_the_table_fits_80_columns_without_cutting_anything(labels: LabelSet, n_systems: int, title: str):
    rng = np.random.default_rng(0)
    gold, *preds = (rng.random((n_systems + 1, 8000, len(labels))) < 0.25).astype(np.int8)
    results = [score(gold, pred, labels.names) for pred in preds]
    lines = shown([(f"{title} {k}", result) for k, result in enumerate(results)])
    for name in labels.names:
        [cells] = [line.split() for line in lines if line.startswith(f"{name} ")]
        expected = [
            f"{result['per_label'][name][key]:.3f}" for result in results for key in ("precision", "recall", "f1")
        ]
        assert cells[1] == f"{results[0]['per_label'][name]['support']:,}"
        assert cells[2 : 2 + len(expected)] == expected
        assert len(cells) == 2 + len(expected) + (n_systems == 2)
    assert "…" not in "".join(lines)
    assert ("[red]" in "".join(lines)) == ("[red]" in title)


def test_systems_on_different_rows_or_labels_are_refused():
    result = score(GOLD, PRED, NAMES)
    for other in (score(GOLD, PRED, ["a", "b", "d"]), score(GOLD[:3], PRED[:3], NAMES), score(PRED, PRED, NAMES)):
        with pytest.raises(ValueError, match="same gold rows and labels"):
            metrics_table([("one", result), ("other", other)])
    with pytest.raises(ValueError, match="no metrics"):
        metrics_table([])


@pytest.mark.parametrize("folds", [None, np.array([0, 0, 1, 1])])
def test_metrics_are_printed_with_nested_thresholds_if_there_are_folds(capsys, folds):
    print_metrics(evaluate(GOLD, PRED, PRED * 0.8 + 0.1, folds, NAMES))
    printed = capsys.readouterr().out
    assert ("nested thresholds" in printed) == (folds is not None)
    assert "No gold positives for: c." in printed


def test_the_spread_of_a_cross_validation_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    values = {"f1_macro": 0.5, "f1_micro": 0.625}
    metrics = {
        "mean": {"answer": values, "thresholds": values},
        "sd": {decision: {"f1_macro": 0.01, "f1_micro": 0.02} for decision in ("answer", "thresholds")},
        "interval": {
            decision: {"f1_macro": (0.4, 0.6), "f1_micro": (0.5, 0.75)} for decision in ("answer", "thresholds")
        },
        "folds": {"answer": {"f1_macro": [0.5] * 5}},
        "collapsed_folds": {"answer": [1, 4]},
    }
    print_spread(metrics)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "macro-F1, answers: 0.500 ± 0.010 over the folds; pooled, 95 %: 0.400 to 0.600"
    assert lines[3] == "micro-F1, nested thresholds: 0.625 ± 0.020 over the folds; pooled, 95 %: 0.500 to 0.750"
    assert lines[4:] == [
        "note answers: in 2 of 5 folds (1, 4), most labels are given to every row or to none.",
    ]

    metrics["sd"]["answer"]["f1_macro"], metrics["interval"]["answer"]["f1_macro"] = 0.0, None
    print_spread(metrics)
    assert capsys.readouterr().out.startswith("macro-F1, answers: 0.500 in every fold; pooled, no interval\n")


def test_below_the_scores_are_the_references_and_the_caveats_of_each_system(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    names = ["a", "[red]b"]
    gold = np.array([[1, 0], [0, 1]] * 20)
    print_scores([("every", score(gold, np.ones_like(gold), names)), ("right", score(gold, gold, names))])
    printed = capsys.readouterr().out
    assert "Without a model: all labels to every row: macro-F1 0.667, micro-F1 0.667." in printed
    assert "note every: 2 of 2 labels are given to every row or to none" in printed
    assert "(every row has: a, [red]b)" in printed
    assert "note every: Macro-F1 0.667 is not above the 0.667 of all labels to every row" in printed
    assert "note right" not in printed
