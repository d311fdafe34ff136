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

GRACE = 600  # seconds that a pod waits, once its job has ended, for the run to be fetched
DEFAULT_HOURS = 6.0  # the limit of a pod of this project that does not say its own
NAME = re.compile(r"(?P<job>emogen-(?P<recipe>[a-z0-9._-]+)-[0-9a-f]{8})-(?P<epoch>\d{9,11})")
LIVE = ("PROVISIONING", "STARTING", "RUNNING")


class ApiError(ModelError):
    """An answer of the API that is not what was asked for; `status` is None if there was no answer at all."""

    def __init__(self, message: str, status: int | None):
        super().__init__(message)
        self.status = status


def read_keys() -> dict[str, str]:
    """`RUNPOD_API_KEY` and `HF_TOKEN`, from the environment, or from ~/.config/emogen/keys (lines of KEY=VALUE).

    Raises:
        InputError: others can read that file.
    """
    names = ("RUNPOD_API_KEY", "HF_TOKEN")
    keys: dict[str, str] = {}
    path = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "emogen" / "keys"
    if path.is_file():
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InputError(f"{path}: others can read your keys; chmod 600 {path}")
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition("=")
            if name.strip() in names:
                keys[name.strip()] = value.strip().strip("'\"")
    keys |= {name: os.environ[name].strip() for name in names if os.environ.get(name)}
    return {name: value for name, value in keys.items() if value}


class GpuOf(BaseModel):
    """The GPUs of a pod."""

    id: str
    count: int = 1


class SshEndpoint(BaseModel):
    """A way to a pod's sshd."""

    host: str
    port: int
    username: str


class Ssh(BaseModel):
    """`direct` is None until the pod runs."""

    direct: SshEndpoint | None = None


class Pod(BaseModel):
    """What emogen reads of a pod; fields that it does not know are passed over. `cost`: dollars an hour, now."""

    id: str
    name: str
    status: str
    cost: float = 0.0
    gpu: GpuOf | None = None
    ssh: Ssh | None = None
    env: dict[str, str] = Field({}, repr=False)  # holds keys

    @property
    def job(self) -> str:
        return self._part("job")

    @property
    def recipe(self) -> str:
        return self._part("recipe")

    @property
    def started(self) -> int:
        """When it was launched, in epoch seconds."""
        return int(self._part("epoch"))

    @property
    def deadline(self) -> int:
        """When it should be gone, in epoch seconds."""
        said = self.env.get("EMOGEN_DEADLINE", "")
        return int(said) + GRACE if said.isdigit() else self.started + round(DEFAULT_HOURS * 3600)

    def _part(self, name: str) -> str:
        match = NAME.fullmatch(self.name)
        assert match is not None  # `list_pods` gives no others
        return match[name]


@dataclass
class Api:
    """A client of the API. `secrets` never come out of it: they are struck from errors and logs."""

    client: "httpx.Client"
    secrets: tuple[str, ...]
    pause: Callable[[float], Any] = time.sleep
    tries: int = 5

    def redact(self, text: str) -> str:
        """The text without keys."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def request(self, method: str, path: str, *, body: Any = None, params: Mapping[str, Any] | None = None) -> Any:
        """One request -> its JSON, or None if the answer has no body.

        A refused one (429) is repeated when the API says so. After a server error or a lost connection only GET and
        DELETE are: of others nobody knows whether they were carried out.

        Raises:
            InputError: the key is refused.
            ApiError: any other error.
        """
        import httpx

        for attempt in range(self.tries):
            last = attempt == self.tries - 1
            try:
                response = self.client.request(method, path, json=body, params=params)
            except httpx.TransportError as error:
                if last or method not in ("GET", "DELETE"):
                    message = f"{method} {path}: no answer ({type(error).__name__}: {error})"
                    raise ApiError(self.redact(message), None) from None
                self.pause(2**attempt)
                continue
            again = response.status_code == 429 or (response.status_code >= 500 and method in ("GET", "DELETE"))
            if again and not last:
                self.pause(_retry_after(response, 2**attempt))
                continue
            if not response.is_success:
                raise self.error(response, f"{method} {path}")
            try:
                return response.json() if response.content else None
            except ValueError:
                raise ApiError(f"{method} {path}: the answer is not JSON", response.status_code) from None
        raise AssertionError

    def error(self, response: "httpx.Response", what: str) -> InputError | ApiError:
        """The error that an answer (RFC 9457) stands for, and what to do."""
        try:
            problem = response.json()
            said = "; ".join([problem.get("detail") or problem.get("title") or "", *problem.get("errors", [])])
        except (ValueError, AttributeError, TypeError):
            said = response.text[:200]
        if response.status_code == 401:
            return InputError(self.redact(f"Runpod refuses the key ({said}); check RUNPOD_API_KEY"))
        hints = {402: "; top up the account's balance", 403: "; the key may not do this, or the account may not use it"}
        message = f"{what}: {response.status_code} {said}{hints.get(response.status_code, '')}"
        return ApiError(self.redact(message), response.status_code)


def _retry_after(response: "httpx.Response", otherwise: float) -> float:
    """Seconds to wait as the answer asks, at most two minutes."""
    said = response.headers.get("Retry-After", "")
    return min(float(said) if said.isdigit() else otherwise, 120.0)


@contextlib.contextmanager
def open_api(keys: Mapping[str, str], timeout: float = 60.0) -> Iterator[Api]:
    """A client of the API, at `RUNPOD_API_URL` or Runpod's own address.

    Raises:
        InputError: no key, no httpx, or an address that would send the key in the clear.
    """
    try:
        import httpx
    except ImportError:
        raise InputError(f"renting a GPU needs httpx: {install_hint('pods')}") from None
    if "RUNPOD_API_KEY" not in keys:
        raise InputError(
            "no key: set RUNPOD_API_KEY, or put RUNPOD_API_KEY=... into ~/.config/emogen/keys (chmod 600); "
            "keys are made in Runpod's console, under Settings"
        )
    base = os.environ.get("RUNPOD_API_URL", "https://api.runpod.io")
    address = urlparse(base)
    if address.scheme != "https" and address.hostname not in ("127.0.0.1", "::1", "localhost"):
        raise InputError(f"RUNPOD_API_URL={base}: https is needed, or the key would be sent in the clear")
    headers = {"Authorization": f"Bearer {keys['RUNPOD_API_KEY']}", "User-Agent": "emogen"}
    with httpx.Client(base_url=base, headers=headers, timeout=timeout) as client:
        yield Api(client, tuple(keys.values()))


def parse_pod(answer: Any) -> Pod:
    try:
        return Pod.model_validate(answer)
    except ValidationError as error:
        where = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise ApiError(f"the API describes a pod otherwise than its document: {where}", 200) from None


def list_pods(api: Api) -> list[Pod]:
    """The pods of this project, by their names, the newest first. Other pods of the account are left alone."""
    pods = (api.request("GET", "/v2/pods") or {}).get("pods", [])
    ours = [parse_pod(pod) for pod in pods if NAME.fullmatch(str(pod.get("name", "")))]
    return sorted(ours, key=lambda pod: -pod.started)


def get_pod(api: Api, pod: Pod) -> Pod | None:
    """A pod as it is now, or None if it is gone."""
    try:
        now = parse_pod(api.request("GET", f"/v2/pods/{pod.id}"))
    except ApiError as error:
        if error.status == 404:
            return None
        raise
    return None if now.status == "TERMINATED" else now


def find_pod(api: Api, word: str) -> Pod:
    """The pod that a word names: its id, its name, or the beginning of its name.

    Raises:
        InputError: none, or several.
    """
    pods = list_pods(api)
    found = [pod for pod in pods if word in (pod.id, pod.name)] or [pod for pod in pods if pod.name.startswith(word)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(pod.name for pod in found or pods) or "there are none"
    raise InputError(f"{word}: {'several pods' if found else 'no pod'} of that name; those of emogen: {names}")


def quotes(api: Api) -> dict[str, Quote]:
    """What each GPU type costs in the secure cloud, and how much stock there is."""
    params = {"include": "AVAILABILITY", "product": "POD"}
    answer = api.request("GET", "/v2/catalog/gpus", params=params) or {}
    return {
        gpu["id"]: Quote(float(gpu["price"]["secure"]), gpu.get("availability"))
        for gpu in answer.get("gpus", [])
        if gpu.get("secure") and gpu.get("price", {}).get("secure")
    }


def act(api: Api, pod: Pod, action: str) -> None:
    """Start or stop a pod. A pod that is in that state already is left so."""
    try:
        api.request("POST", f"/v2/pods/{pod.id}/action", body={"action": action})
    except ApiError as error:
        now = get_pod(api, pod) if error.status == 409 else None
        if now is None or (now.status in LIVE) != (action == "start"):
            raise


def terminate(api: Api, name: str) -> int:
    """End every pod of exactly this name, for good; how many there were. A pod that is gone already is no error."""
    pods = [pod for pod in list_pods(api) if pod.name == name]
    for pod in pods:
        try:
            api.request("DELETE", f"/v2/pods/{pod.id}")
        except ApiError as error:
            if error.status != 404:
                raise
    return len(pods)


def overdue(pods: Sequence[Pod], now: float) -> list[Pod]:
    """Those that are older than their limit, whatever they do."""
    return [pod for pod in pods if now > pod.deadline]


@dataclass
class Event:
    """A server-sent event: its id, and its data."""

    id: str = ""
    data: list[str] = field(default_factory=list)


def _events(lines: Iterator[str]) -> Iterator[Event]:
    """Lines of an event stream -> its events; one that is cut off is none."""
    event = Event()
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
            event = Event(event.id)


def logs(api: Api, pod: Pod, *, poll: float = 5.0, patience: int = 60) -> Iterator[str]:
    """The lines that a pod's container prints, from the beginning until the pod is gone or stopped.

    A stream that breaks off goes on after the last line that was seen.

    Args:
        poll: seconds between attempts. patience: how many in a row may fail.

    Raises:
        ApiError: the API cannot be reached, or refuses.
    """
    import httpx

    last, seen = "", set[str]()  # the last id, and the lines that came with it: more than one can
    failures = 0
    while True:
        resumed, known = bool(last), (last, frozenset(seen))
        headers = {"Last-Event-ID": last, "Accept": "text/event-stream"} if resumed else {"Accept": "text/event-stream"}
        params: dict[str, Any] = {"source": "container"} if resumed else {"source": "container", "tail": 5000}
        wait = poll
        try:
            path = f"/v2/pods/{pod.id}/logs"
            with api.client.stream("GET", path, params=params, headers=headers, timeout=60.0) as response:
                if response.is_success:
                    failures = 0
                    for event in _events(response.iter_lines()):
                        line = _line(event)
                        if event.id == known[0] and line in known[1]:
                            continue
                        if event.id != last:
                            last, seen = event.id, set()
                        seen.add(line)
                        yield api.redact(line)
                elif response.status_code not in (404, 409, 429) and response.status_code < 500:
                    response.read()
                    raise api.error(response, f"GET {path}")
                else:  # a pod that has only just been made may have no log yet
                    failures += 1
                    wait = _retry_after(response, poll)
        except httpx.TransportError:
            failures += 1
        try:
            now = get_pod(api, pod)
            if now is None or now.status not in LIVE:
                return
        except ApiError as error:
            if error.status is not None and error.status < 500:
                raise
            failures += 1
        if failures > patience:
            raise ApiError(f"{pod.name}: the connection is lost, and its log cannot be read", None)
        api.pause(wait)


def _line(event: Event) -> str:
    data = "\n".join(event.data)
    try:
        return str(json.loads(data)["line"])
    except (ValueError, KeyError, TypeError):
        return data
