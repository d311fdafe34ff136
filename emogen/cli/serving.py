"""The command that serves runs: serve."""

from typing import Annotated

import typer

from emogen.cli.shared import split_overrides
from emogen.console import err

KEY = "EMOGEN_API_KEY"


def serve(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_DIR... [KEY=VALUE]...", help="Run folders, cross-validations or baselines, and overrides."
        ),
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for all, which needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for a free one.")] = 8000,
    decide: Annotated[
        str | None, typer.Option(help="answer, thresholds or stack. Default: thresholds where the runs have them.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Texts that are computed together.")] = 32,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="Milliseconds that a batch waits for further texts.")] = 5.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Texts that may wait; further requests get 503.")] = 2048,
    max_texts: Annotated[int, typer.Option(min=1, help="Texts of a request.")] = 256,
    max_characters: Annotated[int, typer.Option(min=1, help="Characters of a text.")] = 20_000,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until a request is given up.")] = 60.0,
) -> None:
    """Serve runs over HTTP.

    POST /v1/classify labels texts; GET /v1/labels, /health and /metrics; / is a page for trying it. Texts of all
    clients are computed together, and the instruction once. With the environment variable EMOGEN_API_KEY, clients must
    send it (Authorization: Bearer KEY). Ctrl-C and SIGTERM stop the server when all requests are answered.
    """
    from emogen.serving.server import run_server  # first: it says what is missing
    from emogen.serving.app import Limits  # isort: skip
    from emogen.prediction.remote import read_key

    runs, overrides = split_overrides(words)
    limits = Limits(
        batch=max_batch,
        wait=max_wait_ms / 1000,
        texts=max_texts,
        characters=max_characters,
        queue=max_queue,
        seconds=timeout,
    )
    key = read_key(KEY)
    with err.status("Loading the model ..."):
        server = run_server(runs, overrides, decide, limits, host, port, key)
    server()
