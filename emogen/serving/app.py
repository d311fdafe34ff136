"""The HTTP interface of finished runs: classify, labels, health, metrics."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Message, Receive, Scope, Send

from emogen.distribution import __version__
from emogen.errors import ModelError
from emogen.prediction.loaded import LoadedClassifier
from emogen.serving.batches import Batches, QueueFullError, TextError

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Limits:
    """What one request and all of them together may take.

    Attributes:
        batch: texts that are computed together.
        wait: seconds that a batch waits for further texts.
        texts: texts of a request.
        characters: characters of a text.
        body: bytes of a request.
        queue: texts that may wait.
        seconds: until a request is given up.
    """

    batch: int = 32
    wait: float = 0.005
    texts: int = 256
    characters: int = 20_000
    body: int = 2_000_000
    queue: int = 2048
    seconds: float = 60.0


class ClassifyRequest(BaseModel):
    """The texts to label."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: list[str] = Field(min_length=1, description="the texts to label", examples=[["so happy for you!!"]])
    probabilities: bool = Field(True, description="compute probabilities, too; without them answers are faster")


class TextResult(BaseModel):
    """The labels of one text, and the probability of every label if they were asked for."""

    labels: list[str]
    probabilities: dict[str, float] | None = None


class ClassifyResponse(BaseModel):
    """The results in the order of the texts, and what made them."""

    model: str
    decision: str
    results: list[TextResult]


class LabelsResponse(BaseModel):
    """The names of all labels, in the order of the label set."""

    labels: list[str]


def make_app(
    classifier: LoadedClassifier,
    thread: Executor,
    model_id: str,
    limits: Limits,
    *,
    key: str | None = None,
    loopback: bool = True,
) -> FastAPI:
    """The application.

    Args:
        thread: calls the classifier; see `Batches`.
        model_id: names the model in responses.
        key: what clients must send as `Authorization: Bearer KEY`; None for no check.
        loopback: whether the server listens on this machine alone; it then answers only to names of this machine, so
            that a page in a browser cannot reach it through a name of its own (DNS rebinding).
    """
    metrics = _Metrics()

    def classify(items: Sequence[tuple[str, bool]]) -> list[TextResult]:
        """Pairs of a text, and whether its probabilities are asked for -> the results."""
        texts, asked = [text for text, _ in items], [wants for _, wants in items]
        if not any(asked):
            return [TextResult(labels=list(names)) for names in classifier.predict(texts, batch_size=limits.batch)]
        found, prob = classifier.classify(texts, batch_size=limits.batch)
        return [
            TextResult(
                labels=list(names),
                probabilities=dict(zip(classifier.labels, map(float, row), strict=True)) if wants else None,
            )
            for names, row, wants in zip(found, prob, asked, strict=True)
        ]

    batches = Batches(
        classify,
        thread,
        max_batch=limits.batch,
        max_wait=limits.wait,
        max_queue=limits.queue,
        on_batch=metrics.batch_size.observe,
    )
    metrics.waiting.set_function(lambda: batches.n_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await batches.start()
        yield
        await batches.stop()

    async def authorised(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        if key is not None and (given is None or not secrets.compare_digest(given.credentials.encode(), key.encode())):
            raise HTTPException(
                401, "send the key of this server: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
            )

    app = FastAPI(
        title="emogen", version=__version__, description=f"Labels texts with {model_id}.", lifespan=lifespan,
        docs_url=None, redoc_url=None,  # their pages load scripts from other servers
    )  # fmt: skip
    app.add_middleware(_BodyLimit, max_bytes=limits.body)
    if loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "::1"])

    @app.middleware("http")
    async def measure(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.perf_counter()
        response = await call_next(request)
        if request.url.path == "/v1/classify":
            metrics.seconds.observe(time.perf_counter() - started)
            metrics.requests.labels(response.status_code).inc()
        return response

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """A page for trying the model, which loads nothing from elsewhere."""
        policy = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
        return Response(PAGE.read_bytes(), media_type="text/html", headers={"Content-Security-Policy": policy})

    @app.post("/v1/classify", dependencies=[Depends(authorised)], response_model_exclude_none=True)
    async def classify_texts(body: ClassifyRequest, request: Request) -> ClassifyResponse:
        """Label texts."""
        if len(body.texts) > limits.texts:
            raise HTTPException(422, f"{len(body.texts)} texts in a request; at most {limits.texts}")
        for k, text in enumerate(body.texts):
            if len(text) > limits.characters:
                raise HTTPException(422, f"text {k}: {len(text):,} characters; at most {limits.characters:,}")
        try:
            results = await asyncio.wait_for(
                _while_connected(request, batches.submit([(text, body.probabilities) for text in body.texts])),
                limits.seconds,
            )
        except QueueFullError:
            raise HTTPException(503, "too many texts wait; try again", {"Retry-After": "1"}) from None
        except TimeoutError:
            raise HTTPException(504, f"not done within {limits.seconds:g} seconds") from None
        except TextError as error:
            raise HTTPException(422, str(error)) from None
        except ModelError:
            raise HTTPException(502, "the model failed; the server has logged the reason") from None
        metrics.texts.inc(len(results))
        return ClassifyResponse(model=model_id, decision=classifier.decide, results=results)

    @app.get("/v1/labels", dependencies=[Depends(authorised)])
    async def labels() -> LabelsResponse:
        """The label set."""
        return LabelsResponse(labels=list(classifier.labels))

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server answers; it does when the model is loaded."""
        return {"status": "ok", "model": model_id}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_page() -> Response:
        """Counts and times, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _Metrics:
    """What `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("emogen_requests", "Requests to /v1/classify", ["status"], registry=self.registry)
        self.texts = Counter("emogen_texts", "Texts that were labelled", registry=self.registry)
        self.seconds = Histogram("emogen_request_seconds", "Time of a request", registry=self.registry)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batch_size = Histogram("emogen_batch_texts", "Texts of a batch", buckets=sizes, registry=self.registry)
        self.waiting = Gauge("emogen_waiting_texts", "Texts that wait for a batch", registry=self.registry)


async def _while_connected(request: Request, work: Any) -> Any:
    """The result of some work, which is cancelled if the client goes away."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=0.5))[0]:
            if await request.is_disconnected():
                raise HTTPException(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()


class _BodyLimit:
    """Answers 413 to a request whose body is too large, whether or not it says so."""

    def __init__(self, app: Any, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = JSONResponse({"detail": f"the request is larger than {self.max_bytes:,} bytes"}, 413)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            await refusal(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_bytes:
                await refusal(scope, receive, send)
                return
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return parts.pop() if parts else await receive()

        await self.app(scope, replay, send)
