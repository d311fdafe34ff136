"""A stand-in for a chat endpoint, on a free port of this machine, which fails when it is told to."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def fake_endpoint() -> Iterator[type[BaseHTTPRequestHandler]]:
    """Serve until the end of the block. What is yielded has its address, what it was asked, and what it will answer."""

    class Endpoint(BaseHTTPRequestHandler):
        """`replies` are (status, headers, body) that come before the usual answers; `kind` is the server."""

        kind = "llama.cpp"
        replies: list = []  # noqa: RUF012
        asked: list = []  # noqa: RUF012
        waited: list = []  # noqa: RUF012
        keys: set = set()  # noqa: RUF012
        lock = threading.Lock()

        @staticmethod
        def answer(messages):
            words = {"happy": "joy, love", "sad": "sadness"}
            return next((labels for word, labels in words.items() if word in messages[-1]["content"]), "none")

        def do_GET(self):
            known = {"/props": "llama.cpp", "/version": "vllm"}.get(self.path)
            self.reply(200 if known == Endpoint.kind else 404, {}, {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with Endpoint.lock:
                Endpoint.asked.append(body)
                Endpoint.keys.add(self.headers.get("authorization"))
                early = Endpoint.replies.pop(0) if Endpoint.replies else None
            if early:
                self.reply(*early)
                return
            self.reply(
                200,
                {},
                {
                    "choices": [{"message": {"content": Endpoint.answer(body["messages"])}}],
                    "usage": {"prompt_tokens": 6, "completion_tokens": 1, "total_tokens": 7},
                },
            )

        def reply(self, status, headers, value):
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, content in headers.items():
                self.send_header(name, content)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Endpoint.base = f"http://127.0.0.1:{server.server_port}/v1"
        yield Endpoint
        server.shutdown()
