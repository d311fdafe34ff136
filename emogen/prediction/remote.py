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
import re
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emogen import paths
from emogen.distribution import install_hint
from emogen.errors import InputError, ModelError
from emogen.evaluation.results import Prediction, pred_matrix, read_held_out
from emogen.prediction.neighbours import Neighbours
from emogen.task.answer import answer_text
from emogen.task.answer_patterns import answer_gbnf, answer_regex
from emogen.task.columns import whole_characters
from emogen.task.labels import LabelSet
from emogen.task.parse import parse_answer
from emogen.task.prompt import Message, fill, load_prompt, render
from emogen.task.recipe import Recipe
from emogen.task.rows import Rows
from emogen.task.splits import draw_rows
from emogen.task.task import Task, draw_examples, load_task, load_task_with_rows, make_task

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

KEYS = ("EMOGEN_REMOTE_KEY", "OPENAI_API_KEY")  # environment variables; the first that is set is sent
TRIES = 6  # of a request that the server cannot answer now
MAX_TOKENS = 128  # of an answer, unless a constrained one may be longer


class BudgetError(ModelError):
    """`max_dollars` is reached."""


def load_remote(run: Path, recipe: Recipe, label_set: LabelSet) -> "RemoteClassifier":
    """Load the classifier of a recipe: its prompt, and the labelled rows where the prompt shows some of them.

    Args:
        run: the recipe file, whose training rows may be shown; or the folder of its cross-validation, all of whose rows
            may be.

    Raises:
        InputError: a part of the recipe is missing or invalid.
    """
    if run.is_dir():
        rows = read_held_out(run, label_set)
        examples, others = draw_rows(rows, recipe)
        task = make_task(recipe, label_set, load_prompt(recipe.find(recipe.prompt)), others, examples)
        return RemoteClassifier(task, others)
    if recipe.examples_by == "nearest":
        task, splits, _ = load_task_with_rows(recipe)
        return RemoteClassifier(task, splits.train)
    return RemoteClassifier(load_task(recipe))


class RemoteClassifier:
    """The model of an endpoint, with the prompt and the labels of a recipe.

    It gives no probabilities. `predict_proba` returns 1 for the labels of the answer and 0 for the others.
    """

    n_questions = 1

    def __init__(self, task: Task, labelled: Rows | None = None, endpoint: "Endpoint | None" = None):
        """Prepare the prompt; nothing is asked yet.

        Args:
            labelled: the rows that `examples_by: nearest` chooses from; it needs them.
            endpoint: that of the recipe, where several classifiers share what they may spend.
        """
        self.recipe: Recipe = task.recipe
        self.label_set: LabelSet = task.label_set
        self._task = task
        self._neighbours = None
        if self.recipe.examples_by == "nearest" and labelled:
            self._neighbours = Neighbours(labelled, self.recipe.features)
        self._messages = render(task.prompt, task.label_set, task.examples)
        self._shown = [example.text for example in task.examples]
        self._endpoint = endpoint or Endpoint(task.recipe)

    def predict(
        self,
        texts: Sequence[str],
        *,
        with_prob: bool = False,
        batch_size: int = 32,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Prediction]:
        """Ask about n texts, several at a time, and parse the answers.

        Raises:
            ModelError: the server refuses or does not answer, or `max_dollars` is reached. Its answers are kept.
        """
        if not texts:
            return []
        prompts, constraint = self._prompts(texts), self._constraint
        same: dict[str, list[int]] = defaultdict(list)  # the positions of each prompt: a repeated one is asked once
        for i, prompt in enumerate(prompts):
            same[json.dumps(prompt)].append(i)
        answers: list[str] = [""] * len(texts)
        with ThreadPoolExecutor(self.recipe.api_requests) as pool:
            ask = self._endpoint.answer
            limit = self._max_tokens if constraint else MAX_TOKENS
            asked = {pool.submit(ask, prompts[rows[0]], limit, constraint): rows for rows in same.values()}
            try:
                for done in as_completed(asked):
                    for i in asked[done]:
                        answers[i] = done.result()
                    if progress:
                        progress(len(asked[done]))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if spent := self._endpoint.summary():
            log.info(spent)
        parsed = [parse_answer(raw, self.label_set, style=self.recipe.answer) for raw in answers]
        return [
            Prediction(raw, each, 0, tuple(map(float, each.vector))) for raw, each in zip(answers, parsed, strict=True)
        ]

    def predict_proba(self, texts: Sequence[str], *, progress: Callable[[int], Any] | None = None) -> np.ndarray:
        """The labels of the answers as float32 [n, L]: 1 or 0."""
        return pred_matrix(self.predict(texts, progress=progress)).astype(np.float32)

    @cached_property
    def _constraint(self) -> dict[str, Any]:
        """What the server takes to constrain an answer; nothing if it is not known to take anything."""
        if self.recipe.decode == "free":
            return {}
        if self._endpoint.kind == "llama.cpp":
            return {"grammar": answer_gbnf(self.label_set, self.recipe.answer)}
        if self._endpoint.kind == "vLLM":
            return {"structured_outputs": {"regex": answer_regex(self.label_set, self.recipe.answer)}}
        return {}

    @property
    def _max_tokens(self) -> int:
        """Enough for every valid answer: none has more tokens than bytes."""
        names = self.label_set.names
        longest = [[name] for name in names] if self.label_set.exactly_one else [names]
        answers = [answer_text(some, self.label_set, self.recipe.answer) for some in longest]
        return max(MAX_TOKENS, *(len(answer.encode()) for answer in answers))

    def _prompts(self, texts: Sequence[str]) -> list[list[Message]]:
        if self._neighbours is None:
            return [fill(self._messages, [text, *self._shown]) for text in texts]
        style, prompts = self.recipe.answer, []
        for text, near in zip(texts, self._neighbours.nearest(texts, self.recipe.examples), strict=True):
            messages = render(self._task.prompt, self.label_set, draw_examples(near, self.label_set, style))
            prompts.append(fill(messages, [text, *near.texts]))
        return prompts


class Endpoint:
    """The endpoint of a recipe: it is asked, its answers are kept on disk, and what they cost is counted."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._store = _Answers()
        self._budget = _Budget(recipe.api_prices, recipe.max_dollars)
        self._warn_once = cache(log.warning)

    def answer(self, messages: Sequence[Message], max_tokens: int, constraint: Mapping[str, Any] | None = None) -> str:
        """The most probable answer of the model to a chat, from the disk if it was given before.

        One that was cut off is a warning, and is not kept: once the server is set up otherwise, it is asked again.

        Args:
            constraint: what the server takes to constrain the answer.

        Raises:
            BudgetError: `max_dollars` is reached.
            ModelError: the server refuses, or does not answer.
        """
        body = {
            "model": self.recipe.api_model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": max_tokens,
            **(constraint or {}),
        }
        key = hashlib.sha256(json.dumps([str(self._client.base_url), body]).encode()).hexdigest()
        if (kept := self._store.get(key)) is not None:
            return kept
        with self._budget.request() as count:
            found = self._ask(body)
            count(found.get("usage") if isinstance(found, dict) else None)
        answer, is_whole = self._read(found)
        if is_whole:
            self._store.put(key, answer)
        else:
            self._warn_once(
                f"{self.recipe.api_base}: the model did not end each answer within {max_tokens} tokens (finish_reason: "
                "length); what such an answer lacks is not in its labels. Does the model reason before it answers? "
                "Turn that off at the server"
            )
        return answer

    def _read(self, found: Any) -> tuple[str, bool]:
        """The text of a response, and whether it is whole.

        Raises:
            ModelError: it is no response of a chat endpoint.
        """
        try:
            choice = found["choices"][0]
            content = choice["message"]["content"]
            if content is None or isinstance(content, str):
                return whole_characters(content or ""), choice.get("finish_reason") != "length"
        except (KeyError, IndexError, TypeError, AttributeError):
            pass
        raise ModelError(f"{self.recipe.api_base}: not an answer of a chat endpoint: {json.dumps(found)[:200]}")

    def summary(self) -> str:
        """Tokens and dollars so far; empty if nothing was counted."""
        return self._budget.summary()

    @cached_property
    def kind(self) -> str | None:
        """The program that serves the model, if it is known to constrain answers: `llama.cpp` or `vLLM`.

        Raises:
            ModelError: nothing listens at the address.
        """
        root = str(self._client.base_url).removesuffix("v1/")
        if "default_generation_settings" in self._object_at(f"{root}props"):
            log.info("The server is llama.cpp: answers are constrained by a grammar.")
            return "llama.cpp"
        if "version" in self._object_at(f"{root}version"):
            log.info("The server is vLLM: answers are constrained by a regular expression.")
            return "vLLM"
        log.warning("The server is not known to constrain answers: the model writes what it likes, and it is parsed.")
        return None

    @cached_property
    def _client(self) -> "httpx.Client":
        try:
            import httpx
        except ImportError:
            raise InputError(f"api_base needs httpx: {install_hint('remote')}") from None
        key = read_key(*KEYS)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            return httpx.Client(base_url=str(self.recipe.api_base).rstrip("/") + "/", headers=headers, timeout=120)
        except httpx.InvalidURL as error:
            raise InputError(f"api_base: {self.recipe.api_base!r}: not an address: {error}") from None

    def _object_at(self, address: str) -> dict[str, Any]:
        """The JSON object at an address, empty if there is none. Some servers answer 200 wherever they are asked."""
        import httpx

        try:
            response = self._client.get(address)
            found = response.json() if response.status_code == 200 else {}
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ModelError(f"{self.recipe.api_base}: cannot connect: {error}") from None
        except (httpx.HTTPError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

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
                status, text = response.status_code, response.text[:200]
                if status == 200:
                    try:
                        return response.json()
                    except (ValueError, RecursionError):
                        status, text = 0, f"200, but no JSON: {text}"
                moved = f"moved to {response.headers['location']}; " if response.has_redirect_location else ""
                reason = f"{status}: {moved}{text}" if status else text
                asked_for = response.headers.get("retry-after", "")  # seconds; a date is not waited for
                wait = float(asked_for) if asked_for.replace(".", "", 1).isdigit() else wait
            except httpx.HTTPError as error:
                status, reason = 0, f"{type(error).__name__}: {error}"
            if status and status != 429 and status < 500:
                raise ModelError(f"{self.recipe.api_base}: the server refuses: {reason}")
            if k < TRIES - 1:
                _sleep(min(wait, 60))
        raise ModelError(f"{self.recipe.api_base}: no answer after {TRIES} tries; the last one: {reason}")


_sleep = time.sleep


def read_key(*names: str) -> str | None:
    """The key in the first of some environment variables that is set and not empty; None if there is none.

    Raises:
        InputError: it has a character that no header can hold, such as the end of a line in a file of Windows. A
            library would print the key with its own message.
    """
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return None
    key = os.environ[name]
    if not re.fullmatch("[!-~]+", key):
        raise InputError(
            f"{name}: it has a blank, the end of a line or another character that no key has; set it again without that"
        )
    return key


class _Budget:
    """What a call has spent at the endpoint, by the tokens that the server counts.

    Args:
        prices: dollars for a million tokens that are read, and that are written.
        limit: dollars.
    """

    def __init__(self, prices: Sequence[float] | None, limit: float | None):
        self._prices, self._limit = prices, limit
        self._tokens: Counter[str] = Counter()
        self._dollars = self._dearest = 0.0
        self._under_way = 0
        self._lock = threading.Condition()  # notified when a request has ended

    @contextmanager
    def request(self) -> Iterator[Callable[[Any], None]]:
        """A request; what it yields takes the server's `usage`. It is not begun if it could exceed the limit.

        Each of the requests that are under way is taken to cost as much as the dearest one so far; with a limit, the
        first one goes alone, since nothing is known of its cost.

        Raises:
            BudgetError: the limit is reached.
            ModelError: the server counts no tokens, so that no limit can be kept.
        """
        with self._lock:
            if self._limit is not None:
                self._lock.wait_for(lambda: self._tokens or not self._under_way)
            expected = self._dollars + (self._under_way + 1) * self._dearest
            if self._limit is not None and expected > self._limit:
                raise BudgetError(
                    f"max_dollars: ${self._dollars:.4f} of ${self._limit:g} are spent, and another answer could exceed "
                    "the limit; all answers are kept, and the same command with a higher limit goes on from here"
                )
            self._under_way += 1
        try:
            yield self._count
        finally:
            with self._lock:
                self._under_way -= 1
                self._lock.notify_all()

    def _count(self, usage: Any) -> None:
        counted = {name: n for name, n in usage.items() if isinstance(n, int)} if isinstance(usage, dict) else {}
        read, written = counted.get("prompt_tokens"), counted.get("completion_tokens")
        if self._limit is not None and (read is None or written is None):
            raise ModelError("max_dollars: the server does not count tokens (`usage`), so no limit can be kept")
        with self._lock:
            self._tokens.update(counted)
            if self._prices and read is not None and written is not None:
                cost = (read * self._prices[0] + written * self._prices[1]) / 1e6
                self._dollars, self._dearest = self._dollars + cost, max(self._dearest, cost)

    def summary(self) -> str:
        """Tokens and dollars so far; empty if nothing was counted."""
        parts = [f"{name}: {n:,}" for name, n in self._tokens.items()]
        return ", ".join([*parts, f"${self._dollars:.4f}"] if parts and self._prices else parts)


@dataclass
class _Answers:
    """The answers that were given before, in a file of the cache folder."""

    def __post_init__(self) -> None:
        path = paths.cache_dir() / "remote-answers.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._lock = path, threading.Lock()
        with self._failing():
            self._file = sqlite3.connect(path, check_same_thread=False, timeout=30)
            self._file.execute("create table if not exists answers (key text primary key, answer text not null)")

    def get(self, key: str) -> str | None:
        with self._lock, self._failing():
            row = self._file.execute("select answer from answers where key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, answer: str) -> None:
        with self._lock, self._failing(), self._file:
            self._file.execute("insert or replace into answers values (?, ?)", (key, answer))

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ModelError(
                f"{self._path}: the answers of endpoints cannot be kept there: {error}; if the file is damaged, delete "
                "it, and everything is asked again"
            ) from None
