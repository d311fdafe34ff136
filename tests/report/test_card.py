import pytest
from huggingface_hub import ModelCard
from tiny import write_run

from emogen.evaluation import results
from emogen.evaluation.metrics import nested_pred, score
from emogen.report.card import model_card
from emogen.report.runs import read_run


def read_back(folder):
    """A card as the Hub would read it."""
    text = str(model_card(read_run(folder)))
    return ModelCard(text).data, text


@pytest.mark.parametrize("by", ["answer", "thresholds"])
def test_its_metadata_are_those_that_the_hub_reads(tmp_path, labels, by):
    run = write_run(tmp_path / "run", labels, predict_by=by, dataset_name="sem_eval_2018_task_1")
    data, _ = read_back(run)
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["sem_eval_2018_task_1"]
    scored = results.read_scored(run, labels)
    pred = scored.pred if by == "answer" else nested_pred(scored.gold, scored.prob, scored.folds)
    metrics = score(scored.gold, pred, labels.names)
    how = "answer" if by == "answer" else "nested thresholds"
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    expected = {"macro-F1": metrics["f1_macro"], "micro-F1": metrics["f1_micro"]}
    expected |= {f"F1 {name}": label["f1"] for name, label in metrics["per_label"].items()}
    assert found == {f"{name} (by {how})": pytest.approx(value, abs=1e-4) for name, value in expected.items()}
    assert {result.dataset_type for result in data.eval_results} == {"sem_eval_2018_task_1"}


def test_what_it_says(tmp_path, labels):
    run = write_run(tmp_path / "run", labels, eval_file="/home/someone else/of us/held.csv")
    (run / "prompt.jinja").write_text("{% user %}\nIs it ``` or /not/ at /all/? {{ text }}\n")
    data, text = read_back(run)
    assert data.datasets is None  # a file is none of the Hub's
    assert "| unknown | 1 | 2.5% |" in text
    assert "| peak memory | 1.5 GiB |" in text
    assert "````jinja\n{% user %}\nIs it ``` or /not/ at /all/?" in text  # a fence that the prompt cannot close
    assert '"posts.csv"' in text
    assert '"held.csv"' in text
    assert not any(
        part in text for part in ("/home", "someone else", "of us")
    )  # a card is published; where files lay is not
    assert str(tmp_path) not in text
    assert "<script>" not in text  # and neither are texts


def test_a_head_that_was_tuned_in_full_and_a_model_from_a_folder(tmp_path, labels):
    (tmp_path / "model").mkdir()
    run = write_run(tmp_path / "run", labels, answer="head", use_peft=False, model_name_or_path=str(tmp_path / "model"))
    data, text = read_back(run)
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification"
    assert data.base_model is None  # nobody else has that folder
    assert "`model` that names the labels" in text
    assert "How the answers were read" not in text


def test_a_run_that_was_not_scored_has_a_card_without_results(tmp_path, labels):
    run = write_run(tmp_path / "run", labels)
    (run / "predictions.jsonl").unlink()
    data, text = read_back(run)
    assert data.eval_results is None
    assert "No rows were scored" in text
