"""The store of scores, which all sets of rows share."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import POSTS, SHORT, write_run

from emogen.console import progress_bar
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.experiments import scores
from emogen.experiments.prompts import load_generator, open_benchmark, prepare
from emogen.experiments.scores import KeptScores, difference_in_words, row_keys, score_rows, score_template
from emogen.task.prompt import parse_prompt


@pytest.fixture(scope="module")
def generator(recipe):
    return load_generator(open_benchmark(recipe, limit=20))


@pytest.fixture
def benchmarks(recipe, tmp_path, monkeypatch):
    """Opens benchmarks of a number of rows, which share an empty store."""
    monkeypatch.setattr(scores, "PART", 8)
    return lambda limit: open_benchmark(recipe, [f"output_dir={tmp_path / 'out'}"], limit=limit)


def short(benchmark):
    return prepare(benchmark, parse_prompt(SHORT, "short.jinja"))


def without_times(metrics):
    return {key: value for key, value in metrics.items() if key != "texts_per_second"}


def test_more_rows_go_on_from_fewer(benchmarks, generator):
    few, many = benchmarks(12), benchmarks(36)
    assert few.store == many.store
    assert few.folder != many.folder
    score_template(few, short(few), generator, progress_bar)
    found, *parts = score_rows(many, short(many), generator)
    assert found == len(few.rows)
    assert sum(parts) == 36 - found
    assert list(score_rows(many, short(many), None)) == [36]  # nothing is left to compute
    assert score_template(many, short(many), None, progress_bar)["n"] == 36
    lines = (short(many).store / "rows.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["row"] for line in lines) == sorted(row_keys(many.rows))


def test_what_is_interrupted_goes_on_with_the_same_scores(benchmarks, generator, tmp_path):
    benchmark = benchmarks(36)
    whole = replace(benchmark, folder=tmp_path / "whole", store=tmp_path / "whole" / "store")
    expected = score_template(whole, short(whole), generator, progress_bar)
    parts = score_rows(benchmark, short(benchmark), generator)
    assert [next(parts), next(parts)] == [0, 8]
    with pytest.raises(InputError, match="in use by process"):
        next(score_rows(benchmark, short(benchmark), generator))
    parts.close()
    with (short(benchmark).store / "rows.jsonl").open("a") as file:
        file.write('{"row": "half a li')  # of a process that was killed
    kept = KeptScores(short(benchmark).store).read()
    assert len(kept.of_row) == 8
    assert list(kept.of_row) == list(KeptScores(short(whole).store).read().of_row)[:8]  # the same sample
    metrics = score_template(benchmark, short(benchmark), generator, progress_bar)
    assert without_times(metrics) == without_times(expected)
    assert len(kept.read().of_row) == 36


def test_the_scores_are_those_of_all_rows_at_once(benchmarks, generator, labels):
    """`yes_no` holds its probabilities, and has several questions of a text; `list` computes them."""
    for benchmark in (benchmarks(20), benchmarks(20)):
        for source in (SHORT, '{% answer "yes_no" %}\n{% user %}\n{{ text }}\n{{ label.name }}?\n'):
            template = prepare(benchmark, parse_prompt(source, "x.jinja"))
            score_template(benchmark, template, generator, progress_bar)
            kept = results.read_scored(template.folder, labels)
            alone = replace(generator, encoder=template.encoder)
            predictions = alone.predict(benchmark.rows.texts, batch_size=64)
            assert (kept.pred == results.pred_matrix(predictions)).all()
            assert np.abs(kept.prob - alone.predict_proba(benchmark.rows.texts)).max() < 1e-4
            assert kept.ids == benchmark.rows.ids


def test_a_text_with_other_labels_is_another_row_and_a_repeated_row_is_scored_once(benchmarks, generator):
    benchmark = benchmarks(36)
    rows = benchmark.rows.take([0, 0, 1])
    rows.gold[:, 0] = [0, 1, 0]
    assert len(set(row_keys(rows))) == 3
    rows = benchmark.rows.take([0, 1, 2, 3, 0])
    repeated = replace(benchmark, rows=replace(rows, ids=list("abcde")))
    assert list(score_rows(repeated, short(repeated), generator)) == [0, 5]
    assert len(KeptScores(short(repeated).store).read().of_row) == 4


@pytest.mark.parametrize("line", ["no JSON", "[]", '{"row": "x"}', json.dumps({"row": "x", "raw": 7, "n_cut": 0, "prob": [], "log_likelihood": None, "seconds": 1})])  # fmt: skip
def test_a_changed_store_is_an_error(benchmarks, line):
    benchmark = benchmarks(20)
    folder = short(benchmark).store
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"rows\.jsonl: a line is not a score; was the file changed"):
        score_template(benchmark, short(benchmark), None, progress_bar)


def test_a_difference_is_told_in_words(tmp_path, labels):
    posts = [(f"{text} {k}", names) for k in range(20) for text, names in POSTS]
    good, bad, again = [
        write_run(tmp_path / name, labels, posts=posts, noise=noise, seed=seed)
        for name, noise, seed in (("good", 0.55, 0), ("bad", 0.9, 0), ("again", 0.55, 1))
    ]
    said = difference_in_words([bad, good], ["bad", "good"], "answer")
    assert said.startswith("On the same 240 rows, by answer: macro-F1 0.")
    assert said.endswith("0 is outside the interval: the difference is real, good is better.")
    assert difference_in_words([good, bad], ["good", "bad"], "answer").endswith("is real, bad is worse.")
    assert "the difference may be chance" in difference_in_words([good, again], ["good", "again"], "thresholds")
    one = labels.model_copy(update={"exactly_one": True})
    (good / "labels.yaml").write_text(one.to_yaml())
    assert "rows, by the most probable label: " in difference_in_words([good, good], ["a", "b"], "thresholds")
    few = [write_run(tmp_path / f"few{seed}", labels, posts=posts[:20], seed=seed) for seed in (0, 1)]
    assert "too few rows" in difference_in_words(few, ["a", "b"], "answer")
