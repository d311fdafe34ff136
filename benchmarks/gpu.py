"""Training and decoding speed on a GPU, beside stock TRL and transformers.

    python benchmarks/gpu.py [--shapes NAME ...] [--precisions bf16 nf4] [--instructions short long] [--json FILE]

The models have the shapes of the recipes' models and random weights, so that no Hub is needed: speed does not depend on
the values of weights. Each measurement has a process of its own. Peers: TRL's `SFTTrainer` with equal batches, and
`model.generate` constrained by xgrammar, if that is installed. A measurement that fails, as without enough memory, is
shown as such. Without a GPU, the shape `tiny` runs on the CPU in fp32, which shows that the script works.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    ROOT,
    benchmark_recipe,
    console,
    enable_shared_prefix,
    is_installed,
    necessary_flops,
    print_table,
    run_child,
    seconds,
    versions,
    write_json,
    write_result,
)
from datasets import Dataset
from decode_speed import transformers_answer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from train_speed import Clock
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config
from trl import SFTTrainer, get_peft_config

from emogen.model.decode import generate
from emogen.model.encode import load_encoder
from emogen.model.loading import load_model, to_device, use_all_cores
from emogen.model.onednn import use_onednn
from emogen.model.tokenizer import load_chat_tokenizer
from emogen.task.task import load_task_with_rows
from emogen.training.sft import EmogenTrainer, encode_rows

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES: dict[str, PretrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
    "1.5B": Qwen2Config(  # Qwen2.5-1.5B
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "3B": LlamaConfig(  # Llama 3.2 3B
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "14B": Qwen2Config(  # Qwen2.5-14B
        vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
PRECISIONS = ("bf16", "nf4")
SYSTEMS = ("emogen", "stock")
BATCH = 16  # rows of a micro-batch, which is a step
WARM_UP, STEPS = 2, 6  # the steps before the clock starts, and those that are timed
N_TEXTS = 256  # texts that are answered, in batches of DECODE_BATCH
DECODE_BATCH = 64
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def make_model(shape: str, folder: Path) -> None:
    """Write a model of random weights in bf16, and a tokenizer that is trained on the sample posts and prompts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = [*sorted((ROOT / "prompts").rglob("*.*")), ROOT / "sample" / "train.csv"]
    bpe.train_from_iterator([file.read_text(encoding="utf-8") for file in files if file.is_file()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
    model.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- one measurement


def child(args: argparse.Namespace) -> None:
    """Train for a few steps, then answer texts, with one system; write speeds and peaks of memory."""
    use_all_cores()
    on_gpu = torch.cuda.is_available()
    overrides = ["lora_r=16", "gradient_checkpointing=true"]
    if on_gpu:
        overrides += ["dtype=bfloat16", "bf16=true", f"load_in_4bit={str(args.precision == 'nf4').lower()}"]
    recipe = benchmark_recipe(str(args.model), args.instruction, *overrides)
    task, splits, _ = load_task_with_rows(recipe)
    encoder = load_encoder(task)
    n_prefix, lm_config = len(encoder.prefix_ids), recipe.lm_config()
    examples, _ = encode_rows(encoder, splits.train, branched=False)
    model = to_device(load_model(str(args.model), lm_config))
    config = model.config.get_text_config()
    trainer_class, own = SFTTrainer, {}
    if args.system == "emogen":
        use_onednn(model)
        enable_shared_prefix(model)
        trainer_class, own = EmogenTrainer, {"n_prefix": n_prefix}
    clock = Clock()
    settings = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    settings |= {"max_steps": WARM_UP + args.steps, "per_device_train_batch_size": BATCH}
    settings |= {"gradient_accumulation_steps": 1, "train_sampling_strategy": "random"}
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
    train_seconds = clock.moments[-1] - clock.moments[WARM_UP - 1]
    n_rest = sum(len(example["input_ids"]) for example in examples) / len(examples) - n_prefix - 1
    n_answer = sum(label != -100 for example in examples for label in example["labels"]) / len(examples)
    result: dict[str, Any] = {
        "train_rows_per_second": args.steps * BATCH / train_seconds,
        "losses": clock.losses,
        "train_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "train_flops_per_row": necessary_flops(config, n_prefix / BATCH, n_rest, n_answer, train_rank=lm_config.lora_r),
        "n_prefix": n_prefix,
        "n_rest": n_rest,
    }  # fmt: skip
    trained = trainer.model.eval()
    suffixes = [encoder.rows(text)[0].suffix_ids for text in splits.train.texts]
    suffixes = (suffixes * (args.texts // len(suffixes) + 1))[: args.texts]
    if args.system == "emogen":
        answer = partial(generate, trained, encoder, batch_size=DECODE_BATCH)
    elif is_installed("xgrammar"):
        answer = in_batches(transformers_answer("xgrammar", trained, encoder, load_chat_tokenizer(recipe)))
    else:
        answer = None
    if answer is not None:
        answer(suffixes[:DECODE_BATCH])  # warms up
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        result["texts_per_second"] = len(suffixes) / seconds(lambda: answer(suffixes))
        result["decode_peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else 0
    write_result(args.out, **result)


def in_batches(answer: Any) -> Any:
    """A function of one batch, as a function of many texts, which go in batches of similar length."""

    def all_texts(suffixes: Sequence[list[int]]) -> None:
        ordered = sorted(suffixes, key=len)
        for start in range(0, len(ordered), DECODE_BATCH):
            answer(ordered[start : start + DECODE_BATCH])

    return all_texts


# ---------------------------------------------------------------------------------------------- all measurements


def device_peak() -> dict[str, Any]:
    """The device, and the peak rate of bf16 matrix products on it, in FLOP/s; of fp32 ones on a CPU."""
    on_gpu = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device="cuda" if on_gpu else "cpu")

    def product() -> None:
        a @ a
        if on_gpu:
            torch.cuda.synchronize()

    product()
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    return {"device": name, "gemm_peak": 2 * size**3 / min(seconds(product) for _ in range(10))}


def table_row(case: str, runs: dict[str, dict[str, Any]], peak: float) -> list[str]:
    """The line of the table for one case: both systems and their ratios."""
    own, stock = runs["emogen"], runs["stock"]
    if "failed" in own or "failed" in stock:
        failures = [f"{name}: {run['failed']}" for name, run in runs.items() if "failed" in run]
        return [case, "; ".join(failures)[:60], *[""] * 6]

    def pair(key: str, digits: int = 1, unit: float = 1) -> str:
        return " / ".join(f"{run[key] / unit:,.{digits}f}" if key in run else "-" for run in (own, stock))

    def ratio(key: str) -> str:
        return f"{own[key] / stock[key]:.1f}×" if key in own and key in stock else "-"

    share = own["train_rows_per_second"] * own["train_flops_per_row"] / peak
    return [
        case,
        pair("train_rows_per_second"),
        ratio("train_rows_per_second"),
        f"{share:.0%}",
        pair("train_peak_bytes", unit=2**30),
        pair("texts_per_second"),
        ratio("texts_per_second"),
        pair("decode_peak_bytes", unit=2**30),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    shapes = ["1.5B", "3B", "14B"] if on_gpu else ["tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes, help=f"default: {' '.join(shapes)}")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS if on_gpu else ["bf16"])
    parser.add_argument("--instructions", nargs="+", choices=["short", "long"], default=["short", "long"])
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"steps that are timed (default {STEPS})")
    parser.add_argument("--texts", type=int, default=N_TEXTS, metavar="N", help=f"texts answered (default {N_TEXTS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    for name in ("--system", "--precision", "--instruction"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--model", "--out"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.system:
        child(args)
        return
    result: dict[str, Any] = {**device_peak(), "batch": BATCH, "steps": args.steps, "texts": args.texts}
    result |= {"versions": versions(*PACKAGES), "runs": {}}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            make_model(shape, Path(folder))
            torch.cuda.empty_cache()
            for precision in args.precisions:
                for instruction in args.instructions:
                    case = f"{shape}, {precision}, {instruction}"
                    result["runs"][case] = {
                        system: measure(system, folder, precision, instruction, args) for system in SYSTEMS
                    }
                    write_json(args.json, result)
    unit = result["gemm_peak"] / 1e12
    header = ["model, precision, instruction", "train rows/s", "ratio", "of the peak", "train GiB", "texts/s", "ratio"]
    rows = [table_row(case, runs, result["gemm_peak"]) for case, runs in result["runs"].items()]
    title = f"{result['device']}, {unit:,.1f} TFLOP/s; emogen / stock"
    print_table(title, [*header, "decode GiB"], rows)


def measure(system: str, model: str, precision: str, instruction: str, args: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a process of its own, or why it failed."""
    console.print(f"  {Path(model).name}: {precision}, {instruction}, {system}")
    words = ["--system", system, "--model", model, "--precision", precision, "--instruction", instruction]
    try:
        return run_child(__file__, *words, "--steps", str(args.steps), "--texts", str(args.texts))
    except RuntimeError as error:
        console.print(str(error))
        return {"failed": str(error).strip().splitlines()[-1]}


if __name__ == "__main__":
    main()
