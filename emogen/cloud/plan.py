"""What a run will take, before a GPU is paid for: recipe and model shape -> parts of memory, tokens, hours, dollars.

Arithmetic alone: no model is loaded, and no network is needed for the models of the shipped recipes. Memory is that of
one process on one GPU. What was measured replaces what is estimated: a finished run of the same model in `runs/` says
how fast its GPU (or this machine's CPU) was.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emogen.cloud.hardware import CPU, GIB, GPUS, PRICES_OF, Quote, Shape, shape_of
from emogen.errors import ModelError
from emogen.model.encode import load_encoder
from emogen.model.sources import locate
from emogen.model.tokenizer import encode_texts, load_tokenizer
from emogen.task.prompt import render
from emogen.task.recipe import Recipe, load_recipe
from emogen.task.rows import Rows
from emogen.task.task import Task, load_task_with_rows

SETUP_SECONDS = 600  # a pod that starts, pip, quantising the weights
DOWNLOAD_RATE = 100e6  # bytes a second from the Hub
SCORING_PASSES = 4  # a row that is scored: as many forward passes over it, for its answer and its probabilities
CONTEXT = GIB // 2  # what CUDA and its libraries take
USABLE = 0.9  # of a GPU's memory; the rest is lost between blocks


@dataclass(frozen=True)
class Tokens:
    """The tokens of a run's rows. `exact`: counted by the model's tokenizer, not by four characters a token.

    Attributes:
        rows, scored: rows to learn from; rows that are labelled, during training and at its end together.
        prefix: tokens that all rows share. rest, answer: mean tokens of a row after it, and of its answer.
        longest: the tokens after the prefix of the longest batch, without padding. widest: of the longest row.
    """

    rows: int
    scored: int
    prefix: int
    rest: float
    answer: float
    longest: int
    widest: int
    exact: bool


@dataclass(frozen=True)
class Option:
    """A GPU type for the run. `dollars` is None for the CPU; `basis` says where the speed comes from."""

    gpu: str
    memory: float  # GB
    fits: bool
    hours: dict[str, float]
    price: float | None  # dollars an hour
    stock: str | None
    basis: str

    @property
    def total_hours(self) -> float:
        return sum(self.hours.values())

    @property
    def dollars(self) -> float | None:
        return None if self.price is None else self.price * self.total_hours


@dataclass(frozen=True)
class Plan:
    """What a run takes. `memory` is in bytes, by parts; `options` are in the order of what the whole run costs."""

    recipe: str
    model: str
    tokens: Tokens
    memory: dict[str, int]
    train_tokens: int
    flops: dict[str, float]
    options: list[Option]
    prices: str

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def fitting(self) -> list[Option]:
        return [option for option in self.options if option.fits and option.price is not None]

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        options = [vars(o) | {"total_hours": o.total_hours, "dollars": o.dollars} for o in self.options]
        cheapest = self.fitting[0].gpu if self.fitting else None
        plain = vars(self) | {"tokens": vars(self.tokens), "options": options}
        return plain | {"peak": self.peak, "cheapest": cheapest}


def plan(path: str | Path, overrides: Sequence[str] = (), quotes: Mapping[str, Quote] | None = None) -> Plan:
    """Work out what the run of a recipe takes.

    Args:
        quotes: live prices by GPU id. Without them the remembered ones are used; with them, what they do not name is
            left out.

    Raises:
        InputError: the recipe or its data is wrong, or the model's shape is not known.
    """
    recipe = load_recipe(path, overrides)
    shape = shape_of(recipe.model_name)
    tokens = count_tokens(recipe)
    parts = memory(recipe, shape, tokens)
    train_tokens = tokens_to_train(recipe, shape, tokens)
    flops = {
        "training": train_tokens * flops_per_token(recipe, shape),
        "scoring": tokens.scored * tokens.rest * 2.0 * shape.linear * SCORING_PASSES,
    }
    rates = measured_rates(recipe)
    setup = SETUP_SECONDS + 2 * (shape.linear + shape.embeddings(with_head=True)) / DOWNLOAD_RATE
    options = []
    for name, gpu in GPUS.items():
        if quotes is not None and name not in quotes:
            continue
        quote = quotes[name] if quotes is not None else Quote(gpu.price)
        rate, basis = rates.get(name, (gpu.rate, "estimated"))
        hours = {"set-up": setup / 3600} | {what: of / rate / 3600 for what, of in flops.items()}
        fits = sum(parts.values()) <= USABLE * gpu.memory * 1e9
        options.append(Option(name, gpu.memory, fits, hours, quote.price, quote.stock, basis))
    options.sort(key=lambda option: (not option.fits, option.dollars, option.gpu))
    if CPU in rates:
        rate, basis = rates[CPU]
        hours = {what: of / rate / 3600 for what, of in flops.items()}
        options.append(Option(CPU, 0, True, hours, None, None, basis))
    prices = "of the catalog" if quotes is not None else f"remembered, of {PRICES_OF}"
    return Plan(recipe.name, recipe.model_name, tokens, parts, train_tokens, flops, options, prices)


def count_tokens(recipe: Recipe) -> Tokens:
    """The tokens of a recipe's rows, by the model's tokenizer where it can be had, or else four characters a token.

    Raises:
        InputError: the data, prompt or labels are wrong.
    """

    task, splits, _ = load_task_with_rows(recipe)
    learnt, n_scored = len(splits.train), len(splits.eval) if splits.eval is not None else 0
    if recipe.select_best:
        watched = round(recipe.select_best.fraction * learnt)
        learnt -= watched
    else:
        watched = min(recipe.eval_samples or n_scored, n_scored)
    texts, gold = splits.train.texts, splits.train.truth
    prefix, exact = 0, True
    rests: list[int] = []
    answers: list[int] = []
    try:
        if recipe.answer == "head":
            location = locate(recipe.model_name, recipe.lm_args.get("model_revision", "main"))
            tokenizer = load_tokenizer(location, trust_remote_code=recipe.trusts_code)
            rests = [len(ids) for ids in encode_texts(tokenizer, texts, recipe.max_length)["input_ids"]]
            answers = [0] * len(rests)
        else:
            encoder, _ = load_encoder(task)
            prefix = len(encoder.prefix_ids)
            for text, vector in zip(texts, gold, strict=True):
                questions = encoder.rows(text, task.label_set.names_of(vector))
                n_text = questions[0].n_text
                rests.append(n_text + sum(len(row) - row.n_text for row in questions))
                answers.append(sum(row.n_answer for row in questions))
    except ModelError:
        exact = False
        prefix, rests, answers = _guess_tokens(recipe, task, splits.train)
    batch = int(recipe.sft_args.get("per_device_train_batch_size", 8))
    return Tokens(
        rows=learnt,
        scored=_evaluations(recipe, learnt) * watched + n_scored,
        prefix=prefix,
        rest=sum(rests) / len(rests),
        answer=sum(answers) / len(answers),
        longest=sum(sorted(rests)[-batch:]),
        widest=max(rests),
        exact=exact,
    )


def _guess_tokens(recipe: Recipe, task: Task, rows: Rows) -> tuple[int, list[int], list[int]]:
    """Prefix, rest and answer tokens without a tokenizer."""

    def tokens(text: str) -> int:
        return math.ceil(len(text) / 4)

    label_set, most = task.label_set, recipe.max_length or 10**9
    texts, gold = rows.texts, rows.truth
    if recipe.answer == "head":
        return 0, [min(2 + tokens(text), most) for text in texts], [0] * len(texts)
    asked = label_set.labels if recipe.answer == "yes_no" else [None]
    messages = render(task.prompt, label_set, task.examples, asked[0])
    turn = 8  # the chat template's own tokens around a turn
    prefix = sum(turn + tokens(message["content"]) for message in messages)
    if recipe.answer == "yes_no":
        answers = [3 * len(label_set)] * len(texts)
    else:
        answers = [2 + sum(1 + tokens(name) for name in label_set.names_of(vector)) for vector in gold]
    question = turn * len(asked)
    cut = [min(tokens(text), max(most - prefix, 1)) for text in texts]
    return prefix, [n + question + answer for n, answer in zip(cut, answers, strict=True)], answers


def _micro_batches(recipe: Recipe, rows: int) -> int:
    """How many batches go through the model in training."""
    args = recipe.sft_args
    batch, gathered = args.get("per_device_train_batch_size", 8), args.get("gradient_accumulation_steps", 1)
    if args.get("max_steps", -1) > 0:
        return int(args["max_steps"] * gathered)
    return math.ceil(math.ceil(rows / batch) * args.get("num_train_epochs", 3.0))


def _evaluations(recipe: Recipe, rows: int) -> int:
    """How often rows are labelled during training."""
    args = recipe.sft_args
    strategy, every = str(args.get("eval_strategy", "no")), args.get("eval_steps")
    if strategy == "epoch":
        return math.ceil(args.get("num_train_epochs", 3.0))
    if strategy != "steps":
        return 0
    if every and every < 1:
        return round(1 / every)
    steps = _micro_batches(recipe, rows) // args.get("gradient_accumulation_steps", 1)
    return int(steps // (every or args.get("logging_steps", 10)))


def shares(recipe: Recipe, shape: Shape) -> bool:
    """Whether the rows of a batch share their instruction, and logits are computed on the answers alone."""
    return recipe.shared_prefix and shape.shares and recipe.answer != "head"


def tokens_to_train(recipe: Recipe, shape: Shape, tokens: Tokens) -> int:
    """The tokens that go through the model in training: the shared instruction once a batch, all else once a row."""
    batch = int(recipe.sft_args.get("per_device_train_batch_size", 8))
    batches = _micro_batches(recipe, tokens.rows)
    rows = min(batches * batch, math.ceil(tokens.rows * batches / math.ceil(tokens.rows / batch)))
    prefixes = batches if shares(recipe, shape) else rows
    return round(prefixes * tokens.prefix + rows * tokens.rest)


def memory(recipe: Recipe, shape: Shape, tokens: Tokens) -> dict[str, int]:
    """The parts of a training step's peak, in bytes.

    Adapters are counted in float32, gradients and optimiser too (TRL makes those of a quantised model bf16, which is
    less). With gradient checkpointing one layer's activations are alive at a time, beside the input of each.
    """
    lm, args = recipe.lm_args, recipe.sft_args
    wide = 2 if str(lm.get("dtype")) in ("bfloat16", "float16") else 4
    quantised = bool(lm.get("load_in_4bit"))
    bits = 4 + (8 + 32 / 256 if lm.get("use_bnb_nested_quant") else 32) / 64  # a scale for each 64 weights
    embeddings = shape.embeddings(with_head=recipe.answer != "head")
    weights = shape.linear * (bits / 8 if quantised else 1 if lm.get("load_in_8bit") else wide) + embeddings * wide

    if lm.get("use_peft"):
        trained = shape.lora(int(lm.get("lora_r", 16)), lm.get("lora_target_modules"))
        adapter = 4 * trained
    else:
        trained, adapter = shape.linear + embeddings, 0

    batch = int(args.get("per_device_train_batch_size", 8))
    shared = shares(recipe, shape)
    n = tokens.prefix + tokens.longest if shared else batch * (tokens.prefix + tokens.widest)
    attention = 9 * shape.hidden + 5 * shape.heads * shape.head_dim
    norms = 3 * shape.hidden if wide == 2 else 0  # which keep a copy in float32
    layer = wide * (attention + norms + (6 if shape.gated else 4) * shape.intermediate)
    if args.get("gradient_checkpointing"):
        activations = n * (shape.layers * shape.hidden * wide + layer)
    else:
        activations = n * shape.layers * layer

    learnt = 0 if recipe.answer == "head" else math.ceil(batch * tokens.answer) if shared else n
    parts = {
        "weights": weights,
        "adapter": adapter,
        "gradients": 4 * trained,
        "optimiser": _optimiser_bytes(str(args.get("optim", "adamw_torch"))) * trained,
        "activations": activations,
        "logits": learnt * shape.vocab * (wide + 8),  # and in float32, and their gradient
        "CUDA and work space": CONTEXT + (2 * shape.hidden * shape.intermediate if quantised else 0),
    }
    return {name: math.ceil(size) for name, size in parts.items()}


def _optimiser_bytes(name: str) -> int:
    """Bytes a trained parameter: two moments, in one byte each or in four; none worth counting for others."""
    if "8bit" in name:
        return 2
    return 0 if name.startswith(("adafactor", "sgd")) else 8


def flops_per_token(recipe: Recipe, shape: Shape) -> float:
    """Floating-point operations of training on one token, the head apart, which sees few of them.

    2 a weight forward, 2 for the gradient of what comes in, 2 for that of the weight where it is learnt; checkpointing
    goes forward twice.
    """
    again = 2 if recipe.sft_args.get("gradient_checkpointing") else 0
    if not recipe.lm_args.get("use_peft"):
        return float((6 + again) * shape.linear)
    adapter = shape.lora(int(recipe.lm_args.get("lora_r", 16)), recipe.lm_args.get("lora_target_modules"))
    return float((4 + again) * shape.linear + (6 + again) * adapter)


def measured_rates(recipe: Recipe) -> dict[str, tuple[float, str]]:
    """What finished runs of the recipe's model tell: GPU id (or `CPU`) -> FLOP/s of its training, and which run.

    The runs beside the recipe's own run folder are looked at; the newest on each kind of GPU counts. Their seconds
    hold the evaluations during training too, so the rate is on the safe side.
    """
    rates: dict[str, tuple[float, str]] = {}
    folders = [path.parent for path in recipe.output_dir.parent.glob("*/manifest.json")]
    for folder in sorted(folders, key=lambda folder: (folder / "manifest.json").stat().st_mtime):
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if manifest["model"] != recipe.model_name:
                continue
            seconds = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["train_seconds"]
            lines = (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
            n_tokens = max(json.loads(line).get("num_tokens", 0) for line in lines)
            flops = n_tokens * flops_per_token(load_recipe(folder / "recipe.yaml"), shape_of(recipe.model_name))
            gpus = manifest["hardware"]["gpus"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a finished run
        if flops and seconds and len(gpus) < 2:
            rates[gpus[0] if gpus else CPU] = (flops / seconds, f"measured: {folder}")
    return rates
