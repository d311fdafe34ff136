"""Estimates of what a run takes: recipe and model shape -> GPU memory, tokens, hours, dollars.

The estimates are arithmetic: no model is loaded, and the models of the shipped recipes need no network. Memory is that
of one process on one GPU. A finished run of the same model beside the recipe's run folder gives a measured speed, which
replaces the estimated one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emogen.cloud.hardware import CPU, GIB, GPUS, PRICES_OF, Quote, Shape, shape_of
from emogen.errors import ModelError
from emogen.evaluation.run_folder import LOG, MANIFEST, METRICS, RECIPE
from emogen.model.encode import load_encoder
from emogen.model.sources import locate_tokenizer
from emogen.model.tokenizer import read_tokenizer
from emogen.task.prompt import render
from emogen.task.recipe import Recipe, load_recipe
from emogen.task.rows import Rows
from emogen.task.task import Task, load_task_with_rows

SETUP_SECONDS = 600  # starting a pod, installing emogen, quantising the weights
DOWNLOAD_RATE = 100e6  # bytes per second from the Hub
SCORING_PASSES = 4  # forward passes per scored row, for its answer and its probabilities
CONTEXT = GIB // 2  # bytes taken by CUDA and its libraries
USABLE = 0.9  # share of a GPU's memory; the rest is lost to fragmentation
CHARS_PER_TOKEN = 4  # without a tokenizer
TURN_TOKENS = 8  # tokens of a chat template around one turn, without a tokenizer


@dataclass(frozen=True)
class Tokens:
    """Token counts of the rows of a run.

    Attributes:
        rows: number of training rows.
        scored: number of rows that are labelled, during training and at its end.
        prefix: tokens shared by all rows.
        rest: mean tokens of a row after the prefix.
        answer: mean tokens of a row's answer.
        longest: tokens after the prefix of the longest batch, without padding.
        widest: tokens after the prefix of the longest row.
        exact: counted by the model's tokenizer; otherwise estimated from the number of characters.
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
    """A GPU type, or this machine's CPU, with what the run takes on it.

    Attributes:
        memory: GB (10^9 bytes).
        fits: the run fits into the memory.
        hours: hours by part of the run.
        price: dollars per hour; None for the CPU.
        stock: as in the catalog of the API; None if unknown.
        basis: where the speed comes from.
    """

    gpu: str
    memory: float
    fits: bool
    hours: dict[str, float]
    price: float | None
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
    """What a run takes.

    Attributes:
        memory: bytes by part.
        train_tokens: tokens that go through the model in training.
        flops: floating-point operations by part of the run.
        options: the GPU types that fit, the cheapest run first; then those that do not fit; then the CPU if measured.
        prices: where the prices come from.
    """

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
        """Bytes of GPU memory."""
        return sum(self.memory.values())

    @property
    def fitting(self) -> list[Option]:
        """The GPU types that the run fits on, the cheapest run first."""
        return [option for option in self.options if option.fits and option.price is not None]

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        options = [
            vars(option) | {"total_hours": option.total_hours, "dollars": option.dollars} for option in self.options
        ]
        cheapest = self.fitting[0].gpu if self.fitting else None
        plain = vars(self) | {"tokens": vars(self.tokens), "options": options}
        return plain | {"peak": self.peak, "cheapest": cheapest}


def make_plan(path: str | Path, overrides: Sequence[str] = (), quotes: Mapping[str, Quote] | None = None) -> Plan:
    """Estimate what the run of a recipe takes.

    Args:
        path: the recipe.
        overrides: `key=value`.
        quotes: live prices by GPU id; GPU types without one are left out. None: use the built-in prices.

    Raises:
        InputError: the recipe or its data is invalid, or the shape of the model is unknown.
    """
    recipe = load_recipe(path, overrides)
    recipe.require_own_model("runs elsewhere, so there is nothing to estimate")
    shape = shape_of(recipe.model_name)
    tokens = count_tokens(recipe)
    parts = memory_parts(recipe, shape, tokens)
    train_tokens = count_train_tokens(recipe, shape, tokens)
    flops = {
        "training": train_tokens * flops_per_token(recipe, shape),
        "scoring": tokens.scored * tokens.rest * 2.0 * shape.linear * SCORING_PASSES,
    }
    setup = SETUP_SECONDS + 2 * (shape.linear + shape.embeddings(with_head=True)) / DOWNLOAD_RATE
    options = _options(sum(parts.values()), flops, setup, measured_rates(recipe), quotes)
    prices = "from the catalog" if quotes is not None else f"built in, as of {PRICES_OF}"
    return Plan(recipe.name, recipe.model_name, tokens, parts, train_tokens, flops, options, prices)


def _options(
    peak: int,
    flops: Mapping[str, float],
    setup: float,
    rates: Mapping[str, tuple[float, str]],
    quotes: Mapping[str, Quote] | None,
) -> list[Option]:
    """The GPU types, those that fit first, by the dollars of the whole run; then the CPU if it was measured.

    Args:
        peak: bytes of GPU memory. flops: operations by part. setup: seconds.
        rates: measured FLOP/s and their basis by GPU id.
        quotes: as in `make_plan`.
    """
    options = []
    for name, gpu in GPUS.items():
        if quotes is not None and name not in quotes:
            continue
        quote = quotes[name] if quotes is not None else Quote(gpu.price)
        rate, basis = rates.get(name, (gpu.rate, "estimated"))
        hours = {"set-up": setup / 3600} | _hours(flops, rate)
        fits = peak <= USABLE * gpu.memory * 1e9
        options.append(Option(name, gpu.memory, fits, hours, quote.price, quote.stock, basis))
    options.sort(key=lambda option: (not option.fits, option.dollars, option.gpu))
    if CPU in rates:
        rate, basis = rates[CPU]
        options.append(Option(CPU, 0, True, _hours(flops, rate), None, None, basis))
    return options


def _hours(flops: Mapping[str, float], rate: float) -> dict[str, float]:
    return {part: operations / rate / 3600 for part, operations in flops.items()}


def count_tokens(recipe: Recipe) -> Tokens:
    """Count the tokens of a recipe's rows.

    The model's tokenizer counts them; without it, four characters are taken for a token.

    Raises:
        InputError: the data, the prompt or the labels are invalid.
    """
    task, splits, _ = load_task_with_rows(recipe)
    try:
        prefix, rests, answers = _exact_lengths(recipe, task, splits.train)
        exact = True
    except ModelError:
        prefix, rests, answers = _estimated_lengths(recipe, task, splits.train)
        exact = False
    n_train, n_eval = len(splits.train), len(splits.eval) if splits.eval is not None else 0
    if recipe.select_best:
        n_val = round(recipe.select_best.fraction * n_train)
        n_train -= n_val
    else:
        n_val = min(recipe.eval_samples or n_eval, n_eval)
    return Tokens(
        rows=n_train,
        scored=_n_evaluations(recipe, n_train) * n_val + n_eval,
        prefix=prefix,
        rest=sum(rests) / len(rests),
        answer=sum(answers) / len(answers),
        longest=sum(sorted(rests)[-_batch_size(recipe) :]),
        widest=max(rests),
        exact=exact,
    )


def _exact_lengths(recipe: Recipe, task: Task, rows: Rows) -> tuple[int, list[int], list[int]]:
    """The tokens of the prefix; and of each row, those after the prefix and those of the answer.

    Raises:
        ModelError: the tokenizer is not available.
    """
    if recipe.answer == "head":
        location = locate_tokenizer(recipe.model_name, recipe.lm_args.get("model_revision", "main"))
        tokenizer = read_tokenizer(location, trust_remote_code=recipe.trusts_code)
        encoded = tokenizer.encode_texts(rows.texts, recipe.max_length)["input_ids"]
        return 0, [len(ids) for ids in encoded], [0] * len(encoded)
    encoder = load_encoder(task)
    rests, answers = [], []
    for text, vector in zip(rows.texts, rows.truth, strict=True):
        questions = encoder.rows(text, task.label_set.names_of(vector))
        n_text = questions[0].n_text
        rests.append(n_text + sum(len(row) - row.n_text for row in questions))
        answers.append(sum(row.n_answer for row in questions))
    return len(encoder.prefix_ids), rests, answers


def _estimated_lengths(recipe: Recipe, task: Task, rows: Rows) -> tuple[int, list[int], list[int]]:
    """What `_exact_lengths` returns, estimated without a tokenizer."""

    def n_tokens(text: str) -> int:
        return math.ceil(len(text) / CHARS_PER_TOKEN)

    label_set, max_length = task.label_set, recipe.max_length or 10**9
    if recipe.answer == "head":
        return 0, [min(2 + n_tokens(text), max_length) for text in rows.texts], [0] * len(rows)
    asked = label_set.labels if recipe.answer == "yes_no" else [None]
    messages = render(task.prompt, label_set, task.examples, asked[0])
    prefix = sum(TURN_TOKENS + n_tokens(message["content"]) for message in messages)
    if recipe.answer == "yes_no":
        answers = [3 * len(label_set)] * len(rows)
    else:
        answers = [2 + sum(1 + n_tokens(name) for name in label_set.names_of(vector)) for vector in rows.truth]
    question = TURN_TOKENS * len(asked)
    texts = [min(n_tokens(text), max(max_length - prefix, 1)) for text in rows.texts]
    return prefix, [text + question + answer for text, answer in zip(texts, answers, strict=True)], answers


def _batch_size(recipe: Recipe) -> int:
    return int(recipe.sft_args.get("per_device_train_batch_size", 8))


def _n_batches(recipe: Recipe, n_rows: int) -> int:
    """The number of batches that go through the model in training."""
    args = recipe.sft_args
    if args.get("max_steps", -1) > 0:
        return int(args["max_steps"] * args.get("gradient_accumulation_steps", 1))
    return math.ceil(math.ceil(n_rows / _batch_size(recipe)) * args.get("num_train_epochs", 3.0))


def _n_evaluations(recipe: Recipe, n_rows: int) -> int:
    """The number of evaluations during training."""
    args = recipe.sft_args
    strategy, every = str(args.get("eval_strategy", "no")), args.get("eval_steps")
    if strategy == "epoch":
        return math.ceil(args.get("num_train_epochs", 3.0))
    if strategy != "steps":
        return 0
    if every and every < 1:  # a share of the run
        return round(1 / every)
    steps = _n_batches(recipe, n_rows) // args.get("gradient_accumulation_steps", 1)
    return int(steps // (every or args.get("logging_steps", 10)))


def shares_prefix(recipe: Recipe, shape: Shape) -> bool:
    """Whether the rows of a batch share their instruction, and logits are computed for the answers alone."""
    return recipe.shared_prefix and shape.shares_prefix and recipe.answer != "head"


def count_train_tokens(recipe: Recipe, shape: Shape, tokens: Tokens) -> int:
    """The tokens that go through the model in training: a shared instruction once per batch, the rest once per row."""
    batch_size, n_batches = _batch_size(recipe), _n_batches(recipe, tokens.rows)
    n_rows = min(n_batches * batch_size, math.ceil(tokens.rows * n_batches / math.ceil(tokens.rows / batch_size)))
    n_prefixes = n_batches if shares_prefix(recipe, shape) else n_rows
    return round(n_prefixes * tokens.prefix + n_rows * tokens.rest)


def memory_parts(recipe: Recipe, shape: Shape, tokens: Tokens) -> dict[str, int]:
    """The parts of the peak of a training step, in bytes.

    Adapters, their gradients and the optimiser are counted in float32. TRL makes the adapters of a quantised model
    bfloat16, which takes less.
    """
    lm, batch_size = recipe.lm_args, _batch_size(recipe)
    width = 2 if str(lm.get("dtype")) in ("bfloat16", "float16") else 4  # bytes of a value
    embeddings = shape.embeddings(with_head=recipe.answer != "head")
    if lm.get("use_peft"):
        n_trained = shape.lora(int(lm.get("lora_r", 16)), lm.get("lora_target_modules"))
        adapter = 4 * n_trained
    else:
        n_trained, adapter = shape.linear + embeddings, 0

    if shares_prefix(recipe, shape):
        n_tokens = tokens.prefix + tokens.longest
        n_logits = math.ceil(batch_size * tokens.answer)
    else:
        n_tokens = batch_size * (tokens.prefix + tokens.widest)
        n_logits = 0 if recipe.answer == "head" else n_tokens
    workspace = 2 * shape.hidden * shape.intermediate if lm.get("load_in_4bit") else 0  # one dequantised matrix
    parts = {
        "weights": shape.linear * _weight_bytes(lm, width) + embeddings * width,
        "adapter": adapter,
        "gradients": 4 * n_trained,
        "optimiser": _optimiser_bytes(str(recipe.sft_args.get("optim", "adamw_torch"))) * n_trained,
        "activations": _activation_bytes(recipe, shape, n_tokens, width),
        "logits": n_logits * shape.vocab * (width + 8),  # also in float32, with their gradient
        "CUDA and work space": CONTEXT + workspace,
    }
    return {name: math.ceil(size) for name, size in parts.items()}


def _weight_bytes(lm_args: Mapping[str, Any], width: int) -> float:
    """Bytes per weight of a linear layer."""
    if lm_args.get("load_in_4bit"):
        scale = 8 + 32 / 256 if lm_args.get("use_bnb_nested_quant") else 32  # bits per scale; one scale per 64 weights
        return (4 + scale / 64) / 8
    return 1 if lm_args.get("load_in_8bit") else width


def _optimiser_bytes(name: str) -> int:
    """Bytes per trained parameter: two moments of one or four bytes each; the others keep next to nothing."""
    if "8bit" in name:
        return 2
    return 0 if name.startswith(("adafactor", "sgd")) else 8


def _activation_bytes(recipe: Recipe, shape: Shape, n_tokens: int, width: int) -> int:
    """Bytes of the activations of a batch.

    With gradient checkpointing, the activations of one layer are alive at a time, beside the input of every layer.
    """
    attention = 9 * shape.hidden + 5 * shape.heads * shape.head_dim
    norms = 3 * shape.hidden if width == 2 else 0  # norms keep a copy in float32
    layer = width * (attention + norms + (6 if shape.gated else 4) * shape.intermediate)
    if recipe.sft_args.get("gradient_checkpointing"):
        return n_tokens * (shape.layers * shape.hidden * width + layer)
    return n_tokens * shape.layers * layer


def flops_per_token(recipe: Recipe, shape: Shape) -> float:
    """Floating-point operations of training per token, without the head, which sees few tokens.

    A weight takes 2 operations forward, 2 for the gradient of its input, and 2 for its own gradient if it is trained.
    Gradient checkpointing repeats the forward pass.
    """
    again = 2 if recipe.sft_args.get("gradient_checkpointing") else 0
    if not recipe.lm_args.get("use_peft"):
        return float((6 + again) * shape.linear)
    adapter = shape.lora(int(recipe.lm_args.get("lora_r", 16)), recipe.lm_args.get("lora_target_modules"))
    return float((4 + again) * shape.linear + (6 + again) * adapter)


def measured_rates(recipe: Recipe) -> dict[str, tuple[float, str]]:
    """Training speeds measured by finished runs of the recipe's model, in the folders beside its run folder.

    The newest run on each GPU type counts. Its seconds include the evaluations during training, so the rate is
    conservative.

    Returns:
        GPU id (or `CPU`) -> FLOP/s of training, and the basis that names the run.
    """
    rates: dict[str, tuple[float, str]] = {}
    manifests = recipe.output_dir.parent.glob(f"*/{MANIFEST}")
    for path in sorted(manifests, key=lambda path: path.stat().st_mtime):
        folder = path.parent
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["model"] != recipe.model_name:
                continue
            seconds = json.loads((folder / METRICS).read_text(encoding="utf-8"))["train_seconds"]
            lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
            n_tokens = max(json.loads(line).get("num_tokens", 0) for line in lines)
            flops = n_tokens * flops_per_token(load_recipe(folder / RECIPE), shape_of(recipe.model_name))
            gpus = manifest["hardware"]["gpus"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a finished run
        if flops and seconds and len(gpus) < 2:
            rates[gpus[0] if gpus else CPU] = (flops / seconds, f"measured: {folder}")
    return rates
