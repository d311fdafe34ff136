"""Tiny models, a tokenizer, posts and run folders, built in the test: no network, no GPU."""

import csv
import json
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from emogen import paths
from emogen.evaluation import results, run_folder
from emogen.evaluation.audit_file import AuditedRelation, AuditedRow, AuditFile, predictions_digest
from emogen.evaluation.metrics import evaluate, tune_thresholds
from emogen.evaluation.results import Prediction
from emogen.task.labels import LabelSet
from emogen.task.parse import parse_answer
from emogen.task.rows import Rows

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


POSTS = [  # (text, labels) - enough to train on for a few steps
    ("what a lovely morning by the sea", ("joy", "love")),
    ("they cancelled my train again, i could scream", ("anger", "disgust")),
    ("counting the days until the concert", ("anticipation", "joy")),
    ("i miss the old dog so much", ("love", "sadness")),
    ("who is at the door at this hour", ("fear", "surprise")),
    ("the bus leaves at nine", ()),
    ("nothing will ever change in this town", ("pessimism", "sadness")),
    ("you got this, tomorrow is a new day", ("optimism",)),
    ("my doctor knows what she is doing", ("optimism", "trust")),
    ("mouldy bread AGAIN, thanks for nothing", ("anger", "disgust")),
    ("did not see that ending coming, wow", ("joy", "surprise")),
    ("the exam is tomorrow and i know nothing", ("fear", "pessimism")),
]


def make_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 500 tokens, trained on the posts and the label names."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [text for text, _ in POSTS] + ["anger, joy, sadness, none, fear, trust, yes, no"] * 3
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


SIZE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "initializer_range": 0.2,  # logits large enough to learn something in a few steps
}


# One for each architecture of the recipes: SmolLM2 and Llama 3 are Llama; Gemma 3 has a sliding window, here a short one.
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZE),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZE, sliding_window=24, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
}


def make_model(kind: str = "llama", seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]())


def save_model(folder: Path, kind: str = "llama", chat_template: str | None = CHATML) -> Path:
    make_model(kind).save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return folder


# For the tests of prompts: 36 posts, and the source of a short template.
MANY = [(f"{text} {k}", names) for k in range(3) for text, names in POSTS]
SHORT = "{% user %}\nFeelings ({{ names | join(' ') }})?\n{{ text }}\n"


def write_posts(path: Path, labels: LabelSet, posts=POSTS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "Tweet", *labels.names])
        for i, (text, names) in enumerate(posts):
            writer.writerow([f"p{i}", text, *labels.vector(names)])
    return path


def write_recipe(
    folder: Path, labels: LabelSet, /, kind: str = "llama", chat_template=CHATML, posts=POSTS, **keys
) -> Path:
    """Write a recipe for a tiny model and a few posts. `keys` are further keys of the recipe.

    Its run goes to `folder`/run.
    """
    model = folder / f"model-{kind}"
    if not model.exists():
        save_model(model, kind, chat_template)
    values = {
        "model_name_or_path": str(model),
        "train_file": str(write_posts(folder / "train.csv", labels, posts)),
        "output_dir": str(folder / "run"),
        "prompt": "prompts/list.jinja",
        "max_length": 1024,
        "lora_r": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        **keys,
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(values, indent=1))  # JSON is YAML
    return path


EVIL = [  # posts that would be markup if they were not escaped
    ("<script>alert(1)</script> and <img src=x onerror=alert(2)> were posted", ("anger",)),
    ("it ends here: </script><script>alert(3)</script> & <!-- that was all", ()),
    ("two\u2028lines, \u202eright to left, and {{ 7 * 7 }}", ("joy",)),
]


def invented_posts(n: int):
    """n posts: first the evil ones, then the usual ones again and again, numbered."""
    usual = [(f"{text}, {k}", names) for k in range(-(-n // len(POSTS))) for text, names in POSTS]
    return [*EVIL, *usual][:n]


def write_run(folder: Path, labels: LabelSet, /, n: int = 40, *, posts=None, noise=0.7, seed: int = 0, **keys) -> Path:
    """The folder of a run that has ended, with everything that a report reads; no model. `keys` go into its recipe."""
    posts = posts or invented_posts(n)
    n = len(posts)
    gold = np.array([labels.vector(names) for _, names in posts], dtype=np.int8)
    prob = gold * (1 - noise) + np.random.default_rng(seed).random(gold.shape) * noise
    raws = [", ".join(labels.names_of(row)) or labels.empty for row in (prob > 0.5).astype(int).tolist()]
    if keys.get("answer", "list") != "head":
        raws[3], raws[4], raws[5] = "<b>bliss</b>", "", raws[5].upper()
    predictions = [Prediction(raw, parse_answer(raw, labels), 2 if i == 6 else 0) for i, raw in enumerate(raws)]
    pred = np.array([prediction.parsed.vector for prediction in predictions], dtype=np.int8)
    rows = Rows("x", [f"r{i}" for i in range(n)], [text for text, _ in posts], gold, list(range(n)))
    folds = np.arange(n) % 5
    results.write_jsonl(folder / run_folder.PREDICTIONS, rows, pred, prob, labels, predictions, folds)
    results.write_thresholds(folder, tune_thresholds(gold, prob), labels)
    metrics = {"train_seconds": 75.0, "train_rows": 90, "peak_memory_bytes": 3 * 2**29, "answer_seconds": 4.0}
    paths.write_json(folder / run_folder.METRICS, metrics | evaluate(gold, pred, prob, folds, labels.names))
    recipe = {"model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "train_file": "/home/someone/posts.csv"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"output_dir": str(folder)} | keys))
    (folder / "prompt.jinja").write_text("{% user %}\nIs it ``` or <i>not</i>? {{ text }}\n")
    (folder / "labels.yaml").write_text(labels.to_yaml())
    (folder / "manifest.json").write_text(
        json.dumps({"seed": 42, "hardware": {"machine": "x86_64", "threads": 2, "gpus": []}})
    )
    logs = [{"loss": 3 / (k + 1), "step": k, "max_steps": 4} for k in range(4)]
    logs += [{"eval_loss": 0.9, "eval_f1_macro": 0.5, "eval_f1_micro": 0.6, "step": 4, "max_steps": 4}]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in logs))
    (folder / "adapter").mkdir()
    return folder


def audit_of(folder: Path, suspected: dict[int, dict[str, float]], twins: tuple[int, ...] = ()) -> AuditFile:
    """What an audit may say about a run folder of `write_run`: rows with suspected labels, two twins, and a relation."""
    rows = [
        AuditedRow(
            id=f"r{i}",
            suspected=probs,
            suggested=("anger",),
            twins=(),
            reasons=tuple(f"{k} <i>is</i> wrong" for k in probs),
        )
        for i, probs in suspected.items()
    ]
    for i, other in zip(twins, reversed(twins), strict=True):
        reason = f"nearly the text of r{other}"
        rows.append(AuditedRow(id=f"r{i}", suspected={}, suggested=(), twins=(f"r{other}",), reasons=(reason,)))
    relation = AuditedRelation(sentence="joy nearly implies anger: 1 of 40 & more", exceptions=("r9",))
    return AuditFile(
        predictions=predictions_digest(folder), systems=(str(folder),), rows=tuple(rows), relations=(relation,)
    )


def kill_at(event: Callable[[], bool], command: Sequence, **options) -> None:
    """Start a command, and kill it as soon as the event has happened. Fails if the command ends before.

    Args:
        options: of `subprocess.Popen`.
    """
    process = subprocess.Popen([str(word) for word in command], **options)
    while not event():
        assert process.poll() is None, f"the command ended with {process.returncode} before it could be killed"
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
