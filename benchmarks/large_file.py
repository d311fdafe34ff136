"""Prediction on large files: time and peak memory of `emogen predict`, by the number of rows.

    python benchmarks/large_file.py [--rows 1000 10000 100000] [--json FILE]

The sample posts again and again, numbered; a model of random weights that is small enough (two layers of width 64) for
what is measured to be reading, encoding, decoding under the grammar, and writing.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, machine, print_table, versions, write_json

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # whose tokenizer it has


def make_recipe(folder: Path) -> Path:
    """A recipe for a small model, which is written there."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from emogen.model import sources, tokenizer

    location = sources.locate(MODEL)
    tokenizer = tokenizer.load_tokenizer(location)
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
    recipe.write_text(f"model_name_or_path: {folder / 'model'}\ntrain_file: sample/train.csv\nmax_length: 256\n")
    return recipe


def write_posts(path: Path, n_rows: int) -> None:
    """So many rows of the sample posts, each with an id and a number of its own."""
    with (ROOT / "sample" / "train.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["Tweet"] for row in csv.DictReader(file)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "Tweet"])
        writer.writerows((f"r{i}", f"{texts[i % len(texts)]} {i}") for i in range(n_rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    args = parser.parse_args()
    table, runs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = make_recipe(folder)
        for n_rows in args.rows:
            source, output = folder / f"{n_rows}.csv", folder / f"{n_rows}-labels.csv"
            write_posts(source, n_rows)
            command = [sys.executable, "-m", "emogen.cli", "predict", str(recipe), str(source), "-o", str(output)]
            started = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            n_written = sum(1 for _ in output.open(encoding="utf-8")) - 1
            if status or n_written != n_rows:
                sys.exit(f"{n_rows:,} rows: exit status {status}, {n_written:,} rows written")
            megabytes = usage.ru_maxrss / 1024
            runs.append({"rows": n_rows, "seconds": seconds, "peak_megabytes": megabytes})
            table.append([f"{n_rows:,}", f"{seconds:.0f}", f"{n_rows / seconds:.0f}", f"{megabytes:,.0f}"])
    print_table("emogen predict, a file of any size", ["rows", "seconds", "rows/s", "peak MB"], table)
    packages = versions("torch", "transformers", "emogen")
    write_json(args.json, {"machine": machine(), "versions": packages, "runs": runs})


if __name__ == "__main__":
    main()
