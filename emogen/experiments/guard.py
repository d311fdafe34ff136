"""Who may talk to a page of this machine: the person who started it, in a browser, and nobody else.

A web page of others can make a browser send requests to 127.0.0.1, and, by pointing a name of its own there (DNS
rebinding), read the answers. So a request needs three things: this server's own address as its Host, no foreign
Origin, and a secret token. The address that is printed has the token; the first request exchanges it for a cookie.
"""

import hmac
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Asgi = Callable[[dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]

OPEN = ("/gradio_api/startup-events",)  # Gradio asks for it when it starts; it tells nothing
CLOSED = ("/gradio_api/upload", "/gradio_api/file", "/gradio_api/proxy", "/upload", "/file", "/proxy")


class Guard:
    """ASGI middleware that answers foreign requests itself.

    Args:
        app: the application that is guarded.
        port: of the server on 127.0.0.1.
        token: the secret.
    """

    def __init__(self, app: Asgi, port: int, token: str):
        self.app, self.token, self.cookie = app, token, f"emogen_lab_{port}"
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it with 401, 403 or 404."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"]
        if headers.get("host") not in self.hosts:
            await _refuse(scope, receive, send, 403, "another host than this machine")
        elif "origin" in headers and headers["origin"].removeprefix("http://") not in self.hosts:
            await _refuse(scope, receive, send, 403, "a request of another website")
        elif path.startswith(CLOSED):
            await _refuse(scope, receive, send, 404, "files are neither taken nor given")
        elif path in OPEN or self._is_known(headers):
            await self.app(scope, receive, send)
        elif self._is_token(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]):
            await self.app(scope, receive, self._with_cookie(send))
        else:
            await _refuse(scope, receive, send, 401, "open the address that emogen lab has printed; it has a token")

    def _is_token(self, word: str) -> bool:
        return hmac.compare_digest(word.encode(), self.token.encode())

    def _is_known(self, headers: dict[str, str]) -> bool:
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return morsel is not None and self._is_token(morsel.value)

    def _with_cookie(self, send: Any) -> Any:
        cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"

        async def send_with_cookie(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], (b"set-cookie", cookie.encode())]}
            await send(message)

        return send_with_cookie


async def _refuse(scope: dict[str, Any], receive: Any, send: Any, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"emogen lab: {reason}\n".encode()})
