"""How fast training is: emogen against TRL's own `SFTTrainer`.

    python benchmarks/train_speed.py [--json FILE] [--quick]

The same model, rows and hyperparameters; each run in a process of its own, in alternating order; medians. TRL runs at
the settings that were fastest for it here: micro-batches of 4 rows of like length, no gradient checkpointing, the
default loss (which never holds all logits).
"""

import argparse
import tempfile
import time
from typing import Any

from common import (
    MODEL,
    alternate,
    begin,
    median,
    print_table,
    recipe_of,
    run_child,
    useful_flops,
    versions,
    write_json,
    write_result,
)

BATCH = 16  # rows an optimizer step
# How many rows TRL and emogen are timed on, after one micro-batch (TRL) or step (emogen) to warm up.
ROWS = {"short": {"trl": 48, "emogen": 160}, "long": {"trl": 16, "emogen": 96}}
QUICK = {"short": {"trl": 16, "emogen": 48}, "long": {"trl": 4, "emogen": 32}}
GROWTH = (64, 128, 256, 512, 1024)  # tokens of instruction


def child(args: argparse.Namespace) -> None:
    """Train for a few steps with one system, and leave how long they took."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTTrainer, get_peft_config

    from emogen.model import loading, sources
    from emogen.model.encode import load_encoder
    from emogen.model.loading import use_all_cores
    from emogen.model.shared_prefix import share_prefix
    from emogen.task.task import load_task
    from emogen.train import _encode
    from emogen.training.sft import EmogenTrainer

    class Clock(TrainerCallback):
        """The moments at which a (micro-)step was done."""

        def __init__(self) -> None:
            self.moments: list[float] = []
            self.losses: list[float] = []

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            self.moments.append(time.perf_counter())

        on_step_end = on_substep_end

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(logs["loss"])

    use_all_cores()
    micro = BATCH if args.system == "emogen" else 4
    recipe = recipe_of(
        args.instruction or "short", f"load_in_4bit={str(args.precision == 'nf4').lower()}", "max_length=2048"
    )
    task = load_task(recipe)
    location = sources.locate(recipe.model_name, "main")
    encoder, _ = load_encoder(task, location)
    examples, _ = _encode(encoder, task.splits.train)
    n_prefix = len(encoder.prefix_ids)
    if args.prefix:  # an instruction of just this many tokens: the same one, repeated or cut
        filler = (encoder.prefix_ids * (args.prefix // n_prefix + 1))[: args.prefix]
        cut = n_prefix
        n_prefix = args.prefix
        examples = [
            {"input_ids": filler + e["input_ids"][cut:], "labels": [-100] * n_prefix + e["labels"][cut:]}
            for e in examples
        ]
    rows = (args.rows + (BATCH if args.system == "emogen" else micro) - 1) // micro * micro
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "max_steps": max(1, (rows + BATCH) // BATCH),
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": BATCH // micro,
            "train_sampling_strategy": "random" if args.system == "emogen" else "group_by_length",
            "eval_strategy": "no",
            "save_strategy": "no",
            "logging_steps": 1,
            "max_length": None,
            "disable_tqdm": True,
        }
        model = loading.load_model(location, recipe.lm_config())
        trainer_class, more = SFTTrainer, {}
        if args.system == "emogen":
            assert share_prefix(model)
            trainer_class, more = EmogenTrainer, {"n_prefix": n_prefix}
        clock = Clock()
        trainer = trainer_class(
            model=model,
            args=recipe.sft_config(**settings),
            train_dataset=Dataset.from_list(examples),
            processing_class=encoder.tokenizer,
            peft_config=get_peft_config(recipe.lm_config()),
            callbacks=[clock],
            **more,
        )
        trainer.train()
    moments = clock.moments[: 1 + rows // micro]
    timed = len(moments) - 1
    n_rest = sum(len(e["input_ids"]) for e in examples) / len(examples) - n_prefix - 1
    n_answer = sum(sum(label != -100 for label in e["labels"]) for e in examples) / len(examples)
    write_result(
        args.out,
        rows=timed * micro,
        seconds=moments[-1] - moments[0],
        rows_per_second=timed * micro / (moments[-1] - moments[0]),
        first_loss=clock.losses[0],
        flops_per_row=useful_flops(model.config, n_prefix / BATCH, n_rest, n_answer, train_rank=16),
        n_prefix=n_prefix,
        n_rest=n_rest,
        threads=torch.get_num_threads(),
    )


def compare(instruction: str, precision: str, rows: dict[str, int], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Runs of both systems: {system: [measurement]}."""
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], "emogen": []}
    for system in alternate(list(runs), repeats, f"{instruction} {precision}"):
        options = ["--system", system, "--instruction", instruction, "--precision", precision]
        runs[system].append(run_child(__file__, *options, "--rows", str(rows[system])))
    return runs


def growth(quick: bool) -> list[dict[str, Any]]:
    """emogen's rows/s as the instruction grows."""
    lengths = GROWTH[::2] if quick else GROWTH
    rows = 32 if quick else 96
    return [
        run_child(
            __file__, "--system", "emogen", "--instruction", "short", "--rows", str(rows), "--prefix", str(length)
        )
        for length in lengths
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all measurements there; a run that was cut short goes on")
    parser.add_argument("--quick", action="store_true", help="under five minutes: one run each, fp32 only")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system (default 3)")
    for name in ("--system", "--instruction", "--precision", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--rows", "--prefix"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.system:
        child(args)
        return

    repeats, rows = (1, QUICK) if args.quick else (args.repeats, ROWS)
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "emogen")
    result = begin(args.json, args.quick, model=MODEL, batch=BATCH, versions=versions(*names))
    peak = result["machine"]["gemm_peak"]
    table = []
    for precision in ("fp32",) if args.quick else ("fp32", "nf4"):
        for instruction in rows:
            case = f"{instruction} {precision}"
            if case not in result["runs"]:
                result["runs"][case] = compare(instruction, precision, rows[instruction], repeats)
            runs = result["runs"][case]
            ratio = median(runs["emogen"], "rows_per_second") / median(runs["trl"], "rows_per_second")
            memory = median(runs["emogen"], "peak_mb") / median(runs["trl"], "peak_mb")
            result["ratio"][case] = {"rows_per_second": round(ratio, 2), "peak_mb": round(memory, 2)}
            write_json(args.json, result)  # after each case: a run that is cut short has not been for nothing
            for system, of_system in runs.items():
                speed = median(of_system, "rows_per_second")
                share = speed * of_system[0]["flops_per_row"] / peak
                table.append(
                    [
                        f"{instruction} ({of_system[0]['n_prefix']} tokens), {precision}: {system}",
                        f"{speed:.2f}",
                        f"{ratio:.1f}x" if system == "emogen" else "",
                        f"{median(of_system, 'peak_mb') / 1024:.1f}",
                        f"{share:.0%}",
                    ]
                )
    print_table(
        f"Training, {MODEL}, LoRA r 16, batches of {BATCH}; peak {peak / 1e9:.0f} GFLOP/s",
        ["instruction, precision: system", "rows/s", "ratio", "peak GB", "of GEMM peak"],
        table,
    )
    result["growth"] = growth(args.quick)
    print_table(
        "As the instruction grows (emogen, fp32)",
        ["tokens of instruction", "rows/s", "peak GB"],
        [[str(r["n_prefix"]), f"{r['rows_per_second']:.2f}", f"{r['peak_mb'] / 1024:.1f}"] for r in result["growth"]],
    )
    write_json(args.json, result)


if __name__ == "__main__":
    main()
