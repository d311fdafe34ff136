"""Fine-tune the model of a recipe: read the data, render the prompt, load the model, train, save, score.

    accelerate launch emogen/train.py RECIPE [key=value ...]

`emogen train RECIPE [key=value ...]` does the same in one process.
"""

import logging
import pickle
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from emogen import paths, processes
from emogen.console import quiet_libraries, run_command
from emogen.errors import ModelError
from emogen.evaluation import run_folder
from emogen.prediction.weights import name_base_model
from emogen.task.recipe import load_recipe
from emogen.task.splits import Splits
from emogen.task.task import Task, load_task_with_rows
from emogen.training import run_setup

log = logging.getLogger("emogen")

USAGE = """usage: accelerate launch emogen/train.py RECIPE [key=value ...]

Fine-tunes the model of a recipe. The result is a run folder: output_dir, or runs/<recipe name>.
  key=value                     overrides a key of the recipe, such as learning_rate=2e-4
  resume_from_checkpoint=true   continues an interrupted run
The keys are emogen's own and those of TRL's SFTConfig and ModelConfig; `emogen keys` lists them.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune the model of a recipe. `console.run_command` turns its errors into exit codes.

    Args:
        argv: recipe and overrides; those of the command line by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if argv else 2)

    quiet_libraries()
    recipe = load_recipe(argv[0], argv[1:])
    recipe.require_own_model("is not tuned")
    for notice in recipe.notices:
        log.warning(notice)
    task, splits, warnings = load_task_with_rows(recipe)
    for problem in warnings:
        log.warning(str(problem))
    resume = bool(recipe.sft_args.get("resume_from_checkpoint"))
    fingerprint = run_setup.fingerprint_of(task, splits)
    opened = run_setup.open_folder(task, recipe.output_dir, fingerprint, resume=resume)
    with opened if processes.is_main_process() else nullcontext():
        checkpoint = run_setup.newest_checkpoint(recipe.output_dir) if resume else None
        try:
            _train(task, splits, fingerprint, checkpoint, argv)
        except KeyboardInterrupt:
            log.warning("Interrupted. resume_from_checkpoint=true continues from the newest checkpoint.")
            raise
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"{checkpoint}: one of its files is not what torch saves, or would run code; it is not opened. Remove "
                "that checkpoint to continue from the one before"
            ) from error
        except Exception as error:
            if reason := run_setup.disk_problem(error):
                raise ModelError(
                    f"{recipe.output_dir}: a file could not be written: {reason}. Complete checkpoints are kept: free "
                    "some space, and continue with resume_from_checkpoint=true"
                ) from error
            raise


def _train(
    task: Task, splits: Splits, fingerprint: dict[str, str], checkpoint: Path | None, argv: Sequence[str]
) -> None:
    """Train, save and score in a folder that this process holds.

    Args:
        fingerprint: see `run_setup.fingerprint_of`.
        checkpoint: where to continue; None for a new run.
        argv: see `main`.
    """
    # Everything up to here takes a second. torch, transformers and TRL take ten.
    import torch
    from transformers import set_seed

    from emogen.model.loading import use_all_cores
    from emogen.report import trackers
    from emogen.report.page import report_finished
    from emogen.training import head, progress, scoring, sft

    use_all_cores()
    recipe, folder, is_main = task.recipe, task.recipe.output_dir, processes.is_main_process()
    logs_to = trackers.load_trackers(recipe)
    # emogen shortens the texts itself, and its rows have columns that the trainer does not know.
    changes: dict[str, Any] = {"resume_from_checkpoint": None, "max_length": None, "remove_unused_columns": False}
    if not torch.accelerator.is_available():
        changes["use_cpu"] = True  # otherwise several processes on a CPU would not train together
        changes["bf16"] = False  # the linear layers do it (`bf16_pays`); autocast would slow down all between them
    args = recipe.sft_config(**changes)
    run_setup.use_one_gpu(args)
    set_seed(args.seed)  # the trainer also sets the seed, but only after the adapter is initialised
    train_rows, val_rows = run_setup.split_rows(recipe, splits)
    prepare = head.prepare if recipe.answer == "head" else sft.prepare
    trainer, make_classifier = prepare(task, args, train_rows, val_rows, scoring.make_compute_metrics(val_rows))
    trackers.guard_trackers(trainer, logs_to)
    trainer.add_callback(scoring.LogFile(folder / run_folder.LOG))
    progress.show_progress(trainer)
    if is_main:
        run_setup.write_run_files(task, folder, fingerprint, argv)
    log.info(f"Resuming from {checkpoint}" if checkpoint else "Starting at step 0")
    started = time.perf_counter()
    weights = folder / (run_folder.ADAPTER if recipe.lm_args["use_peft"] else run_folder.MODEL)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    trainer.save_model(str(weights))
    if is_main:
        name_base_model(weights, recipe.model_name)
        (weights / "training_args.bin").unlink(missing_ok=True)  # a pickle, which a reader of the run should not open
    metrics: dict[str, Any] = {"train_seconds": round(seconds, 1), "train_rows": len(train_rows)}
    if splits.eval is not None:
        classifier = make_classifier(trainer.accelerator.unwrap_model(trainer.model))
        metrics |= scoring.final_score(classifier, splits.eval, args.per_device_eval_batch_size)
    if not is_main:
        return
    metrics["peak_memory_bytes"] = run_setup.peak_memory_bytes()
    run_setup.record_weights(folder)
    paths.write_json(folder / run_folder.METRICS, metrics)
    report_finished(folder)
    log.info(f"The run is in {folder}. Next: emogen predict {shlex.quote(str(folder))} YOUR.csv -o OUT.csv")


if __name__ == "__main__":
    run_command(main)
