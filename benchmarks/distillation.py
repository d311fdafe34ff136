"""What a small model learns from an ensemble: trained on its probabilities, and scored on folds that it never saw.

    python benchmarks/distillation.py RECIPE RUN_DIR ... [--plain RUN_DIR] [--weight 0.5] [--keys KEY=VALUE ...]

The runs are cross-validations and baselines on the same folds; their stack is the teacher. For each fold a student is
trained on the rows of the other folds. Its targets are W times the teacher's out-of-fold probabilities and 1 - W times
the labels. The stack is fitted without the fold. Its members are not: a row's member has not seen the row's own fold,
but, as it was trained on all the others, it has seen the one that the student is scored on. --plain names a
cross-validation of the same recipe on labels alone. Finished students are not repeated.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, machine, print_table, versions, write_json

from emogen.evaluation import results
from emogen.evaluation.metrics import bootstrap, interval_of, nested_pred, score_nested
from emogen.evaluation.run_folder import (
    CROSS_VALIDATION,
    LABELS,
    METRICS,
    PREDICTIONS,
    label_set_of,
    read_json,
    write_manifest,
)
from emogen.evaluation.stack import cross_fit, nested_stack
from emogen.experiments.jobs import RunProcess, run_all
from emogen.report.compare import with_interval

KEYS = ["labels_column=prob", "soft_labels=true", "eval_fraction=0", "eval_strategy=no", "save_strategy=steps"]
KEYS += ["save_steps=0.2", "save_total_limit=1", "resume_from_checkpoint=true"]


def main(argv: Sequence[str] | None = None) -> None:
    """Train the students and print what they reach beside their teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the recipe of the student")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="the members of the teacher")
    parser.add_argument("--plain", type=Path, metavar="RUN_DIR", help="the student's recipe, trained on labels alone")
    parser.add_argument("--weight", type=float, default=0.5, metavar="W", help="weight of the teacher (default 0.5)")
    parser.add_argument("--keys", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "student", help="folder (default runs/student)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all metrics to FILE")
    args = parser.parse_intermixed_args(argv)
    label_set = label_set_of(args.runs[0])
    named = [*args.runs, *([args.plain] if args.plain else [])]
    scored = results.align_scored([results.read_scored(run, label_set) for run in named])
    probs = np.stack([rows.prob for rows in scored[: len(args.runs)]])  # [M, n, L]
    folder = args.out.resolve()
    seconds = train_students(folder, [args.recipe, *args.keys], scored[0], probs, args.weight)
    gold, folds = scored[0].gold, scored[0].folds
    _, student = results.align_scored([scored[0], results.read_scored(folder, label_set)])
    preds = {"the teacher": nested_stack(gold, probs, folds), "the student": nested_pred(gold, student.prob, folds)}
    if args.plain:
        preds["the same, trained on labels"] = nested_pred(gold, scored[-1].prob, folds)
    resampled = [values["f1_macro"] for values in bootstrap(gold, list(preds.values()), label_set.names)]
    systems: dict[str, dict[str, Any]] = {}
    for (name, pred), values in zip(preds.items(), resampled, strict=True):
        own = systems[name] = {"metrics": score_nested(gold, pred, folds, label_set.names)}
        own["interval"] = interval_of(values, len(gold))
        own["difference"] = own["metrics"]["f1_macro"] - systems["the teacher"]["metrics"]["f1_macro"]
        own["difference_interval"] = interval_of(values - resampled[0], len(gold))
    table = [
        [
            name,
            with_interval(own["metrics"]["f1_macro"], own["interval"]),
            f"{own['metrics']['f1_micro']:.3f}",
            "" if name == "the teacher" else with_interval(own["difference"], own["difference_interval"], "+"),
        ]
        for name, own in systems.items()
    ]
    header = ["system", "macro-F1 (95 %)", "micro-F1", "to the teacher (95 %)"]
    print_table(f"{args.recipe}, {len(gold):,} rows, {len(np.unique(folds))} folds", header, table)
    result = {"recipe": args.recipe, "keys": args.keys, "members": [run.name for run in args.runs]}
    result |= {"weight": args.weight, "train_seconds": seconds, "systems": systems}
    write_json(args.json, result | {"machine": machine(), "versions": versions("torch", "transformers")})


def train_students(
    folder: Path, recipe: Sequence[str], scored: results.ScoredRows, probs: np.ndarray, weight: float
) -> float:
    """Train and score one student per fold, and write what all of them said into `folder`, as a cross-validation.

    Args:
        recipe: the recipe and its overrides.
        scored: n rows, with their folds.
        probs: the probabilities of the teacher's members, [M, n, L].
        weight: the weight of the teacher in the targets.

    Returns:
        The seconds of all trainings.
    """
    rows, label_set = results.held_out_rows(scored), label_set_of(scored.path.parent)
    numbers = np.unique(scored.folds)
    students = [RunProcess(k, folder / f"fold-{number}") for k, number in enumerate(numbers)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LABELS).write_text(label_set.to_yaml(), encoding="utf-8")
    commands = []
    for student, number in zip(students, numbers, strict=True):
        held = scored.folds == number
        teacher = cross_fit(scored.gold[~held], probs[:, ~held], scored.folds[~held])
        targets = weight * teacher + (1 - weight) * scored.gold[~held]
        train_file, eval_file = (folder / f"fold-{number}-{part}.jsonl" for part in ("train", "eval"))
        train_rows = rows.take(np.flatnonzero(~held))
        results.write_jsonl(train_file, train_rows, train_rows.truth, targets, label_set)
        results.write_rows(eval_file, rows.take(np.flatnonzero(held)), label_set)
        commands.append([*recipe, *KEYS, f"train_file={train_file}", f"eval_file={eval_file}"])
        commands[-1] += [f"labels={folder / LABELS}", f"output_dir={student.folder}"]
    run_all(students, commands, 1, lambda _: None)

    parts = [results.read_scored(student.folder, label_set) for student in students]
    order = scored.positions([row_id for part in parts for row_id in part.ids])
    pred, prob = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pred", "prob"))
    results.write_jsonl(folder / PREDICTIONS, rows.take(order), pred, prob, label_set, folds=scored.folds[order])
    write_manifest(folder, CROSS_VALIDATION, model=folder.name)
    return sum(read_json(student.folder / METRICS)["train_seconds"] for student in students)


if __name__ == "__main__":
    main()
