"""What the speed benchmarks share: a process for each run, the machine's peak, useful work, tables, and JSON."""

import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The rows are those of the sample. A short instruction of 66 tokens, and a long one of 599: twelve solved examples.
INSTRUCTIONS = {
    "short": ["prompt=prompts/list.jinja"],
    "long": ["prompt=prompts/few_shot.jinja", "examples=12", "max_length=1024"],
}
console = Console(stderr=True)


def recipe_of(instruction: str, *overrides: str) -> Any:
    """The recipe that all systems follow: SmolLM2-135M, LoRA r 16 on all linear layers, the sample posts."""
    from emogen.task.recipe import load_recipe

    keys = ["train_file=sample/train.csv", "eval_fraction=0", *INSTRUCTIONS[instruction], *overrides]
    return load_recipe(ROOT / "recipes" / "smollm2-135m.yaml", keys)


# ---------------------------------------------------------------------------------------------- one run, one process


def run_child(script: str, *args: str, python: str = sys.executable, timeout: float = 3600) -> dict[str, Any]:
    """Run `script args` in a process of its own, and read the JSON that it leaves. All cores are its."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [python, script, *args, "--out", str(out)]
        env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode or not out.is_file():
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def write_result(path: str, **result: Any) -> None:
    """What a child leaves: its measurements, with its peak of resident memory."""
    result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    Path(path).write_text(json.dumps(result), encoding="utf-8")


def environment(name: str, *requirements: str) -> str:
    """The Python of an environment of its own, `.venv-<name>`, made on first use."""
    folder = ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        console.print(f"Installing {', '.join(requirements)} into {folder.name} (once)")
        venv.create(folder, with_pip=True, clear=True)
        for requirement in requirements:
            subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
        (folder / "installed").touch()
    return str(python)


# ---------------------------------------------------------------------------------------------- the machine


def gemm_peak() -> float:
    """The most FLOP/s that this machine reaches at fp32 matrix products, by the better of torch's two libraries."""
    import torch

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    products: list[Callable[[], Any]] = [lambda: a @ b.t()]
    if torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    best = min(seconds(product) for product in products for _ in range(8))
    return 2 * 2048**3 / best


def seconds(work: Callable[[], Any]) -> float:
    """How long a piece of work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": model or platform.processor(), "cores": len(os.sched_getaffinity(0)), "gemm_peak": gemm_peak()}


def versions(*names: str) -> dict[str, str]:
    """The installed versions of packages, and Python's."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def useful_flops(config: Any, n_prefix: float, n_rest: float, n_projected: float, *, train_rank: int = 0) -> float:
    """The FLOPs of a row that nobody can avoid.

    Args:
        n_prefix: the row's share of the prefix, in tokens: its length over the rows that it is computed once for.
        n_rest: how many other tokens the row has.
        n_projected: how many of its tokens are projected onto the vocabulary.
        train_rank: of LoRA on all linear layers, with forward and backward pass; or 0, forward alone.
    """
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    shapes = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    weights = layers * sum(i * o for i, o in shapes)
    lora = layers * sum(train_rank * (i + o) for i, o in shapes)
    passes = 2 if train_rank else 1  # the gradient of the inputs; frozen weights have none
    tokens = n_prefix + n_rest
    return 2 * passes * (weights * tokens + config.vocab_size * hidden * n_projected) + 6 * lora * tokens


# ---------------------------------------------------------------------------------------------- results


def alternate(systems: Sequence[str], repeats: int, title: str) -> Iterator[str]:
    """The systems in turn, forwards and backwards, so that a machine that warms up or tires favours none."""
    for k in range(repeats):
        for system in systems if k % 2 == 0 else systems[::-1]:
            console.print(f"  {title}: {system}, run {k + 1} of {repeats}")
            yield system


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for k, name in enumerate(header):
        table.add_column(name, justify="left" if k == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def begin(path: str | None, quick: bool, **settings: Any) -> dict[str, Any]:
    """The result to fill: what a run that was cut short left in `path`, if it was of the same settings and machine."""
    here = machine()
    result = {**settings, "machine": here, "runs": {}, "ratio": {}}
    with contextlib.suppress(OSError, ValueError):
        left = json.loads(Path(path or "").read_text(encoding="utf-8"))
        same = all(left.get(key) == value for key, value in settings.items())
        if same and left["machine"]["cpu"] == here["cpu"] and "growth" not in left and not quick:
            console.print(f"Going on from {path}: {', '.join(left['runs'])} are measured")
            return left
    return result


def write_json(path: str | None, result: dict[str, Any]) -> None:
    if path:
        from emogen import paths

        with paths.writing(Path(path)) as file:
            json.dump(result, file, indent=1)
