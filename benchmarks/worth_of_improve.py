"""What `emogen prompts improve` is worth: what it finds beside the shipped templates, on rows that it never saw.

    python benchmarks/worth_of_improve.py [RECIPE] [KEY=VALUE ...] [--limit N] [--minutes N] [--json FILE]

The search starts from prompts/improve.jinja. The best shipped template is chosen on the unseen rows themselves, so the
difference to it favours the shipped ones. The same command goes on from where it was stopped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine, print_table, versions, write_json

from emogen.console import progress_bar
from emogen.evaluation.results import read_scored
from emogen.experiments.improve import improve
from emogen.experiments.prompts import load_generator, open_benchmark, prepare
from emogen.experiments.scores import score_template
from emogen.report.compare import System, compare, with_interval
from emogen.task.prompt import load_prompt

SHIPPED = ("list", "definitions", "few_shot", "json", "count", "yes_no")


def main(argv: Sequence[str] | None = None) -> None:
    """Search, score, and print the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/demo.yaml", help="default: recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="rows of the search (default: 200)")
    parser.add_argument("--minutes", type=float, metavar="N", help="end the search after this time")
    parser.add_argument("--shipped", nargs="+", choices=SHIPPED, default=SHIPPED, help=f"default: {' '.join(SHIPPED)}")
    parser.add_argument("--by", choices=("thresholds", "answer"), default="thresholds", help="how labels are decided")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    args = parser.parse_args(argv)
    options: dict[str, Any] = {"limit": args.limit, "minutes": args.minutes, "by": args.by, "bar": progress_bar}
    found = improve(args.recipe, "prompts/improve.jinja", args.overrides, **options)
    result: dict[str, Any] = {
        "recipe": args.recipe,
        "overrides": args.overrides,
        "search rows": found.n_rows,
        "candidates": len(found.tried),
        "best": found.best,
        "stopped": found.stopped,
        "versions": versions("torch", "transformers"),
        "machine": machine(),
    }
    if found.unseen:
        names = ["the start", "found", *args.shipped]
        folders = [
            *found.unseen_folders,
            *score_shipped(args.recipe, args.overrides, args.shipped, found.unseen_folders),
        ]
        label_set = open_benchmark(args.recipe, args.overrides).task.label_set
        by_name = dict(zip(names, folders, strict=True))
        f1 = {name: system.metrics["f1_macro"] for name, system in _systems(by_name, label_set, args.by).items()}
        best = max(args.shipped, key=f1.__getitem__)
        systems = _systems({best: by_name.pop(best), **by_name}, label_set, args.by)
        result |= {"rows": systems[best].metrics["n"], "best shipped": best}
        result["systems"] = {name: _summary(system) for name, system in systems.items()}
        rows = [[name, *_cells(system, is_first=name == best)] for name, system in systems.items()]
        title = f"{result['rows']:,} rows that the search never saw. Found: {found.best}"
        print_table(title, ["prompt", "macro-F1, 95 %", "to the best shipped"], rows)
    else:
        print("Nothing better than the start was found.")
    write_json(args.json, result)


def score_shipped(recipe: str, overrides: Sequence[str], names: Sequence[str], like: Sequence[Path]) -> list[Path]:
    """Score shipped templates with the untuned model on the rows of another score; returns their folders."""
    folders: list[Path] = []
    generator = None
    for name in names:
        own = [*overrides, *(["examples=4"] if name == "few_shot" else [])]
        benchmark = open_benchmark(recipe, own, limit=10**9)
        ids = set(read_scored(like[0], benchmark.task.label_set).ids)
        benchmark = benchmark.on(benchmark.rows.take([i for i, row in enumerate(benchmark.rows.ids) if row in ids]))
        template = prepare(benchmark, load_prompt(f"prompts/{name}.jinja"))
        if not template.done:
            generator = generator or load_generator(benchmark)
        score_template(benchmark, template, generator, progress_bar)
        folders.append(template.folder)
    return folders


def _systems(folders: dict[str, Path], label_set: Any, by: str) -> dict[str, System]:
    return dict(zip(folders, compare(list(folders.values()), label_set, by=by), strict=True))


def _summary(system: System) -> dict[str, Any]:
    return {
        "f1_macro": system.metrics["f1_macro"],
        "interval": system.interval,
        "difference": system.difference,
        "difference_interval": system.difference_interval,
    }


def _cells(system: System, *, is_first: bool) -> list[str]:
    difference = "" if is_first else with_interval(system.difference, system.difference_interval, "+z")
    return [with_interval(system.metrics["f1_macro"], system.interval), difference]


if __name__ == "__main__":
    main()
