"""Time and peak memory of `emogen predict`, by the number of rows of the file.

    python benchmarks/large_file.py [--rows 1000 10000 100000] [--model NAME_OR_FOLDER] [--json FILE]

The file repeats the sample posts, each with a number. The model has random weights, two layers and a width of 64, so
that the time is that of reading, encoding, decoding under the grammar, and writing.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import MODEL, ROOT, machine, model_name, print_table, versions, write_json
from transformers import AutoModelForCausalLM, LlamaConfig

from emogen.model.sources import locate
from emogen.model.tokenizer import load_tokenizer


def make_recipe(folder: Path, model: str) -> Path:
    """Write a small model with the tokenizer of `model`, and a recipe for it."""
    tokenizer = load_tokenizer(locate(model))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    recipe = folder / "small.yaml"
    recipe.write_text(f"model_name_or_path: {folder / 'model'}\ntrain_file: sample/train.csv\nmax_length: null\n")
    return recipe


def write_posts(path: Path, n_rows: int) -> None:
    """Write `n_rows` sample posts, each with an id and a number of its own."""
    with (ROOT / "sample" / "train.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["Tweet"] for row in csv.DictReader(file)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "Tweet"])
        writer.writerows((f"r{i}", f"{texts[i % len(texts)]} {i}") for i in range(n_rows))


def predict(recipe: Path, source: Path, output: Path) -> tuple[float, float]:
    """Run `emogen predict` in a process of its own.

    Returns:
        Its wall time in seconds, and the peak of its resident memory in MB.
    """
    command = [sys.executable, "-m", "emogen.cli", "predict", str(recipe), str(source), "-o", str(output)]
    log = output.with_suffix(".log")
    with log.open("w", encoding="utf-8") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return seconds, usage.ru_maxrss / 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Predict files of growing size and print time and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000], metavar="N")
    parser.add_argument("--model", type=model_name, default=MODEL, help=f"whose tokenizer is used (default {MODEL})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    args = parser.parse_args(argv)
    table, runs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = make_recipe(folder, args.model)
        for n_rows in args.rows:
            source, output = folder / f"{n_rows}.csv", folder / f"{n_rows}-labels.csv"
            write_posts(source, n_rows)
            seconds, megabytes = predict(recipe, source, output)
            with output.open(encoding="utf-8") as lines:
                n_written = sum(1 for _ in lines) - 1
            if n_written != n_rows:
                sys.exit(f"{n_rows:,} rows read, but {n_written:,} written")
            runs.append({"rows": n_rows, "seconds": seconds, "peak_megabytes": megabytes})
            table.append([f"{n_rows:,}", f"{seconds:.0f}", f"{n_rows / seconds:.0f}", f"{megabytes:,.0f}"])
    print_table("emogen predict, by the size of the file", ["rows", "seconds", "rows/s", "peak MB"], table)
    packages = versions("torch", "transformers")
    write_json(args.json, {"machine": machine(), "versions": packages, "runs": runs})


if __name__ == "__main__":
    main()
