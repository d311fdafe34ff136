"""Answer prompts with llama.cpp, one after another. `decode_speed.py` runs this in an environment without emogen.

python benchmarks/llama_cpp_worker.py TASK.json --out FILE
"""

import argparse
import json
import resource
import time
from pathlib import Path

from llama_cpp import Llama, LlamaGrammar


def main() -> None:
    """Read the task, answer all prompts under its grammar, and write answers, time and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="JSON with gguf, gbnf, prompts (token ids), max_tokens, threads")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    task = json.loads(args.task.read_text(encoding="utf-8"))
    model = Llama(task["gguf"], n_ctx=2048, n_threads=task["threads"], verbose=False)
    grammar = LlamaGrammar.from_string(task["gbnf"], verbose=False)

    def answer(ids: list[int]) -> str:
        done = model.create_completion(ids, grammar=grammar, temperature=0.0, max_tokens=task["max_tokens"])
        return done["choices"][0]["text"].strip()

    answer(task["prompts"][0])  # puts the instruction into llama.cpp's cache
    started = time.perf_counter()
    answers = [answer(ids) for ids in task["prompts"]]
    taken = time.perf_counter() - started
    peak_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    result = {"texts": len(answers), "seconds": taken, "texts_per_second": len(answers) / taken, "answers": answers}
    args.out.write_text(json.dumps(result | {"peak_mb": peak_mb}), encoding="utf-8")


if __name__ == "__main__":
    main()
