"""A model behind an OpenAI-compatible endpoint, prompted and not tuned.

It gets the prompt of the recipe as a chat. Where the server can constrain an answer, it is constrained to the valid
ones: llama.cpp by a grammar, vLLM by a regular expression. Elsewhere the model writes what it likes, and the answer is
parsed.

Answers are kept on disk, so that nothing is asked, and paid, twice, and an interrupted prediction goes on.
"""

import hashlib
import json
import logging
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from emogen import paths
from emogen.distribution import install_hint
from emogen.errors import InputError, ModelError
from emogen.evaluation.results import Prediction, pred_matrix
from emogen.task.answer_patterns import answer_gbnf, answer_regex
from emogen.task.labels import LabelSet
from emogen.task.parse import parse_answer
from emogen.task.prompt import Message, fill, render
from emogen.task.recipe import Recipe
from emogen.task.task import Task

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

KEYS = ("EMOGEN_REMOTE_KEY", "OPENAI_API_KEY")  # environment variables; the first that is set is sent
TRIES = 6  # of a request that the server cannot answer now
MAX_TOKENS = 128  # of an answer that nothing constrains


class RemoteClassifier:
    """The model of an endpoint, with the prompt and the labels of a recipe.

    It gives no probabilities. `predict_proba` returns 1 for the labels of the answer and 0 for the others.
    """

    n_questions = 1

    def __init__(self, task: Task):
        self.recipe: Recipe = task.recipe
        self.label_set: LabelSet = task.label_set
        self._messages: list[Message] = render(task.prompt, task.label_set, task.examples)
        self._shown = [example.text for example in task.examples]
        self._store = _Answers()
        self.tokens: Counter[str] = Counter()  # what the server has counted

    def predict(
        self, texts: Sequence[str], *, batch_size: int = 32, progress: Callable[[int], Any] | None = None
    ) -> list[Prediction]:
        """Ask about n texts, several at a time, and parse the answers.

        Raises:
            ModelError: the server refuses, or does not answer. What it has answered is kept.
        """
        answers: list[str] = [""] * len(texts)
        with ThreadPoolExecutor(self.recipe.api_requests) as pool:
            asked = {pool.submit(self._answer, text): i for i, text in enumerate(texts)}
            try:
                for done in as_completed(asked):
                    answers[asked[done]] = done.result()
                    if progress:
                        progress(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if self.tokens:
            log.info(", ".join(f"{name}: {n:,}" for name, n in self.tokens.items()))
        style = self.recipe.answer
        return [Prediction(raw, parse_answer(raw, self.label_set, style=style), 0) for raw in answers]

    def predict_proba(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """The labels of the answers as float32 [n, L]: 1 or 0."""
        return pred_matrix(self.predict(texts, progress=progress)).astype(np.float32)

    @cached_property
    def _client(self) -> "httpx.Client":
        try:
            import httpx
        except ImportError:
            raise InputError(f"api_base needs httpx: {install_hint('remote')}") from None
        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=str(self.recipe.api_base).rstrip("/") + "/", headers=headers, timeout=120)

    @cached_property
    def _constraint(self) -> dict[str, Any]:
        """What the server takes to constrain an answer; nothing if it is not known to take anything."""
        if self.recipe.decode == "free":
            return {}
        root = str(self._client.base_url).removesuffix("v1/")
        style = self.recipe.answer
        if self._answers_at(f"{root}props"):
            log.info("The server is llama.cpp: answers are constrained by a grammar.")
            return {"grammar": answer_gbnf(self.label_set, style)}
        if self._answers_at(f"{root}version"):
            log.info("The server is vLLM: answers are constrained by a regular expression.")
            return {"structured_outputs": {"regex": answer_regex(self.label_set, style)}}
        log.warning("The server is not known to constrain answers: the model writes what it likes, and it is parsed.")
        return {}

    def _answers_at(self, address: str) -> bool:
        import httpx

        try:
            return self._client.get(address).status_code == 200
        except httpx.HTTPError:
            return False

    def _answer(self, text: str) -> str:
        body = {
            "model": self.recipe.api_model,
            "messages": fill(self._messages, [text, *self._shown]),
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            **self._constraint,
        }
        key = hashlib.sha256(json.dumps([str(self._client.base_url), body]).encode()).hexdigest()
        if (kept := self._store.get(key)) is not None:
            return kept
        found = self._ask(body)
        try:
            answer = str(found["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise ModelError(
                f"{self.recipe.api_base}: not an answer of a chat endpoint: {json.dumps(found)[:200]}"
            ) from None
        for name, n in (found.get("usage") or {}).items():
            if isinstance(n, int):
                self.tokens[name] += n
        self._store.put(key, answer)
        return answer

    def _ask(self, body: dict[str, Any]) -> Any:
        """Send a request, again if the server is busy or fails.

        Raises:
            ModelError: it refuses, or fails each time.
        """
        import httpx

        reason = ""
        for k in range(TRIES):
            wait = min(2.0**k, 30) * random.uniform(0.5, 1)  # noqa: S311 - spreads requests
            try:
                response = self._client.post("chat/completions", json=body)
                status = response.status_code
                if status == 200:
                    return response.json()
                reason = f"{status}: {response.text[:200]}"
                asked_for = response.headers.get("retry-after", "")  # seconds; a date is not waited for
                wait = float(asked_for) if asked_for.replace(".", "", 1).isdigit() else wait
            except (httpx.HTTPError, json.JSONDecodeError) as error:
                status, reason = 0, f"{type(error).__name__}: {error}"
            if status and status != 429 and status < 500:
                raise ModelError(f"{self.recipe.api_base}: the server refuses: {reason}")
            if k < TRIES - 1:
                _sleep(min(wait, 60))
        raise ModelError(f"{self.recipe.api_base}: no answer after {TRIES} tries; the last one: {reason}")


_sleep = time.sleep


@dataclass
class _Answers:
    """The answers that were given before, in a file of the cache folder."""

    def __post_init__(self) -> None:
        path = paths.cache_dir() / "remote-answers.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = sqlite3.connect(path, check_same_thread=False, timeout=30)
        self._file.execute("create table if not exists answers (key text primary key, answer text not null)")

    def get(self, key: str) -> str | None:
        with self._lock:
            row = self._file.execute("select answer from answers where key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, answer: str) -> None:
        with self._lock, self._file:
            self._file.execute("insert or replace into answers values (?, ?)", (key, answer))
