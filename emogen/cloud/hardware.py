"""The sizes of models and of GPUs, and what GPUs cost."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emogen.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, as its config names them. `gated`: three matrices in an MLP, not two; `shares`: its rows
    can share their instruction; `positions`: learnt position (and type) embeddings."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = True
    gated: bool = True
    shares: bool = True
    positions: int = 0

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block: name -> width in, width out."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block = {"q_proj": (self.hidden, q), "k_proj": (self.hidden, kv), "v_proj": (self.hidden, kv)}
        block |= {"o_proj": (q, self.hidden), "up_proj": (self.hidden, self.intermediate)}
        if self.gated:
            block["gate_proj"] = (self.hidden, self.intermediate)
        return block | {"down_proj": (self.intermediate, self.hidden)}

    @property
    def linear(self) -> int:
        """Parameters of all linear layers but the head: what NF4 quantises."""
        return self.layers * sum(wide * out for wide, out in self.modules.values())

    def embeddings(self, *, with_head: bool) -> int:
        """Parameters of the embeddings, and of the head where it has weights of its own."""
        tables = self.vocab + self.positions + (self.vocab if with_head and not self.tied else 0)
        return tables * self.hidden

    def lora(self, r: int, targets: str | Sequence[str] | None) -> int:
        """Parameters of a LoRA adapter of rank r on the layers that are named, or on all linear ones."""
        named = self.modules.items()
        if not isinstance(targets, str | None):
            named = {name: widths for name, widths in named if name in targets}.items()
        return r * self.layers * sum(wide + out for _, (wide, out) in named)


# The models that recipes name. Any other is read from its config.json: in its folder, or in the Hub's cache.
SHAPES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Shape(30, 576, 1536, 9, 3, 64, 49152),
    "google/gemma-2-2b": Shape(26, 2304, 9216, 8, 4, 256, 256000, shares=False),
    "google/gemma-3-270m": Shape(18, 640, 2048, 4, 1, 256, 262144),
    "meta-llama/Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "meta-llama/Llama-3.2-3B-Instruct": Shape(28, 3072, 8192, 24, 8, 128, 128256),
    "Qwen/Qwen2.5-1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151936),
    "Qwen/Qwen2.5-14B-Instruct": Shape(48, 5120, 13824, 40, 8, 128, 152064, tied=False),
    "NovaSearch/stella_en_1.5B_v5": Shape(28, 1536, 8960, 12, 2, 128, 151646, tied=False),
    "sentence-transformers/all-MiniLM-L6-v2": Shape(
        6, 384, 1536, 12, 12, 32, 30522, gated=False, shares=False, positions=514
    ),
    "distilbert/distilbert-base-uncased": Shape(
        6, 768, 3072, 12, 12, 64, 30522, gated=False, shares=False, positions=512
    ),
    "distilbert/distilroberta-base": Shape(6, 768, 3072, 12, 12, 64, 50265, gated=False, shares=False, positions=515),
    "FacebookAI/roberta-base": Shape(12, 768, 3072, 12, 12, 64, 50265, gated=False, shares=False, positions=515),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU type by Runpod's id: memory in GB (10^9 bytes), its makers' dense bf16 TFLOP/s and GB/s to and from memory,
    dollars an hour."""

    memory: int
    tflops: float
    bandwidth: float
    price: float

    @property
    def rate(self) -> float:
        """FLOP/s of training, estimated: the time to compute, and the time to move what is computed with."""
        return 1e12 / (1 / (EFFICIENCY * self.tflops) + 1e3 / (INTENSITY * self.bandwidth))


# Prices of the secure cloud, remembered: they move, and the catalog has those of today.
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


CPU = "this machine's CPU"  # where runs without a GPU were measured


# Estimates, until a run of the same model has been measured.
EFFICIENCY = 0.4  # of a GPU's peak, while it computes
INTENSITY = 150  # operations for a byte that is moved: every batch unpacks NF4 weights anew, and norms reread rows


@dataclass(frozen=True)
class Quote:
    """What the catalog says of a GPU type: dollars an hour, and how much stock there is, if it says so."""

    price: float
    stock: str | None = None


def shape_of(name: str) -> Shape:
    """The shape of a model: a built-in one, or from the config.json in its folder or in the Hub's cache.

    Raises:
        InputError: neither is there, or the config does not say.
    """
    if name in SHAPES:
        return SHAPES[name]
    folder = Path(name).expanduser()
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
        f"{name}: its shape is not known here; put its config.json into a folder and name that "
        f"(model_name_or_path=FOLDER). Built in: {', '.join(SHAPES)}"
    )


def _read_shape(path: Path) -> Shape:
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
            shares=not encoder and not config.get("attn_logit_softcapping"),
            positions=config["max_position_embeddings"] if encoder else 0,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except KeyError as missing:
        raise InputError(f"{path}: says nothing of {missing}, which the estimate needs") from None
