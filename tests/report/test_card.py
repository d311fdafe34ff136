"""Model cards: the metadata for the Hub, and what the text contains and leaves out."""

from html import escape

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny import write_run

from emogen.evaluation import results
from emogen.evaluation.metrics import nested_pred, score
from emogen.report.card import model_card
from emogen.report.runs import read_run
from emogen.task.labels import Label, LabelSet


def read_back(folder):
    """The metadata of a card, as the Hub reads them, and its text."""
    text = str(model_card(read_run(folder)))
    return ModelCard(text).data, text


@pytest.mark.parametrize("by", ["answer", "thresholds"])
def test_the_metadata_are_those_that_the_hub_reads(tmp_path, labels, by):
    run = write_run(tmp_path / "run", labels, predict_by=by, dataset_name="sem_eval_2018_task_1")
    data, _ = read_back(run)
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["sem_eval_2018_task_1"]
    scored = results.read_scored(run, labels)
    pred = scored.pred if by == "answer" else nested_pred(scored.gold, scored.prob, scored.folds)
    metrics = score(scored.gold, pred, labels.names)
    title = "answer" if by == "answer" else "nested thresholds"
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    expected = {"macro-F1": metrics["f1_macro"], "micro-F1": metrics["f1_micro"]}
    expected |= {f"F1 {name}": label["f1"] for name, label in metrics["per_label"].items()}
    assert found == {f"{name} ({title})": pytest.approx(value, abs=1e-4) for name, value in expected.items()}
    assert {result.dataset_type for result in data.eval_results} == {"sem_eval_2018_task_1"}


def test_the_text_shows_parses_and_files_but_no_folders_and_no_posts(tmp_path, labels):
    run = write_run(tmp_path / "run", labels, eval_file="/home/someone else/of us/held.csv")
    (run / "prompt.jinja").write_text("{% user %}\nIs it ``` or /not/ at /all/? {{ text }}\n")
    data, text = read_back(run)
    assert data.datasets is None  # a file is not a dataset of the Hub
    assert "| unknown | 1 | 2.5% |" in text
    assert "| peak memory | 1.5 GiB |" in text
    assert "````jinja\n{% user %}\nIs it ``` or /not/ at /all/?" in text  # the prompt cannot close the fence
    assert '"posts.csv"' in text
    assert '"held.csv"' in text
    # A card is published; the places of files and the posts are private.
    assert not any(part in text for part in ("/home", "someone else", "of us"))
    assert str(tmp_path) not in text
    assert "<script>" not in text


def test_a_head_tuned_in_full_from_a_local_model(tmp_path, labels):
    (tmp_path / "model").mkdir()
    run = write_run(tmp_path / "run", labels, answer="head", use_peft=False, model_name_or_path=str(tmp_path / "model"))
    data, text = read_back(run)
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification"
    assert data.base_model is None  # the folder is local
    assert "`model`, fine-tuned with emogen" in text
    assert "How the answers were parsed" not in text


def test_a_run_with_one_label_for_each_text_is_no_multi_label_classifier(tmp_path):
    one = LabelSet(name="one", labels=(Label(name="red"), Label(name="blue")), exactly_one=True)
    data, text = read_back(write_run(tmp_path / "run", one, posts=[("x", ("red",)), ("y", ("blue",))] * 20))
    assert data.tags == ["emogen", "multi-class-classification"]
    assert {result.task_name for result in data.eval_results} == {"multi-class text classification"}
    assert "multi-label" not in text


def test_a_run_without_scored_rows_has_a_card_without_results(tmp_path, labels):
    run = write_run(tmp_path / "run", labels)
    (run / "predictions.jsonl").unlink()
    data, text = read_back(run)
    assert data.eval_results is None
    assert "No rows were scored" in text


def test_names_are_not_markdown(tmp_path):
    names = ("<|im_end|>", "<script>alert(1)</script>", "**loud**", "_a_b_", "=1+2")
    labels = LabelSet(name="odd", labels=tuple(Label(name=name) for name in names))
    run = write_run(tmp_path / "run $(id) `x`", labels, posts=[(f"post {k}", (names[k % 5],)) for k in range(40)])
    data, text = read_back(run)
    assert {f"F1 {name} (answer)" for name in names} <= {result.metric_name for result in data.eval_results}
    html = MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])
    assert "<script>" not in html
    assert "<strong>" not in html
    assert "<em>" not in html
    assert all(f"<td>{escape(name)}</td>" in html for name in names)
    assert "<h1>run $(id) `x`</h1>" in html
    assert "emogen predict 'run $(id) `x`' YOUR.csv" in text
