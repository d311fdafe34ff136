"""Texts per second and latency of `emogen serve` beside a llama.cpp server.

    python benchmarks/serving.py EXPORT_DIR [--clients 1 8 64] [--seconds 20] [--json FILE]

EXPORT_DIR is made by `emogen export RUN_DIR --to gguf`. Both servers answer with the same model and grammar on the same
cores, one after the other; llama.cpp keeps the instruction in its cache and has a slot for each client, up to 8. Each
client sends one text, waits for its labels, and sends the next (a closed loop). LLAMA_SERVER names the program, unless
`llama-server` is on the path.
"""

import argparse
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from common import ROOT, machine, print_table, versions, write_json

from emogen.exporting.llama_cpp import llama_server
from emogen.prediction.ensemble import load_run
from emogen.task.parse import parse_answer
from emogen.task.readers import read_rows
from emogen.task.rows import checked

Ask = Callable[[httpx.Client, int], tuple[str, ...]]  # a client's request for text number k -> its labels


@contextmanager
def emogen_server(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """`emogen serve` in a process of its own; yields the process and its address."""
    command = [sys.executable, "-m", "emogen.cli.__main__", "serve", str(folder), "--port", "0", "--decide", "answer"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found = next((m for line in process.stderr if (m := re.search(r"at (http://\S+:\d+);", line))), None)
        if found is None:
            raise RuntimeError(f"emogen serve {folder} did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, found[1]
    finally:
        process.terminate()
        process.wait()


def closed_loop(base: str, ask: Ask, n_texts: int, n_clients: int, seconds: float) -> dict[str, Any]:
    """Let clients ask one after another for some seconds.

    Returns:
        `texts_per_second`, `median_ms` and `p95_ms` of a request, and the labels of each text that was answered.
    """
    latencies: list[float] = []
    labels: dict[int, tuple[str, ...]] = {}
    deadline = time.perf_counter() + seconds

    def client(k: int) -> None:
        with httpx.Client(base_url=base, timeout=120) as connection:
            while time.perf_counter() < deadline:
                started = time.perf_counter()
                found = ask(connection, k % n_texts)
                latencies.append(time.perf_counter() - started)
                labels[k % n_texts] = found
                k += n_clients

    threads = [threading.Thread(target=client, args=(k,)) for k in range(n_clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - started
    return {
        "texts_per_second": len(latencies) / taken,
        "median_ms": statistics.median(latencies) * 1000,
        "p95_ms": sorted(latencies)[int(0.95 * (len(latencies) - 1))] * 1000,
        "labels": labels,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="EXPORT_DIR", help="the folder of an export to GGUF")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="clients at a time")
    parser.add_argument("--seconds", type=float, default=20.0, help="time of each measurement (default 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to FILE")
    args = parser.parse_args(argv)
    loaded: Any = load_run(args.folder)
    encoder, label_set = loaded.encoder, loaded.label_set
    texts = checked(read_rows(str(ROOT / "sample" / "test.csv"), label_set)).texts
    prompts = [[*encoder.prefix_ids, *encoder.rows(text)[0].suffix_ids] for text in texts]
    grammar = (args.folder / "answer.gbnf").read_text(encoding="utf-8")
    n_answer = encoder.grammar.max_length

    def ask_emogen(client: httpx.Client, k: int) -> tuple[str, ...]:
        response = client.post("/v1/classify", json={"texts": [texts[k]], "probabilities": False}).raise_for_status()
        return tuple(response.json()["results"][0]["labels"])

    def ask_llama_cpp(client: httpx.Client, k: int) -> tuple[str, ...]:
        body = {
            "prompt": prompts[k],
            "grammar": grammar,
            "n_predict": n_answer,
            "temperature": 0.0,
            "cache_prompt": True,
        }
        answer = client.post("/completion", json=body).raise_for_status().json()["content"].strip()
        return parse_answer(answer, label_set, style=loaded.recipe.answer).labels

    result: dict[str, Any] = {"machine": machine(), "versions": versions("torch", "fastapi", "uvicorn"), "runs": {}}
    rows = []
    for n_clients in args.clients:
        with emogen_server(args.folder) as (_, base):
            own = closed_loop(base, ask_emogen, len(texts), n_clients, args.seconds)
        with llama_server(args.folder / "model.gguf", max(map(len, prompts)) + n_answer, min(n_clients, 8)) as server:
            theirs = closed_loop(server.base, ask_llama_cpp, len(texts), n_clients, args.seconds)
        both = own["labels"].keys() & theirs["labels"].keys()
        same = sum(own["labels"][k] == theirs["labels"][k] for k in both)
        for found in (own, theirs):
            del found["labels"]
        result["runs"][str(n_clients)] = {"emogen": own, "llama.cpp": theirs, "same_labels": [same, len(both)]}
        ratio = own["texts_per_second"] / theirs["texts_per_second"]
        rows.append(
            [
                str(n_clients),
                *(
                    f"{found[key]:,.1f}"
                    for key in ("texts_per_second", "median_ms", "p95_ms")
                    for found in (own, theirs)
                ),
                f"{ratio:.1f}×",
                f"{same} of {len(both)}",
            ]
        )
    write_json(args.json, result)
    header = [
        "clients",
        "texts/s",
        "llama.cpp",
        "median ms",
        "llama.cpp",
        "p95 ms",
        "llama.cpp",
        "ratio",
        "same labels",
    ]
    print_table("emogen serve and llama-server", header, rows)


if __name__ == "__main__":
    main()
