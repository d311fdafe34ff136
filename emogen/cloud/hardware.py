"""Shapes of models, GPU types, and their prices."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emogen import paths
from emogen.errors import InputError

GIB = 2**30
CPU = "this machine's CPU"  # the name of the machine on which runs without a GPU were measured

# Estimates of a GPU's speed, used until a run of the same model has been measured on it.
EFFICIENCY = 0.4  # share of the peak that is reached while the GPU computes
INTENSITY = 150  # operations per byte moved: every batch dequantises NF4 weights again, and norms read the rows again


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, as its config names them.

    Attributes:
        tied: input and output embeddings share their weights.
        gated: an MLP has three matrices instead of two.
        shares_prefix: the rows of a batch can share their instruction.
        positions: number of trained position (and type) embeddings.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = True
    gated: bool = True
    shares_prefix: bool = True
    positions: int = 0

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block: name -> (input width, output width)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block = {"q_proj": (self.hidden, q), "k_proj": (self.hidden, kv), "v_proj": (self.hidden, kv)}
        block |= {"o_proj": (q, self.hidden), "up_proj": (self.hidden, self.intermediate)}
        if self.gated:
            block["gate_proj"] = (self.hidden, self.intermediate)
        return block | {"down_proj": (self.intermediate, self.hidden)}

    @property
    def linear(self) -> int:
        """The number of parameters in all linear layers except the head: those that NF4 quantises."""
        return self.layers * sum(n_in * n_out for n_in, n_out in self.modules.values())

    def embeddings(self, *, with_head: bool) -> int:
        """The number of parameters in the embeddings, and in the head if it has its own weights."""
        tables = self.vocab + self.positions + (self.vocab if with_head and not self.tied else 0)
        return tables * self.hidden

    def lora(self, r: int, targets: str | Sequence[str] | None) -> int:
        """The number of parameters of a LoRA adapter.

        Args:
            r: rank of the adapter.
            targets: names of the adapted layers; a string or None stands for all linear layers.
        """
        modules = self.modules
        names = modules if isinstance(targets, str | None) else modules.keys() & set(targets)
        return r * self.layers * sum(sum(modules[name]) for name in names)


# The models that the shipped recipes name. The shape of any other model is read from its config.json.
SHAPES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Shape(30, 576, 1536, 9, 3, 64, 49152),
    "google/gemma-2-2b": Shape(26, 2304, 9216, 8, 4, 256, 256000, shares_prefix=False),
    "google/gemma-3-270m": Shape(18, 640, 2048, 4, 1, 256, 262144),
    "meta-llama/Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "meta-llama/Llama-3.2-3B-Instruct": Shape(28, 3072, 8192, 24, 8, 128, 128256),
    "Qwen/Qwen2.5-1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151936),
    "Qwen/Qwen2.5-1.5B-Instruct": Shape(28, 1536, 8960, 12, 2, 128, 151936),
    "Qwen/Qwen2.5-14B-Instruct": Shape(48, 5120, 13824, 40, 8, 128, 152064, tied=False),
    "NovaSearch/stella_en_1.5B_v5": Shape(28, 1536, 8960, 12, 2, 128, 151646, tied=False),
    "sentence-transformers/all-MiniLM-L6-v2": Shape(
        6, 384, 1536, 12, 12, 32, 30522, gated=False, shares_prefix=False, positions=514
    ),
    "sentence-transformers/all-mpnet-base-v2": Shape(
        12, 768, 3072, 12, 12, 64, 30527, gated=False, shares_prefix=False, positions=514
    ),
    "distilbert/distilbert-base-uncased": Shape(
        6, 768, 3072, 12, 12, 64, 30522, gated=False, shares_prefix=False, positions=512
    ),
    "distilbert/distilroberta-base": Shape(
        6, 768, 3072, 12, 12, 64, 50265, gated=False, shares_prefix=False, positions=515
    ),
    "FacebookAI/roberta-base": Shape(12, 768, 3072, 12, 12, 64, 50265, gated=False, shares_prefix=False, positions=515),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU type.

    Attributes:
        memory: GB (10^9 bytes).
        tflops: the maker's dense bf16 TFLOP/s.
        bandwidth: GB/s to and from memory.
        price: dollars per hour.
    """

    memory: int
    tflops: float
    bandwidth: float
    price: float

    @property
    def rate(self) -> float:
        """Estimated FLOP/s of training: the time to compute plus the time to move the operands."""
        return 1e12 / (1 / (EFFICIENCY * self.tflops) + 1e3 / (INTENSITY * self.bandwidth))


# Prices of the secure cloud on this date. They change; the catalog of the API has the current ones.
PRICES_OF = "March 2026"
GPUS = {
    "NVIDIA GeForce RTX 3090": Gpu(24, 71, 936, 0.46),
    "NVIDIA GeForce RTX 4090": Gpu(24, 165, 1008, 0.69),
    "NVIDIA L4": Gpu(24, 121, 300, 0.44),
    "NVIDIA A40": Gpu(48, 150, 696, 0.40),
    "NVIDIA RTX A6000": Gpu(48, 155, 768, 0.49),
    "NVIDIA L40S": Gpu(48, 362, 864, 0.86),
    "NVIDIA RTX 6000 Ada Generation": Gpu(48, 364, 960, 0.77),
    "NVIDIA A100 80GB PCIe": Gpu(80, 312, 1935, 1.39),
    "NVIDIA A100-SXM4-80GB": Gpu(80, 312, 2039, 1.49),
    "NVIDIA H100 PCIe": Gpu(80, 756, 2000, 2.39),
    "NVIDIA H100 80GB HBM3": Gpu(80, 989, 3350, 2.99),
}


@dataclass(frozen=True)
class Quote:
    """An offer of the catalog: dollars per hour, and the stock if the catalog names it (NONE, LOW, MEDIUM, HIGH)."""

    price: float
    stock: str | None = None


def shape_of(name: str) -> Shape:
    """The shape of a model: built in, or read from the config.json in its folder or in the Hub's cache.

    Raises:
        InputError: there is no config.json, or it lacks a value.
    """
    if name in SHAPES:
        return SHAPES[name]
    folder = paths.expand(name)
    if folder.is_dir():
        return _read_shape(folder / "config.json")
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        cached = None
    if isinstance(cached, str):
        return _read_shape(Path(cached))
    raise InputError(
        f"{name}: unknown model shape; put the model's config.json into a folder and set model_name_or_path=FOLDER. "
        f"Built in: {', '.join(SHAPES)}"
    )


def _read_shape(path: Path) -> Shape:
    """Read a shape from a config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        hidden = config.get("hidden_size") or config["dim"]
        heads = config.get("num_attention_heads") or config["n_heads"]
        encoder = config["model_type"] in ("bert", "roberta", "xlm-roberta", "distilbert")
        return Shape(
            layers=config.get("num_hidden_layers") or config["n_layers"],
            hidden=hidden,
            intermediate=config.get("intermediate_size") or config["hidden_dim"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", config["model_type"].startswith("gemma"))),
            gated=not encoder,
            shares_prefix=not encoder and not config.get("attn_logit_softcapping"),
            positions=config["max_position_embeddings"] if encoder else 0,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except KeyError as missing:
        raise InputError(f"{path}: has no key {missing}, which the estimate needs") from None
