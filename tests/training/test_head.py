"""Classification heads: tiny models of the architectures of the six published systems that use one."""

import json
import logging
import shutil
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import POSTS, SIZE, invented_posts, make_tokenizer, write_posts, write_recipe
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    Gemma2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    RobertaConfig,
)
from trl import SFTConfig

from emogen.console import progress_bar
from emogen.errors import ModelError
from emogen.evaluation.results import read_scored
from emogen.evaluation.run_folder import member_folders
from emogen.prediction.classifier import prob_of
from emogen.prediction.ensemble import DecisionRule, load_run, load_runs, predict_rows
from emogen.report import page
from emogen.task.readers import read_rows
from emogen.train import main
from emogen.training.head import HeadTrainer, encode_rows

ENCODER = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 200, "pad_token_id": 0}  # fmt: skip
CONFIGS = {
    "roberta": lambda: RobertaConfig(**ENCODER),
    "bert": lambda: BertConfig(**ENCODER),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=512, dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=0
    ),
    "sentence": lambda: BertConfig(**ENCODER),  # a sentence encoder, by its 1_Pooling
    "gemma2": lambda: Gemma2Config(**SIZE, query_pre_attn_scalar=8),
    "llama": lambda: LlamaConfig(**SIZE),
    "qwen2": lambda: Qwen2Config(**SIZE),
}
ENCODERS = ("roberta", "bert", "distilbert", "sentence")


def write_head_recipe(folder, labels, kind, **keys):
    """A recipe for a tiny model with a head. Encoders are tuned in full, decoders with LoRA."""
    model = folder / f"head-{kind}"
    if not model.exists():
        torch.manual_seed(0)
        AutoModel.from_config(CONFIGS[kind]()).save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        if kind == "sentence":
            (model / "1_Pooling").mkdir()
            (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    keys = {"use_peft": kind not in ENCODERS, "max_length": 64} | keys
    return str(write_recipe(folder, labels, model_name_or_path=str(model), answer="head", **keys))


@pytest.fixture
def head_recipe(tmp_path, labels):
    """Writes a recipe; its run goes to tmp_path/run."""
    return lambda kind, **keys: write_head_recipe(tmp_path, labels, kind, **keys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, labels):
    """Trains a head once for each architecture. Returns the run folder, which tests do not change.

    Only that of BERT has a report, because a report takes longer than the training.
    """

    @cache
    def train(kind, four_bit):
        folder = tmp_path_factory.mktemp(kind)
        with pytest.MonkeyPatch.context() as patch:
            if kind != "bert":
                patch.setattr(page, "report_finished", lambda folder: None)
            main([write_head_recipe(folder, labels, kind, load_in_4bit=four_bit, eval_fraction=0.3)])
        return folder / "run"

    return train


@pytest.mark.parametrize(
    ("kind", "four_bit"),
    [("llama", False), ("sentence", False)]
    + [pytest.param(kind, False, marks=pytest.mark.slow) for kind in CONFIGS if kind not in ("llama", "sentence")]
    + [pytest.param(kind, True, marks=pytest.mark.slow) for kind in ("gemma2", "llama", "qwen2")],
)
def test_every_architecture_trains_and_predicts_what_it_was_scored_with(trained, kind, four_bit):
    run = trained(kind, four_bit)
    tuned = run / ("model" if kind in ENCODERS else "adapter")
    assert tuned.is_dir()
    saved = load_file(next(tuned.glob("*.safetensors")))
    assert any(name.split(".")[-2] in ("score", "classifier", "out_proj", "dense") for name in saved)
    records = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    loaded = load_run(run)
    texts = [record["text"] for record in records]
    np.testing.assert_allclose(
        loaded.predict_proba(texts), [list(record["prob"].values()) for record in records], atol=1e-4
    )
    answers = loaded.predict(texts, batch_size=2)
    assert [list(answer.parsed.labels) for answer in answers] == [record["labels"] for record in records]
    np.testing.assert_allclose(
        prob_of(loaded, texts, answers, progress_bar, ""), loaded.predict_proba(texts), atol=1e-5
    )


@pytest.mark.slow
def test_the_report_of_a_head_names_its_threshold(trained):
    assert "macro-F1, threshold 0.5" in (trained("bert", False) / "report.html").read_text()


def test_a_trained_head_is_not_reported_as_missing(trained, caplog):
    run = trained("llama", False)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    caplog.clear()
    load_run(run)
    logger.removeHandler(caplog.handler)
    assert "MISSING" not in caplog.text


@pytest.mark.slow
def test_a_head_memorises_its_posts_and_padding_changes_nothing(head_recipe, tmp_path, labels):
    main([head_recipe("llama", max_steps=150, learning_rate=1e-2, lora_r=8)])
    loaded = load_run(tmp_path / "run")
    texts = [text for text, _ in POSTS]
    together = loaded.predict_proba(texts)
    assert ((together > 0.5) == [labels.vector(names) for _, names in POSTS]).mean() > 0.98
    alone = np.concatenate([loaded.predict_proba([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.slow
def test_a_student_learns_the_probabilities_of_its_teacher(head_recipe, tmp_path, labels):
    wanted = np.random.default_rng(0).choice([0.2, 0.8], (len(POSTS), len(labels)))
    teacher = tmp_path / "teacher.jsonl"  # as predict --jsonl writes it
    records = [
        {"id": str(k), "text": text, "labels": [], "prob": dict(zip(labels.names, prob, strict=True))}
        for k, ((text, _), prob) in enumerate(zip(POSTS, wanted.tolist(), strict=True))
    ]
    teacher.write_text("".join(json.dumps(record) + "\n" for record in records))
    mine = write_posts(tmp_path / "mine.csv", labels, invented_posts(20))  # has no column `prob`
    keys = {"train_file": str(teacher), "labels_column": "prob", "soft_labels": True, "max_steps": 150}
    main([head_recipe("llama", learning_rate=1e-2, lora_r=8, eval_file=str(mine), **keys)])
    assert len(read_scored(tmp_path / "run", labels).ids) == 20
    learnt = load_run(tmp_path / "run").predict_proba([text for text, _ in POSTS])
    assert np.abs(learnt - wanted).mean() < 0.05  # certain labels would be learnt as 0 and 1, 0.2 away


def test_the_loss_is_binary_cross_entropy_with_weighted_positives():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
    gold = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    class Model(torch.nn.Module):
        def forward(self, **inputs):
            return type("Output", (), {"logits": logits})

    trainer = object.__new__(HeadTrainer)
    trainer.pos_weight, trainer.exactly_one = torch.tensor([3.0, 5.0]), False
    loss = trainer.compute_loss(Model(), {"labels": gold})
    prob = logits.sigmoid()
    by_hand = -(3 * prob[0, 0].log() + (1 - prob[0, 1]).log() + (1 - prob[1, 0]).log() + 5 * prob[1, 1].log()) / 4
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)

    trainer.exactly_one = True  # a softmax; row 0 has label 1 (weight 5), row 1 has label 0 (weight 3)
    loss = trainer.compute_loss(Model(), {"labels": 1 - gold})
    prob = logits.softmax(1)
    by_hand = -(5 * prob[0, 1].log() + 3 * prob[1, 0].log()) / 8
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_long_training_texts_are_cut_and_counted(tokenizer, labels, tmp_path):
    posts = [("a bus", ()), ("a bus " * 40, ("joy",))]
    rows, _ = read_rows(write_posts(tmp_path / "posts.csv", labels, posts), labels)
    dataset, n_cut = encode_rows(tokenizer, rows, 16)
    assert n_cut == 1
    assert len(dataset[0]["input_ids"]) < len(dataset[1]["input_ids"]) == 16
    assert dataset[1]["labels"] == [float(name == "joy") for name in labels.names]


def test_long_texts_are_cut_and_counted_in_prediction(trained, tmp_path):
    run = shutil.copytree(trained("llama", False), tmp_path / "run")
    recipe = run / "recipe.yaml"
    assert "\nmax_length: 64\n" in recipe.read_text()
    recipe.write_text(recipe.read_text().replace("\nmax_length: 64\n", "\nmax_length: 16\n"))
    short, long = load_run(run).predict(["a bus", "a bus " * 40])
    assert short.n_cut == 0
    assert long.n_cut > 20


@pytest.mark.slow
def test_a_head_and_a_generator_decide_together(trained, tiny_recipe, tmp_path, labels):
    main([str(tiny_recipe(max_steps=1))])
    rows, _ = read_rows(write_posts(tmp_path / "new.csv", labels), labels)
    folders = member_folders([trained("llama", False), tmp_path / "run"])
    bar = lambda title, n: nullcontext(lambda done: None)  # noqa: E731
    both = predict_rows(
        load_runs(folders), rows, rule=DecisionRule(lambda probs: probs.mean(axis=0), np.full(11, 0.4)), bar=bar
    )
    apart = [load_run(folder).predict_proba(rows.texts) for folder in folders]
    np.testing.assert_allclose(both.prob, np.mean(apart, axis=0), atol=1e-5)
    assert (both.pred == (both.prob > 0.4)).all()


def test_an_untrained_head_is_refused(head_recipe):
    with pytest.raises(ModelError, match="before it is trained"):
        load_run(head_recipe("bert"))


def test_constant_labels_are_a_warning_at_the_first_evaluation(head_recipe, caplog, monkeypatch):
    monkeypatch.setattr(page, "report_finished", lambda folder: None)
    steps = {"eval_fraction": 0.3, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "learning_rate": 0}
    main([head_recipe("bert", **steps)])
    assert "labels are given to every row or to none" in caplog.text
    assert "label_weights: within" in caplog.text


def test_in_float16_all_that_is_trained_is_float32(tmp_path):
    """A scaler of gradients refuses those in float16."""
    model = LlamaForSequenceClassification(LlamaConfig(**SIZE, num_labels=2)).half()
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    args.fp16 = True  # refused without a GPU if it is set before
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[0.0, 1.0]]})
    HeadTrainer(model=model, args=args, train_dataset=rows, processing_class=make_tokenizer(), pos_weight=torch.ones(2))
    trained = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("score" in name for name in trained)
    assert set(trained.values()) == {torch.float32}
    assert model.dtype == torch.float16


@pytest.mark.parametrize("kind", ["bert", "sentence"])
def test_evaluations_of_a_head_have_a_loss_by_which_select_best_chooses(head_recipe, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(page, "report_finished", lambda folder: None)
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    main([head_recipe(kind, select_best={"within": 1.0, "fraction": 0.3}, **steps)])
    log = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in log if "eval_f1_macro" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 2 for loss in losses)
