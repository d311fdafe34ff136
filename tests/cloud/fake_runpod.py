"""A fake of Runpod's REST API v2 on loopback, whose pods are processes of this machine.

Every request and every response is validated against `data/runpod-openapi.json`, which is Runpod's own OpenAPI document
reduced to the operations that emogen uses. An invalid request is refused with 422, as Runpod does. The container of a
pod runs the pod's `args` with its `env`; the log of the pod is what that prints.
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
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import psutil
from jsonschema import Draft202012Validator

KEY = "rp-secret-key-0123456789"
TOKEN = "hf_secret-token-0123456789"
KEYS = {"RUNPOD_API_KEY": KEY, "HF_TOKEN": TOKEN}
DOCUMENT = json.loads((Path(__file__).parent / "data" / "runpod-openapi.json").read_text(encoding="utf-8"))
OPERATIONS = {
    operation["operationId"]: operation for methods in DOCUMENT["paths"].values() for operation in methods.values()
}
# The actions that are valid in each status of a pod.
ACTIONS = {
    "RUNNING": ["stop", "restart", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
}
GPUS = {"NVIDIA A40": (48, 0.40), "NVIDIA L40S": (48, 0.86), "NVIDIA A100 80GB PCIe": (80, 1.39)}  # GB, dollars


# --------------------------------------------------------------------------------------------- Runpod's API document


def find_operation(method, path):
    """The operation of a request and the id in its path; (None, None) if the document has no such operation."""
    for template, methods in DOCUMENT["paths"].items():
        match = re.fullmatch(template.replace("{id}", "(?P<id>[^/]+)"), path)
        if match and method.lower() in methods:
            return methods[method.lower()], match.groupdict().get("id")
    return None, None


def schema_errors(schema, value):
    """What is wrong with a value, a message for each error."""
    validator = Draft202012Validator(schema | {"components": DOCUMENT["components"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def request_errors(operation, query, body):
    """What is wrong with a request, given its query parameters and its decoded body."""
    parameters = {p["name"]: p for p in operation["parameters"] if p["in"] == "query"}
    errors = [f"unknown parameter {name}" for name in query.keys() - parameters.keys()]
    for name in query.keys() & parameters.keys():
        schema, value = parameters[name]["schema"], query[name]
        if schema.get("type") == "array":
            value = value.split(",")
        elif schema.get("type") == "integer" and value.isdigit():
            value = int(value)
        errors += schema_errors(schema, value)
    if "requestBody" in operation:
        errors += schema_errors(operation["requestBody"]["content"]["application/json"]["schema"], body)
    elif body is not None:
        errors.append("unexpected body")
    return errors


def response_errors(operation, status, media_type, value):
    """What is wrong with a response, given its decoded body (None: it has none)."""
    responses = operation["responses"]
    content = responses.get(str(status), responses["default"]).get("content", {})
    if value is None and not content:
        return []
    if media_type not in content:
        return [f"{status}: unexpected {media_type}"]
    return schema_errors(content[media_type]["schema"], value)


# ----------------------------------------------------------------------------------------------------------- the pods


class Container:
    """The process of a pod, and what it has printed."""

    def __init__(self):
        self.process = None
        self.log = []
        self.changed = threading.Condition()

    def print(self, line):
        with self.changed:
            minute, second = divmod(len(self.log) // 2, 60)  # two lines share a time
            self.log.append((f"2026-11-01T12:{minute:02d}:{second:02d}Z", line))
            self.changed.notify_all()

    def run(self, args, env):
        self.process = subprocess.Popen(
            shlex.split(args),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process):
        for line in process.stdout:
            self.print(line.rstrip("\n"))

    def kill(self):
        with self.changed:
            if self.process is not None:
                kill_tree(self.process)
                self.process = None
            self.changed.notify_all()

    @property
    def is_alive(self):
        return self.process is not None and self.process.poll() is None


def kill_tree(process):
    """Send SIGKILL to a process and all its descendants, as when a container is killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(process.pid)
        top.suspend()
        for each in [*top.children(recursive=True), top]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def container_environment(volume, python=sys.executable):
    """The environment of a container on this machine: its volume is a folder, and its interpreter has emogen."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return inherited | {
        "EMOGEN_WORKSPACE": str(volume),
        "EMOGEN_PYTHON": str(python),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


class FakeRunpod:
    """The state of the account.

    Attributes:
        failures: planned failures in order, (method, path pattern, answer). The answer is a status; a status with
            headers; "drop" (the connection breaks); "silence" (no answer at all); or "lost" (the request is carried
            out, but the connection breaks).
        polls_to_run: how often a pod is looked at until it runs; None: it never runs.
        drops: after how many events a log stream breaks, in the middle of the next event; one number per stream.
        environment: the environment of the image, beside the `env` of a pod; None: containers do not run.
        requests: (method, path, body) of all requests.
        invalid: what did not match Runpod's document, in requests and responses.
    """

    def __init__(self):
        self.pods, self.containers, self.requests, self.invalid, self.failures, self.drops = {}, {}, [], [], [], []
        self.keys, self.volumes = ["ssh-ed25519 AAAA me"], {"vol1": "EU-RO-1"}
        self.polls_to_run, self.polls, self.environment = 1, {}, None
        self.numbers, self.over = itertools.count(), threading.Event()
        self.server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"fake": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for container in self.containers.values():
            container.kill()
        self.server.shutdown()
        self.server.server_close()

    def bodies(self, method, pattern):
        """The bodies of the requests that match."""
        return [body for m, path, body in self.requests if m == method and re.fullmatch(pattern, path)]

    def stops(self):
        """The number of requests to stop a pod."""
        return sum(body == {"action": "stop"} for body in self.bodies("POST", "/v2/pods/.*/action"))

    def printed(self, pod):
        """The lines that the container of a pod has printed."""
        return [line for _, line in self.containers[pod["id"]].log]

    def wait_until(self, pod, condition):
        """Wait for a condition. Fails if the container of the pod ends before."""
        container = self.containers[pod["id"]]
        with container.changed:
            while not condition():
                assert container.is_alive, container.log
                container.changed.wait(0.02)

    def add(self, body, status="PROVISIONING"):
        """Add a pod without a request; `body` needs a name only."""
        gpu = body.get("gpu", {"id": "NVIDIA A40"})
        pod = {
            "id": f"pod{next(self.numbers)}", "name": body["name"], "image": body.get("image", ""),
            "args": body.get("args", ""), "disk": body.get("disk", 50), "ports": body.get("ports", []),
            "env": body.get("env", {}), "registry": None, "status": status, "mounts": body.get("mounts", {}),
            "gpu": {"id": gpu["id"], "count": gpu.get("count", 1)}, "cloud": "SECURE", "dataCenterId": None,
            "cudaVersion": None, "template": None, "cost": GPUS[gpu["id"]][1], "locked": False,
            "globalNetworking": {"enabled": False}, "createdAt": "2026-11-01T12:00:00Z", "startedAt": None,
            "aFieldOfNextYear": {"unknown": [1]},
        }  # fmt: skip
        self.pods[pod["id"]], self.containers[pod["id"]] = pod, Container()
        return pod

    def shown(self, pod):
        """A pod as the API shows it."""
        running = pod["status"] == "RUNNING"
        direct = {"host": "192.0.2.7", "port": 10022, "username": "root", "command": "ssh root@192.0.2.7 -p 10022"}
        return pod | {
            "actions": ACTIONS[pod["status"]],
            "runtime": {"uptime": 1} if running else None,
            "ssh": {"proxy": None, "direct": direct if running else None},
        }

    def boot(self, pod):
        """Start the container of a pod."""
        container = self.containers[pod["id"]]
        with container.changed:
            pod["status"] = "RUNNING"
            if self.environment is not None:
                injected = {"RUNPOD_POD_ID": pod["id"], "RUNPOD_API_URL": self.url}
                job = pod["env"]["EMOGEN_POD"].rpartition("-")[0]
                code = {"PYTHONPATH": f"{self.environment['EMOGEN_WORKSPACE']}/emogen/{job}/code"}
                container.run(pod["args"], self.environment | injected | code | pod["env"])

    def halt(self, pod, status):
        """End a pod with a status."""
        container = self.containers[pod["id"]]
        with container.changed:  # nobody sees one without the other
            pod["status"] = status
            container.kill()


# --------------------------------------------------------------------------------------------------------- the server


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a client may hang up
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers requests. The operations of the document are methods, named by their `operationId`."""

    fake: FakeRunpod
    operation = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.handle_request("GET")

    def do_POST(self):
        self.handle_request("POST")

    def do_DELETE(self):
        self.handle_request("DELETE")

    def handle_request(self, method):
        fake, url = self.fake, urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(raw) if raw else None
        fake.requests.append((method, url.path, body))
        self.operation, identity = find_operation(method, url.path)
        if self.operation is None:
            fake.invalid.append(f"unknown operation {method} {url.path}")
            return self.answer(404)
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.answer(401, {"detail": "missing bearer token"})
        for planned in fake.failures:
            if planned[0] == method and re.fullmatch(planned[1], url.path):
                fake.failures.remove(planned)
                return self.fail(planned[2], body)
        if errors := request_errors(self.operation, dict(parse_qsl(url.query)), body):
            fake.invalid += errors
            return self.answer(422, {"errors": errors})
        return getattr(self, self.operation["operationId"])(identity, body)

    def fail(self, how, body):
        if how == "lost":
            self.fake.add(body)
        if how == "silence":
            self.fake.over.wait()
        if how in ("lost", "drop", "silence"):
            self.close_connection = True
            return self.connection.close()
        status, headers = how if isinstance(how, tuple) else (how, None)
        # The answer to an invalid request may repeat what was sent.
        return self.answer(status, {"errors": [f"$.env: {json.dumps(body)}"]} if status == 422 else None, headers)

    def answer(self, status, value=None, headers=None):
        media_type = "application/json"
        if status >= 400:
            titles = {400: "Bad Request", 402: "Payment Required", 404: "Not Found", 409: "Conflict"}
            value = {"title": titles.get(status, "Error"), "status": status, "detail": f"problem {status}"} | (
                value or {}
            )
            media_type = "application/problem+json"
        if self.operation is not None:
            self.fake.invalid += response_errors(self.operation, status, media_type, value)
        payload = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if value is not None:
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def listGpuTypes(self, *_):
        gpus = [
            {
                "id": name, "name": name, "pool": None, "manufacturer": "NVIDIA", "memory": memory, "secure": True,
                "community": False, "price": {"secure": price, "community": price, "new": 1}, "availability": "LOW",
                "maxCount": {"secure": 8, "community": 0},
            }
            for name, (memory, price) in GPUS.items()
        ]  # fmt: skip
        self.answer(200, {"gpus": gpus})

    def getSshKeys(self, *_):
        self.answer(200, {"keys": self.fake.keys})

    def getNetworkVolume(self, identity, _):
        if identity not in self.fake.volumes:
            return self.answer(404)
        place = self.fake.volumes[identity]
        return self.answer(200, {"id": identity, "name": "v", "size": 100, "dataCenter": place, "type": "STANDARD"})

    def listPods(self, *_):
        self.answer(200, {"pods": [self.fake.shown(pod) for pod in self.fake.pods.values()]})

    def createPod(self, _, body):
        if ("gpu" in body) == ("cpu" in body):
            return self.answer(400, {"detail": "exactly one of gpu and cpu is needed"})
        return self.answer(201, self.fake.shown(self.fake.add(body)))

    def getPod(self, identity, _):
        fake, pod = self.fake, self.fake.pods.get(identity)
        if pod is None:
            return self.answer(404)
        fake.polls[identity] = fake.polls.get(identity, 0) + 1
        if (
            pod["status"] == "PROVISIONING"
            and fake.polls_to_run is not None
            and fake.polls[identity] >= fake.polls_to_run
        ):
            fake.boot(pod)
        return self.answer(200, fake.shown(pod))

    def deletePod(self, identity, _):
        pod = self.fake.pods.pop(identity, None)
        if pod is None:
            return self.answer(404)
        self.fake.halt(pod, "TERMINATED")
        return self.answer(204)

    def podAction(self, identity, body):
        pod = self.fake.pods.get(identity)
        if pod is None:
            return self.answer(404)
        if body["action"] not in ACTIONS[pod["status"]]:
            return self.answer(409, {"detail": f"{body['action']} is not valid for {pod['status']}"})
        if body["action"] == "start":
            self.fake.boot(pod)
        else:
            self.fake.halt(pod, "EXITED")
        return self.answer(200, self.fake.shown(pod))

    def getPodLogs(self, identity, _):
        pod = self.fake.pods.get(identity)
        if pod is None:
            return self.answer(404)
        self.fake.invalid += response_errors(self.operation, 200, "text/event-stream", "")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may hang up
            self.send_log(pod, self.fake.containers[identity], self.headers.get("Last-Event-ID"))

    def send_log(self, pod, container, cursor):
        """Send the log from a time on, its lines included; at most as many events as the account's `drops` says."""
        left = self.fake.drops.pop(0) if self.fake.drops else None
        sent = next((k for k, (time, _) in enumerate(container.log) if time == cursor), 0)
        while True:
            with container.changed:
                if sent == len(container.log):
                    if pod["status"] not in ("PROVISIONING", "STARTING", "RUNNING"):
                        return
                    container.changed.wait(0.2)
                new = container.log[sent:]
            for time, line in new:
                data = json.dumps({"ts": time, "source": "container", "line": line, "new": 1})
                event = f": comment\nid: {time}\ndata: {data}\n\n".encode()
                if left == 0:
                    self.wfile.write(event[:-9])
                    return
                self.wfile.write(event)
                self.wfile.flush()
                left = None if left is None else left - 1
            sent += len(new)
