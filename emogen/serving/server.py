"""A server process: runs, a socket, uvicorn."""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast, get_args

from emogen.console import err
from emogen.distribution import install_hint
from emogen.errors import InputError
from emogen.evaluation.run_folder import content_hash
from emogen.prediction.loaded import Decision, load
from emogen.task.yaml_files import read_value

try:
    import uvicorn

    from emogen.serving.app import Limits, make_app
except ImportError:
    raise InputError(f"emogen serve needs FastAPI: {install_hint('serve')}") from None

STOP_SECONDS = 60  # until requests that are not answered are given up when the server stops


def run_server(
    runs: Sequence[str],
    overrides: Sequence[str],
    decide: str | None,
    limits: Limits,
    host: str,
    port: int,
    key: str | None,
) -> Callable[[], None]:
    """Load what is served, and take the port.

    Returns:
        A function that serves until it is stopped by SIGINT or SIGTERM.

    Raises:
        InputError: a run, a decision or an address is not valid, the port is taken, or the key is missing.
    """
    if not runs:
        raise InputError("name at least one run folder")
    if decide is not None and decide not in get_args(Decision):
        raise InputError(f"--decide is one of {', '.join(get_args(Decision))}, not {decide}")
    loopback = _is_loopback(host)
    if not loopback and not key:
        raise InputError(
            f"--host {host} is open to other machines: set EMOGEN_API_KEY to a secret that clients send, or serve on "
            "127.0.0.1 behind a proxy that checks who asks"
        )
    _listen(host, port).close()  # a port that is taken is an error now, not after the model has been loaded
    given: dict[str, Any] = {key: read_value(value) for key, _, value in (word.partition("=") for word in overrides)}
    classifier = load(*runs, decide=cast(Decision | None, decide), **given)
    thread = ThreadPoolExecutor(1, "model")
    thread.submit(classifier.classify, ["warm up"]).result()  # loads the model before the port is open
    model_id = ", ".join(f"{Path(run).resolve().name}@{content_hash(Path(run))[:12]}" for run in runs)
    app = make_app(classifier, thread, model_id, limits, key=key, loopback=loopback)
    listener = _listen(host, port)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_SECONDS, server_header=False
    )

    def serve() -> None:
        server = uvicorn.Server(settings)
        address = f"http://{host if ':' not in host else f'[{host}]'}:{listener.getsockname()[1]}"
        err.print(
            f"emogen serves {model_id} at {address}; try it there in a browser. Stop it with Ctrl-C.", soft_wrap=True
        )
        server.run(sockets=[listener])

    return serve


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise InputError(f"--host {host}: expected an IP address, such as 127.0.0.1 or 0.0.0.0") from None
