"""Shared by the benchmarks: recipes, child processes, the processor's peak, necessary FLOPs, tables and JSON files."""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from emogen import paths
from emogen.distribution import __version__
from emogen.model.encode import Encoder
from emogen.model.shared_prefix import share_prefix
from emogen.task.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Instructions of 66 and 675 tokens of SmolLM2. The long one has twelve solved examples.
INSTRUCTIONS = {
    "short": ["prompt=prompts/list.jinja"],
    "long": ["prompt=prompts/few_shot.jinja", "examples=12"],
}
console = Console(stderr=True)

# ---------------------------------------------------------------------------------------------- settings


def speed_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of the two speed benchmarks. The hidden ones are for their child processes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, metavar="N", help="rows that each system is timed on (default: see ROWS)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each system (default 3)")
    parser.add_argument("--quick", action="store_true", help="one run of each system on fewer rows; a few minutes")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all measurements to FILE; an interrupted benchmark resumes"
    )
    parser.add_argument("--system", help=argparse.SUPPRESS)
    parser.add_argument("--instruction", default="short", help=argparse.SUPPRESS)
    parser.add_argument("--prefix", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser


def model_name(name: str) -> str:
    """A model's name on the Hub, or the absolute path of its folder: child processes run in another folder."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def benchmark_recipe(model: str, instruction: str, *overrides: str) -> Recipe:
    """The recipe of all systems: LoRA of rank 16 on all linear layers, the sample posts, no text shortened."""
    keys = [
        f"model_name_or_path={json.dumps(model)}",
        "train_file=sample/train.csv",
        "eval_fraction=0",
        "order=canonical",
        "max_length=null",
    ]
    return load_recipe(ROOT / "recipes" / "smollm2-135m.yaml", [*keys, *INSTRUCTIONS[instruction], *overrides])


def resize_instruction(encoder: Encoder, n_tokens: int) -> Encoder:
    """The encoder with an instruction of exactly `n_tokens`: its own, repeated or cut."""
    ids = encoder.prefix_ids
    return dataclasses.replace(encoder, prefix_ids=(ids * (n_tokens // len(ids) + 1))[:n_tokens])


def enable_shared_prefix(model: Any) -> None:
    """Switch the model to shared-prefix attention. Exits if its architecture does not support it."""
    if not share_prefix(model):
        sys.exit("This model cannot share the instruction between rows; there is nothing to compare.")


# ---------------------------------------------------------------------------------------------- child processes


def run_child(script: str, *args: str, python: str = sys.executable, timeout: float = 3600) -> dict[str, Any]:
    """Run `script args --out FILE` in a process of its own, with all cores.

    Returns:
        The JSON object that the script wrote to FILE.

    Raises:
        RuntimeError: the script failed. The message ends with its standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [python, script, *args, "--out", str(out)]
        env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode or not out.is_file():
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def write_result(path: Path, **result: Any) -> None:
    """Write the measurements of a child process, with the peak of its resident memory."""
    result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    paths.write_json(path, result)


def alternate(systems: Sequence[str], repeats: int, title: str) -> Iterator[str]:
    """The systems in turn, forwards and backwards, so that a change in the machine's speed favours none of them."""
    for k in range(repeats):
        for system in systems if k % 2 == 0 else systems[::-1]:
            console.print(f"  {title}: {system}, run {k + 1} of {repeats}")
            yield system


# ---------------------------------------------------------------------------------------------- the machine


@cache
def gemm_peak() -> float:
    """The peak rate of fp32 matrix products on this machine, in FLOP/s, with the faster of PyTorch's two libraries."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    products: list[Callable[[], Any]] = [lambda: a @ b.t()]
    if torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    best = min(seconds(product) for product in products for _ in range(8))
    return 2 * 2048**3 / best


def seconds(work: Callable[[], Any]) -> float:
    """The wall time of `work()`."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """The processor, the number of cores that this process may use, and their peak."""
    name = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": name or platform.processor(), "cores": len(os.sched_getaffinity(0)), "gemm_peak": gemm_peak()}


def versions(*names: str) -> dict[str, str]:
    """The versions of Python, of emogen and of the named packages."""
    own = {"python": platform.python_version(), "emogen": __version__}
    return own | {name: metadata.version(name) for name in names}


def is_installed(name: str) -> bool:
    """Whether a package is installed."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def necessary_flops(config: Any, n_prefix: float, n_rest: float, n_projected: float, *, train_rank: int = 0) -> float:
    """The FLOPs of a row that no implementation can avoid.

    Args:
        config: of a decoder such as Llama's.
        n_prefix: the row's share of the instruction, in tokens: its length over the number of rows that share it.
        n_rest: the row's other tokens.
        n_projected: the row's tokens that are projected onto the vocabulary.
        train_rank: the rank of LoRA on all linear layers, for a forward and a backward pass; 0 for a forward pass only.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    shapes = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    weights = layers * sum(i * o for i, o in shapes)
    lora = layers * sum(train_rank * (i + o) for i, o in shapes)
    passes = 2 if train_rank else 1  # backward: the gradient of the inputs; frozen weights need none
    tokens = n_prefix + n_rest
    return 2 * passes * (weights * tokens + config.vocab_size * hidden * n_projected) + 6 * lora * tokens


# ---------------------------------------------------------------------------------------------- results


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    """The median of one measurement over several runs."""
    return statistics.median(run[key] for run in runs)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, and the command that made it, to standard output. The first column is aligned left."""
    command = shlex.join(["python", *sys.argv])
    table = Table(title=title, title_justify="left", caption=command, caption_justify="left")
    for k, name in enumerate(header):
        table.add_column(name, justify="left" if k == 0 else "right")
    for row in rows:
        table.add_row(*row)
    out = Console()
    (out if out.is_terminal else Console(width=160)).print(table)  # in a file, lines need not fit into 80 columns


def start_or_resume(path: Path | None, **settings: Any) -> dict[str, Any]:
    """The result to fill in: that of an interrupted benchmark in `path`, or a new one.

    A benchmark resumes only with the same settings on the same kind of processor.
    """
    here = machine()
    if path and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before.get(key) == value for key, value in settings.items())
        if same and before["machine"]["cpu"] == here["cpu"] and "growth" not in before:
            console.print(f"Resuming from {path}, which has: {', '.join(before['runs'])}")
            return before
    return {**settings, "machine": here, "runs": {}, "ratio": {}}


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write the result to a file, if there is one."""
    if path:
        paths.write_json(path, result)
