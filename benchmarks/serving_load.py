"""A server under load from clients that go away: no answer is lost or given to another, and memory stays flat.

    python benchmarks/serving_load.py RUN_DIR [--minutes 30] [--clients 16] [--json FILE]

Clients ask about the sample posts. One request in five is cut off after it was sent. Each answer is compared with that
of the same text by `emogen.load`.
"""

import argparse
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from common import ROOT, machine, print_table, versions, write_json
from serving import emogen_server

import emogen
from emogen.task.readers import read_rows
from emogen.task.rows import checked


def cut_off(base: str, texts: list[str]) -> None:
    """Send a request and go away."""
    address = urlsplit(base)
    body = json.dumps({"texts": texts, "probabilities": False}).encode()
    with socket.create_connection((address.hostname or "", address.port or 80)) as connection:
        head = "POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run folder")
    parser.add_argument("--minutes", type=float, default=30.0, help="time under load (default 30)")
    parser.add_argument("--clients", type=int, default=16, help="clients at a time (default 16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to FILE")
    args = parser.parse_args(argv)
    loaded = emogen.load(args.run, decide="answer")
    texts = checked(read_rows(str(ROOT / "sample" / "test.csv"), emogen.load_run(args.run).label_set)).texts
    expected = dict(zip(texts, loaded.predict(texts), strict=True))
    counts: Counter[str] = Counter()
    memory: list[tuple[float, float]] = []

    with emogen_server(args.run) as (process, base):
        started = time.perf_counter()
        deadline = started + args.minutes * 60

        def client(k: int) -> None:
            draw = random.Random(k)  # noqa: S311
            with httpx.Client(base_url=base, timeout=120) as connection:
                while time.perf_counter() < deadline:
                    chosen = draw.choices(texts, k=draw.randint(1, 4))
                    if draw.random() < 0.2:
                        cut_off(base, chosen)
                        counts["cut off"] += 1
                        continue
                    response = connection.post("/v1/classify", json={"texts": chosen, "probabilities": False})
                    if response.status_code != 200:
                        counts[f"status {response.status_code}"] += 1
                        continue
                    results = response.json()["results"]
                    counts["texts"] += len(chosen)
                    right = [tuple(r["labels"]) == expected[t] for r, t in zip(results, chosen, strict=True)]
                    counts["wrong"] += right.count(False)

        threads = [threading.Thread(target=client, args=(k,)) for k in range(args.clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append((time.perf_counter() - started, psutil.Process(process.pid).memory_info().rss / 2**20))
            time.sleep(min(10, args.minutes * 6))
    half = [mib for seconds, mib in memory if seconds >= args.minutes * 30] or [memory[-1][1]]
    result: dict[str, Any] = {
        "machine": machine(), "versions": versions("torch", "fastapi", "uvicorn"), "minutes": args.minutes,
        "counts": dict(counts), "memory_mib": [round(mib, 1) for _, mib in memory],
    }  # fmt: skip
    write_json(args.json, result)
    rows = [[name, f"{n:,}"] for name, n in sorted(counts.items())]
    rows += [["MiB at half time", f"{half[0]:,.0f}"], ["MiB at the end", f"{memory[-1][1]:,.0f}"]]
    print_table(f"{args.minutes:g} minutes under load, {args.clients} clients", ["", ""], rows)


if __name__ == "__main__":
    main()
