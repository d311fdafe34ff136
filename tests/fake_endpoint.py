"""A stand-in for a chat endpoint, on a free port of this machine, which fails when it is told to."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stand_in import JsonHandler, serving


@contextmanager
def fake_endpoint() -> Iterator[type[JsonHandler]]:
    """Serve until the end of the block. What is yielded has its address, what it was asked, and what it will answer."""

    class Endpoint(JsonHandler):
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
            known = {
                "/props": ("llama.cpp", {"default_generation_settings": {}}),
                "/version": ("vllm", {"version": "0.11.0"}),
            }
            kind, value = known[self.path]
            if Endpoint.kind == "lm studio":
                self.reply({"error": f"Unexpected endpoint or method. (GET {self.path})"})
            else:
                self.reply(value, 200 if kind == Endpoint.kind else 404)

        def do_POST(self):
            body = json.loads(self.read())
            with Endpoint.lock:
                Endpoint.asked.append(body)
                Endpoint.keys.add(self.headers.get("authorization"))
                early = Endpoint.replies.pop(0) if Endpoint.replies else None
            if early:
                status, headers, value = early
                self.reply(value, status, headers)
                return
            usage = {"prompt_tokens": 6, "completion_tokens": 1, "total_tokens": 7}
            self.reply({"choices": [{"message": {"content": Endpoint.answer(body["messages"])}}], "usage": usage})

    with serving(Endpoint) as address:
        Endpoint.base = f"{address}/v1"
        yield Endpoint
