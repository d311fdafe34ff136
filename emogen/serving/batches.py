"""Texts of many requests, computed together.

A request waits for others for a few milliseconds at most. While a batch is computed, the texts of further requests
gather for the next one, so the batches grow with the load.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from emogen.errors import ModelError

log = logging.getLogger(__name__)

Classify = Callable[[Sequence[Any]], Sequence[Any]]  # n texts (with what is asked about each) -> one result for each


class QueueFullError(Exception):
    """There is no room for the texts of a request."""


class TextError(Exception):
    """A text that cannot be computed, by its position in the request."""

    def __init__(self, index: int, reason: str):
        self.index, self.reason = index, reason
        super().__init__(f"text {index}: {reason}")


@dataclass
class _Request:
    texts: Sequence[Any]
    done: "asyncio.Future[list[Any]]"
    results: list[Any] = field(default_factory=list)
    n_left: int = 0


class Batches:
    """Computes texts in batches, one batch at a time, in a thread of its own.

    Args:
        classify: computes the results of a batch.
        thread: runs `classify`. It should have loaded the model: threads of OpenMP that belong to other threads would
            slow it down.
        max_batch: the number of texts of a batch.
        max_wait: seconds that a batch waits for further texts.
        max_queue: texts that may wait.
        on_batch: called with the number of texts of each batch.
    """

    def __init__(
        self,
        classify: Classify,
        thread: Executor,
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        on_batch: Callable[[int], Any] = lambda n: None,
    ):
        self._classify, self._thread, self._on_batch = classify, thread, on_batch
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait, max_queue
        self._queue: asyncio.Queue[tuple[_Request, int]] = asyncio.Queue()
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to compute."""
        self._loop_task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End after the batch that is being computed. Texts that still wait are not computed."""
        if self._loop_task:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        self._thread.shutdown(wait=True)

    @property
    def n_waiting(self) -> int:
        """The number of texts that wait for a batch."""
        return self._queue.qsize()

    async def submit(self, texts: Sequence[Any]) -> list[Any]:
        """The result of each text of a request.

        If the caller is cancelled, texts that are not in a batch yet are not computed.

        Raises:
            QueueFullError: too many texts wait.
            TextError: a text cannot be computed.
            ModelError: the model fails, whatever the text, such as an endpoint that does not answer.
        """
        if self.n_waiting + len(texts) > self._max_queue:
            raise QueueFullError
        request = _Request(texts, asyncio.get_running_loop().create_future(), [None] * len(texts), len(texts))
        for k in range(len(texts)):
            self._queue.put_nowait((request, k))
        return await request.done

    async def _run(self) -> None:
        while True:
            batch = await self._next_batch()
            if not batch:
                continue
            texts = [request.texts[k] for request, k in batch]
            self._on_batch(len(texts))
            try:
                results: Sequence[Any] = await self._compute(texts)
            except Exception as error:
                results = [error] if len(texts) == 1 else await self._one_by_one(texts)
            for (request, k), result in zip(batch, results, strict=True):
                _settle(request, k, result)

    async def _next_batch(self) -> list[tuple[_Request, int]]:
        """The next texts of requests whose callers still wait."""
        batch = [await self._queue.get()]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._max_wait
        while len(batch) < self._max_batch:
            try:
                batch.append(self._queue.get_nowait())
            except asyncio.QueueEmpty:
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), deadline - loop.time()))
                except TimeoutError:
                    break
        return [(request, k) for request, k in batch if not request.done.done()]

    async def _compute(self, texts: Sequence[Any]) -> Sequence[Any]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._classify, texts)

    async def _one_by_one(self, texts: Sequence[Any]) -> list[Any]:
        """The results of a batch that failed: of its texts alone, or the errors of those that cannot be computed."""
        results: list[Any] = []
        for text in texts:
            try:
                results += await self._compute([text])
            except Exception as error:
                results.append(error)
        return results


def _settle(request: _Request, k: int, result: Any) -> None:
    if request.done.done():  # its caller has gone, or another text of it failed
        return
    if isinstance(result, Exception):
        log.error(f"a text could not be computed: {type(result).__name__}: {result}")
        request.done.set_exception(result if isinstance(result, ModelError) else TextError(k, str(result)))
        return
    request.results[k] = result
    request.n_left -= 1
    if not request.n_left:
        request.done.set_result(request.results)
