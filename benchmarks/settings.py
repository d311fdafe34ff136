"""What helps: one key of the recipe changed at a time, on one fold of real posts, with the same budget for all.

    python benchmarks/settings.py path/to/2018-E-c-En-train.txt [--epochs 1] [--rows 684] [--jobs 2] [NAME ...]

Each setting learns from four of five folds and is scored on the fifth, or on a stratified sample of it: by its answers,
by thresholds that are nested in five parts of these rows, and by its probabilities, which tell apart what F1 on so few
rows does not. Differences are to the first setting, with paired bootstrap intervals. Runs that are there are not done
again.
"""

import argparse
import json
from pathlib import Path

from common import ROOT, machine, print_table, versions, write_json

from emogen.experiments.jobs import RunProcess, run_all

SETTINGS = {
    "list": [],
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
RECIPE = "recipes/smollm2-135m.yaml"


def fold_files(data: str, folder: Path, n_scored: int | None) -> list[str]:
    """The rows of the first of five folds, written once: the overrides that name them."""
    import numpy as np

    from emogen.evaluation.results import write_rows
    from emogen.task.labels import load_label_set
    from emogen.task.readers import read_rows
    from emogen.task.rows import checked
    from emogen.task.splits import make_folds, sample_rows

    label_set = load_label_set("semeval2018")
    rows = checked(read_rows(data, label_set, need_labels=True))
    folds = make_folds(rows, 5, seed=42)
    files = []
    learnt, held = rows.take(np.flatnonzero(folds != 0)), rows.take(np.flatnonzero(folds == 0))
    for name, part in (("train", learnt), ("eval", sample_rows(held, n_scored or len(held), seed=42))):
        file = folder.resolve() / f"{name}.jsonl"
        write_rows(file, part, label_set)
        files.append(f"{name}_file={file}")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the training file of SemEval-2018 Task 1 E-c English, or one like it")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which settings, of: {', '.join(SETTINGS)}")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--rows", type=int, help="how many rows to score (all of the fold)")
    parser.add_argument("--jobs", type=int, default=1, help="settings at once, each on its part of the cores")
    parser.add_argument("--out", default=str(ROOT / "runs" / "settings"), help="where the runs go (runs/settings)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    args = parser.parse_intermixed_args()
    names = ["list", *(name for name in args.names or SETTINGS if name != "list")]
    if unknown := set(names) - SETTINGS.keys():
        parser.error(f"no such settings: {', '.join(sorted(unknown))}")
    out = Path(args.out)
    files = fold_files(args.data, out / "data", args.rows)
    runs = [RunProcess(k, out / name.replace(" ", "-")) for k, name in enumerate(names)]
    same = [*files, "eval_fraction=0", "eval_strategy=no", "save_steps=0.1", "order=canonical"]
    same += [f"num_train_epochs={args.epochs}", "resume_from_checkpoint=true"]
    commands = [
        [str(ROOT / RECIPE), *same, *SETTINGS[name], f"output_dir={run.folder}"]
        for name, run in zip(names, runs, strict=True)
    ]
    run_all(runs, commands, args.jobs, lambda runs: None)

    from emogen.evaluation.metrics import row_log_loss
    from emogen.evaluation.results import aligned, read_scored
    from emogen.report.compare import compare
    from emogen.task.labels import load_label_set

    label_set = load_label_set("semeval2018")
    folders = [run.folder for run in runs]
    by = {how: compare(folders, label_set, by=how) for how in ("answer", "thresholds")}
    losses = [row_log_loss(of.gold, of.prob) for of in aligned([read_scored(f, label_set) for f in folders])]
    table, figures = [], {}
    for k, name in enumerate(names):
        answer, thresholds = by["answer"][k], by["thresholds"][k]
        seconds = json.loads((folders[k] / "metrics.json").read_text())["train_seconds"]
        low, high = thresholds.difference_interval
        more_loss = losses[k] - losses[0]
        error = 1.96 * more_loss.std(ddof=1) / len(more_loss) ** 0.5
        table.append(
            [
                name,
                f"{answer.metrics['f1_macro']:.3f}",
                f"{thresholds.metrics['f1_macro']:.3f}",
                f"{thresholds.difference:+.3f} ({low:+.3f} .. {high:+.3f})" if k else "",
                f"{answer.metrics['f1_micro']:.3f}",
                f"{losses[k].mean():.3f}",
                f"{more_loss.mean():+.3f} ± {error:.3f}" if k else "",
                f"{seconds / 60:.0f}",
            ]
        )
        figures[name] = {
            "keys": SETTINGS[name],
            "train_seconds": seconds,
            "answer": answer.metrics,
            "thresholds": thresholds.metrics,
            "log_loss": float(losses[k].mean()),
            "log_loss_difference": [float(more_loss.mean()), float(error)],
            "difference": thresholds.difference,
            "difference_interval": thresholds.difference_interval,
        }
    header = ["setting", "macro-F1, answer", "by thresholds", "difference (95 %)", "micro-F1, answer"]
    header += ["log loss of a row", "difference (95 %)", "minutes"]
    print_table(f"SmolLM2-135M, {args.epochs:g} epochs, {by['answer'][0].metrics['n']:,} rows", header, table)
    packages = versions("torch", "transformers", "trl", "peft", "emogen")
    write_json(args.json, {"epochs": args.epochs, "machine": machine(), "versions": packages, "runs": figures})


if __name__ == "__main__":
    main()
