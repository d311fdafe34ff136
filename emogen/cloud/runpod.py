"""A client of Runpod's REST API v2: pods, prices, logs."""

import contextlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from pydantic import BaseModel, Field, ValidationError

from emogen.cloud.hardware import Quote
from emogen.distribution import install_hint
from emogen.errors import InputError, ModelError

if TYPE_CHECKING:
    import httpx

GRACE = 600  # seconds that a pod waits after its job has ended, so that the run can be fetched
DEFAULT_HOURS = 6.0  # the limit of a pod of this project that has no EMOGEN_DEADLINE
NAME = re.compile(r"(?P<job>emogen-(?P<recipe>[a-z0-9._-]+)-[0-9a-f]{8})-(?P<epoch>\d{9,11})")
LIVE = ("PROVISIONING", "STARTING", "RUNNING")  # the statuses of a pod that runs or will run
KEYS = ("RUNPOD_API_KEY", "HF_TOKEN")


class ApiError(ModelError):
    """A request that failed. `status` is the HTTP status, or None if there was no answer."""

    def __init__(self, message: str, status: int | None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Polling:
    """How a pod is polled.

    Attributes:
        poll: seconds between two requests.
        provision: requests until a new pod has to be up.
        patience: failed attempts in a row that are tolerated.
    """

    poll: float = 5.0
    provision: int = 240
    patience: int = 60


def read_keys() -> dict[str, str]:
    """Read `RUNPOD_API_KEY` and `HF_TOKEN`.

    The environment takes precedence over ~/.config/emogen/keys, which has lines of KEY=VALUE.

    Raises:
        InputError: other users can read that file.
    """
    keys: dict[str, str] = {}
    path = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "emogen" / "keys"
    if path.is_file():
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InputError(f"{path}: other users can read your keys; run chmod 600 {path}")
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition("=")
            if name.strip() in KEYS:
                keys[name.strip()] = value.strip().strip("'\"")
    keys |= {name: os.environ[name].strip() for name in KEYS if os.environ.get(name)}
    return {name: value for name, value in keys.items() if value}


# What emogen reads of a pod. Fields that are not named here are ignored.


class PodGpu(BaseModel):
    """The GPU type of a pod."""

    id: str


class SshEndpoint(BaseModel):
    """The address of a pod's sshd."""

    host: str
    port: int
    username: str


class Ssh(BaseModel):
    """The ways to a pod's sshd. `direct` is None until the pod runs."""

    direct: SshEndpoint | None = None


class Pod(BaseModel):
    """A pod of this project. `cost` is in dollars per hour, in the pod's present state."""

    id: str
    name: str
    status: str
    cost: float = 0.0
    gpu: PodGpu | None = None
    ssh: Ssh | None = None
    env: dict[str, str] = Field({}, repr=False)  # contains keys

    @property
    def is_live(self) -> bool:
        """Whether the pod runs or will run."""
        return self.status in LIVE

    @property
    def job(self) -> str:
        """The name of the job."""
        return self._name_part("job")

    @property
    def recipe(self) -> str:
        """The name of the recipe."""
        return self._name_part("recipe")

    @property
    def started(self) -> int:
        """The time of its launch, in epoch seconds."""
        return int(self._name_part("epoch"))

    @property
    def deadline(self) -> int:
        """The time at which the pod should be gone, in epoch seconds."""
        deadline = self.env.get("EMOGEN_DEADLINE", "")
        return int(deadline) + GRACE if deadline.isdigit() else self.started + round(DEFAULT_HOURS * 3600)

    def _name_part(self, group: str) -> str:
        match = NAME.fullmatch(self.name)
        assert match is not None  # `list_pods` returns no other pods
        return match[group]


@dataclass
class Api:
    """A client of the API. `secrets` are removed from errors and logs."""

    client: "httpx.Client"
    secrets: tuple[str, ...]
    pause: Callable[[float], Any] = time.sleep
    tries: int = 5

    def redact(self, text: str) -> str:
        """The text without secrets."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def request(self, method: str, path: str, *, body: Any = None, params: Mapping[str, Any] | None = None) -> Any:
        """Send a request.

        A request that is rate-limited (429) is repeated when the API says so. After a server error or a lost
        connection only GET and DELETE are repeated: any other request may have been carried out.

        Returns:
            The decoded JSON of the answer, or None if it has no body.

        Raises:
            InputError: the key is refused.
            ApiError: any other failure.
        """
        import httpx

        repeatable = method in ("GET", "DELETE")
        for attempt in range(self.tries):
            last = attempt == self.tries - 1
            try:
                response = self.client.request(method, path, json=body, params=params)
            except httpx.TransportError as error:
                if last or not repeatable:
                    message = f"{method} {path}: no answer ({type(error).__name__}: {error})"
                    raise ApiError(self.redact(message), None) from None
                self.pause(2**attempt)
                continue
            again = response.status_code == 429 or (response.status_code >= 500 and repeatable)
            if last or not again:
                break
            self.pause(_retry_after(response, 2**attempt))
        if not response.is_success:
            raise self.error(response, f"{method} {path}")
        try:
            return response.json() if response.content else None
        except ValueError:
            raise ApiError(f"{method} {path}: the answer is not JSON", response.status_code) from None

    def error(self, response: "httpx.Response", request: str) -> InputError | ApiError:
        """The exception for an error response (RFC 9457), with what to do."""
        try:
            problem = response.json()
            detail = "; ".join([problem.get("detail") or problem.get("title") or "", *problem.get("errors", [])])
        except (ValueError, AttributeError, TypeError):
            detail = response.text[:200]
        if response.status_code == 401:
            return InputError(self.redact(f"Runpod refuses the key ({detail}); check RUNPOD_API_KEY"))
        hints = {
            402: "; top up the balance of the account",
            403: "; the key lacks the permission, or the account has no access",
        }
        message = f"{request}: {response.status_code} {detail}{hints.get(response.status_code, '')}"
        return ApiError(self.redact(message), response.status_code)


def _retry_after(response: "httpx.Response", otherwise: float) -> float:
    """The seconds to wait before the next request: the Retry-After header, at most two minutes."""
    seconds = response.headers.get("Retry-After", "")
    return min(float(seconds) if seconds.isdigit() else otherwise, 120.0)


@contextlib.contextmanager
def open_api(keys: Mapping[str, str], timeout: float = 60.0) -> Iterator[Api]:
    """Open a client of the API, at `RUNPOD_API_URL` or Runpod's address.

    Raises:
        InputError: there is no key or no httpx, or the address would send the key unencrypted.
    """
    try:
        import httpx
    except ImportError:
        raise InputError(f"renting a GPU needs httpx: {install_hint('pods')}") from None
    if "RUNPOD_API_KEY" not in keys:
        raise InputError(
            "no Runpod key: set RUNPOD_API_KEY, or put RUNPOD_API_KEY=... into ~/.config/emogen/keys (chmod 600); "
            "create a key in Runpod's console, under Settings"
        )
    base = os.environ.get("RUNPOD_API_URL", "https://api.runpod.io")
    address = urlparse(base)
    if address.scheme != "https" and address.hostname not in ("127.0.0.1", "::1", "localhost"):
        raise InputError(f"RUNPOD_API_URL={base}: https is needed; the key would be sent unencrypted")
    headers = {"Authorization": f"Bearer {keys['RUNPOD_API_KEY']}", "User-Agent": "emogen"}
    with httpx.Client(base_url=base, headers=headers, timeout=timeout) as client:
        yield Api(client, tuple(keys.values()))


def parse_pod(answer: Any) -> Pod:
    """A pod from an answer of the API.

    Raises:
        ApiError: the answer does not match Runpod's API document.
    """
    try:
        return Pod.model_validate(answer)
    except ValidationError as error:
        where = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise ApiError(f"the API describes a pod in an unknown way: {where}", 200) from None


def list_pods(api: Api) -> list[Pod]:
    """The pods of this project, the newest first. They are recognised by their names; other pods are left alone."""
    pods = (api.request("GET", "/v2/pods") or {}).get("pods", [])
    ours = [parse_pod(pod) for pod in pods if NAME.fullmatch(str(pod.get("name", "")))]
    return sorted(ours, key=lambda pod: -pod.started)


def get_pod(api: Api, pod: Pod) -> Pod | None:
    """The present state of a pod, or None if it is gone."""
    try:
        current = parse_pod(api.request("GET", f"/v2/pods/{pod.id}"))
    except ApiError as error:
        if error.status == 404:
            return None
        raise
    return None if current.status == "TERMINATED" else current


def find_pod(api: Api, word: str) -> Pod:
    """Find a pod by its id, its name, or the beginning of its name.

    Raises:
        InputError: no pod or several pods match.
    """
    pods = list_pods(api)
    found = [pod for pod in pods if word in (pod.id, pod.name)] or [pod for pod in pods if pod.name.startswith(word)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(pod.name for pod in found or pods) or "none"
    raise InputError(f"{word}: {'several pods' if found else 'no pod'} of that name; pods of emogen: {names}")


def quotes(api: Api) -> dict[str, Quote]:
    """The price and stock of each GPU type in the secure cloud."""
    params = {"include": "AVAILABILITY", "product": "POD"}
    answer = api.request("GET", "/v2/catalog/gpus", params=params) or {}
    return {
        gpu["id"]: Quote(float(gpu["price"]["secure"]), gpu.get("availability"))
        for gpu in answer.get("gpus", [])
        if gpu.get("secure") and gpu.get("price", {}).get("secure")
    }


def act(api: Api, pod: Pod, action: str) -> None:
    """Start or stop a pod. A pod that is in that state already is no error."""
    try:
        api.request("POST", f"/v2/pods/{pod.id}/action", body={"action": action})
    except ApiError as error:
        current = get_pod(api, pod) if error.status == 409 else None
        if current is None or current.is_live != (action == "start"):
            raise


def terminate(api: Api, name: str) -> int:
    """Terminate every pod of exactly this name, and return their number. A pod that is gone already is no error."""
    pods = [pod for pod in list_pods(api) if pod.name == name]
    for pod in pods:
        try:
            api.request("DELETE", f"/v2/pods/{pod.id}")
        except ApiError as error:
            if error.status != 404:
                raise
    return len(pods)


def overdue(pods: Sequence[Pod], now: float) -> list[Pod]:
    """The pods past their deadline, whatever their status."""
    return [pod for pod in pods if now > pod.deadline]


@dataclass
class _Event:
    """A server-sent event."""

    id: str = ""
    data: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """The line of the log."""
        data = "\n".join(self.data)
        try:
            return str(json.loads(data)["line"])
        except (ValueError, KeyError, TypeError):
            return data


@dataclass
class _Cursor:
    """A position in a log: the id of the last event, and the lines seen with that id (several events may share it)."""

    id: str = ""
    lines: set[str] = field(default_factory=set)


def logs(api: Api, pod: Pod, polling: Polling) -> Iterator[str]:
    """The lines that the container of a pod prints, from the first one until the pod is gone or stopped.

    After a lost connection the log continues with the first line that was not seen.

    Raises:
        ApiError: the API cannot be reached, or refuses.
    """
    import httpx

    path, cursor, failures = f"/v2/pods/{pod.id}/logs", _Cursor(), 0
    while True:
        wait = polling.poll
        try:
            with _open_log(api, path, cursor) as response:
                if response.is_success:
                    failures = 0
                    for line in _new_lines(response, cursor):
                        yield api.redact(line)
                elif response.status_code in (404, 409, 429) or response.status_code >= 500:
                    failures += 1  # a new pod may have no log yet
                    wait = _retry_after(response, polling.poll)
                else:
                    response.read()
                    raise api.error(response, f"GET {path}")
        except httpx.TransportError:
            failures += 1
        try:
            current = get_pod(api, pod)
            if current is None or not current.is_live:
                return
        except ApiError as error:
            if error.status is not None and error.status < 500:
                raise
            failures += 1
        if failures > polling.patience:
            raise ApiError(f"{pod.name}: the connection is lost, and the log cannot be read", None)
        api.pause(wait)


def _open_log(api: Api, path: str, cursor: _Cursor) -> contextlib.AbstractContextManager["httpx.Response"]:
    """The stream of a log, from the cursor on; at first, the last 5,000 lines, the most that the API sends."""
    headers = {"Accept": "text/event-stream"}
    params: dict[str, Any] = {"source": "container"}
    if cursor.id:
        headers["Last-Event-ID"] = cursor.id
    else:
        params["tail"] = 5000
    return api.client.stream("GET", path, params=params, headers=headers, timeout=60.0)


def _new_lines(response: "httpx.Response", cursor: _Cursor) -> Iterator[str]:
    """The lines of a stream that were not seen before it was opened; moves the cursor along.

    A resumed stream repeats the events that have the id of the cursor.
    """
    resumed_at, seen = cursor.id, frozenset(cursor.lines)
    for event in _events(response.iter_lines()):
        if event.id == resumed_at and event.line in seen:
            continue
        if event.id != cursor.id:
            cursor.id, cursor.lines = event.id, set()
        cursor.lines.add(event.line)
        yield event.line


def _events(lines: Iterator[str]) -> Iterator[_Event]:
    """The complete events of an event stream."""
    event = _Event()
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            event.id = value
        elif name == "data":
            event.data.append(value)
        elif not line:
            if event.data:
                yield event
            event = _Event(event.id)
