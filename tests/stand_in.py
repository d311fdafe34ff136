"""Servers that stand in for others, on loopback: they answer JSON."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class JsonHandler(BaseHTTPRequestHandler):
    """Answers requests with JSON; a subclass has `do_GET` and `do_POST`."""

    def read(self) -> bytes:
        """The body of the request."""
        return self.rfile.read(int(self.headers["content-length"]))

    def reply(self, value, status=200, headers=None):
        """Answer with a JSON value, or with bytes as they are."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, content in ({"content-type": "application/json"} | (headers or {})).items():
            self.send_header(name, content)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def serving(handler: type[JsonHandler]) -> Iterator[str]:
    """Serve in a thread; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def program_that_serves(methods: str) -> str:
    """The source of a program that serves at `--port`, with the methods of a JsonHandler."""
    return f"""
import json, sys
from http.server import ThreadingHTTPServer
sys.path.insert(0, {str(Path(__file__).parent)!r})
from stand_in import JsonHandler
class Handler(JsonHandler):
{methods}
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
