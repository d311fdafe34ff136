"""Training speed of emogen and of TRL's own `SFTTrainer`, on a CPU.

    python benchmarks/train_speed.py [--model NAME_OR_FOLDER] [--rows N] [--repeats N] [--json FILE] [--quick]

Both systems train the same model on the same rows with the same hyperparameters. Each run has a process of its own; the
systems alternate; the table shows medians.

TRL runs with the settings that were fastest for it in README.md: micro-batches of 4 rows of similar length, no gradient
checkpointing, and the default loss, which never holds all logits.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import (
    MODEL,
    alternate,
    benchmark_recipe,
    enable_shared_prefix,
    median,
    model_name,
    necessary_flops,
    print_table,
    resize_instruction,
    run_child,
    speed_parser,
    start_or_resume,
    versions,
    write_json,
    write_result,
)
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTTrainer, get_peft_config

from emogen.model.encode import load_encoder
from emogen.model.loading import load_model, use_all_cores
from emogen.model.sources import locate
from emogen.model.tokenizer import load_chat_tokenizer
from emogen.task.task import load_task_with_rows
from emogen.training.sft import EmogenTrainer, encode_rows

BATCH = 16  # rows of an optimizer step
MICRO_BATCH = {"trl": 4, "emogen": BATCH}
# The number of rows that each system is timed on, after a micro-batch to warm up.
ROWS = {"short": {"trl": 48, "emogen": 160}, "long": {"trl": 16, "emogen": 96}}
QUICK_ROWS = {"short": {"trl": 16, "emogen": 48}, "long": {"trl": 4, "emogen": 32}}
GROWTH_TOKENS = (64, 128, 256, 512, 1024)  # lengths of the instruction
GROWTH_ROWS = 96
QUICK_GROWTH_ROWS = 32
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")

# ---------------------------------------------------------------------------------------------- one run


class Clock(TrainerCallback):
    """Records the time at the end of each micro-batch, and the loss of each step."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.losses: list[float] = []

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.moments.append(time.perf_counter())

    on_step_end = on_substep_end

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def child(args: argparse.Namespace) -> None:
    """Train for a few steps with one system and write the measurements."""
    use_all_cores()
    recipe = benchmark_recipe(args.model, args.instruction, f"load_in_4bit={str(args.precision == 'nf4').lower()}")
    task, splits, _ = load_task_with_rows(recipe)
    location = locate(recipe.model_name)
    encoder = load_encoder(task, location)
    if args.prefix:
        encoder = resize_instruction(encoder, args.prefix)
    examples, _ = encode_rows(encoder, splits.train, branched=False)
    lm_config, n_prefix = recipe.lm_config(), len(encoder.prefix_ids)
    model = load_model(location, lm_config)
    micro_batch = MICRO_BATCH[args.system]
    n_micro_batches = -(-args.rows // micro_batch)
    settings = {
        "max_steps": (n_micro_batches * micro_batch + BATCH) // BATCH,  # one micro-batch more than is timed
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": BATCH // micro_batch,
        "train_sampling_strategy": "random" if args.system == "emogen" else "group_by_length",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    trainer_class, own = SFTTrainer, {}
    if args.system == "emogen":
        enable_shared_prefix(model)
        trainer_class, own = EmogenTrainer, {"n_prefix": n_prefix}
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            args=recipe.sft_config(output_dir=folder, **settings),
            train_dataset=Dataset.from_list(examples),
            processing_class=load_chat_tokenizer(recipe),
            peft_config=get_peft_config(lm_config),
            callbacks=[clock],
            **own,
        )
        trainer.train()
    taken = clock.moments[n_micro_batches] - clock.moments[0]
    n_rows = n_micro_batches * micro_batch
    # The last token of a row predicts nothing.
    n_rest = sum(len(example["input_ids"]) for example in examples) / len(examples) - n_prefix - 1
    n_answer = sum(label != -100 for example in examples for label in example["labels"]) / len(examples)
    config, rank = model.config.get_text_config(), lm_config.lora_r
    write_result(
        args.out,
        rows=n_rows,
        seconds=taken,
        rows_per_second=n_rows / taken,
        first_loss=clock.losses[0],
        flops_per_row=necessary_flops(config, n_prefix / BATCH, n_rest, n_answer, train_rank=rank),
        n_prefix=n_prefix,
        n_rest=n_rest,
        threads=torch.get_num_threads(),
    )


# ---------------------------------------------------------------------------------------------- all runs


def compare(model: str, instruction: str, precision: str, rows: dict[str, int], repeats: int) -> dict[str, Any]:
    """Run both systems: {system: [measurements of a run, ...]}."""
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in MICRO_BATCH}
    for system in alternate(list(runs), repeats, f"{instruction} {precision}"):
        options = ["--system", system, "--instruction", instruction, "--precision", precision]
        runs[system].append(run_child(__file__, "--model", model, *options, "--rows", str(rows[system])))
    return runs


def table_rows(case: str, runs: dict[str, Any], ratio: float, peak: float) -> list[list[str]]:
    """The lines of the table for one instruction and precision."""
    instruction, precision = case.split()
    lines = []
    for system, measured in runs.items():
        speed = median(measured, "rows_per_second")
        lines.append(
            [
                f"{instruction} ({measured[0]['n_prefix']} tokens), {precision}: {system}",
                f"{speed:.2f}",
                f"{ratio:.1f}x" if system == "emogen" else "",
                f"{median(measured, 'peak_mb') / 1024:.1f}",
                f"{speed * measured[0]['flops_per_row'] / peak:.0%}",
            ]
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Compare both systems, then measure emogen with instructions of growing length."""
    parser = speed_parser(__doc__)
    parser.add_argument("--model", type=model_name, default=MODEL, help=f"the model to train (default {MODEL})")
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.system:
        child(args)
        return

    repeats, rows = (1, QUICK_ROWS) if args.quick else (args.repeats, ROWS)
    if args.rows:
        rows = {instruction: dict.fromkeys(MICRO_BATCH, args.rows) for instruction in ROWS}
    packages = versions(*PACKAGES)
    result = start_or_resume(args.json, model=args.model, batch=BATCH, rows=rows, repeats=repeats, versions=packages)
    peak = result["machine"]["gemm_peak"]
    table = []
    for precision in ("fp32",) if args.quick else ("fp32", "nf4"):
        for instruction in rows:
            case = f"{instruction} {precision}"
            if case not in result["runs"]:
                result["runs"][case] = compare(args.model, instruction, precision, rows[instruction], repeats)
            runs = result["runs"][case]
            measures = ("rows_per_second", "peak_mb")
            ratio = {key: median(runs["emogen"], key) / median(runs["trl"], key) for key in measures}
            result["ratio"][case] = {key: round(value, 2) for key, value in ratio.items()}
            write_json(args.json, result)  # after each case, so that an interrupted benchmark can resume
            table += table_rows(case, runs, ratio["rows_per_second"], peak)
    print_table(
        f"Training, {args.model}, LoRA r 16, batches of {BATCH}; peak {peak / 1e9:.0f} GFLOP/s",
        ["instruction, precision: system", "rows/s", "ratio", "peak GB", "of GEMM peak"],
        table,
    )
    n_rows = args.rows or (QUICK_GROWTH_ROWS if args.quick else GROWTH_ROWS)
    result["growth"] = []
    for length in GROWTH_TOKENS[::2] if args.quick else GROWTH_TOKENS:
        options = ["--system", "emogen", "--rows", str(n_rows), "--prefix", str(length)]
        result["growth"].append(run_child(__file__, "--model", args.model, *options))
    print_table(
        "Instructions of growing length (emogen, fp32)",
        ["tokens of instruction", "rows/s", "peak GB"],
        [[str(r["n_prefix"]), f"{r['rows_per_second']:.2f}", f"{r['peak_mb'] / 1024:.1f}"] for r in result["growth"]],
    )
    write_json(args.json, result)


if __name__ == "__main__":
    main()
