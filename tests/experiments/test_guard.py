"""Requests of others do not reach the lab."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from emogen.experiments.guard import Guard

PATHS = (
    "/",
    "/gradio_api/queue/join",
    "/gradio_api/upload",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/startup-events",
)


def answer(request):
    return PlainTextResponse("reached")


async def talk(websocket):
    await websocket.accept()
    await websocket.send_text("reached")


@pytest.fixture
def client():
    routes = [Route(path, answer, methods=["GET", "POST"]) for path in PATHS]
    app = Starlette(
        routes=[*routes, WebSocketRoute("/ws", talk)], middleware=[Middleware(Guard, port=7860, token="s3cret")]
    )
    return TestClient(app, base_url="http://127.0.0.1:7860")


@pytest.fixture
def known(client):
    """A client that has opened the printed address."""
    assert client.get("/?token=s3cret").text == "reached"
    return client


def test_the_printed_address_opens_the_page_and_its_cookie_the_rest(client):
    assert client.get("/").status_code == 401
    cookie = client.get("/?token=s3cret").headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
    assert client.post("/gradio_api/queue/join", headers={"Origin": "http://127.0.0.1:7860"}).text == "reached"
    with client.websocket_connect("ws://127.0.0.1:7860/ws") as websocket:
        assert websocket.receive_text() == "reached"


@pytest.mark.parametrize("query", ["", "?token=", "?token=wrong", "?token=s3cre", "?token=s3cret2", "?tok=s3cret"])
def test_without_the_token_nothing_is_reached(client, query):
    refused = client.get(f"/{query}")
    assert (refused.status_code, "reached" in refused.text) == (401, False)
    assert "set-cookie" not in refused.headers


@pytest.mark.parametrize("cookie", ["emogen_lab_7860=wrong", "emogen_lab_7861=s3cret", "=;;", "emogen_lab_7860"])
def test_another_cookie_is_refused(client, cookie):
    assert client.get("/", headers={"Cookie": cookie}).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1", "127.0.0.1:80", "localhost.evil:7860", ""]
)
def test_a_name_that_points_to_this_machine_is_refused(known, host):
    refused = known.get("/", headers={"Host": host})
    assert (refused.status_code, "reached" in refused.text) == (403, False)


def test_localhost_is_this_machine(known):
    cookie = {"Cookie": "emogen_lab_7860=s3cret"}
    assert known.get("/", headers={"Host": "localhost:7860"} | cookie).text == "reached"


@pytest.mark.parametrize("origin", ["http://evil.example", "https://127.0.0.1:7860", "http://127.0.0.1:8000", "null"])
def test_another_website_is_refused(known, origin):
    for refused in (
        known.post("/gradio_api/queue/join", headers={"Origin": origin}),
        known.get("/", headers={"Origin": origin}),
    ):
        assert (refused.status_code, "reached" in refused.text) == (403, False)
    with (
        pytest.raises(WebSocketDisconnect),
        known.websocket_connect("ws://127.0.0.1:7860/ws", headers={"Origin": origin}),
    ):
        pass


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/file=/etc/passwd"])
def test_files_are_neither_taken_nor_given(known, path):
    assert known.post(path).status_code == 404
    assert known.get(path).status_code == 404
