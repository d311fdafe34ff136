import json
import os
import re
import shutil
import subprocess
import sys
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
from emogen.experiments.crossval import sum_up
from emogen.report import page
from emogen.report.page import report, report_finished
from emogen.report.runs import read_run
from emogen.task.labels import Label, LabelSet


class Page(HTMLParser):
    """What a browser would make of a page: its text, its ids, the tags and what they load."""

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


def lines_of(run):
    """The objects of a predictions file."""
    return results.read_records(run / "predictions.jsonl")


def write_lines(run, records):
    (run / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_cv(folder, labels, **keys):
    """A finished cross-validation of five folds over the rows of `write_run`."""
    write_run(folder, labels, **keys)
    (folder / "folds.csv").write_text("id,fold\n" + "".join(f"{r['id']},{r['fold']}\n" for r in lines_of(folder)))
    for k in range(5):
        (folder / f"fold-{k}").mkdir()
        shutil.copy(folder / "train_log.jsonl", folder / f"fold-{k}")
        paths.write_json(folder / f"fold-{k}" / "metrics.json", {"train_seconds": 60.0 * k, "n": 8, "f1_macro": 0.1})
    for name in ("train_log.jsonl", "manifest.json", "metrics.json", "thresholds.json"):
        (folder / name).unlink()
    sum_up(folder, labels)
    return folder


def test_the_page_of_a_run_says_what_is_in_its_folder(tmp_path, labels):
    run = write_run(tmp_path / "run", labels)
    (run / "README.md").write_text("# Model card of another library")
    assert report([run]) == [run / "report.html", run / "README.md"]
    page = Page(run / "report.html")
    assert not page.loads
    assert "link" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    scored = results.read_scored(run, labels)
    nested = nested_pred(scored.gold, scored.prob, scored.folds)
    for pred in (scored.pred, nested):
        metrics = score(scored.gold, pred, labels.names)
        assert f"{metrics['f1_macro']:.3f}" in page.shown
        for label in metrics["per_label"].values():
            assert f"{label['precision']:.3f}" in page.shown
    for said in (
        "qwen2.5-14b-instruct (published)",
        "nested thresholds",
        "1 min",
        "1.5 GiB",
        "10.0 rows/s",
        "Is it ```",
    ):
        assert said in page.shown
    assert "1 texts were shortened" in page.shown
    assert "2 of 40 answers could not be read" in page.shown
    assert "another library" not in (run / "README.md").read_text()


def test_each_row_is_there_with_what_was_said_of_it(tmp_path, labels):
    run = write_run(tmp_path / "run", labels)
    report([run])
    page = Page(run / "report.html")
    scored, posts = results.read_scored(run, labels), invented_posts(40)
    assert page.data["texts"] == [text for text, _ in posts]
    assert [labels.names_of([int(c) for c in row]) for row in page.data["gold"]] == [names for _, names in posts]
    answer, nested = page.data["systems"]
    assert [list(map(int, row)) for row in answer["pred"]] == scored.pred.tolist()
    assert [list(map(int, row)) for row in nested["pred"]] == nested_pred(
        scored.gold, scored.prob, scored.folds
    ).tolist()
    (of,) = page.data["runs"]
    assert of["loss"] == pytest.approx(row_log_loss(scored.gold, scored.prob), abs=1e-3)
    assert np.array(of["prob"]) / 1000 == pytest.approx(scored.prob, abs=6e-4)
    assert of["raw"][3] == "<b>bliss</b>"
    assert of["status"][3:6] == ["unknown", "empty", "normalised"]
    # The thresholds that are shown are those that decided: beside a probability, they give the prediction.
    prob = np.array(of["prob"])
    at = np.array([nested["thresholds"][str(fold)] for fold in page.data["folds"]])
    clear = abs(prob - at) > 1
    assert ((prob > at) == nested_pred(scored.gold, scored.prob, scored.folds))[clear].all()


def test_what_looks_like_markup_is_text(tmp_path):
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
    assert "(published)" not in page.shown  # theirs are other labels
    assert len(page.svgs) > 5
    for svg in page.svgs:
        ElementTree.fromstring(svg)
        assert "script" not in svg
    assert "$x_1$" in "".join(page.svgs)


def test_a_cross_validation_has_its_folds(tmp_path, labels):
    folder = write_cv(tmp_path / "cv", labels)
    assert report([folder])[1] == folder / "README.md"
    page = Page(folder / "report.html")
    metrics = json.loads((folder / "metrics.json").read_text())
    for system in ("answer", "thresholds"):
        for value in metrics["folds"][system]["f1_macro"]:
            assert f"{value:.3f}" in page.shown
        assert f"{metrics['mean'][system]['f1_macro']:.3f} ± {metrics['sd'][system]['f1_macro']:.3f}" in page.shown
    assert "training of 5 folds" in page.shown
    assert "10 min" in page.shown  # 0 + 1 + 2 + 3 + 4


def test_what_is_missing_is_said(tmp_path, labels):
    unscored = write_run(tmp_path / "unscored", labels)
    (unscored / "predictions.jsonl").unlink()
    assert [path.name for path in report([unscored])] == ["report.html", "README.md"]
    page = Page(unscored / "report.html")
    assert "No rows were scored" in page.shown
    assert page.data is None
    assert len(page.svgs) == 2  # the learning curves
    assert "No rows were scored" in (unscored / "README.md").read_text()

    (unscored / "metrics.json").unlink()
    report([unscored])
    assert "It has not ended" in Page(unscored / "report.html").shown

    begun = write_cv(tmp_path / "cv", labels)
    for name in ("metrics.json", "predictions.jsonl", "fold-3/metrics.json", "fold-4/metrics.json"):
        (begun / name).unlink()
    report([begun])
    assert "3 of 5 folds are finished" in Page(begun / "report.html").shown


def test_heads_and_baselines_have_no_answers_to_read(tmp_path, labels):
    head = write_run(tmp_path / "head", labels, answer="head")
    report([head])
    page = Page(head / "report.html")
    assert "How answers were read" not in page.shown
    assert "macro-F1 by threshold 0.5" in page.shown
    assert page.data["runs"][0]["raw"] is None

    baseline = write_cv(tmp_path / "baseline", labels)
    for fold in baseline.glob("fold-*"):
        shutil.rmtree(fold)
    answers = ("raw", "status", "unknown")
    write_lines(baseline, [{k: v for k, v in line.items() if k not in answers} for line in lines_of(baseline)])
    assert report([baseline]) == [baseline / "report.html"]  # no model, no card
    page = Page(baseline / "report.html")
    assert "TF-IDF" in page.shown
    assert "mean ± sd" in page.shown
    assert "macro-F1, threshold 0.5" in page.shown
    assert "macro-F1, answer" not in page.shown
    assert "SmolLM2" not in page.shown.partition("How it was made")[0]


def test_runs_beside_each_other_whatever_the_order_of_their_rows(tmp_path, labels):
    runs = [write_run(tmp_path / name / "run", labels, noise=noise, seed=seed, lora_r=seed) for name, noise, seed in (("a", 0.6, 1), ("b", 0.8, 2))]  # fmt: skip
    lines = lines_of(runs[1])
    write_lines(runs[1], reversed(lines))
    assert report(runs, tmp_path / "both.html") == [tmp_path / "both.html"]
    page = Page(tmp_path / "both.html")
    assert [run["name"] for run in page.data["runs"]] == ["a/run", "b/run"]
    scored = [results.read_scored(run, labels) for run in runs]
    for system in page.data["systems"]:
        of = scored[system["run"]]
        pred = of.pred if "answer" in system["title"] else nested_pred(of.gold, of.prob, of.folds)
        expected = dict(zip(of.ids, ("".join(map(str, row)) for row in pred.tolist()), strict=True))
        assert dict(zip(page.data["ids"], system["pred"], strict=True)) == expected
    assert page.data["runs"][1]["raw"] == [line["raw"] for line in lines]
    assert "lora_r" in page.shown
    assert "not better" in page.shown

    other = write_run(tmp_path / "other", labels, n=30)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "labels.yaml").write_text(labels.to_yaml())
    with pytest.raises(InputError, match=r"begun: nothing to compare\. It has not ended"):
        report([runs[0], tmp_path / "begun"], tmp_path / "c.html")
    few = LabelSet(name="few", labels=labels.labels[:2])
    (tmp_path / "begun" / "labels.yaml").write_text(few.to_yaml())
    with pytest.raises(InputError, match="its labels are not those of"):
        report([runs[0], tmp_path / "begun"], tmp_path / "c.html")
    with pytest.raises(InputError, match="not the same rows"):
        report([runs[0], other], tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_only_emogens_own_files_are_replaced(tmp_path, labels):
    run, papers = write_run(tmp_path / "run", labels), tmp_path / "papers"
    (run / "predictions.jsonl").unlink()  # two pictures are enough
    files = [papers / f"learning-{name}.{kind}" for name in ("loss", "f1") for kind in ("svg", "png")]
    assert report([run], pictures=papers) == [run / "report.html", run / "README.md", *files]
    assert b"watched rows" in files[0].read_bytes()
    assert files[1].read_bytes().startswith(b"\x89PNG")
    report([run], pictures=papers)
    for file in files:
        drawn = file.read_bytes()
        file.write_bytes(b"mine")
        with pytest.raises(InputError, match=rf"{file.name}: it exists.*--overwrite"):
            report([run], pictures=papers)
        assert file.read_bytes() == b"mine"
        report([run], pictures=papers, overwrite=True)
        assert len(file.read_bytes()) == len(drawn)

    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine")
    with pytest.raises(InputError, match=r"mine\.html: it exists"):
        report([run], mine)
    assert mine.read_text() == "<p>mine"
    report([run], mine, overwrite=True)
    report([run], mine)  # now it is emogen's


def test_a_broken_file_is_named_and_a_finished_run_survives_it(tmp_path, labels, caplog):
    run = write_run(tmp_path / "run", labels)
    with (run / "predictions.jsonl").open("a") as file:
        file.write('{"id": "r40", "te')
    with pytest.raises(InputError, match=r"predictions\.jsonl:41: not a JSON object"):
        report([run])
    report_finished(run)
    assert f"emogen report {run}" in caplog.text
    (run / "metrics.json").write_text("{")
    with pytest.raises(InputError, match=r"metrics\.json: not JSON"):
        read_run(run)
    with pytest.raises(InputError, match=r"not the folder of a run.*labels\.yaml"):
        report([tmp_path])


def test_too_few_rows_for_thresholds_leave_them_out(tmp_path, labels):
    runs = [write_run(tmp_path / name, labels, n=8, seed=seed) for seed, name in enumerate("ab")]
    for run in runs:
        write_lines(run, [{k: v for k, v in line.items() if k != "fold"} for line in lines_of(run)])
    report([runs[0]])
    page = Page(runs[0] / "report.html")
    assert [system["title"] for system in page.data["systems"]] == ["answer"]
    assert page.data["folds"] is None
    assert "No gold positives" not in page.shown or "trust" in page.shown
    report(runs, tmp_path / "both.html")
    assert [system["title"] for system in Page(tmp_path / "both.html").data["systems"]] == ["a: answer", "b: answer"]


@pytest.mark.parametrize("n_labels", [1, 2, 20])
def test_label_sets_of_any_size(tmp_path, n_labels):
    names = [f"a rather long name {k}" for k in range(n_labels)]
    run = write_run(tmp_path / "run", LabelSet(name="other", labels=tuple(Label(name=name) for name in names)), posts=[
        (f"post {i}", [name for k, name in enumerate(names) if (i + k) % 3 == 0]) for i in range(30)
    ])  # fmt: skip
    report([run])
    page = Page(run / "report.html")
    assert page.data["names"] == names
    for name in names:
        assert sum(name in svg for svg in page.svgs) >= 6
    assert "nan" not in page.shown


def test_the_command(tmp_path, labels):
    run = write_run(tmp_path / "run", labels)
    emogen = [Path(sys.executable).parent / "emogen", "report"]
    env = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([*emogen, run, "--figures", tmp_path / "figures"], capture_output=True, text=True, env=env, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(run / "report.html") in done.stdout
    assert f"Beside it: {run / 'README.md'}\n" in done.stderr
    assert f"{len(list((tmp_path / 'figures').iterdir()))} pictures are in {tmp_path / 'figures'}" in done.stderr
    kinds = [{path.stem for path in (tmp_path / "figures").glob(f"*.{kind}")} for kind in ("svg", "png")]
    assert kinds[0] == kinds[1] >= {"labels-answer", "learning-loss", "precision-recall", "reliability", "published"}
    done = subprocess.run([*emogen, tmp_path / "none"], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert "not the folder of a run" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_model_is_loaded_for_it():
    code = "import sys, emogen.report.page; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_template_ships_with_the_package():
    assert page.TEMPLATE.is_file()
    assert page.TEMPLATE.parent == Path(page.__file__).parent
