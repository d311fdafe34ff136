"""Label sets in which every text has exactly one label (`exactly_one: true`), through all rooms."""

import json

import numpy as np
import pytest
import torch
from tiny import make_tokenizer, write_posts, write_recipe
from torch.nn import functional

from emogen import load as emogen_load
from emogen.errors import InputError
from emogen.evaluation.metrics import most_probable
from emogen.model.grammar import build_grammar, encode_answer
from emogen.model.tokenizer import PlainTokenizer, TextTokenizer
from emogen.prediction.baseline import fit_baseline
from emogen.prediction.classifier import labels_from_prob, predictions_from_prob
from emogen.prediction.ensemble import DecisionRule, load_rule, predict_rows
from emogen.task.labels import LabelSet, load_label_set
from emogen.task.rows import Rows
from emogen.training.head import HeadTrainer

TOPICS = """
name: topics
exactly_one: true
labels:
  - name: sport
  - name: politics
  - name: science
"""


@pytest.fixture
def topics(tmp_path) -> LabelSet:
    (tmp_path / "topics.yaml").write_text(TOPICS)
    return load_label_set(tmp_path / "topics.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nexactly_one: true\nlabels: [{name: a}]\n", "two labels or more"),
        ("name: x\nexactly_one: 1\nlabels: [{name: a}, {name: b}]\n", "exactly_one"),
        ("name: x\nexactly_one: 'yes'\nlabels: [{name: a}, {name: b}]\n", "exactly_one"),
    ],
)
def test_a_choice_needs_two_labels_and_a_plain_yes_or_no(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_label_set(tmp_path / "x.yaml")


@pytest.mark.parametrize(("style", "text"), [("list", "{}"), ("json", '["{}"]')])
def test_the_grammar_accepts_one_label_and_nothing_else(topics, style, text):
    tokenizer = make_tokenizer()
    plain, end = PlainTokenizer(TextTokenizer.of(tokenizer)), [2]
    grammar = build_grammar(topics, style, plain.encode, plain.protect("<|im_end|>"))
    for i, name in enumerate(topics.names):
        ids, _ = encode_answer(grammar, [i])
        assert grammar.accepts(ids)
        assert tokenizer.decode(ids[:-1]) == text.format(name)
    for wrong in ("none", "[]", "sport, politics", '["sport", "science"]', ""):
        assert not grammar.accepts([*plain.encode(wrong), *end])


def test_counts_are_refused(topics):
    with pytest.raises(ValueError, match="several labels"):
        build_grammar(topics, "count", PlainTokenizer(TextTokenizer.of(make_tokenizer())).encode, "x")


def test_the_most_probable_label_is_given_whatever_its_probability(topics):
    prob = np.array([[0.2, 0.1, 0.3], [0.9, 0.8, 0.7], [0.4, 0.4, 0.2]])
    wanted = [[0, 0, 1], [1, 0, 0], [1, 0, 0]]  # of equals the first
    assert most_probable(prob).tolist() == wanted
    assert most_probable(np.zeros((2, 3))).tolist() == [[0, 0, 0]] * 2  # answers that could not be read
    assert labels_from_prob(prob, topics).tolist() == wanted
    predictions = predictions_from_prob(prob, topics, [0, 0, 0])
    assert [prediction.raw for prediction in predictions] == ["science", "sport", "sport"]
    assert DecisionRule(lambda probs: probs.mean(axis=0), None).decide(prob).tolist() == wanted


def test_runs_decide_without_thresholds(topics, tmp_path):
    rule = load_rule([tmp_path], topics, "thresholds")  # the folder has no thresholds.json
    assert rule.thresholds is None
    np.testing.assert_allclose(rule.combine(np.array([[[0.6, 0.4, 0]], [[0.2, 0.8, 0]]])), [[0.4, 0.6, 0]])


def test_several_answers_are_a_vote_and_unreadable_ones_give_nothing(topics):
    class Fixed:
        n_questions = 1

        def __init__(self, *vectors):
            self.vectors = np.array(vectors, dtype=float)

        def predict(self, texts, **options):
            from types import SimpleNamespace

            return [SimpleNamespace(parsed=SimpleNamespace(vector=vector)) for vector in self.vectors]

    rows = Rows("x", ["1", "2", "3"], ["a", "b", "c"], None, [1, 2, 3])
    models = [
        Fixed([1, 0, 0], [0, 1, 0], [0, 0, 0]),
        Fixed([0, 1, 0], [0, 1, 0], [0, 0, 0]),
        Fixed([0, 1, 0], [0, 0, 1], [0, 0, 0]),
        Fixed([0, 0, 1], [0, 0, 0], [0, 0, 0]),
    ]
    from contextlib import nullcontext

    batch = predict_rows(models, rows, exactly_one=True, bar=lambda title, n: nullcontext(lambda done: None))
    assert batch.pred.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_the_baseline_gives_probabilities_that_sum_to_one():
    texts = ["the team won the match", "parliament votes today", "telescope sees a star"] * 4
    gold = np.tile(np.eye(3, 4, dtype=int), (4, 1))  # no text has the fourth label
    prob = fit_baseline(texts, gold, exactly_one=True)(["the match", "parliament", "a star"])
    np.testing.assert_allclose(prob.sum(axis=1), 1, atol=1e-6)
    assert most_probable(prob).tolist() == np.eye(3, 4).tolist()
    assert (prob[:, 3] == 0).all()


def test_the_loss_of_a_head_is_cross_entropy_over_the_labels():
    logits, gold = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0]]), torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    trainer = HeadTrainer.__new__(HeadTrainer)
    trainer.pos_weight, trainer.exactly_one = torch.ones(3), True

    class Output:
        pass

    def model(**inputs):
        output = Output()
        output.logits = inputs["x"]
        return output

    loss = trainer.compute_loss(model, {"x": logits, "labels": gold})
    by_hand = -(torch.log_softmax(logits, 1)[0, 0] + torch.log_softmax(logits, 1)[1, 1]) / 2
    assert loss.item() == pytest.approx(by_hand.item())
    trainer.exactly_one = False
    binary = functional.binary_cross_entropy_with_logits(logits, gold)
    assert trainer.compute_loss(model, {"x": logits, "labels": gold}).item() == pytest.approx(binary.item())


# ---------------------------------------------------------------------------------------- through the commands

HEADLINES = [
    (f"{text} {k}", (topic,))
    for k in range(7)
    for topic, texts in {
        "sport": ["the keeper saved a penalty", "a record on the last lap"],
        "politics": ["the minister resigned at noon", "voters go to the polls"],
        "science": ["a probe sends pictures of ice", "the vaccine works in mice"],
    }.items()
    for text in texts
]


@pytest.fixture
def recipe(topics, tmp_path):
    """Writes a recipe for the headlines; arguments as for `tiny.write_recipe`."""

    def write(**keys):
        file = str(tmp_path / "topics.yaml")
        return write_recipe(tmp_path, topics, posts=HEADLINES, labels=file, eval_fraction=0.3, **keys)

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [{"max_steps": 2}, {"max_steps": 2, "answer": "head"}],
    ids=["list", "head"],
)
def test_a_run_gives_each_text_one_label_and_has_no_thresholds(recipe, keys, emogen, tmp_path, topics):
    printed = emogen("train", recipe(**keys)).out
    run = tmp_path / "run"
    assert "nested thresholds" not in printed
    assert not (run / "thresholds.json").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["n"] >= 12
    assert "by_thresholds" not in metrics
    for record in map(json.loads, (run / "predictions.jsonl").read_text().splitlines()):
        assert len(record["labels"]) == 1
        assert sum(record["prob"].values()) == pytest.approx(1, abs=1e-3)
    title = "most probable label" if "answer" in keys else "answer"
    assert title in (run / "README.md").read_text()
    for page in ("report.html", "README.md"):
        text = (run / page).read_text()
        assert "nested thresholds" not in text.lower().replace("nested thresholds change", "")

    new = write_posts(tmp_path / "new.csv", topics, HEADLINES[:6])
    for by in ("answer", "thresholds"):
        emogen("predict", run, new, "-o", tmp_path / f"{by}.csv", f"predict_by={by}")
        lines = (tmp_path / f"{by}.csv").read_text().splitlines()
        assert lines[0] == "ID,sport,politics,science"
        assert [sum(map(int, line.split(",")[1:])) for line in lines[1:]] == [1] * 6
    (tmp_path / "none.csv").write_text("ID,Tweet\n")
    emogen("predict", run, tmp_path / "none.csv", "-o", tmp_path / "out.csv", "--jsonl", tmp_path / "out.jsonl")
    assert (tmp_path / "out.csv").read_text() == "ID,sport,politics,science\n"
    alone, together = emogen_load(run).predict_proba([""]), emogen_load(run).predict_proba(["", "so be it"])
    np.testing.assert_allclose(alone[0], together[0], atol=1e-5)  # a text without tokens
    scored = emogen("score", new, tmp_path / "answer.csv", "--labels", tmp_path / "topics.yaml").out
    assert "macro average" in scored


def test_a_baseline_chooses_the_most_probable_label_and_is_compared(recipe, emogen, tmp_path):
    printed = emogen("baseline", recipe(), f"output_dir={tmp_path / 'tfidf'}").out
    assert "nested thresholds" not in printed
    folder = tmp_path / "tfidf"
    assert not (folder / "thresholds.json").exists()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["f1_macro"] > 0.9  # the headlines repeat
    assert set(metrics["mean"]) == set(metrics["interval"]) == {"answer"}
    for by, decided in {"thresholds": "the most probable label", "answer": "answer"}.items():
        compared = emogen("compare", folder, "--by", by).out
        assert f"labels decided by {decided}" in compared
        assert f"{metrics['f1_macro']:.3f}" in compared
    assert "most probable label" in (folder / "report.html").read_text()
