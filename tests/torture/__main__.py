"""Run the campaign; see the package."""

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from torture import damage, inputs, kills

# Loaded once, for all forks; a fork that has to load them itself takes twice as long.
for _module in (
    "emogen.cli.__main__", "emogen.experiments.crossval", "emogen.experiments.prompts", "emogen.experiments.sweep",
    "emogen.prediction.files", "emogen.report.page", "emogen.training.head", "emogen.training.sft", "emogen.worker",
    "iterstrat.ml_stratifiers", "matplotlib.pyplot", "optuna", "optuna.storages", "sklearn.linear_model", "sqlalchemy",
    "transformers.models.llama.modeling_llama",
):  # fmt: skip
    import_module(_module)

# Each campaign with the number of its cases: a case -> problems.
CAMPAIGNS: dict[str, tuple[int, Callable[[int, Path], list[str]]]] = {
    **{f"kill {name}": (n, partial(kills.killed, name)) for name, n in (("train", 100), ("cv", 100), ("predict", 100), ("sweep", 20), ("prompts", 20), ("report", 20))},
    **{f"pair {name}": (n, partial(kills.pair, name)) for name, n in (("train", 20), ("predict", 20), ("cv", 10), ("prompts", 10))},
    "full disk": (20, kills.full_disk),
    "damaged run": (500, damage.damaged_run),
    "damaged checkpoint": (50, damage.damaged_checkpoint),
    "pickle": (2 * len(damage.PICKLES), damage.pickled),
    "other base model": (5, damage.other_base),
    **{f"mutated {kind}": (n, partial(inputs.mutated, kind)) for kind, n in (("recipe", 3000), ("labels", 2000), ("template", 2000), ("data", 4000))},
    "hostile template": (128, inputs.hostile),
    "text": (3000, inputs.text),
}  # fmt: skip


def case(job: tuple[str, int, Path]) -> dict:
    """Run one case in a process that forks."""
    name, number, scratch = job
    started = time.monotonic()
    try:
        problems = CAMPAIGNS[name][1](number, scratch)
    except Exception as error:
        problems = [f"the campaign itself failed: {error!r}"]
    return {"campaign": name, "case": number, "problems": problems, "seconds": round(time.monotonic() - started, 2)}


def main(argv: list[str] | None = None) -> int:
    """Run what is not done yet; print a table. Returns the number of cases with problems."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("folder", type=Path, help="where cases and results are kept")
    parser.add_argument(
        "--cases", default="", help='numbers of cases, such as "kill train=10,pair cv=2"; 0 leaves one out'
    )
    parser.add_argument("--all", type=int, help="the number of cases of every campaign that --cases does not name")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    args = parser.parse_args(argv)
    scratch = args.folder.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    counts = {name: (n if args.all is None else min(n, args.all)) for name, (n, _) in CAMPAIGNS.items()}
    counts |= {name: int(n) for name, _, n in (part.partition("=") for part in args.cases.split(",") if part)}
    if not kills.can_mount():
        print("full disk: left out; it needs the right to mount", file=sys.stderr)
        counts["full disk"] = 0
    log = scratch / "results.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    finished = {(entry["campaign"], entry["case"]) for entry in done}
    for name in ("train", "predict", "cv", "sweep", "prompts", "report"):
        if any(counts.get(f"{what} {name}") for what in ("kill", "pair")) or name in ("train", "predict"):
            kills.reference(name, scratch)  # before the workers are forked, so that they share it
    todo = [(name, k, scratch) for name, n in counts.items() for k in range(n) if (name, k) not in finished]
    random.Random(0).shuffle(todo)  # so that a campaign that is stopped has something of everything
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=200) as pool, log.open("a") as file:
        for entry in pool.imap_unordered(case, todo):
            done.append(entry)
            file.write(json.dumps(entry) + "\n")
            file.flush()
            for problem in entry["problems"]:
                print(f"{entry['campaign']} {entry['case']}: {problem}", file=sys.stderr, flush=True)
    return table(done)


def table(done: list[dict]) -> int:
    """Print the cases and their problems by campaign."""
    cases, bad, seconds = Counter(), Counter(), defaultdict(float)
    for entry in done:
        cases[entry["campaign"]] += 1
        bad[entry["campaign"]] += bool(entry["problems"])
        seconds[entry["campaign"]] += entry["seconds"]
    print("| campaign | cases | with a problem | seconds a case |\n|---|---:|---:|---:|")
    for name in CAMPAIGNS:
        if cases[name]:
            print(f"| {name} | {cases[name]:,} | {bad[name]} | {seconds[name] / cases[name]:.2f} |")
    print(f"| all | {sum(cases.values()):,} | {sum(bad.values())} | |")
    return sum(bad.values())


if __name__ == "__main__":
    sys.exit(bool(main()))
