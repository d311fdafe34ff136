"""The page of rows × templates in Chromium: the time to open it, and the time of its filters.

    python benchmarks/grid_page.py [--rows 2000] [--templates 8] [--repeats 5] [--json FILE]

The texts are the sample posts, again and again; the answers and probabilities are drawn at random. The times are those
of the processor in the page's main thread (script, style, layout), until what it shows is painted: they hardly depend
on what else the machine does.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, machine, print_table, versions, write_json

from emogen.experiments import grid
from emogen.experiments.prompts import PromptBenchmark
from emogen.experiments.scores import KeptScores, RowScore, row_keys
from emogen.task.answer import answer_text
from emogen.task.recipe import load_recipe
from emogen.task.rows import Rows
from emogen.task.task import load_task_with_rows

CHROMIUM = "/usr/bin/chromium"
CHANGES = {  # [element, value]
    "wrong in A, right in B": ["relation", "ab"],
    "A and B differ": ["relation", "differ"],
    "any two templates differ": ["relation", "any"],
    "a label": ["label", "4"],
    "a word": ["search", "the"],
    "order by errors": ["sort", "errors"],
    "nested thresholds": ["decision", "nested thresholds"],
}
CHANGE = """async ([id, value]) => {
  const element = document.getElementById(id);
  element.value = value;
  element.dispatchEvent(new Event("input", { bubbles: true }));
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
}"""
PAINTED = "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"


def make_page(folder: Path, n_rows: int, n_templates: int) -> Path:
    """Write a page with random answers into a folder."""
    task, splits, _ = load_task_with_rows(load_recipe(ROOT / "recipes" / "demo.yaml"))
    sample, label_set = splits.train, task.label_set
    index = np.arange(n_rows) % len(sample)
    texts = [f"{sample.texts[i]} {k}" for k, i in enumerate(index)]
    rows = Rows("posts.csv", [str(k) for k in range(n_rows)], texts, sample.truth[index], list(range(n_rows)))
    benchmark = PromptBenchmark(task, rows, None, None, folder, folder / "store", ROOT / "recipes" / "demo.yaml", ())
    rng = np.random.default_rng(0)
    for k in range(n_templates):
        store = benchmark.store / f"template{k}-{k:08x}"
        store.mkdir(parents=True)
        (store / "prompt.jinja").write_text("{% user %}\n{{ text }}\n", encoding="utf-8")
        prob = np.clip(rows.truth * 0.5 + rng.random(rows.truth.shape) * 0.6, 0, 1)
        raws = [answer_text(label_set.names_of(row), label_set, "list") for row in (prob > 0.5).astype(int)]
        KeptScores(store).write(
            [
                RowScore(key, raw, 0, row_prob, -1.0, 0.1)
                for key, raw, row_prob in zip(row_keys(rows), raws, prob.tolist(), strict=True)
            ]
        )
    page = folder / grid.PAGE
    page.write_text(grid.render(benchmark, grid.GrowingGrid(benchmark).news({})), encoding="utf-8")
    return page


def measure(browser: Any, page_file: Path, repeats: int) -> dict[str, list[float]]:
    """Open a page and use its filters: the milliseconds of each."""
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        page = browser.new_page()
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def taken(session: Any = session) -> float:
            metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
            return float(metrics["TaskDuration"] * 1000)

        page.goto(f"file://{page_file}")
        page.evaluate(PAINTED)
        found.setdefault("open", []).append(taken())
        for name, change in CHANGES.items():
            started = taken()
            page.evaluate(CHANGE, change)
            found.setdefault(name, []).append(taken() - started)
            page.reload()
            page.evaluate(PAINTED)
        page.close()
    return found


def main(argv: list[str] | None = None, browser: Any = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, metavar="N")
    parser.add_argument("--templates", type=int, default=8, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    args = parser.parse_args(argv)
    if browser is None:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM) as browser:
            main(argv, browser)
        return
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        page = make_page(Path(folder), args.rows, args.templates)
        made, n_bytes = time.perf_counter() - started, page.stat().st_size
        found = measure(browser, page, args.repeats)
    title = f"{args.rows:,} rows × {args.templates} templates, {n_bytes / 1e6:.1f} MB, Chromium {browser.version}"
    lines = [[name, f"{statistics.median(times):.0f}", f"{max(times):.0f}"] for name, times in found.items()]
    print_table(title, ["", "median, ms", "slowest, ms"], lines)
    if args.json:
        sizes = {"rows": args.rows, "templates": args.templates, "bytes": n_bytes, "seconds_to_make": made}
        write_json(
            args.json,
            sizes | {"browser": browser.version, "machine": machine(), "versions": versions(), "milliseconds": found},
        )


if __name__ == "__main__":
    main()
