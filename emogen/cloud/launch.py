"""The life of a job on a rented GPU, from the first request to the end of its pod.

A pod is called `emogen-<recipe>-<8 hex digits of the shipped content>-<epoch seconds>`, so the same job is recognised
and never paid for twice. Three things limit its cost: `runpod/start.sh` ends training at the deadline and stops its own
pod; `launch_job` terminates the pod that it created if anything fails; `emogen pod reap` terminates whatever is left.
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
from emogen.cloud import runpod, ship
from emogen.cloud.hardware import shape_of
from emogen.cloud.plan import Option, Plan, make_plan
from emogen.cloud.runpod import GRACE, Api, ApiError, Pod, Polling
from emogen.cloud.ship import Address, Job
from emogen.errors import InputError, ModelError
from emogen.task.recipe import load_recipe

IMAGE = "runpod/pytorch:1.0.3-cu1281-torch291-ubuntu2404"
ENDED = re.compile(r"\[emogen\] ended: (done|failed.*)$")  # the message of start.sh when a job has ended
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Say = Callable[[str], Any]  # prints a line


class NotFetchedError(ModelError):
    """A job is done, but its run is still on its pod."""


@dataclass(frozen=True)
class Limits:
    """The most that a job may take."""

    hours: float
    dollars: float


def prepare(
    path: str | Path, overrides: Sequence[str], limits: Limits, *, gpus: Sequence[str] = (), volume: str | None = None,
    api: Api | None = None,
) -> tuple[Plan, Job, list[dict[str, Any]]]:  # fmt: skip
    """Collect all that has to be known before a pod is created.

    Args:
        path: the recipe.
        overrides: `key=value`.
        gpus: the GPU types to consider; all if empty.
        volume: the id of a network volume.
        api: used to ask for prices, SSH keys and the volume; None asks for nothing.

    Returns:
        The plan; the job; and the bodies of the requests to try, the cheapest first, without keys.

    Raises:
        InputError: the recipe, the limits or the account do not allow the job.
        ApiError: the API failed.
    """
    recipe = load_recipe(path, overrides)
    if recipe.output_dir.exists() and any(recipe.output_dir.iterdir()):
        raise InputError(f"output_dir: {recipe.output_dir}: not empty, and the run would go there; name another folder")
    plan = make_plan(path, overrides, runpod.quotes(api) if api else None)
    options = affordable_options(plan, limits, gpus)
    job = ship.make_job(recipe)
    data_center = None
    if api:
        check_account(api)
        data_center = data_center_of(api, volume) if volume else None
    shape = shape_of(recipe.model_name)
    disk = math.ceil(20 + 6e-9 * (shape.linear + shape.embeddings(with_head=True)))  # the model, and space for the run
    now = int(time.time())
    bodies = [
        pod_request(job, option, limits, now=now, disk=disk, volume=volume, data_center=data_center)
        for option in options
    ]
    return plan, job, bodies


def affordable_options(plan: Plan, limits: Limits, gpus: Sequence[str] = ()) -> list[Option]:
    """The GPU types to try: those that fit the run and the limits, the cheapest run first.

    Args:
        gpus: the GPU types to consider; all if empty.

    Raises:
        InputError: there are none.
    """
    known = {option.gpu: option for option in plan.options if option.price is not None}
    if unknown := [name for name in gpus if name not in known]:
        raise InputError(f"--gpu {unknown[0]!r}: not offered or unknown; choose from: {', '.join(known)}")
    wanted = [option for option in known.values() if not gpus or option.gpu in gpus]
    fitting = [option for option in wanted if option.fits]
    if not fitting:
        raise InputError(
            f"the run needs about {plan.peak / 1e9:.1f} GB of GPU memory, more than any of "
            f"{', '.join(option.gpu for option in wanted)} has; halve per_device_train_batch_size, set "
            "gradient_checkpointing=true or load_in_4bit=true, or choose a smaller model"
        )
    affordable = [
        option for option in fitting if option.total_hours <= limits.hours and (option.dollars or 0) <= limits.dollars
    ]
    if not affordable:
        best = fitting[0]
        raise InputError(
            f"the run takes about {best.total_hours:.1f} hours and ${best.dollars:.2f} on {best.gpu}, more than "
            f"--max-hours {limits.hours:g} or --max-dollars {limits.dollars:g} allow"
        )
    in_stock = [option for option in affordable if option.stock != "NONE"]
    return in_stock or affordable  # the stock may have changed since; the API decides


def check_account(api: Api) -> None:
    """Check that the account can start jobs.

    Raises:
        InputError: it has no SSH key, so nothing could be sent to a pod.
    """
    if not (api.request("GET", "/v2/account/ssh-keys") or {}).get("keys"):
        raise InputError(
            "your Runpod account has no SSH public key; add the content of ~/.ssh/id_ed25519.pub in Runpod's console, "
            "under Settings (ssh-keygen -t ed25519 creates one)"
        )


def data_center_of(api: Api, volume: str) -> str:
    """The data centre of a network volume. Pods that use the volume have to be there.

    Raises:
        InputError: there is no such volume.
    """
    try:
        return str(api.request("GET", f"/v2/network-volumes/{volume}")["dataCenter"])
    except ApiError as error:
        if error.status == 404:
            raise InputError(f"--volume {volume}: the account has no such network volume") from None
        raise


def pod_request(
    job: Job,
    option: Option,
    limits: Limits,
    *,
    now: int,
    disk: int,
    volume: str | None = None,
    data_center: str | None = None,
) -> dict[str, Any]:
    """The body of the request that creates the pod of a job, without keys.

    Args:
        now: epoch seconds.
        disk: GB for models, checkpoints and the run.
        volume: the id of a network volume. Without one, the pod gets storage that is deleted with it.
        data_center: the data centre of the volume.
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
        # One string, which Runpod splits as a shell does.
        "args": shlex.join(["bash", "-c", 'eval "$(base64 -d <<<"$EMOGEN_START")"']),
        "env": {
            "EMOGEN_POD": name,
            "EMOGEN_DEADLINE": str(math.floor(now + seconds - GRACE)),
            "EMOGEN_GRACE": str(GRACE),
            "EMOGEN_START": base64.b64encode(start).decode(),
        },
    }
    return body | ({"dataCenterIds": [data_center]} if data_center else {})


def launch_job(
    api: Api,
    job: Job,
    bodies: Sequence[dict[str, Any]],
    keys: Mapping[str, str],
    say: Say,
    polling: Polling,
    folder: Path | None = None,
) -> Pod:
    """Rent a pod and start a job on it.

    A pod that runs this job already is used, and none is rented. If anything fails, Ctrl-C included, the pod is
    terminated; but not a pod that was there before and is not followed, and not a pod that holds a finished run.

    Args:
        bodies: the requests to try, in order.
        keys: put into the environment of the pod.
        folder: follow the job to its end, fetch its run into this folder, and terminate the pod. None: return when
            the job has been sent.

    Raises:
        InputError: the job has a stopped pod.
        ApiError, ModelError: the pod or the job failed.
    """
    running = find_running_pod(api, job)
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
        except NotFetchedError:
            raise
        except BaseException:
            if folder is not None or running is None:
                _give_up(api, name, say)
            raise
    return pod


def find_running_pod(api: Api, job: Job) -> Pod | None:
    """The pod that runs a job already, or None.

    Raises:
        InputError: the job has a stopped pod.
    """
    for pod in runpod.list_pods(api):
        if pod.job == job.name and pod.is_live:
            return pod
        if pod.job == job.name:
            raise InputError(
                f"this job has a stopped pod: {pod.name}. Fetch its run with: emogen pod fetch {pod.id}, terminate it "
                f"with: emogen pod terminate {pod.id}, then launch again"
            )
    return None


def create_first(api: Api, bodies: Sequence[dict[str, Any]], keys: Mapping[str, str], say: Say) -> Pod:
    """Create a pod from the first request that there is capacity for.

    Raises:
        ApiError: all requests were refused.
    """
    for body in bodies:
        try:
            pod = create(api, body, keys)
        except ApiError as error:
            if error.status not in (400, 403):
                raise
            say(f"{body['gpu']['id']}: {error}")
            refused = error
        else:
            say(f"{pod.name} ({pod.id}) on {body['gpu']['id']}, ${pod.cost:.2f} per hour")
            return pod
    raise ApiError(
        f"no GPU type is available, or the request is invalid; the last answer: {refused}. Try later, or allow more "
        "types with --gpu and --max-dollars",
        refused.status,
    )


def create(api: Api, body: dict[str, Any], keys: Mapping[str, str]) -> Pod:
    """Create a pod, once. If the answer is lost, the list of pods shows whether the pod was created.

    Raises:
        ApiError: the request was refused, or the API does not answer.
    """
    with_keys = body | {"env": body["env"] | keys}
    for attempt in range(api.tries):
        try:
            return runpod.parse_pod(api.request("POST", "/v2/pods", body=with_keys))
        except ApiError as error:
            if error.status is not None and error.status < 500:
                raise
            lost = error
        api.pause(2**attempt)
        for pod in runpod.list_pods(api):
            if pod.name == body["name"]:
                return pod
    raise lost


def wait_for_ssh(api: Api, pod: Pod, polling: Polling) -> Address:
    """Wait until a pod runs and its sshd has an address.

    Raises:
        ApiError: the pod does not come up.
    """
    status = pod.status
    for _ in range(polling.provision):
        current = runpod.get_pod(api, pod)
        if current is None or not current.is_live:
            status = current.status if current else "TERMINATED"
            raise ApiError(f"{pod.name}: the pod did not come up ({status})", None)
        if current.status == "RUNNING" and current.ssh and current.ssh.direct:
            to = current.ssh.direct
            known_hosts = paths.cache_dir() / "pods" / pod.id
            return Address(to.host, to.port, to.username, known_hosts, polling.poll, polling.patience)
        status = current.status
        api.pause(polling.poll)
    minutes = polling.provision * polling.poll / 60
    raise ApiError(f"{pod.name}: still {status} after {minutes:.0f} minutes; try another --gpu", None)


def follow(api: Api, pod: Pod, folder: Path, say: Say, polling: Polling) -> None:
    """Print the log of a job until it ends, fetch its run, and terminate its pod.

    Raises:
        NotFetchedError: the job is done, but its run cannot be fetched. The pod is stopped instead.
        ModelError: the job failed (its run so far has been fetched), or its pod disappeared.
    """
    result = None
    for line in runpod.logs(api, pod, polling):
        say(line)
        if match := ENDED.search(line):
            result = match[1]
            break
    if result is None:
        raise ModelError(f"{pod.name}: the pod was stopped or terminated before its job ended")
    try:
        ship.fetch(pod.job, wait_for_ssh(api, pod, polling), folder)
    except (ModelError, InputError, OSError) as error:
        if result == "done":  # the run has been paid for
            with contextlib.suppress(ModelError, InputError):  # the pod also stops itself
                runpod.act(api, pod, "stop")
            raise NotFetchedError(
                f"{pod.name}: the job is done, but its run could not be fetched: {error}. The pod is stopped, and only "
                f"its storage costs money: emogen pod fetch {pod.id} --into FOLDER, then emogen pod terminate {pod.id}"
            ) from None
        say(f"nothing was fetched: {error}")
    runpod.terminate(api, pod.name)
    if result != "done":
        raise ModelError(f"{pod.name}: the job {result}; see the log above")
    say(f"The run is in {folder}. The pod is terminated.")


def fetch_run(api: Api, pod: Pod, folder: Path, polling: Polling) -> None:
    """Fetch the run of a pod. A stopped pod is started for it, and stopped again.

    Raises:
        InputError, ModelError: as `ship.fetch`.
    """
    was_stopped = not pod.is_live
    if was_stopped:
        runpod.act(api, pod, "start")
    try:
        ship.fetch(pod.job, wait_for_ssh(api, pod, polling), folder)
    finally:
        if was_stopped:
            runpod.act(api, pod, "stop")


def _give_up(api: Api, name: str, say: Say) -> None:
    """Terminate the pod of a failed launch, and report clearly if that fails."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave a pod that costs money
    try:
        if runpod.terminate(api, name):
            say(f"{name}: terminated")
    except (ApiError, InputError) as error:
        say(
            f"{name} COULD NOT BE TERMINATED ({error}). It stops itself at its limit. Terminate it in Runpod's "
            f"console, or with: emogen pod terminate {name}"
        )


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Treat a closed terminal or a kill like Ctrl-C, so that the pod is terminated; restore the handlers at the end."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
