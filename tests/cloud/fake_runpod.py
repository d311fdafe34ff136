"""A Runpod on loopback: what emogen uses of the REST API v2, with pods that are processes of this machine.

Every request is checked against the shapes below; what does not match is refused with 422, as there. A pod's container
is its `args`, run with its `env`; its log is what that prints.
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

KEY = "rp-secret-key-0123456789"
TOKEN = "hf_secret-token-0123456789"


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


CudaVersion = Annotated[str, Field(pattern=r"^\d+\.\d+$")]
NonEmpty = Annotated[str, Field(min_length=1)]


class CreateGpuConfig(Shape):
    id: str
    count: Annotated[int, Field(ge=1)] = 1
    allowedCudaVersions: list[CudaVersion] = []
    minCudaVersion: CudaVersion = "0.0"


class CreateCpuConfig(Shape):
    id: NonEmpty
    vcpuCount: Annotated[int, Field(ge=2)]


class PersistentMount(Shape):
    size: Annotated[int, Field(ge=10)]
    path: str


class NetworkMount(Shape):
    volumeId: str
    path: str


class Mounts(Shape):
    persistent: PersistentMount | None = None
    network: Annotated[list[NetworkMount], Field(max_length=1)] = []


class CreatePodRequest(Shape):
    name: NonEmpty
    image: str = ""
    cloud: Literal["SECURE", "COMMUNITY"] = "SECURE"
    gpu: CreateGpuConfig | None = None
    cpu: CreateCpuConfig | None = None
    args: str = ""
    disk: Annotated[int, Field(ge=1)] = 50
    env: dict[str, str] = {}
    ports: list[str] = []
    registry: str | None = None
    dataCenterIds: list[str] = []
    globalNetworking: bool = False
    mounts: Mounts = Mounts()
    startJupyter: bool = False
    startSsh: bool = False
    templateId: NonEmpty = "-"


class PodActionRequest(Shape):
    action: Literal["start", "stop", "restart", "terminate"]


BODIES = {("POST", "/v2/pods"): CreatePodRequest, ("POST", "/v2/pods/{id}/action"): PodActionRequest}
PARAMETERS = {
    ("GET", "/v2/pods"): {"includeClusterPods"},
    ("POST", "/v2/pods"): set(),
    ("GET", "/v2/pods/{id}"): set(),
    ("DELETE", "/v2/pods/{id}"): set(),
    ("POST", "/v2/pods/{id}/action"): set(),
    ("GET", "/v2/pods/{id}/logs"): {"source", "tail", "since"},
    ("GET", "/v2/catalog/gpus"): {
        "include",
        "product",
        "count",
        "cloud",
        "countryCodes",
        "cudaVersions",
        "minCudaVersion",
    },
    ("GET", "/v2/account/ssh-keys"): set(),
    ("GET", "/v2/network-volumes/{id}"): set(),
}
ALLOWED = {
    "RUNNING": ["stop", "restart", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
}
GPUS = {"NVIDIA A40": (48, 0.40), "NVIDIA L40S": (48, 0.86), "NVIDIA A100 80GB PCIe": (80, 1.39)}


class Container:
    """The process of a pod, and what it has printed."""

    def __init__(self):
        self.process = None
        self.log = []
        self.heard = threading.Condition()

    def print(self, line):
        with self.heard:
            self.log.append((f"2026-11-01T12:00:{len(self.log) // 2 % 60:02d}Z", line))  # two lines share a time
            self.heard.notify_all()

    def run(self, args, env):
        self.process = subprocess.Popen(
            shlex.split(args),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process):
        for line in process.stdout:
            self.print(line.rstrip("\n"))

    def kill(self):
        if self.process is not None:
            kill_tree(self.process)
            self.process = None
        with self.heard:
            self.heard.notify_all()


def kill_tree(process):
    """SIGKILL to a process and all that it has started, as when a container is killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(process.pid)
        top.suspend()
        for each in [*top.children(recursive=True), top]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


class FakeRunpod:
    """The account's state.

    Attributes:
        failures: what is to go wrong, in order: (method, path pattern, answer), where the answer is a status, or a
            status with headers, or "drop" (no answer), "silence" (not even a lost connection), "lost" (carried out, but the answer does not arrive).
        looks: how often a pod is looked at until it runs; None: it never does.
        drops: after how many log events a stream breaks off, in the middle of the next one; one stream after another.
        environment: what the image has beside a request's `env`; None: containers do not run.
        requests: (method, path, body) of all that was asked. invalid: what did not match the document.
    """

    def __init__(self):
        self.pods, self.containers, self.requests, self.invalid, self.failures, self.drops = {}, {}, [], [], [], []
        self.headers = []
        self.keys, self.volumes = ["ssh-ed25519 AAAA me"], {"vol1": "EU-RO-1"}
        self.looks, self.looked, self.environment = 1, {}, None
        self.numbers, self.over = itertools.count(), threading.Event()
        self.server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"fake": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for container in self.containers.values():
            container.kill()
        self.server.shutdown()
        self.server.server_close()

    def asked(self, method, pattern):
        """The bodies of the requests that match."""
        return [body for m, path, body in self.requests if m == method and re.fullmatch(pattern, path)]

    def stops(self):
        return sum(body == {"action": "stop"} for body in self.asked("POST", "/v2/pods/.*/action"))

    def add(self, body, status="PROVISIONING"):
        number = next(self.numbers)
        pod = {
            "id": f"pod{number}", "name": body["name"], "image": body.get("image", ""), "args": body.get("args", ""),
            "disk": body.get("disk", 50), "ports": body.get("ports", []), "env": body.get("env", {}), "registry": None,
            "status": status, "mounts": body.get("mounts", {}), "gpu": body.get("gpu", {"id": "NVIDIA A40", "count": 1}),
            "cloud": "SECURE", "dataCenterId": None, "cudaVersion": None, "template": None,
            "cost": GPUS.get(body.get("gpu", {}).get("id"), (0, 0.5))[1], "locked": False,
            "globalNetworking": {"enabled": False}, "createdAt": "2026-11-01T12:00:00Z", "startedAt": None,
            "aFieldOfNextYear": {"unknown": [1]},
        }  # fmt: skip
        self.pods[pod["id"]], self.containers[pod["id"]] = pod, Container()
        return pod

    def shown(self, pod):
        running = pod["status"] == "RUNNING"
        direct = {"host": "192.0.2.7", "port": 10022, "username": "root", "command": "ssh root@192.0.2.7 -p 10022"}
        return pod | {
            "actions": ALLOWED[pod["status"]],
            "runtime": {"uptime": 1} if running else None,
            "ssh": {"proxy": None, "direct": direct if running else None},
        }

    def boot(self, pod):
        pod["status"] = "RUNNING"
        if self.environment is not None:
            injected = {"RUNPOD_POD_ID": pod["id"], "RUNPOD_API_URL": self.url}
            job = pod["env"]["EMOGEN_POD"].rpartition("-")[0]
            code = {"PYTHONPATH": f"{self.environment['EMOGEN_WORKSPACE']}/emogen/{job}/code"}
            self.containers[pod["id"]].run(pod["args"], self.environment | injected | code | pod["env"])

    def halt(self, pod, status):
        pod["status"] = status
        self.containers[pod["id"]].kill()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a client may hang up
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    fake: FakeRunpod
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.handle_request("GET")

    def do_POST(self):
        self.handle_request("POST")

    def do_DELETE(self):
        self.handle_request("DELETE")

    def answer(self, status, value=None, headers=None):
        if status < 400:
            payload, kind = b"" if value is None else json.dumps(value).encode(), "application/json"
        else:
            titles = {400: "Bad Request", 402: "Payment Required", 404: "Not Found", 409: "Conflict"}
            problem = {"title": titles.get(status, "Error"), "status": status, "detail": f"problem {status}"}
            payload, kind = json.dumps(problem | (value or {})).encode(), "application/problem+json"
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if payload or status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def handle_request(self, method):
        fake, url = self.fake, urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(raw) if raw else None
        fake.requests.append((method, url.path, body))
        fake.headers.append(dict(self.headers))
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.answer(401, {"detail": "missing bearer token"})
        for planned in fake.failures:
            if planned[0] == method and re.fullmatch(planned[1], url.path):
                fake.failures.remove(planned)
                return self.fail(planned[2], url, body)
        return self.serve(method, url, body)

    def fail(self, how, url, body):
        if how == "lost":
            self.fake.add(body)
        if how == "silence":
            self.fake.over.wait()
        if how in ("lost", "drop", "silence"):
            self.close_connection = True
            return self.connection.close()
        status, headers = how if isinstance(how, tuple) else (how, None)
        value = (
            {"errors": [f"$.env: {json.dumps(body)}"]} if status == 422 else None
        )  # it may well repeat what it was sent
        return self.answer(status, value, headers)

    def serve(self, method, url, body):
        fake = self.fake
        route = re.sub(r"(?<=/v2/pods/)[^/]+|(?<=/v2/network-volumes/)[^/]+", "{id}", url.path)
        query = parse_qs(url.query)
        if (method, route) not in PARAMETERS:
            fake.invalid.append(f"{method} {url.path}")
            return self.answer(404)
        wrong = [f"unknown parameter {name}" for name in query.keys() - PARAMETERS[method, route]]
        shape = BODIES.get((method, route))
        if shape is None:
            wrong += ["no body expected"] if body is not None else []
        else:
            try:
                shape.model_validate_json(json.dumps(body))
            except ValidationError as error:
                wrong += [f"{e['loc']}: {e['msg']}" for e in error.errors()]
        if wrong:
            fake.invalid += wrong
            return self.answer(422, {"errors": wrong})
        identity = url.path.split("/")[3] if route.count("/") > 2 and "{id}" in route else None
        if route == "/v2/catalog/gpus":
            return self.answer(200, {"gpus": [self.gpu(name) for name in GPUS]})
        if route == "/v2/account/ssh-keys":
            return self.answer(200, {"keys": fake.keys})
        if route.startswith("/v2/network-volumes"):
            if identity not in fake.volumes:
                return self.answer(404)
            place = fake.volumes[identity]
            return self.answer(200, {"id": identity, "name": "v", "size": 100, "dataCenter": place, "type": "STANDARD"})
        if route == "/v2/pods":
            if method == "GET":
                return self.answer(200, {"pods": [fake.shown(pod) for pod in fake.pods.values()]})
            if not body.get("image") or ("gpu" in body) == ("cpu" in body):
                return self.answer(400, {"detail": "exactly one of gpu and cpu, and an image"})
            return self.answer(201, fake.shown(fake.add(body)))
        pod = fake.pods.get(identity)
        if pod is None:
            return self.answer(404)
        if route.endswith("/logs"):
            return self.stream(pod)
        if method == "DELETE":
            fake.halt(fake.pods.pop(identity), "TERMINATED")
            return self.answer(204)
        if method == "GET":
            fake.looked[identity] = fake.looked.get(identity, 0) + 1
            if pod["status"] == "PROVISIONING" and fake.looks is not None and fake.looked[identity] >= fake.looks:
                fake.boot(pod)
            return self.answer(200, fake.shown(pod))
        if body["action"] not in ALLOWED[pod["status"]]:
            return self.answer(409, {"detail": f"{body['action']} is not valid for {pod['status']}"})
        if body["action"] == "start":
            fake.boot(pod)
        else:
            fake.halt(pod, "EXITED")
        return self.answer(200, fake.shown(pod))

    def gpu(self, name):
        memory, price = GPUS[name]
        return {
            "id": name, "name": name, "pool": None, "manufacturer": "NVIDIA", "memory": memory, "secure": True,
            "community": False, "price": {"secure": price, "community": price, "new": 1}, "availability": "LOW",
            "maxCount": {"secure": 8, "community": 0},
        }  # fmt: skip

    def stream(self, pod):
        container, cursor = self.fake.containers[pod["id"]], self.headers.get("Last-Event-ID")
        limit = self.fake.drops.pop(0) if self.fake.drops else None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        sent = 0
        if cursor:  # from this point on: what has that time comes again
            sent = next((k for k, (stamp, _) in enumerate(container.log) if stamp == cursor), 0)
        count = 0
        while True:
            with container.heard:
                live = pod["status"] in ("PROVISIONING", "STARTING", "RUNNING")
                if sent == len(container.log):
                    if not live:
                        return
                    container.heard.wait(0.2)
                new = container.log[sent:]
            for stamp, line in new:
                data = json.dumps({"ts": stamp, "source": "container", "line": line, "new": 1})
                event = f": comment\nid: {stamp}\ndata: {data}\n\n".encode()
                try:
                    if count == limit:
                        self.wfile.write(event[:-9])
                        return
                    self.wfile.write(event)
                    self.wfile.flush()
                except OSError:
                    return
                count += 1
            sent += len(new)


def clean_environment():
    """What a container has of this machine's environment."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
