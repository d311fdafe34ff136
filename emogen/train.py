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
from typing import TYPE_CHECKING, Any

from emogen import data, paths, predict, results
from emogen.balance import label_weights, repeat_rare
from emogen.cli import fail_clearly, progress_bar, show_metrics
from emogen.recipe import Recipe, RecipeError, load_recipe
from emogen.score import evaluate, score, tune_thresholds
from emogen.task import Task, load_encoder, load_task, write_examples

if TYPE_CHECKING:
    from emogen.encode import Encoder

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
    main_process = os.environ.get("RANK", "0") == "0"
    fingerprint = _fingerprint(recipe)
    if main_process:
        claim_folder(folder, resume, fingerprint)
    checkpoint = newest_checkpoint(folder) if resume else None

    # From here on it is slow: torch, transformers and TRL are loaded.
    from datasets import Dataset
    from transformers import set_seed
    from trl import get_peft_config

    from emogen import modeling
    from emogen.attention import share_prefix
    from emogen.trainer import EmogenTrainer, LogFile

    _use_all_cores()
    # Rows are cut to length by `encode.py`, and bring columns that the trainer does not know.
    args = recipe.sft_config(resume_from_checkpoint=None, max_length=None, remove_unused_columns=False)
    lm_config = recipe.lm_config()
    location = modeling.locate(recipe.model_name, lm_config.model_revision)
    encoder, plain = load_encoder(task, location)
    if plain:
        log.warning(f"{recipe.model_name} has no chat template: it is a base model, and gets a plain one.")
    if main_process:
        _write_run_files(task, folder, fingerprint, argv)
    log.info(f"Going on from {checkpoint}" if checkpoint else "Starting at the first step")

    set_seed(args.seed)  # the trainer does so itself, but not before the adapter has been drawn
    model = modeling.load_model(location, lm_config, trust_remote_code=args.trust_remote_code)
    if recipe.init_adapter:
        model = modeling.load_adapter(model, recipe.find(recipe.init_adapter) / predict.ADAPTER, trainable=True)
    n_prefix = len(encoder.prefix_ids) if recipe.shared_prefix and share_prefix(model) else 0
    learnt, watched = _watch(recipe, splits)
    train_set, n_cut = _encode(encoder, learnt, recipe, branched=bool(n_prefix))
    eval_set = None if watched is None else _encode(encoder, watched, branched=bool(n_prefix))[0]
    if n_cut:
        log.warning(f"{n_cut:,} texts were shortened to fit max_length={recipe.max_length}")
    log.info(
        f"{len(learnt):,} rows to learn from, {len(splits.eval) if splits.eval else 0:,} to score on; the "
        f"instruction takes {len(encoder.prefix_ids)} tokens, the rest of a row {_mean_rest(encoder, train_set):.0f}"
    )
    trainer = EmogenTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(train_set),
        eval_dataset=None if eval_set is None else Dataset.from_list(eval_set),
        processing_class=encoder.tokenizer,
        peft_config=None if recipe.init_adapter else get_peft_config(lm_config),
        n_prefix=n_prefix,
        score=_scorer(recipe, encoder, watched),
        select_best=recipe.select_best,
        callbacks=[LogFile(folder / results.LOG)],
    )
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        log.warning("Interrupted. resume_from_checkpoint=true goes on from the newest checkpoint.")
        raise
    seconds = time.perf_counter() - started

    trainer.save_model(str(folder / predict.ADAPTER))
    if not main_process:
        return
    _name_base_model(folder / predict.ADAPTER, recipe.model_name)
    figures: dict[str, Any] = {"train_seconds": round(seconds, 1), "train_rows": len(learnt)}
    if splits.eval is not None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        figures |= _final_score(recipe, encoder, model, splits.eval, args.per_device_eval_batch_size)
    results.write_json(folder / results.METRICS, figures)
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


def _encode(
    encoder: "Encoder", rows: data.Rows, recipe: Recipe | None = None, *, branched: bool
) -> tuple[list[dict[str, Any]], int]:
    """Rows -> examples, and how many texts had to be shortened. With a recipe, weighted and repeated as it says.

    Args:
        branched: several questions on one text are one example.
    """
    weights = None
    if recipe and recipe.sampling == "rare":
        rows = rows.take(repeat_rare(rows.truth, recipe.seed))
    if recipe and recipe.label_weights != "none":
        weights = label_weights(rows.truth, recipe.label_weights).tolist()
    examples: list[dict[str, Any]] = []
    n_cut = 0
    for text, vector in zip(rows.texts, rows.truth, strict=True):
        questions = encoder.rows(text, encoder.label_set.names_of(vector))
        n_cut += any(row.n_cut for row in questions)
        text_weight = recipe.text_loss_weight if recipe else 0.0
        if branched and len(questions) > 1:
            examples.append(encoder.branched_example(questions, weights, text_weight))
        else:
            examples += [encoder.training_example(row, weights, text_weight) for row in questions]
    if examples and "weights" in examples[0]:
        # The mean weight of what is learnt is 1: the learning rate means what it means without weights.
        learnt = [w for e in examples for w, label in zip(e["weights"], e["labels"], strict=True) if label != -100]
        mean = sum(learnt) / len(learnt)
        examples = [example | {"weights": [w / mean for w in example["weights"]]} for example in examples]
    return examples, n_cut


def _mean_rest(encoder: "Encoder", examples: list[dict[str, list[int]]]) -> float:
    return sum(len(example["input_ids"]) for example in examples) / len(examples) - len(encoder.prefix_ids)


def _use_all_cores() -> None:
    """Let one process on a machine without a GPU use every core: `accelerate launch` would give it a single thread."""
    import torch

    if not torch.cuda.is_available() and os.environ.get("WORLD_SIZE", "1") == "1":
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(allowed or 1)


def _scorer(recipe: Recipe, encoder: "Encoder", rows: data.Rows | None) -> Callable[[Any], dict[str, float]] | None:
    """What the trainer calls at each evaluation: generate for the rows, and score what comes out."""
    if rows is None:
        return None

    def scorer(model: Any) -> dict[str, float]:
        predictions = predict.predict_texts(model, encoder, rows.texts, decode=recipe.decode)
        metrics = score(rows.truth, predict.pred_matrix(predictions), encoder.label_set.names)
        figures = {name: metrics[name] for name in ("f1_macro", "f1_micro", "jaccard_samples")}
        figures["parse_failure"] = predict.parse_audit(predictions)["parse_failure"]
        return figures | {f"f1/{name}": label["f1"] for name, label in metrics["per_label"].items()}

    return scorer


def _final_score(recipe: Recipe, encoder: "Encoder", model: Any, rows: data.Rows, batch_size: int) -> dict[str, Any]:
    """Generate for all rows that are held out, keep what came out, print the table, and give the figures back."""
    names, gold = encoder.label_set.names, rows.truth
    n_questions = len(rows) * len(encoder.question_ids)
    with progress_bar("Generating", n_questions) as advance:
        predictions = predict.predict_texts(
            model, encoder, rows.texts, decode=recipe.decode, batch_size=batch_size, progress=advance
        )
    with progress_bar("Probabilities", n_questions) as advance:
        prob = predict.predict_prob(model, encoder, rows.texts, how=recipe.prob, progress=advance)
    pred = predict.pred_matrix(predictions)
    try:
        # The thresholds that are kept rest on all of these rows; what they are worth is said by nested ones.
        folds = data.make_folds(rows, 5, recipe.seed)
    except ValueError:
        folds = None  # too few rows
    folder, label_set = recipe.output_dir, encoder.label_set
    results.write_jsonl(folder / results.PREDICTIONS, rows, pred, prob, label_set, predictions, folds)
    results.write_thresholds(folder, tune_thresholds(gold, prob), label_set)
    metrics = evaluate(gold, pred, prob, folds, names)
    show_metrics(metrics)
    return metrics | {"parse": predict.parse_audit(predictions)}


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
    import yaml

    files = {
        predict.RECIPE: task.recipe.to_yaml(
            prompt=predict.PROMPT, labels=predict.LABELS, output_dir=str(folder), resume_from_checkpoint=None
        ),
        predict.PROMPT: task.prompt.source,
        predict.LABELS: yaml.safe_dump(task.label_set.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
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
