"""Micro-F1 where it is what thresholds are chosen for: one for all labels, on several runs stacked.

    python benchmarks/micro.py runs/A runs/B ... [--json FILE]

The runs are cross-validations or baselines on the same folds. For each fold the regressions and the threshold come from
the other folds alone, the threshold from what regressions without each of those in turn say of it.
"""

import argparse
from pathlib import Path

import numpy as np
from common import versions, write_json

from emogen.evaluation import results
from emogen.evaluation.metrics import apply_thresholds, bootstrap, interval, score
from emogen.evaluation.run_folder import label_set_of
from emogen.evaluation.stack import nested_stack
from emogen.report.compare import names_of

GRID = np.arange(0.2, 0.55, 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    label_set = label_set_of(args.runs[0])
    scored = results.aligned([results.read_scored(run, label_set) for run in args.runs])
    gold, folds, probs = scored[0].gold, scored[0].folds, np.stack([of.prob for of in scored])
    thresholds: list[float] = []  # of each fold

    def common_threshold(gold: np.ndarray, prob: np.ndarray) -> np.ndarray:
        f1 = [score(gold, apply_thresholds(prob, t), label_set.names)["f1_micro"] for t in GRID]
        thresholds.append(round(float(GRID[np.argmax(f1)]), 2))
        return np.full(len(label_set), thresholds[-1])

    pred = nested_stack(gold, probs, folds, common_threshold)
    metrics = score(gold, pred, label_set.names)
    (resampled,) = bootstrap(gold, [pred], label_set.names)
    low, high = interval(resampled["f1_micro"])
    print(", ".join(names_of(args.runs)))
    print(f"micro-F1 {metrics['f1_micro']:.3f} ({low:.3f} to {high:.3f}), macro-F1 {metrics['f1_macro']:.3f}")
    print(f"{metrics['n']:,} rows, thresholds {', '.join(f'{t:.2f}' for t in thresholds)}")
    if args.json:
        runs = {"runs": names_of(args.runs), "thresholds": thresholds, "interval_micro": [low, high]}
        write_json(args.json, runs | {"metrics": metrics, "versions": versions()})


if __name__ == "__main__":
    main()
