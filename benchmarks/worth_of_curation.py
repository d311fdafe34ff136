"""What `emogen audit` and `emogen select` are worth, with TF-IDF and logistic regression as the model.

    python benchmarks/worth_of_curation.py FILE [--labels NAME] [--seeds N] [--parts flips prune ...] [--json FILE]

flips: 5 % of all labels are turned round at random. Of the labels with the lowest quality, a share of 5 %, how many are
turned ones, compared with chance?

prune: does a model become better without the 2 % of the training rows that look worst? Five folds; the quality of a
row comes from models that saw neither it nor the held-out fold. Without as many rows at random, for comparison.

select: a fifth of the rows is held out. The model starts with 100 labelled rows and gets 100 more, five times: those
that `select` chooses, or random ones. Macro-F1 by thresholds that are tuned on the labelled rows. Each seed has its own
start.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import print_table, versions, write_json

from emogen.curation.audit import find_issues
from emogen.curation.selection import choose, worth
from emogen.evaluation.metrics import apply_thresholds, bootstrap, interval, nested_pred, score, tune_thresholds
from emogen.prediction.baseline import cross_fit_baseline, fit_baseline
from emogen.task.labels import load_label_set
from emogen.task.readers import read_rows
from emogen.task.rows import Rows, checked
from emogen.task.splits import make_folds

PARTS = ("flips", "prune", "select")
FLIPPED, LOOKED_AT, PRUNED = 0.05, 0.05, 0.02
START = STEP = 100
ROUNDS = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="rows with labels")
    parser.add_argument("--labels", default="semeval2018", help="the label set (default: semeval2018)")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="repetitions of flips and select")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    args = parser.parse_args(argv)
    label_set = load_label_set(args.labels)
    rows, names = checked(read_rows(args.file, label_set, need_labels=True)), label_set.names
    result: dict[str, Any] = {"rows": len(rows), "seeds": args.seeds, "versions": versions()}
    if "flips" in args.parts:
        lifts = [flips(rows, seed) for seed in range(args.seeds)]
        result["flips"] = {"lift": lifts}
        print_table(
            f"Turned labels among the first {LOOKED_AT:.0%}, times chance; {len(rows):,} rows",
            ["mean", "lowest", "highest"],
            [[f"{np.mean(lifts):.1f}", f"{min(lifts):.1f}", f"{max(lifts):.1f}"]],
        )
    if "prune" in args.parts:
        result["prune"] = prune(rows, names)
        print_table(
            f"Macro-F1, nested thresholds, five folds; {len(rows):,} rows",
            ["training rows", "macro-F1", "difference, 95 %"],
            [
                [system, f"{value:.4f}", f"{change:+.4f} ({low:+.4f} to {high:+.4f})"]
                for system, (value, change, low, high) in result["prune"].items()
            ],
        )
    if "select" in args.parts:
        result["select"] = curves(rows, names, args.seeds)
        print_table(
            f"Macro-F1 of held-out rows, mean of {args.seeds} starts; {len(rows):,} rows",
            ["labelled rows", "random", "select", "difference, 95 %"],
            _rows_of(result["select"]),
        )
    write_json(args.json, result)


def out_of_fold(rows: Rows, n_folds: int, seed: int) -> np.ndarray:
    """Probabilities of each row by a baseline that was not fitted to it, [n, L]."""
    return cross_fit_baseline(rows.texts, rows.truth, make_folds(rows, n_folds, seed))


def flips(rows: Rows, seed: int) -> float:
    """How many times more turned labels than by chance are among those with the lowest quality."""
    turned = np.random.default_rng(seed).random(rows.truth.shape) < FLIPPED
    noisy = replace(rows, gold=np.where(turned, 1 - rows.truth, rows.truth).astype(np.int8))
    _, quality = find_issues(noisy.truth, out_of_fold(noisy, 5, seed))
    first = np.argsort(quality, axis=None, kind="stable")[: int(LOOKED_AT * quality.size)]
    return float(turned.ravel()[first].mean() / turned.mean())


def prune(rows: Rows, names: Sequence[str]) -> dict[str, list[float]]:
    """Macro-F1 with all training rows, without the worst ones, and without as many random ones.

    Each with its difference to all rows, paired, and the ends of the 95 % interval of that.
    """
    folds, texts = make_folds(rows, 5, 42), np.array(rows.texts, dtype=object)
    systems = ("all rows", "without the worst 2 %", "without random 2 %")
    probs = {system: np.zeros(rows.truth.shape) for system in systems}
    rng = np.random.default_rng(0)
    for fold in range(5):
        held = folds == fold
        train = rows.take(np.flatnonzero(~held))
        _, quality = find_issues(train.truth, out_of_fold(train, 5, 1))
        n = int(PRUNED * len(train))
        worst_first = np.argsort(quality.min(axis=1), kind="stable")
        for system, kept in zip(systems, (worst_first, worst_first[n:], rng.permutation(len(train))[n:]), strict=True):
            kept = np.sort(kept)
            fitted = fit_baseline([train.texts[i] for i in kept], train.truth[kept])
            probs[system][held] = fitted(texts[held])
    preds = [nested_pred(rows.truth, prob, folds) for prob in probs.values()]
    resampled = [values["f1_macro"] for values in bootstrap(rows.truth, preds, names)]
    f1 = [score(rows.truth, pred, names)["f1_macro"] for pred in preds]
    return {
        system: [own, own - f1[0], *interval(of_system - resampled[0])]
        for system, own, of_system in zip(systems, f1, resampled, strict=True)
    }


def curves(rows: Rows, names: Sequence[str], n_seeds: int) -> dict[str, list[list[float]]]:
    """Macro-F1 after each round, [starts, rounds + 1], by the way of choosing."""
    found: dict[str, list[list[float]]] = {"random": [], "select": []}
    for seed in range(n_seeds):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(rows))
        test, pool = order[: len(rows) // 5], order[len(rows) // 5 :]
        for way, values in found.items():
            values.append(_curve(rows, names, pool, test, way, np.random.default_rng(seed)))
    return found


def _curve(
    rows: Rows, names: Sequence[str], pool: np.ndarray, test: np.ndarray, way: str, rng: np.random.Generator
) -> list[float]:
    labelled = pool[:START].tolist()
    values = []
    for k in range(ROUNDS + 1):
        known, held_out = rows.take(labelled), rows.take(test)
        thresholds = tune_thresholds(known.truth, out_of_fold(known, 3, 0))
        fitted = fit_baseline(known.texts, known.truth)
        pred = apply_thresholds(fitted(held_out.texts), thresholds)
        values.append(score(held_out.truth, pred, names)["f1_macro"])
        rest = np.setdiff1d(pool, labelled)
        if k == ROUNDS or len(rest) < STEP:
            break
        if way == "random":
            chosen = rng.permutation(len(rest))[:STEP].tolist()
        else:
            texts = [rows.texts[i] for i in rest]
            chosen = choose(texts, worth(fitted(texts)[None], thresholds), STEP, known.texts)
        labelled += rest[chosen].tolist()
    return values


def _rows_of(found: dict[str, list[list[float]]]) -> list[list[str]]:
    random, select = np.array(found["random"]), np.array(found["select"])
    difference = select - random  # [starts, rounds + 1]
    n = len(difference)
    mean = difference.mean(axis=0)
    half = 1.96 * difference.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.full_like(mean, np.nan)
    return [
        [
            str(START + k * STEP),
            f"{random[:, k].mean():.3f}",
            f"{select[:, k].mean():.3f}",
            f"{mean[k]:+.3f} ({mean[k] - half[k]:+.3f} to {mean[k] + half[k]:+.3f})",
        ]
        for k in range(len(mean))
    ]


if __name__ == "__main__":
    main()
