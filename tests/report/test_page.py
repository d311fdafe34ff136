"""Report pages, read as HTML: what they show, what they contain for the script, and which files they replace."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny import invented_posts, write_run

from emogen import paths
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.metrics import nested_pred, row_log_loss, score
from emogen.evaluation.run_folder import label_set_of
from emogen.experiments.crossval import sum_up
from emogen.report import page
from emogen.report.compare import compare
from emogen.report.figures import MAX_WRITTEN
from emogen.report.page import report, report_finished
from emogen.report.runs import read_run
from emogen.task.labels import Label, LabelSet

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """A parsed page: its text, ids, tags, scripts and pictures, and the addresses that it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.ids, self.tags, self.loads, self.shown, self.scripts, self.in_script = [], [], [], "", [], False
        self.feed(self.source)
        self.data = next((json.loads(text) for kind, text in self.scripts if kind == "application/json"), None)
        self.svgs = re.findall(r"<svg .*?</svg>", self.source, re.DOTALL)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.loads += [attrs[key] for key in ("src", "href", "xlink:href") if not attrs.get(key, "#").startswith("#")]
        if tag == "script":
            self.scripts.append([attrs.get("type"), ""])
            self.in_script = True

    def handle_endtag(self, tag):
        self.in_script = False

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1][1] += data
        else:
            self.shown += data


@pytest.fixture(scope="module")
def small_page(reports):
    return Page(reports / "small" / "report.html")


def lines_of(run):
    """The objects of a predictions file."""
    return results.read_records(run / "predictions.jsonl")


def write_lines(run, records):
    (run / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def make_cross_validation(folder, label_set, kind="cross-validation"):
    """Turn a run folder into a finished cross-validation of five folds, or into a baseline."""
    (folder / "folds.csv").write_text("id,fold\n" + "".join(f"{r['id']},{r['fold']}\n" for r in lines_of(folder)))
    for k in range(5 if kind == "cross-validation" else 0):
        (folder / f"fold-{k}").mkdir()
        shutil.copy(folder / "train_log.jsonl", folder / f"fold-{k}")
        paths.write_json(folder / f"fold-{k}" / "metrics.json", {"train_seconds": 60.0 * k, "n": 8, "f1_macro": 0.1})
    for name in ("train_log.jsonl", "metrics.json", "thresholds.json"):
        (folder / name).unlink()
    paths.write_json(folder / "manifest.json", {"format": 1, "kind": kind})
    sum_up(folder, label_set)
    return folder


def test_the_page_needs_no_other_file(small_page):
    assert not small_page.loads
    assert "link" not in small_page.tags
    assert len(small_page.ids) == len(set(small_page.ids))


def test_the_page_shows_the_metrics_of_each_decision(small_page, reports, labels):
    scored = results.read_scored(reports / "small", labels)
    for pred in (scored.pred, nested_pred(scored.gold, scored.prob, scored.folds)):
        metrics = score(scored.gold, pred, labels.names)
        assert f"{metrics['f1_macro']:.3f}" in small_page.shown
        for label in metrics["per_label"].values():
            assert f"{label['precision']:.3f}" in small_page.shown


@pytest.mark.parametrize(
    "text",
    [
        "Without a model, on these rows: all labels to every row macro-F1",
        "nested thresholds",
        "1 min",
        "1.5 GiB",
        "10.0 rows/s",
        "Is it ```",
        "1 text was shortened",
        "2 of 40 answers could not be parsed",
    ],
)
def test_the_page_shows_what_the_folder_contains(small_page, text):
    assert text in small_page.shown


@pytest.mark.parametrize("better", ["answer", "nested thresholds"])
def test_the_better_decision_is_shown_first_everywhere(tmp_path, write_small, better):
    run = write_small(tmp_path / "run")
    if better == "answer":
        write_lines(run, [line | {"labels": line["gold"]} for line in lines_of(run)])
    else:
        write_lines(run, [line | {"labels": []} for line in lines_of(run)])
    report([run])
    page = Page(run / "report.html")
    (other,) = {"answer", "nested thresholds"} - {better}
    assert [decision["title"] for decision in page.data["decisions"]] == [better, other]
    assert f"Shown first: {better}" in page.shown
    assert page.shown.index(f"macro-F1, {better}") < page.shown.index(f"macro-F1, {other}")
    card = (run / "README.md").read_text()
    assert card.index(f"By label, {better}") < card.index(f"By label, {other}")


def test_published_systems_are_shown_on_request(small_page, reports, tmp_path):
    assert "(published)" not in small_page.shown
    page, *_ = report([reports / "small"], tmp_path / "page.html", published=True)
    assert "qwen2.5-14b-instruct (published)" in Page(page).shown


def test_the_data_of_the_script_holds_every_row(small_page, reports, labels):
    data = small_page.data
    scored, posts = results.read_scored(reports / "small", labels), invented_posts(40)
    pred = nested_pred(scored.gold, scored.prob, scored.folds)
    assert data["ids"] == scored.ids
    assert data["texts"] == [text for text, _ in posts]
    assert [labels.names_of([int(c) for c in row]) for row in data["gold"]] == [names for _, names in posts]
    answer, nested = data["decisions"]
    assert [list(map(int, row)) for row in answer["pred"]] == scored.pred.tolist()
    assert [list(map(int, row)) for row in nested["pred"]] == pred.tolist()
    (run,) = data["runs"]
    assert run["loss"] == pytest.approx(row_log_loss(scored.gold, scored.prob), abs=1e-3)
    assert np.array(run["prob"]) / 1000 == pytest.approx(scored.prob, abs=6e-4)
    assert run["raw"][3] == "<b>bliss</b>"
    assert run["status"][3:6] == ["unknown", "empty", "normalised"]
    # The thresholds in the data are those of the decision: together with the probabilities they give the prediction.
    prob = np.array(run["prob"])
    thresholds = np.array([nested["thresholds"][str(fold)] for fold in data["folds"]])
    is_clear = abs(prob - thresholds) > 1
    assert ((prob > thresholds) == pred)[is_clear].all()


def test_markup_in_names_texts_and_recipes_is_shown_as_text(tmp_path):
    names = ("<b>joy</b>", "a & b", "$x_1$")
    strange = LabelSet(name="</title><script>", labels=tuple(Label(name=name) for name in names))
    folder = tmp_path / "run <i>1"
    folder.mkdir()
    rng = np.random.default_rng(0)
    gold = (rng.random((30, 3)) < 0.4).astype(np.int8)
    records = [
        {
            "id": f"<u>{i}", "text": "</script><script>alert(1)</script>", "raw": "</pre>", "status": "unknown",
            "unknown": ["<script>alert(4)</script>"], "labels": [], "fold": i % 3,
            "prob": dict(zip(names, rng.random(3), strict=True)), "gold": strange.names_of(gold[i]),
        }
        for i in range(30)
    ]  # fmt: skip
    write_lines(folder, records)
    (folder / "labels.yaml").write_text(strange.to_yaml())
    (folder / "recipe.yaml").write_text("model_name_or_path: </title><script>alert(5)</script>")
    paths.write_json(folder / "metrics.json", {})
    report([folder])
    page = Page(folder / "report.html")
    assert page.tags.count("script") == 2
    assert page.source.count("<script>") == 1
    assert page.source.count("</script>") == 2
    assert not {"u", "i"} & set(page.tags)
    assert "<b>joy</b>" in page.shown
    assert page.data["texts"][0] == "</script><script>alert(1)</script>"
    assert "(published)" not in page.shown  # the published systems have other labels
    assert len(page.svgs) > 5
    for svg in page.svgs:
        ElementTree.fromstring(svg)
        assert "script" not in svg
    assert "$x_1$" in "".join(page.svgs)


def test_a_cross_validation_shows_its_folds(tmp_path, write_small, two_labels):
    folder = make_cross_validation(write_small(tmp_path / "cv"), two_labels)
    assert report([folder])[1] == folder / "README.md"
    page = Page(folder / "report.html")
    metrics = json.loads((folder / "metrics.json").read_text())
    for decision in ("answer", "thresholds"):
        mean, sd = metrics["mean"][decision]["f1_macro"], metrics["sd"][decision]["f1_macro"]
        for value in metrics["folds"][decision]["f1_macro"]:
            assert f"{value:.3f}" in page.shown
        assert f"{mean:.3f} ± {sd:.3f}" in page.shown
    assert "training of 5 folds" in page.shown
    assert "10 min" in page.shown  # 0 + 1 + 2 + 3 + 4


def test_a_run_without_scored_rows_says_so(tmp_path, write_small):
    run = write_small(tmp_path / "run")
    (run / "predictions.jsonl").unlink()
    (run / "README.md").write_text("# Model card of another library")
    assert report([run]) == [run / "report.html", run / "README.md"]
    page = Page(run / "report.html")
    assert "No rows were scored" in page.shown
    assert page.data is None
    assert len(page.svgs) == 2  # the learning curves
    card = (run / "README.md").read_text()
    assert "No rows were scored" in card
    assert "another library" not in card


def test_an_unfinished_run_or_cross_validation_says_so(tmp_path, write_small, two_labels):
    run = write_small(tmp_path / "run")
    for name in ("predictions.jsonl", "metrics.json", "train_log.jsonl"):
        (run / name).unlink()
    report([run])
    assert "Not finished" in Page(run / "report.html").shown

    cv = make_cross_validation(write_small(tmp_path / "cv"), two_labels)
    for name in ("metrics.json", "predictions.jsonl", "fold-3/metrics.json", "fold-4/metrics.json"):
        (cv / name).unlink()
    report([cv])
    assert "3 of 5 folds are finished" in Page(cv / "report.html").shown


def test_a_head_has_no_answers_to_parse(tmp_path, write_small):
    head = write_small(tmp_path / "head", answer="head")
    report([head])
    page = Page(head / "report.html")
    assert "Parsing of answers" not in page.shown
    assert "macro-F1, threshold 0.5" in page.shown
    assert page.data["runs"][0]["raw"] is None


def test_a_baseline_has_folds_but_no_answers_and_no_card(tmp_path, write_small, two_labels):
    baseline = make_cross_validation(write_small(tmp_path / "baseline"), two_labels, "baseline")
    answers = ("raw", "status", "unknown")
    write_lines(baseline, [{k: v for k, v in line.items() if k not in answers} for line in lines_of(baseline)])
    assert report([baseline]) == [baseline / "report.html"]
    page = Page(baseline / "report.html")
    assert "TF-IDF" in page.shown
    assert "mean ± sd" in page.shown
    assert "macro-F1, threshold 0.5" in page.shown
    assert "macro-F1, answer" not in page.shown
    shown, heading, configuration = page.shown.partition("recipe.yaml")
    assert heading
    assert "SmolLM2" not in shown
    assert "SmolLM2" in configuration


def test_runs_are_compared_row_by_row_whatever_the_order_of_their_files(tmp_path, write_small, two_labels):
    runs = [
        write_small(tmp_path / name / "run", noise=noise, seed=seed, lora_r=seed)
        for name, noise, seed in (("a", 0.6, 1), ("b", 0.8, 2))
    ]
    lines = lines_of(runs[1])
    write_lines(runs[1], reversed(lines))
    assert report(runs, tmp_path / "both.html") == [tmp_path / "both.html"]
    page = Page(tmp_path / "both.html")
    assert [run["name"] for run in page.data["runs"]] == ["a/run", "b/run"]
    scored = [results.read_scored(run, two_labels) for run in runs]
    for decision in page.data["decisions"]:
        rows = scored[decision["run"]]
        pred = rows.pred if "answer" in decision["title"] else nested_pred(rows.gold, rows.prob, rows.folds)
        expected = dict(zip(rows.ids, ("".join(map(str, row)) for row in pred.tolist()), strict=True))
        assert dict(zip(page.data["ids"], decision["pred"], strict=True)) == expected
    assert page.data["runs"][1]["raw"] == [line["raw"] for line in lines]
    assert page.data["runs"][1]["prob"][0] == [round(1000 * lines[0]["prob"][name]) for name in two_labels.names]
    assert "lora_r" in page.shown
    assert "not better" in page.shown


def test_a_comparison_tunes_thresholds_for_macro_f1_everywhere(tmp_path, write_small):
    """Also those of a run that says `tune: f1_micro`: the rows are those that the table counts."""
    runs = [write_small(tmp_path / name, tune="f1_micro", seed=seed) for seed, name in enumerate("ab")]
    report(runs, tmp_path / "both.html")
    page = Page(tmp_path / "both.html")
    by_title = {decision["title"]: decision["pred"] for decision in page.data["decisions"]}
    macro = {system.name: system for system in compare(runs, label_set_of(runs[0]))}
    for name in "ab":
        pred = np.array([list(map(int, row)) for row in by_title[f"{name}: nested thresholds"]])
        gold = np.array([list(map(int, row)) for row in page.data["gold"]])
        assert score(gold, pred, page.data["names"])["f1_macro"] == macro[name].metrics["f1_macro"]


def test_a_comparison_with_exactly_one_label_has_no_threshold(tmp_path):
    one = LabelSet(name="one", labels=(Label(name="red"), Label(name="blue")), exactly_one=True)
    posts = [("x", ("red",)), ("y", ("blue",))] * 20
    report([write_run(tmp_path / name, one, posts=posts) for name in "ab"], tmp_path / "both.html")
    shown = Page(tmp_path / "both.html").shown
    assert "(heads and baselines: most probable label)" in shown
    assert "threshold 0.5" not in shown


def test_runs_that_cannot_be_compared_are_refused(tmp_path, write_small, two_labels):
    run, page = write_small(tmp_path / "run"), tmp_path / "comparison.html"
    unfinished, other = tmp_path / "unfinished", write_small(tmp_path / "other", n=30)
    unfinished.mkdir()
    (unfinished / "labels.yaml").write_text(two_labels.to_yaml())
    with pytest.raises(InputError, match=r"unfinished: nothing to compare\. Not finished"):
        report([run, unfinished], page)
    (unfinished / "labels.yaml").write_text(LabelSet(name="one", labels=two_labels.labels[:1]).to_yaml())
    with pytest.raises(InputError, match="its labels are not those of"):
        report([run, unfinished], page)
    with pytest.raises(InputError, match="not the same rows"):
        report([run, other], page)
    assert not page.exists()


def test_files_that_emogen_did_not_write_are_not_replaced(tmp_path, write_small):
    run, folder = write_small(tmp_path / "run"), tmp_path / "pictures"
    (run / "predictions.jsonl").unlink()  # leaves two pictures
    pictures = [folder / f"learning-{name}.{kind}" for name in ("loss", "f1") for kind in ("svg", "png")]
    assert report([run], pictures=folder) == [run / "report.html", run / "README.md", *pictures]
    assert b"validation rows" in pictures[0].read_bytes()
    assert pictures[1].read_bytes().startswith(b"\x89PNG")
    written = {path: path.read_bytes() for path in pictures}
    for path in pictures:
        path.write_bytes(b"mine")
        with pytest.raises(InputError, match=rf"{path.name}: the file exists .*--overwrite"):
            report([run], pictures=folder)
        assert path.read_bytes() == b"mine"
        path.write_bytes(written[path])

    page = tmp_path / "mine.html"
    page.write_text("<p>mine")
    with pytest.raises(InputError, match=r"mine\.html: the file exists"):
        report([run], page)
    assert page.read_text() == "<p>mine"
    pictures[0].write_bytes(b"mine")
    report([run], page, pictures=folder, overwrite=True)
    assert len(pictures[0].read_bytes()) == len(written[pictures[0]])
    report([run], page, pictures=folder)  # its own files are replaced


def test_a_broken_file_is_named_and_does_not_stop_a_finished_run(tmp_path, write_small, caplog):
    run = write_small(tmp_path / "run")
    with (run / "predictions.jsonl").open("a") as file:
        file.write('{"id": "r40", "te')
    with pytest.raises(InputError, match=r"predictions\.jsonl:41: not a JSON object"):
        report([run])
    report_finished(run)
    assert f"emogen report {run}" in caplog.text
    (run / "metrics.json").write_text("{")
    with pytest.raises(InputError, match=r"metrics\.json: not valid JSON"):
        read_run(run)
    with pytest.raises(InputError, match=r"not the folder of a run.*labels\.yaml"):
        report([tmp_path])


def test_too_few_rows_for_folds_are_reported_without_thresholds(tmp_path, write_small):
    runs = [write_small(tmp_path / name, n=8, seed=seed) for seed, name in enumerate("ab")]
    for run in runs:
        write_lines(run, [{k: v for k, v in line.items() if k != "fold"} for line in lines_of(run)])
    report([runs[0]])
    page = Page(runs[0] / "report.html")
    assert [decision["title"] for decision in page.data["decisions"]] == ["answer"]
    assert page.data["folds"] is None
    report(runs, tmp_path / "both.html")
    page = Page(tmp_path / "both.html")
    assert [decision["title"] for decision in page.data["decisions"]] == ["a: answer", "b: answer"]


def test_labels_without_positives_are_named(small_page, tmp_path, write_small):
    assert "No gold positives" not in small_page.shown
    run = write_small(tmp_path / "run", n=8)
    write_lines(run, [line | {"gold": [name for name in line["gold"] if name != "anger"]} for line in lines_of(run)])
    report([run])
    assert "No gold positives for: anger." in Page(run / "report.html").shown


@pytest.mark.parametrize("n_labels", [1, 2, MAX_WRITTEN + 1])
def test_label_sets_of_any_size(tmp_path, n_labels):
    names = [f"a rather long name {k}" for k in range(n_labels)]
    label_set = LabelSet(name="other", labels=tuple(Label(name=name) for name in names))
    posts = [(f"post {i}", [name for k, name in enumerate(names) if (i + k) % 3 == 0]) for i in range(30)]
    run = write_run(tmp_path / "run", label_set, posts=posts)
    report([run])
    page = Page(run / "report.html")
    assert page.data["names"] == names
    for name in names:
        assert sum(name in svg for svg in page.svgs) >= 6
    assert "nan" not in page.shown


def test_the_template_is_part_of_the_package():
    assert page.TEMPLATE.is_file()
    assert page.TEMPLATE.parent == Path(page.__file__).parent
