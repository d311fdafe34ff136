"""accelerate launch emogen/train.py RECIPE [key=value ...]

From a recipe to a tuned model: read the data, render the prompt, load the model, train, score, save.
`emogen train RECIPE [key=value ...]` is the same.
"""

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from emogen import data, paths, predict, ranks, results
from emogen.cli import fail_clearly, progress_bar, show_metrics
from emogen.recipe import Recipe, RecipeError, load_recipe
from emogen.report import report_finished
from emogen.score import collapsed, evaluate, score, tune_thresholds
from emogen.task import Task, load_task, write_examples

log = logging.getLogger("emogen")

USAGE = """usage: accelerate launch emogen/train.py RECIPE [key=value ...]

Tunes the model of a recipe, and leaves a run folder (output_dir, runs/<recipe name> by default).
  key=value                     overrides any key of the recipe: learning_rate=2e-4 num_train_epochs=3
  resume_from_checkpoint=true   goes on where an interrupted run stopped
The keys are those of emogen (`emogen keys` lists them) and all of TRL's SFTConfig and ModelConfig.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Train by a recipe. Raises what `emogen.cli.fail_clearly` turns into an exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if argv else 2)

    recipe = load_recipe(argv[0], argv[1:])
    for notice in recipe.notices:
        log.warning(notice)
    task = load_task(recipe)
    splits = task.splits
    assert splits is not None
    for problem in task.warnings:
        log.warning(str(problem))
    folder, resume = recipe.output_dir, bool(recipe.sft_args.get("resume_from_checkpoint"))
    main_process = ranks.is_main()
    fingerprint = _fingerprint(recipe)
    if main_process:
        claim_folder(folder, resume, fingerprint)
    checkpoint = newest_checkpoint(folder) if resume else None

    # From here on it is slow: torch, transformers and TRL are loaded.
    import torch
    from transformers import set_seed

    from emogen import head, trainer
    from emogen.trainer import LogFile

    _use_all_cores()
    # Rows are cut to length by emogen, and bring columns that the trainer does not know.
    own: dict[str, Any] = {"resume_from_checkpoint": None, "max_length": None, "remove_unused_columns": False}
    if not torch.accelerator.is_available():
        own["use_cpu"] = True  # unless it is said, several processes on a CPU would each train for themselves
    args = recipe.sft_config(**own)
    set_seed(args.seed)  # the trainer does so itself, but not before new weights have been drawn
    learnt, watched = _watch(recipe, splits)
    prepare = head.prepare if recipe.answer == "head" else trainer.prepare
    tuned, labeller_of = prepare(task, args, learnt, watched, _figures_of(watched))
    tuned.add_callback(LogFile(folder / results.LOG))
    if main_process:
        _write_run_files(task, folder, fingerprint, argv)
    log.info(f"Going on from {checkpoint}" if checkpoint else "Starting at the first step")
    started = time.perf_counter()
    try:
        tuned.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        log.warning("Interrupted. resume_from_checkpoint=true goes on from the newest checkpoint.")
        raise
    seconds = time.perf_counter() - started

    weights = folder / (predict.ADAPTER if recipe.lm_args["use_peft"] else predict.MODEL)
    tuned.save_model(str(weights))
    if main_process:
        _name_base_model(weights, recipe.model_name)
    figures: dict[str, Any] = {"train_seconds": round(seconds, 1), "train_rows": len(learnt)}
    if splits.eval is not None:
        labeller = labeller_of(tuned.accelerator.unwrap_model(tuned.model))
        figures |= _final_score(labeller, splits.eval, args.per_device_eval_batch_size)
    if not main_process:
        return
    figures["peak_memory_bytes"] = peak_memory_bytes()
    results.write_json(folder / results.METRICS, figures)
    report_finished(folder)
    log.info(f"The run is in {folder}. Next: emogen predict {folder} YOUR.csv -o OUT.csv")


def claim_folder(folder: Path, resume: bool, fingerprint: dict[str, str]) -> None:
    """Make sure that a run may write here.

    Raises:
        RecipeError: the folder holds another run, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with paths.writing(folder / ".writable") as file:
            file.write("x")
        (folder / ".writable").unlink()
    except OSError as error:
        raise RecipeError([f"output_dir: {folder}: cannot be written to: {error.strerror}"]) from None
    manifest = folder / "manifest.json"
    if not resume:
        if any(path.name != "logs" for path in folder.iterdir()):
            raise RecipeError(
                [
                    f"output_dir: {folder}: not empty, and nothing is overwritten. Go on with that run: "
                    "resume_from_checkpoint=true; start another one: output_dir=FOLDER; or remove the folder"
                ]
            )
        return
    if manifest.is_file():
        before = json.loads(manifest.read_text(encoding="utf-8")).get("sha256", {})
        changed = [name for name, digest in fingerprint.items() if before.get(name, digest) != digest]
        if changed:
            raise RecipeError(
                [f"output_dir: {folder}: cannot go on with this run: {', '.join(changed)} changed since it was started"]
            )


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end. One that a kill cut short is passed over."""
    numbered = [(int(p.name.rpartition("-")[2]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # the file that is written last
        except (OSError, ValueError):
            log.warning(f"{path} is incomplete; passed over")
            continue
        return path
    return None


def _watch(recipe: Recipe, splits: data.Splits) -> tuple[data.Rows, data.Rows | None]:
    """The rows to learn from, and those that are looked at during training; at the end all of `splits.eval` are scored.

    Where a checkpoint is chosen by them they are held out from the training rows: a choice by the rows that are scored
    in the end would flatter the score. Otherwise they are a fixed part of the evaluation rows.
    """
    if recipe.select_best:
        kept, held = data.hold_out(splits.train, recipe.select_best.fraction, recipe.seed)
        return splits.train.take(kept), splits.train.take(held)
    if splits.eval is None:
        return splits.train, None
    return splits.train, data.sample_rows(splits.eval, recipe.eval_samples or len(splits.eval), recipe.seed)


def _use_all_cores() -> None:
    """Let one process on a machine without a GPU use every core: `accelerate launch` would give it a single thread."""
    import torch

    if not torch.cuda.is_available() and ranks.count() == 1:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(allowed or 1)


def _figures_of(rows: data.Rows | None) -> Callable[[predict.Labeller], dict[str, float]] | None:
    """What is called at each evaluation: label the rows, and score what comes out."""
    if rows is None:
        return None

    def figures(labeller: predict.Labeller) -> dict[str, float]:
        predictions = labeller.answers(rows.texts)
        pred, names = predict.pred_matrix(predictions), labeller.label_set.names
        metrics = score(rows.truth, pred, names)
        warn_of_collapse(pred, names)
        shown = {name: metrics[name] for name in ("f1_macro", "f1_micro", "jaccard_samples")}
        shown["parse_failure"] = predict.parse_audit(predictions)["parse_failure"]
        return shown | {f"f1/{name}": label["f1"] for name, label in metrics["per_label"].items()}

    return figures


def warn_of_collapse(pred: np.ndarray, names: Sequence[str]) -> None:
    """Say so if most labels are given to all rows of `pred` [n, L], or to none."""
    stuck = collapsed(pred, names)
    if len(stuck) > len(names) / 2:
        log.warning(
            f"{len(stuck)} of {len(names)} labels are given to every row or to none: {', '.join(stuck)}. The model "
            "does not tell rows apart. Early in training that passes; if it stays, lower learning_rate, train longer, "
            "or weigh the labels within themselves (label_weights: within)"
        )


def _final_score(labeller: predict.Labeller, rows: data.Rows, batch_size: int) -> dict[str, Any]:
    """Label all rows that are held out, keep what came out, print the table, and give the figures back.

    All processes label; the main one does the rest."""
    recipe, label_set, gold = labeller.recipe, labeller.label_set, rows.truth
    times = [time.perf_counter()]
    with progress_bar("Answers", len(rows) * labeller.n_questions) as advance:
        predictions = labeller.answers(rows.texts, batch_size=batch_size, progress=advance)
    times.append(time.perf_counter())
    prob = predict.prob_of(labeller, rows.texts, predictions, progress_bar, "Probabilities")
    times.append(time.perf_counter())
    if not ranks.is_main():
        return {}
    pred = predict.pred_matrix(predictions)
    try:
        # The thresholds that are kept rest on all of these rows; what they are worth is said by nested ones.
        folds = data.make_folds(rows, 5, recipe.seed)
    except ValueError:
        folds = None  # too few rows
    folder = recipe.output_dir
    results.write_jsonl(folder / results.PREDICTIONS, rows, pred, prob, label_set, predictions, folds)
    results.write_thresholds(folder, tune_thresholds(gold, prob), label_set)
    metrics = evaluate(gold, pred, prob, folds, label_set.names)
    show_metrics(metrics)
    warn_of_collapse(pred, label_set.names)
    answer_seconds, prob_seconds = np.diff(times).round(2).tolist()
    return metrics | {
        "parse": predict.parse_audit(predictions),
        "answer_seconds": answer_seconds,
        "prob_seconds": prob_seconds,
    }


def peak_memory_bytes() -> int:
    """The most memory that this process has had: of its GPU, where it has one, else of the machine."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes there, and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _fingerprint(recipe: Recipe) -> dict[str, str]:
    """sha256 of everything besides the recipe that a run depends on."""
    files = {"data": recipe.train_file, "eval data": recipe.eval_file, "prompt": recipe.prompt}
    if recipe.init_adapter:
        files["init_adapter"] = f"{recipe.init_adapter}/{predict.ADAPTER}/adapter_model.safetensors"
    found = {name: recipe.find(file) for name, file in files.items() if file is not None}
    if missing := [f"{name}: {path}: no such file" for name, path in found.items() if not path.is_file()]:
        raise RecipeError(missing)
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


def _write_run_files(task: Task, folder: Path, fingerprint: dict[str, str], argv: Sequence[str]) -> None:
    """What makes the folder self-contained: the resolved recipe, prompt, labels, examples, and the manifest."""
    import torch

    files = {
        predict.RECIPE: task.recipe.to_yaml(
            prompt=predict.PROMPT, labels=predict.LABELS, output_dir=str(folder), resume_from_checkpoint=None
        ),
        predict.PROMPT: task.prompt.source,
        predict.LABELS: task.label_set.to_yaml(),
        "manifest.json": json.dumps(
            {
                "command": ["emogen", "train", *argv],
                "model": task.recipe.model_name,
                "seed": task.recipe.seed,
                "sha256": fingerprint,
                "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
                "commit": _commit(),
                "hardware": {
                    "machine": platform.machine(),
                    "threads": torch.get_num_threads(),
                    "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
                },
            },
            indent=2,
        ),
    }
    for name, text in files.items():
        with paths.writing(folder / name) as file:
            file.write(text)
    write_examples(folder, task.examples)


PACKAGES = ("emogen", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers")


def _commit() -> str | None:
    """The commit of the checkout that this runs from, or None in an installed package."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def _name_base_model(adapter: Path, model_name: str) -> None:
    """Let the saved adapter name its base model as the recipe does, not by the folder of this machine's cache."""
    path = adapter / "adapter_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": model_name}
        with paths.writing(path) as file:
            json.dump(config, file, indent=2)


if __name__ == "__main__":
    fail_clearly(main)
