"""The time of the commands that people wait for while they write a prompt: none of them runs a model.

    python benchmarks/startup.py [--repeats 5] [--recipe recipes/demo.yaml] [--only COMMAND...] [--json FILE]

Each command runs in a process of its own. Its first time is with an empty cache of what emogen remembers between
commands (the model is downloaded before); the other one is the median of the repetitions after it. `compare` compares
two baselines, and `prompts compare` looks up two templates that have been scored.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import ROOT, machine, print_table, versions, write_json

from emogen import paths
from emogen.model.sources import locate
from emogen.task.recipe import load_recipe

TEMPLATES = ("prompts/list.jinja", "prompts/definitions.jinja")


def commands(recipe: str) -> dict[str, list[str]]:
    """The commands that are timed, by their names."""
    compared = ["prompts", "compare", recipe, *TEMPLATES, "--limit", "20"]
    return {
        "--version": ["--version"],
        "keys": ["keys"],
        "check": ["check", recipe],
        "show": ["show", recipe],
        "prompts show": ["prompts", "show", recipe, *TEMPLATES],
        "plan": ["plan", recipe],
        "score": ["score", "sample/train.csv", "sample/train.csv"],
        "compare": ["compare", "runs/baseline", "runs/baseline"],
        "prompts compare": compared,
    }


def run(words: Sequence[str], folder: Path, cache: Path) -> float:
    """Run `emogen` in a folder; returns its wall time in seconds.

    Raises:
        RuntimeError: it failed. The message ends with its output.
    """
    command = [sys.executable, "-m", "emogen.cli.__main__", *words]
    started = time.perf_counter()
    env = os.environ | {"EMOGEN_CACHE": str(cache)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"emogen {' '.join(words)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return taken


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/demo.yaml", help="the recipe (default: recipes/demo.yaml)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each command (default 5)")
    parser.add_argument("--only", nargs="+", choices=commands(""), metavar="COMMAND", help="time these commands only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to FILE")
    args = parser.parse_args(argv)
    recipe = str(paths.find(args.recipe).resolve())
    result = {"machine": machine(), "versions": versions("transformers", "trl", "torch"), "seconds": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch), Path(scratch) / "cache"
        cache.mkdir()
        model = Path(locate(load_recipe(recipe).model_name))
        if model.parent == paths.cache_dir():  # what is downloaded stays
            (cache / model.name).symlink_to(model)
        (folder / "sample").symlink_to(ROOT / "sample")
        chosen = {name: words for name, words in commands(recipe).items() if name in (args.only or commands(recipe))}
        if "compare" in chosen:
            run(["baseline", recipe, "output_dir=runs/baseline"], folder, cache)
        if "prompts compare" in chosen:
            run(chosen["prompts compare"], folder, cache)
        for name, words in chosen.items():
            for kept in cache.iterdir():
                if kept.name != model.name:
                    kept.rename(Path(scratch) / f"before {name} {kept.name}")
            first = run(words, folder, cache)
            again = [run(words, folder, cache) for _ in range(args.repeats)]
            result["seconds"][name] = {"first": first, "median": statistics.median(again), "all": again}
    write_json(args.json, result)
    rows = [[f"emogen {name}", f"{s['first']:.2f}", f"{s['median']:.2f}"] for name, s in result["seconds"].items()]
    print_table("Seconds of a command", ["command", "first", "median after"], rows)


if __name__ == "__main__":
    main()
