"""Micro-F1 of several stacked runs, with one threshold for all labels that is chosen for micro-F1.

    python benchmarks/micro.py RUN RUN ... [--json FILE]

The runs are cross-validations or baselines on the same folds. The regressions and the threshold of a fold come from the
other folds only. The threshold is chosen on probabilities of regressions that did not see the row either.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import print_table, versions, write_json

from emogen.evaluation.metrics import apply_thresholds, bootstrap, interval, score
from emogen.evaluation.results import align_scored, read_scored
from emogen.evaluation.run_folder import label_set_of
from emogen.evaluation.stack import nested_stack
from emogen.report.compare import names_of

GRID = np.arange(0.2, 0.55, 0.01)


def main(argv: Sequence[str] | None = None) -> None:
    """Stack the runs and print micro-F1, macro-F1 and the threshold of each fold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a cross-validation or a baseline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all metrics to FILE")
    args = parser.parse_args(argv)
    label_set, names = label_set_of(args.runs[0]), names_of(args.runs)
    systems = align_scored([read_scored(run, label_set) for run in args.runs])
    gold, folds, probs = systems[0].gold, systems[0].folds, np.stack([system.prob for system in systems])
    thresholds: list[float] = []  # of each fold

    def common_threshold(gold: np.ndarray, prob: np.ndarray) -> np.ndarray:
        preds = [apply_thresholds(prob, np.full(len(label_set), threshold)) for threshold in GRID]
        f1 = [score(gold, pred, label_set.names)["f1_micro"] for pred in preds]
        thresholds.append(round(float(GRID[np.argmax(f1)]), 2))
        return np.full(len(label_set), thresholds[-1])

    pred = nested_stack(gold, probs, folds, common_threshold)
    metrics = score(gold, pred, label_set.names)
    (resampled,) = bootstrap(gold, [pred], label_set.names)
    low, high = interval(resampled["f1_micro"])
    print_table(
        f"Stack of {', '.join(names)}; {metrics['n']:,} rows",
        ["micro-F1", "95 %", "macro-F1", "threshold of each fold"],
        [
            [
                f"{metrics['f1_micro']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{metrics['f1_macro']:.3f}",
                " ".join(f"{threshold:.2f}" for threshold in thresholds),
            ]
        ],
    )
    result = {"runs": names, "thresholds": thresholds, "interval_micro": [low, high], "metrics": metrics}
    write_json(args.json, result | {"versions": versions()})


if __name__ == "__main__":
    main()
