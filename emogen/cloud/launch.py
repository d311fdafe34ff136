"""Training on a rented GPU: Runpod's REST API v2, and the life of a job from the first request to the end of its pod.

A pod's name is `emogen-<recipe>-<8 hex digits of what is shipped>-<epoch seconds>`, so the same job is found again and
never paid for twice. Three limits hold what it costs: `runpod/start.sh` ends training at the deadline and stops its own
pod; `launch` terminates what it made when anything goes wrong; `reap` ends what is left of both.
"""

import base64
import contextlib
import math
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emogen import paths
from emogen.cloud import ship
from emogen.cloud.hardware import shape_of
from emogen.cloud.plan import Option, Plan, plan
from emogen.cloud.runpod import (
    GRACE,
    LIVE,
    Api,
    ApiError,
    Pod,
    act,
    get_pod,
    list_pods,
    logs,
    parse_pod,
    quotes,
    terminate,
)
from emogen.cloud.ship import Address, Job
from emogen.errors import InputError, ModelError
from emogen.task.recipe import load_recipe

IMAGE = "runpod/pytorch:1.0.3-cu1281-torch291-ubuntu2404"
ENDED = re.compile(r"\[emogen\] ended: (done|failed.*)$")  # what start.sh says last
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Unfetched(ModelError):
    """A job is done, and its run is still on its pod."""


@dataclass(frozen=True)
class Limits:
    """What a job may take at most."""

    hours: float
    dollars: float


@dataclass(frozen=True)
class Polling:
    """How a job is watched: seconds between two looks, how many looks until a pod has to be there, and how many
    attempts to reach it may fail in a row."""

    poll: float = 5.0
    provision: int = 240
    patience: int = 60


POLLING = Polling()


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
            return parse_pod(api.request("POST", "/v2/pods", body=full))
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


def wait_for_ssh(api: Api, pod: Pod, polling: Polling) -> Address:
    """Wait until a pod runs and its sshd has an address.

    Raises:
        ApiError: it does not come up.
    """
    status = pod.status
    for _ in range(polling.provision):
        now = get_pod(api, pod)
        status = now.status if now else "TERMINATED"
        if now and now.status == "RUNNING" and now.ssh and now.ssh.direct:
            to = now.ssh.direct
            known_hosts = paths.cache_dir() / "pods" / pod.id
            return Address(to.host, to.port, to.username, known_hosts, polling.poll, polling.patience)
        if status not in LIVE:
            raise ApiError(f"{pod.name}: the pod did not come up ({status})", None)
        api.pause(polling.poll)
    minutes = polling.provision * polling.poll / 60
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
    polling: Polling = POLLING, folder: Path | None = None,
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
            address = wait_for_ssh(api, pod, polling)
            say(f"sending {len(job.files)} files, {job.size / 1e6:.1f} MB")
            ship.send(job, pod.name, address)
            if folder is not None:
                follow(api, pod, folder, say, polling)
        except Unfetched:
            raise
        except BaseException:
            if folder is not None or running is None:
                _give_up(api, name, say)
            raise
    return pod


def follow(api: Api, pod: Pod, folder: Path, say: Callable[[str], Any], polling: Polling = POLLING) -> None:
    """Print the log of a job until it ends, bring its run home, and terminate its pod.

    Raises:
        Unfetched: it is done, but its run cannot be brought home: then the pod is stopped instead.
        ModelError: it failed (what there is of the run has been fetched), or its pod went away.
    """
    ended = None
    for line in logs(api, pod, poll=polling.poll, patience=polling.patience):
        say(line)
        if match := ENDED.search(line):
            ended = match[1]
            break
    if ended is None:
        raise ModelError(f"{pod.name}: the pod was stopped or terminated before its job had ended")
    try:
        ship.fetch(pod.job, wait_for_ssh(api, pod, polling), folder)
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


def fetch(api: Api, pod: Pod, folder: Path, polling: Polling = POLLING) -> None:
    """Bring the run of a pod home. A pod that is stopped is started for it, and stopped again.

    Raises:
        InputError, ModelError: see `ship.fetch`.
    """
    started = pod.status not in LIVE
    if started:
        act(api, pod, "start")
    try:
        ship.fetch(pod.job, wait_for_ssh(api, pod, polling), folder)
    finally:
        if started:
            act(api, pod, "stop")
