"""A prompted model behind an endpoint: a fake that fails in every way."""

import json
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import write_posts
from typer.testing import CliRunner

import emogen
from emogen.cli.__main__ import app
from emogen.errors import InputError, ModelError
from emogen.prediction import remote
from emogen.prediction.ensemble import load_run
from emogen.prediction.files import predict_file
from emogen.task.recipe import RecipeError
from emogen.train import main as train
from emogen.training.check import check

TEXTS = ["so happy", "so sad", "nothing"]


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """A chat endpoint. `replies` are (status, headers, body) that come before the usual answer; `kind` is the server."""
    monkeypatch.setenv("EMOGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_sleep", lambda seconds: Endpoint.waited.append(seconds))

    class Endpoint(BaseHTTPRequestHandler):
        kind = "llama.cpp"
        replies: list = []  # noqa: RUF012
        asked: list = []  # noqa: RUF012
        waited: list = []  # noqa: RUF012
        keys: set = set()  # noqa: RUF012
        lock = threading.Lock()

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
            text = body["messages"][-1]["content"]
            words = {"happy": "joy, love", "sad": "sadness"}
            answer = next((labels for word, labels in words.items() if word in text), "none")
            self.reply(200, {}, {"choices": [{"message": {"content": answer}}], "usage": {"total_tokens": 7}})

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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Endpoint.base = f"http://127.0.0.1:{server.server_port}/v1"
    yield Endpoint
    server.shutdown()


def load(endpoint, *overrides):
    return load_run("recipes/remote.yaml", [f"api_base={endpoint.base}", "api_model=tiny", *overrides])


def test_it_asks_with_the_prompt_of_the_recipe_and_the_grammar_of_its_labels(endpoint, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    found = load(endpoint).predict(TEXTS)
    assert [prediction.parsed.labels for prediction in found] == [("joy", "love"), ("sadness",), ()]
    body = endpoint.asked[0]
    assert body["model"] == "tiny"
    assert body["temperature"] == 0
    assert body["grammar"].startswith('root ::= ("none" | "anger" (", anticipation")?')
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert endpoint.keys == {"Bearer secret"}
    assert "llama.cpp: answers are constrained by a grammar" in caplog.text
    assert "total_tokens: 21" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(("kind", "said"), [("vllm", "a regular expression"), ("other", "writes what it likes")])
def test_what_a_server_offers_is_found_out_and_said(endpoint, caplog, kind, said):
    caplog.set_level("INFO")
    endpoint.kind = kind
    load(endpoint).predict(TEXTS[:1])
    assert said in caplog.text
    assert ("structured_outputs" in endpoint.asked[0]) == (kind == "vllm")
    assert "grammar" not in endpoint.asked[0]


def test_nothing_is_asked_twice(endpoint):
    first = load(endpoint).predict(TEXTS)
    assert len(endpoint.asked) == 3
    assert load(endpoint).predict(TEXTS) == first
    assert len(endpoint.asked) == 3
    load(endpoint, "prompt=prompts/list.jinja").predict(TEXTS)
    assert len(endpoint.asked) == 6


def test_a_busy_server_is_asked_again_when_it_says(endpoint):
    endpoint.replies = [(429, {"retry-after": "7"}, {}), (503, {}, {}), (200, {}, b"not JSON")]
    found = load(endpoint, "api_requests=1").predict(TEXTS[:1])
    assert found[0].parsed.labels == ("joy", "love")
    assert endpoint.waited[0] == 7
    assert len(endpoint.waited) == 3


def test_a_server_that_refuses_or_never_answers_is_an_error_and_what_it_answered_is_kept(endpoint):
    one = ["api_requests=1"]
    load(endpoint, *one).predict(TEXTS[:1])
    endpoint.replies = [(401, {}, {"error": "no key"})]
    with pytest.raises(ModelError, match=r"the server refuses: 401: .*no key"):
        load(endpoint, *one).predict(TEXTS)
    endpoint.replies = [(500, {}, {})] * remote.TRIES
    with pytest.raises(ModelError, match=f"no answer after {remote.TRIES} tries; the last one: 500"):
        load(endpoint, *one).predict(["another text"])
    endpoint.replies = [(200, {}, {"choices": []})]
    with pytest.raises(ModelError, match="not an answer of a chat endpoint"):
        load(endpoint, *one).predict(["another text"])
    asked = len(endpoint.asked)
    load(endpoint, *one).predict(TEXTS[:1])
    assert len(endpoint.asked) == asked


def test_an_address_where_nothing_listens_is_an_error(endpoint, monkeypatch):
    with pytest.raises(ModelError, match="no answer after 6 tries"):
        load_run("recipes/remote.yaml", ["api_base=http://127.0.0.1:9/v1", "decode=free"]).predict(["a"])


def test_a_file_is_labelled_in_one_command_and_in_python(endpoint, tmp_path, labels):
    source, output = write_posts(tmp_path / "posts.csv", labels), tmp_path / "out.csv"
    overrides = [f"api_base={endpoint.base}", "api_model=tiny"]
    summary = predict_file(
        [remote.paths.find("recipes/remote.yaml")],
        source,
        overrides,
        csv_file=output,
        bar=lambda *_: nullcontext(lambda n: None),
    )
    assert summary.n_rows == len(output.read_text().splitlines()) - 1
    loaded = emogen.load("recipes/remote.yaml", api_base=endpoint.base, api_model="tiny")
    assert loaded.predict(["so happy"]) == [("joy", "love")]
    assert loaded.predict_proba(["so happy"]).sum() == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("api_model=null", "api_base: needs api_model"),
        ("api_base=localhost:8080", "begins with http"),
        ("answer=yes_no", "cannot be combined with answer: yes_no"),
    ],
)
def test_what_an_endpoint_cannot_do_is_an_error(override, message):
    with pytest.raises(RecipeError, match=message):
        load_run("recipes/remote.yaml", [override])


def test_check_asks_no_endpoint():
    findings = check("recipes/remote.yaml")
    assert not findings.problems
    assert "http://127.0.0.1:8080/v1, which is not asked" in findings.facts[-1]


@pytest.mark.parametrize(
    "words",
    [
        ["show"], ["plan"], ["cv"], ["prompts", "show", "prompts/list.jinja"],
        ["prompts", "compare", "prompts/list.jinja"], ["lab"], ["train"],
    ],
)  # fmt: skip
def test_commands_for_a_model_that_is_here_say_so(words):
    result = CliRunner().invoke(app, [*words[:2], "recipes/remote.yaml", *words[2:]])
    assert isinstance(result.exception, InputError)
    assert "api_base: the model of an endpoint" in str(result.exception)


def test_the_model_of_an_endpoint_is_not_tuned():
    with pytest.raises(InputError, match="the model of an endpoint is not tuned"):
        train(["recipes/remote.yaml"])
