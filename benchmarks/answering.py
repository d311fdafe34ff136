"""CPU time of answers, and of answers with probabilities: in one pass with packed weights, or as it was before.

    python benchmarks/answering.py RUN_DIR [FILE] [--rows N] [--batches 1 8 32] [--threads 1] [--json FILE]

Everything is measured in one process by its own CPU time, on one core unless --threads says otherwise, so that other
programs on the machine change it little. The rows are the last ones of FILE, by default of the sample posts. "Before"
is emogen 0.1: a pass for the answers, another one for the probabilities, and weights that are not packed.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, machine, print_table, versions, write_json

from emogen.model.decode import generate
from emogen.model.onednn import pack_weights
from emogen.model.probabilities import generate_with_probabilities, probabilities
from emogen.prediction.ensemble import load_run
from emogen.task.readers import read_rows
from emogen.task.rows import checked

Work = Callable[[Sequence[list[int]]], Any]


def cpu_seconds(work: Work, batches: Sequence[Sequence[list[int]]]) -> tuple[float, list[Any]]:
    """The CPU time of this process for all batches, and their results."""
    started = time.process_time()
    results = [work(batch) for batch in batches]
    return time.process_time() - started, results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the folder of a run that generates lists")
    parser.add_argument("file", type=Path, nargs="?", default=ROOT / "sample" / "test.csv", metavar="FILE")
    parser.add_argument("--rows", type=int, default=96, metavar="N", help="texts (default 96)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="texts of a batch")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="cores (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to FILE")
    args = parser.parse_args(argv)
    classifier: Any = load_run(args.run)
    torch.set_num_threads(args.threads)
    model, encoder, kept = classifier.model, classifier.encoder, classifier.kept
    texts = checked(read_rows(str(args.file), classifier.label_set)).texts[-args.rows :]
    suffixes = [encoder.rows(text)[0].suffix_ids for text in texts]

    def answers(batch: Sequence[list[int]]) -> Any:
        return generate(model, encoder, batch, batch_size=len(batch), kept=kept)

    def two_passes(batch: Sequence[list[int]]) -> Any:
        return answers(batch), probabilities(model, encoder, batch, batch_size=len(batch), kept=kept)[:, 0]

    def one_pass(batch: Sequence[list[int]]) -> Any:
        return generate_with_probabilities(model, encoder, batch, batch_size=len(batch), kept=kept)

    ways: dict[str, tuple[bool, Work]] = {  # whether the weights are packed
        "answers, before": (False, answers),
        "answers": (True, answers),
        "with probabilities, before": (False, two_passes),
        "with probabilities": (True, one_pass),
    }
    two_passes(sorted(suffixes, key=len)[-2:])  # rows of the greatest length are tried before any time is taken
    result: dict[str, Any] = {"machine": machine(), "versions": versions("torch", "transformers")}
    result |= {"rows": len(texts), "threads": args.threads, "runs": {}}
    table = []
    for size in args.batches:
        batches = [suffixes[start : start + size] for start in range(0, len(suffixes), size)]
        rates, found = {}, {}
        for name, (packed, work) in ways.items():
            for module in model.modules():
                module.__dict__.pop("packed", None)
            if packed:
                pack_weights(model)
            taken, found[name] = cpu_seconds(work, batches)
            rates[name] = len(texts) / taken
        before, now = found["with probabilities, before"], found["with probabilities"]
        same = sum(
            a == b for one, other in zip(before, now, strict=True) for a, b in zip(one[0], other[0], strict=True)
        )
        change = max(float(np.abs(one[1] - other[1]).max()) for one, other in zip(before, now, strict=True))
        result["runs"][str(size)] = {"texts_per_cpu_second": rates, "same_answers": same, "largest_change": change}
        write_json(args.json, result)
        gains = [f"{rates[name] / rates[f'{name}, before']:.2f}×" for name in ("answers", "with probabilities")]
        equal = [f"{same} of {len(texts)}", f"{change:.0e}"]
        table.append([str(size), *(f"{rate:.2f}" for rate in rates.values()), *gains, *equal])
    header = ["batch", *ways, "answers", "with probabilities", "same answers", "largest change"]
    print_table(f"Texts per CPU second, {args.threads} thread(s)", header, table)


if __name__ == "__main__":
    main()
