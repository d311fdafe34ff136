"""Tiny models and a tokenizer, made in the test: no network, no GPU."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from emogen.labels import LabelSet, load_label_set

CHROMIUM = Path("/usr/bin/chromium")  # Debian's
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


@pytest.fixture(scope="session")
def labels() -> LabelSet:
    return load_label_set("semeval2018")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


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


@pytest.fixture(params=sorted(CONFIGS))
def model(request):
    return make_model(request.param)


def save_model(folder: Path, kind: str = "llama", chat_template: str | None = CHATML) -> Path:
    make_model(kind).save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return folder


def write_posts(path: Path, labels: LabelSet, posts=POSTS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "Tweet", *labels.names])
        for i, (text, names) in enumerate(posts):
            writer.writerow([f"p{i}", text, *labels.vector(names)])
    return path


@pytest.fixture
def tiny_recipe(tmp_path: Path, labels: LabelSet):
    """Writes a recipe for a tiny model and twelve posts; returns its path. Arguments are further keys."""

    def write(kind: str = "llama", chat_template: str | None = CHATML, **keys) -> Path:
        model = tmp_path / f"model-{kind}"
        if not model.exists():
            save_model(model, kind, chat_template)
        values = {
            "model_name_or_path": str(model),
            "train_file": str(write_posts(tmp_path / "train.csv", labels)),
            "output_dir": str(tmp_path / "run"),
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
        path = tmp_path / "tiny.yaml"
        path.write_text(json.dumps(values, indent=1))  # JSON is YAML
        return path

    return write


@pytest.fixture(scope="session")
def chromium():
    """A headless browser. Where there is none, the tests that need one are skipped; CI insists."""
    if not CHROMIUM.exists() and not os.environ.get("EMOGEN_REQUIRE_BROWSER"):
        pytest.skip("no /usr/bin/chromium: what people see in a browser is not tested here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens an address in a page of its own. At the end: nothing was complained of, and no other host was asked."""
    context, heard = chromium.new_context(), []

    def visit(address: str):
        own = address.split("/")[2]
        page = context.new_page()
        page.on("console", lambda message: heard.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: None if _is_own(request.url, own) else heard.append(f"asked {request.url}"))
        page.goto(address)
        return page

    yield visit
    context.close()
    assert heard == []


def _is_own(url: str, host: str) -> bool:
    return url.startswith(("data:", "blob:")) or url.split("/")[2] == host
