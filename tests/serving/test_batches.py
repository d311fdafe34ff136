"""Texts of many requests are computed together, and none gets the result of another."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from emogen.errors import ModelError
from emogen.serving.app import Limits, make_app
from emogen.serving.batches import Batches, QueueFullError, TextError


class Model:
    """Answers a text with its capitals. It can be made to wait, and refuses some texts."""

    def __init__(self, waits: bool = False):
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.may_go = threading.Event()
        if not waits:
            self.may_go.set()

    def __call__(self, texts):
        self.batches.append(list(texts))
        self.threads.add(threading.get_ident())
        assert self.may_go.wait(10)
        if "bad" in texts:
            raise ValueError("the model refuses it")
        if "down" in texts:
            raise ModelError("the endpoint does not answer")
        return [text.upper() for text in texts]


def run(model, work, **settings):
    """Run `work(batches)` in an event loop."""

    async def main():
        batches = Batches(
            model, ThreadPoolExecutor(1), **{"max_batch": 8, "max_wait": 0.0, "max_queue": 100} | settings
        )
        await batches.start()
        try:
            return await work(batches)
        finally:
            model.may_go.set()
            await batches.stop()

    with ThreadPoolExecutor(1) as thread:  # the thread of the tests may have a loop already, that of a browser
        return thread.submit(asyncio.run, main()).result()


def test_requests_that_come_together_share_a_batch_and_keep_their_results():
    model = Model()

    async def work(batches):
        return await asyncio.gather(*(batches.submit([f"a{k}", f"b{k}"]) for k in range(10)))

    assert run(model, work) == [[f"A{k}", f"B{k}"] for k in range(10)]
    assert [len(batch) for batch in model.batches] == [8, 8, 4]
    assert len(model.threads) == 1


def test_texts_gather_while_a_batch_is_computed():
    model = Model(waits=True)

    async def work(batches):
        first = asyncio.create_task(batches.submit(["one"]))
        while not model.batches:
            await asyncio.sleep(0)
        others = [asyncio.create_task(batches.submit([f"t{k}"])) for k in range(5)]
        await asyncio.sleep(0)
        assert batches.n_waiting == 5
        model.may_go.set()
        return await asyncio.gather(first, *others)

    assert run(model, work) == [["ONE"], *([f"T{k}"] for k in range(5))]
    assert [len(batch) for batch in model.batches] == [1, 5]


def test_a_full_queue_refuses_and_recovers():
    model = Model(waits=True)

    async def work(batches):
        first = asyncio.create_task(batches.submit(["one"]))
        while not model.batches:
            await asyncio.sleep(0)
        second = asyncio.create_task(batches.submit(["two", "three"]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await batches.submit(["four", "five"])
        model.may_go.set()
        await asyncio.gather(first, second)
        return await batches.submit(["four", "five", "six"])

    assert run(model, work, max_queue=3) == ["FOUR", "FIVE", "SIX"]


def test_a_text_that_cannot_be_computed_fails_alone():
    model = Model()

    async def work(batches):
        return await asyncio.gather(
            batches.submit(["good"]), batches.submit(["fine", "bad"]), batches.submit(["well"]), return_exceptions=True
        )

    good, bad, well = run(model, work)
    assert (good, well) == (["GOOD"], ["WELL"])
    assert isinstance(bad, TextError)
    assert str(bad) == "text 1: the model refuses it"


def test_texts_of_a_client_that_has_gone_are_not_computed():
    model = Model(waits=True)

    async def work(batches):
        first = asyncio.create_task(batches.submit(["one"]))
        while not model.batches:
            await asyncio.sleep(0)
        gone, stays = (asyncio.create_task(batches.submit([text])) for text in ("gone", "stays"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        model.may_go.set()
        return await asyncio.gather(first, stays)

    assert run(model, work) == [["ONE"], ["STAYS"]]
    assert model.batches == [["one"], ["stays"]]


def test_a_model_that_fails_is_not_the_fault_of_a_text():
    """The reason stays on the server: it may name the address of an endpoint."""

    async def work(batches):
        with pytest.raises(ModelError, match="does not answer"):
            await batches.submit(["fine", "down"])

    run(Model(), work)
    classifier = SimpleNamespace(
        classify=lambda *args, **keys: Model()(["down"]), decide="answer", labels=("joy",), loads=1
    )
    with ThreadPoolExecutor(1) as thread:
        app = make_app(classifier, thread, "model", Limits(), loopback=False)
        with TestClient(app) as client:
            response = client.post("/v1/classify", json={"texts": ["hello"]})
    assert response.status_code == 502
    assert response.json() == {"detail": "the model failed; the server has logged the reason"}
