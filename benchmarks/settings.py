"""The effect of single keys of a recipe, on one fold of real posts, each with the same budget.

    python benchmarks/settings.py path/to/2018-E-c-En-train.txt [NAME ...] [--epochs 1] [--rows 684] [--jobs 2]

Each setting trains on four of five folds. It is scored on the fifth, or on a stratified sample of it, in three ways: by
its answers, by thresholds nested in five parts of these rows, and by the log loss of its probabilities, which separates
settings that F1 on so few rows cannot. Differences are to the first setting; they are paired, with 95 % intervals.
Finished runs are not repeated.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import MODEL, ROOT, machine, model_name, print_table, versions, write_json

from emogen.evaluation.metrics import row_log_loss
from emogen.evaluation.results import align_scored, read_scored, write_rows
from emogen.evaluation.run_folder import METRICS, read_json
from emogen.experiments.jobs import RunProcess, run_all
from emogen.report.compare import compare, with_interval
from emogen.task.labels import LabelSet, load_label_set
from emogen.task.readers import read_rows
from emogen.task.rows import checked
from emogen.task.splits import make_folds, sample_rows

FIRST = "list"  # the setting that the others are compared with
SETTINGS = {
    FIRST: [],
    "frequent first": ["order=frequent_first"],
    "rare first": ["order=rare_first"],
    "count first": ["answer=count", "prompt=prompts/count.jinja"],
    "json": ["answer=json", "prompt=prompts/json.jinja"],
    "yes or no": ["answer=yes_no", "prompt=prompts/yes_no.jinja"],
    "definitions": ["prompt=prompts/definitions.jinja"],
    "text .03": ["text_loss_weight=0.03"],
    "text .1": ["text_loss_weight=0.1"],
    "weights within": ["label_weights=within"],
    "weights across": ["label_weights=across"],
    "rare rows repeated": ["sampling=rare"],
}
RECIPE = ROOT / "recipes" / "smollm2-135m.yaml"


def write_fold(data: str, folder: Path, label_set: LabelSet, n_scored: int | None) -> list[str]:
    """Write the training and evaluation rows of the first of five folds. Returns the overrides that name the files."""
    rows = checked(read_rows(data, label_set, need_labels=True))
    folds = make_folds(rows, 5, seed=42)
    train_rows, eval_rows = rows.take(np.flatnonzero(folds != 0)), rows.take(np.flatnonzero(folds == 0))
    eval_rows = sample_rows(eval_rows, n_scored or len(eval_rows), seed=42)
    overrides = []
    for name, part in (("train", train_rows), ("eval", eval_rows)):
        file = folder / f"{name}.jsonl"
        write_rows(file, part, label_set)
        overrides.append(f"{name}_file={file}")
    return overrides


def train(names: Sequence[str], folder: Path, overrides: Sequence[str], jobs: int) -> list[Path]:
    """Train and score the settings that have not finished yet. Returns their run folders."""
    runs = [RunProcess(k, folder / name.replace(" ", "-")) for k, name in enumerate(names)]
    commands = [
        [str(RECIPE), *overrides, *SETTINGS[name], f"output_dir={run.folder}"]
        for name, run in zip(names, runs, strict=True)
    ]
    run_all(runs, commands, jobs, lambda _: None)
    return [run.folder for run in runs]


def summarise(names: Sequence[str], folders: Sequence[Path], label_set: LabelSet) -> dict[str, dict[str, Any]]:
    """All metrics of each setting, with their differences to the first one."""
    by_answer, by_thresholds = (compare(folders, label_set, by=by) for by in ("answer", "thresholds"))
    systems = align_scored([read_scored(folder, label_set) for folder in folders])
    losses = [row_log_loss(system.gold, system.prob) for system in systems]
    metrics = {}
    for k, name in enumerate(names):
        more_loss = losses[k] - losses[0]
        error = 1.96 * more_loss.std(ddof=1) / len(more_loss) ** 0.5
        metrics[name] = {
            "keys": SETTINGS[name],
            "train_seconds": read_json(folders[k] / METRICS)["train_seconds"],
            "answer": by_answer[k].metrics,
            "thresholds": by_thresholds[k].metrics,
            "log_loss": float(losses[k].mean()),
            "log_loss_difference": [float(more_loss.mean()), float(error)],
            "difference": by_thresholds[k].difference,
            "difference_interval": by_thresholds[k].difference_interval,
        }
    return metrics


def table_row(name: str, metrics: dict[str, Any]) -> list[str]:
    """The line of the table for one setting."""
    more_loss, error = metrics["log_loss_difference"]
    is_first = name == FIRST
    return [
        name,
        f"{metrics['answer']['f1_macro']:.3f}",
        f"{metrics['thresholds']['f1_macro']:.3f}",
        "" if is_first else with_interval(metrics["difference"], metrics["difference_interval"], "+"),
        f"{metrics['answer']['f1_micro']:.3f}",
        f"{metrics['log_loss']:.3f}",
        "" if is_first else f"{more_loss:+.3f} ± {error:.3f}",
        f"{metrics['train_seconds'] / 60:.0f}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Train the settings and print what each of them gains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled posts, such as the training file of SemEval-2018 Task 1 E-c English")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"settings (default all): {', '.join(SETTINGS)}")
    parser.add_argument("--epochs", type=float, default=1, help="training budget of each setting (default 1)")
    parser.add_argument("--rows", type=int, metavar="N", help="rows to score (default: all of the fold)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, each on its share of the cores")
    parser.add_argument("--model", type=model_name, default=MODEL, help=f"the model to train (default {MODEL})")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "settings", help="folder of the runs (default runs/settings)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all metrics to FILE")
    args = parser.parse_intermixed_args(argv)
    names = [FIRST, *(name for name in args.names or SETTINGS if name != FIRST)]
    if unknown := set(names) - SETTINGS.keys():
        parser.error(f"no such settings: {', '.join(sorted(unknown))}")
    folder, label_set = args.out.resolve(), load_label_set("semeval2018")
    overrides = write_fold(args.data, folder / "data", label_set, args.rows)
    overrides += [f"model_name_or_path={args.model}", "eval_fraction=0", "eval_strategy=no", "save_steps=0.1"]
    overrides += ["order=canonical", f"num_train_epochs={args.epochs}", "resume_from_checkpoint=true"]
    metrics = summarise(names, train(names, folder, overrides, args.jobs), label_set)
    header = ["setting", "macro-F1, answer", "by thresholds", "difference (95 %)", "micro-F1, answer"]
    header += ["log loss of a row", "difference (95 %)", "minutes"]
    n_rows = metrics[FIRST]["answer"]["n"]
    title = f"{args.model}, {args.epochs:g} epochs, {n_rows:,} rows"
    print_table(title, header, [table_row(name, of_setting) for name, of_setting in metrics.items()])
    packages = versions("torch", "transformers", "trl", "peft")
    result = {"model": args.model, "epochs": args.epochs, "machine": machine(), "versions": packages, "runs": metrics}
    write_json(args.json, result)


if __name__ == "__main__":
    main()
