"""Training on a rented GPU: Runpod's REST API v2, and the life of a job from the first request to the end of its pod.

A pod's name is `emogen-<recipe>-<8 hex digits of what is shipped>-<epoch seconds>`, so the same job is found again and
never paid for twice. Three limits hold what it costs: `runpod/start.sh` ends training at the deadline and stops its own
pod; `launch` terminates what it made when anything goes wrong; `reap` ends what is left of both.
"""

import base64
import contextlib
import json
import math
import os
import re
import shlex
import signal
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from pydantic import BaseModel, Field, ValidationError

from emogen import paths, ship
from emogen.errors import InputError, ModelError
from emogen.plan import Option, Plan, Quote, plan, shape_of
from emogen.recipe import load_recipe
from emogen.ship import Address, Job

if TYPE_CHECKING:
    import httpx

IMAGE = "runpod/pytorch:1.0.3-cu1281-torch291-ubuntu2404"
GRACE = 600  # seconds that a pod waits, once its job has ended, for the run to be fetched
DEFAULT_HOURS = 6.0  # the limit of a pod of this project that does not say its own
NAME = re.compile(r"(?P<job>emogen-(?P<recipe>[a-z0-9._-]+)-[0-9a-f]{8})-(?P<epoch>\d{9,11})")
ENDED = re.compile(r"\[emogen\] ended: (done|failed.*)$")  # what start.sh says last
LIVE = ("PROVISIONING", "STARTING", "RUNNING")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Unfetched(ModelError):
    """A job is done, and its run is still on its pod."""


class ApiError(ModelError):
    """An answer of the API that is not what was asked for; `status` is None if there was no answer at all."""

    def __init__(self, message: str, status: int | None):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------- keys


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


# ---------------------------------------------------------------------------------------------- the API


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
        raise InputError("renting a GPU needs httpx: pip install 'emogen[pods]'") from None
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


def _pod(answer: Any) -> Pod:
    try:
        return Pod.model_validate(answer)
    except ValidationError as error:
        where = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise ApiError(f"the API describes a pod otherwise than its document: {where}", 200) from None


def list_pods(api: Api) -> list[Pod]:
    """The pods of this project, by their names, the newest first. Other pods of the account are left alone."""
    pods = (api.request("GET", "/v2/pods") or {}).get("pods", [])
    ours = [_pod(pod) for pod in pods if NAME.fullmatch(str(pod.get("name", "")))]
    return sorted(ours, key=lambda pod: -pod.started)


def get_pod(api: Api, pod: Pod) -> Pod | None:
    """A pod as it is now, or None if it is gone."""
    try:
        now = _pod(api.request("GET", f"/v2/pods/{pod.id}"))
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


# ---------------------------------------------------------------------------------------------- logs


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


# ---------------------------------------------------------------------------------------------- a job


@dataclass(frozen=True)
class Limits:
    """What a job may take at most."""

    hours: float
    dollars: float


@dataclass(frozen=True)
class Rhythm:
    """How a job is watched: seconds between two looks, how many looks until a pod has to be there, and how many
    attempts to reach it may fail in a row."""

    poll: float = 5.0
    provision: int = 240
    patience: int = 60


RHYTHM = Rhythm()


def candidates(planned: Plan, limits: Limits, gpus: Sequence[str] = ()) -> list[Option]:
    """The GPU types to try: those that fit the run and the limits, in the order of what the whole run costs on them.

    Raises:
        InputError: there is none, and why.
    """
    known = {option.gpu: option for option in planned.options if option.price is not None}
    if unknown := [name for name in gpus if name not in known]:
        raise InputError(f"--gpu {unknown[0]!r}: not offered, or not known here; there are: {', '.join(known)}")
    wanted = [option for option in known.values() if not gpus or option.gpu in gpus]
    fitting = [option for option in wanted if option.fits]
    need = f"{planned.peak / 1e9:.1f} GB"
    if not fitting:
        raise InputError(
            f"the run needs about {need} of GPU memory, which none of {', '.join(o.gpu for o in wanted)} has; halve "
            "per_device_train_batch_size, set gradient_checkpointing=true or load_in_4bit=true, or take a smaller model"
        )
    able = [o for o in fitting if o.total_hours <= limits.hours and (o.dollars or 0) <= limits.dollars]
    if not able:
        best = fitting[0]
        raise InputError(
            f"the run takes about {best.total_hours:.1f} hours and ${best.dollars:.2f} on {best.gpu}, more than "
            f"--max-hours {limits.hours:g} or --max-dollars {limits.dollars:g} allow"
        )
    in_stock = [option for option in able if option.stock != "NONE"]
    return in_stock or able  # stock is as of a moment ago; the API has the last word


def request_of(
    job: Job,
    option: Option,
    limits: Limits,
    *,
    now: int,
    disk: int,
    volume: str | None = None,
    place: str | None = None,
) -> dict[str, Any]:
    """The body of the request that creates the pod of a job, without secrets.

    Args:
        now: epoch seconds. disk: GB for models, checkpoints and the run.
        volume, place: the id of a network volume, and the data centre that it is in. Without one the pod gets storage
            of its own, which ends with it.
    """
    name = f"{job.name}-{now}"
    assert option.price
    seconds = 3600 * min(limits.hours, limits.dollars / option.price)
    start = paths.shipped("runpod/start.sh").read_bytes()
    network = {"network": [{"volumeId": volume, "path": ship.WORKSPACE}]} if volume else None
    body: dict[str, Any] = {
        "name": name,
        "image": IMAGE,
        "cloud": "SECURE",
        "gpu": {"id": option.gpu, "count": 1, "minCudaVersion": "12.8"},
        "disk": 40,
        "mounts": network or {"persistent": {"size": disk, "path": ship.WORKSPACE}},
        "ports": ["22/tcp"],
        "startSsh": True,
        # One string, which a shell's rules take apart.
        "args": shlex.join(["bash", "-c", 'eval "$(base64 -d <<<"$EMOGEN_START")"']),
        "env": {
            "EMOGEN_POD": name,
            "EMOGEN_DEADLINE": str(math.floor(now + seconds - GRACE)),
            "EMOGEN_GRACE": str(GRACE),
            "EMOGEN_START": base64.b64encode(start).decode(),
        },
    }
    return body | ({"dataCenterIds": [place]} if place else {})


def create(api: Api, body: dict[str, Any], keys: Mapping[str, str]) -> Pod:
    """Create a pod, once: after an answer that was lost, the list of pods says whether there is one of that name.

    Raises:
        ApiError: it was refused, or the API does not answer.
    """
    full = body | {"env": body["env"] | keys}
    for attempt in range(api.tries):
        try:
            return _pod(api.request("POST", "/v2/pods", body=full))
        except ApiError as error:
            if error.status is not None and error.status < 500:
                raise
            lost = error
        api.pause(2**attempt)
        for pod in list_pods(api):
            if pod.name == body["name"]:
                return pod
    raise lost


def create_first(api: Api, bodies: Sequence[dict[str, Any]], keys: Mapping[str, str], say: Callable[[str], Any]) -> Pod:
    """Create a pod of the first of several kinds that there is capacity for.

    Raises:
        ApiError: of none.
    """
    refused = ApiError("none was asked for", None)
    for body in bodies:
        try:
            pod = create(api, body, keys)
        except ApiError as error:
            if error.status not in (400, 403):
                raise
            say(f"{body['gpu']['id']}: {error}")
            refused = error
        else:
            say(f"{pod.name} ({pod.id}) on {body['gpu']['id']}, ${pod.cost:.2f} an hour")
            return pod
    raise ApiError(
        f"no GPU type could be had, or the request breaks a rule; the last answer was: {refused}. Try later, or allow "
        "more types with --gpu and --max-dollars",
        refused.status,
    )


def wait_for_ssh(api: Api, pod: Pod, rhythm: Rhythm) -> Address:
    """Wait until a pod runs and its sshd has an address.

    Raises:
        ApiError: it does not come up.
    """
    status = pod.status
    for _ in range(rhythm.provision):
        now = get_pod(api, pod)
        status = now.status if now else "TERMINATED"
        if now and now.status == "RUNNING" and now.ssh and now.ssh.direct:
            to = now.ssh.direct
            known_hosts = paths.cache_dir() / "pods" / pod.id
            return Address(to.host, to.port, to.username, known_hosts, rhythm.poll, rhythm.patience)
        if status not in LIVE:
            raise ApiError(f"{pod.name}: the pod did not come up ({status})", None)
        api.pause(rhythm.poll)
    minutes = rhythm.provision * rhythm.poll / 60
    raise ApiError(f"{pod.name}: still {status} after {minutes:.0f} minutes; try another --gpu", None)


def check_account(api: Api) -> None:
    """Raises InputError if the account has no SSH key, without which nothing could be sent to a pod."""
    if not (api.request("GET", "/v2/account/ssh-keys") or {}).get("keys"):
        raise InputError(
            "your Runpod account has no SSH public key; add the content of ~/.ssh/id_ed25519.pub in the console, under "
            "Settings (ssh-keygen -t ed25519 makes one)"
        )


def place_of(api: Api, volume: str) -> str:
    """The data centre of a network volume, which pods that use it have to be in. Raises InputError if there is none."""
    try:
        return str(api.request("GET", f"/v2/network-volumes/{volume}")["dataCenter"])
    except ApiError as error:
        if error.status == 404:
            raise InputError(f"--volume {volume}: the account has no such network volume") from None
        raise


def prepare(
    path: str | Path, overrides: Sequence[str], limits: Limits, *, gpus: Sequence[str] = (), volume: str | None = None,
    api: Api | None = None,
) -> tuple[Plan, Job, list[dict[str, Any]]]:  # fmt: skip
    """All that there is to know before a pod is created.

    Args:
        gpus: the only GPU types to consider. volume: the id of a network volume.
        api: where to ask for prices, keys and the volume; without it, nothing is asked.

    Returns:
        The plan; the job; and the request bodies to try, without secrets, the cheapest first.

    Raises:
        InputError: something is wrong with the recipe, the limits or the account. ApiError: the API gave way.
    """
    recipe = load_recipe(path, overrides)
    if recipe.output_dir.exists() and any(recipe.output_dir.iterdir()):
        raise InputError(f"output_dir: {recipe.output_dir}: not empty, and the run is to come there; name another one")
    planned = plan(path, overrides, quotes(api) if api else None)
    options = candidates(planned, limits, gpus)
    job = ship.job_of(recipe)
    place = None
    if api:
        check_account(api)
        place = place_of(api, volume) if volume else None
    shape = shape_of(recipe.model_name)
    disk = math.ceil(20 + 6e-9 * (shape.linear + shape.embeddings(with_head=True)))  # the model, and as much for a run
    now = int(time.time())
    bodies = [request_of(job, o, limits, now=now, disk=disk, volume=volume, place=place) for o in options]
    return planned, job, bodies


def same_job(api: Api, job: Job) -> Pod | None:
    """The pod that does this job already, or None.

    Raises:
        InputError: one has done it, and is stopped.
    """
    for pod in list_pods(api):
        if pod.job == job.name and pod.status in LIVE:
            return pod
        if pod.job == job.name:
            raise InputError(
                f"this job has a pod that is stopped: {pod.name}. emogen pod fetch {pod.id} brings its run home, "
                f"emogen pod terminate {pod.id} ends it; then launch again"
            )
    return None


def launch(
    api: Api, job: Job, bodies: Sequence[dict[str, Any]], keys: Mapping[str, str], say: Callable[[str], Any],
    rhythm: Rhythm = RHYTHM, folder: Path | None = None,
) -> Pod:  # fmt: skip
    """Rent a pod and start a job on it; with a `folder`, follow it to its end, and bring its run into that folder.

    A pod that does this job already is taken, and none is rented. Whatever goes wrong, Ctrl-C too, the pod is
    terminated, and with a folder in the end too; but not one that was there before and is not followed, nor one that
    has the run of a finished job, if that cannot be brought home.

    Raises:
        InputError: the job has been done. ApiError, ModelError: what went wrong.
    """
    running = same_job(api, job)
    name = running.name if running else bodies[0]["name"]
    with _signals_interrupt():
        try:
            if running:
                say(f"this job has a pod already: {running.name} ({running.id}), {running.status}")
            pod = running or create_first(api, bodies, keys, say)
            address = wait_for_ssh(api, pod, rhythm)
            say(f"sending {len(job.files)} files, {job.size / 1e6:.1f} MB")
            ship.send(job, pod.name, address)
            if folder is not None:
                follow(api, pod, folder, say, rhythm)
        except Unfetched:
            raise
        except BaseException:
            if folder is not None or running is None:
                _give_up(api, name, say)
            raise
    return pod


def follow(api: Api, pod: Pod, folder: Path, say: Callable[[str], Any], rhythm: Rhythm = RHYTHM) -> None:
    """Print the log of a job until it ends, bring its run home, and terminate its pod.

    Raises:
        Unfetched: it is done, but its run cannot be brought home: then the pod is stopped instead.
        ModelError: it failed (what there is of the run has been fetched), or its pod went away.
    """
    ended = None
    for line in logs(api, pod, poll=rhythm.poll, patience=rhythm.patience):
        say(line)
        if match := ENDED.search(line):
            ended = match[1]
            break
    if ended is None:
        raise ModelError(f"{pod.name}: the pod was stopped or terminated before its job had ended")
    try:
        ship.fetch(pod.job, wait_for_ssh(api, pod, rhythm), folder)
    except (ModelError, InputError, OSError) as error:
        if ended == "done":  # hours were paid for what is there
            with contextlib.suppress(ModelError, InputError):  # it stops itself, too
                act(api, pod, "stop")
            raise Unfetched(
                f"{pod.name}: the job is done, but its run could not be fetched: {error}. The pod is stopped, and pays "
                f"for its storage alone: emogen pod fetch {pod.id} --into FOLDER, then emogen pod terminate {pod.id}"
            ) from None
        say(f"nothing was fetched: {error}")
    terminate(api, pod.name)
    if ended != "done":
        raise ModelError(f"{pod.name}: the job {ended}; the log above says more")
    say(f"The run is in {folder}, and the pod is gone.")


def _give_up(api: Api, name: str, say: Callable[[str], Any]) -> None:
    """Terminate what a launch made; if that cannot be done, say so loudly."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # one more Ctrl-C would leave a pod that costs
    try:
        if terminate(api, name):
            say(f"{name}: terminated")
    except (ApiError, InputError) as error:
        say(
            f"{name} COULD NOT BE TERMINATED ({error}). It stops itself at its limit. End it in Runpod's console, or "
            f"with: emogen pod terminate {name}"
        )


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """A terminal that is closed, or a kill, ends like Ctrl-C: with the pod terminated. In the end all is as it was."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fetch(api: Api, pod: Pod, folder: Path, rhythm: Rhythm = RHYTHM) -> None:
    """Bring the run of a pod home. A pod that is stopped is started for it, and stopped again.

    Raises:
        InputError, ModelError: see `ship.fetch`.
    """
    started = pod.status not in LIVE
    if started:
        act(api, pod, "start")
    try:
        ship.fetch(pod.job, wait_for_ssh(api, pod, rhythm), folder)
    finally:
        if started:
            act(api, pod, "stop")
