"""Jobs on rented GPUs, against a Runpod on loopback (`fake_runpod.py`) whose pods really run `runpod/start.sh`."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fake_runpod
import httpx
import pytest
from fake_runpod import KEY, TOKEN, FakeRunpod
from pydantic import BaseModel
from test_end_to_end import BIN, ROOT, emogen

from emogen.cloud import launch, runpod, ship
from emogen.errors import InputError, ModelError
from emogen.task.recipe import load_recipe

KEYS = {"RUNPOD_API_KEY": KEY, "HF_TOKEN": TOKEN}
QUICK = launch.Polling(poll=0, provision=5, patience=3)
DOCUMENT = ROOT.parent / "shared" / "specs" / "runpod-rest-v2-openapi.json"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    with FakeRunpod() as fake:
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("RUNPOD_API_URL", fake.url)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        monkeypatch.setenv("EMOGEN_CACHE", str(tmp_path / "cache"))
        yield fake
        assert fake.invalid == []


@pytest.fixture
def api(fake):
    with runpod.open_api(KEYS) as api:
        api.waited = []
        api.pause = api.waited.append
        yield api


@pytest.fixture
def job(tiny_recipe):
    return ship.job_of(load_recipe(tiny_recipe()))


@pytest.fixture
def bodies(tiny_recipe, tmp_path):
    return launch.prepare(tiny_recipe(), [], launch.Limits(6, 10), gpus=["NVIDIA A40", "NVIDIA L40S"])[2]


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """An `ssh` that runs its command here, with the pod's /workspace in a folder; returns that folder.

    `ssh.log` there gets its arguments; a file `lost` makes it lose the connection once.
    """
    root, bin = tmp_path / "pod", tmp_path / "bin"
    root.mkdir()
    bin.mkdir()
    script = f"""#!/bin/bash
printf '%s\\n' "$*" >>{root}/ssh.log
if [ -e {root}/lost ]; then rm {root}/lost; exit 255; fi
command=${{!#}}
exec bash -c "${{command//\\/workspace/{str(root).replace("/", chr(92) + "/")}}}"
"""
    (bin / "ssh").write_text(script)
    (bin / "curl").write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>{root}/curl.log\nexec {shutil.which("curl")} "$@"\n')
    for name in ("ssh", "curl"):
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    return root


def say_nothing(line):
    pass


# ---------------------------------------------------------------------------------------------- the API


def test_the_fake_is_what_the_document_says(fake):
    """Where Runpod's OpenAPI document is at hand: paths, parameters, and the fields of requests and answers."""
    if not DOCUMENT.exists():
        pytest.skip("the document is not here")
    document = json.loads(DOCUMENT.read_text())
    schemas = document["components"]["schemas"]

    def flat(schema):
        """A schema with its references and `allOf` resolved: its properties, and those that are required."""
        if "$ref" in schema:
            schema = schemas[schema["$ref"].rpartition("/")[2]]
        properties, required = dict(schema.get("properties", {})), set(schema.get("required", []))
        for part in schema.get("allOf", []):
            more, needed = flat(part)
            properties |= more
            required |= needed
        return properties, required

    def same(model, schema):
        properties, required = flat(schema)
        assert set(model.model_fields) == set(properties), model
        assert {name for name, field in model.model_fields.items() if field.is_required()} == required, model
        for name, field in model.model_fields.items():
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    items = properties[name].get("items", properties[name])
                    same(kind, items)

    for (method, path), named in fake_runpod.PARAMETERS.items():
        operations = document["paths"][path]
        told = [*operations.get("parameters", []), *operations[method.lower()].get("parameters", [])]
        told = [document["components"]["parameters"][p["$ref"].rpartition("/")[2]] if "$ref" in p else p for p in told]
        assert named == {p["name"] for p in told if p["in"] == "query"}, path
        if model := fake_runpod.BODIES.get((method, path)):
            same(model, operations[method.lower()]["requestBody"]["content"]["application/json"]["schema"])
    pod = fake.shown(fake.add({"name": "x"}))
    properties, required = flat(schemas["Pod"])
    assert required <= pod.keys()
    assert pod.keys() - properties.keys() == {"aFieldOfNextYear"}
    assert set(fake_runpod.ALLOWED) == set(schemas["PodStatus"]["enum"]) - {"TERMINATED"}
    assert set(runpod.LIVE) | {"EXITED", "ERROR", "TERMINATED"} == set(schemas["PodStatus"]["enum"])


def test_no_capacity_means_the_next_gpu(fake, api, bodies):
    fake.failures = [("POST", "/v2/pods", 400)]
    said = []
    pod = launch.create_first(api, bodies, KEYS, said.append)
    assert [body["gpu"]["id"] for body in bodies] == ["NVIDIA A40", "NVIDIA L40S"]
    assert pod.gpu.id == "NVIDIA L40S"
    assert "NVIDIA A40" in said[0]
    assert fake.pods[pod.id]["env"].items() >= KEYS.items()


def test_no_capacity_anywhere_ends_with_the_last_answer(fake, api, bodies):
    fake.failures = [("POST", "/v2/pods", 400)] * 2
    with pytest.raises(ModelError, match=r"no GPU type could be had.*problem 400"):
        launch.create_first(api, bodies, KEYS, say_nothing)
    assert len(fake.asked("POST", "/v2/pods")) == 2


@pytest.mark.parametrize(("status", "said"), [(402, "balance"), (422, "errors|problem 422"), (409, "problem 409")])
def test_what_no_other_gpu_would_mend_is_asked_once(fake, api, bodies, status, said):
    fake.failures = [("POST", "/v2/pods", status)]
    with pytest.raises(ModelError, match=said) as raised:
        launch.create_first(api, bodies, KEYS, say_nothing)
    assert len(fake.asked("POST", "/v2/pods")) == 1
    assert KEY not in str(raised.value)
    assert TOKEN not in str(raised.value)


def test_what_the_api_asks_for_is_waited(fake, api, bodies):
    fake.failures = [
        ("POST", "/v2/pods", (429, {"Retry-After": "7"})),
        ("GET", "/v2/pods", (429, {"Retry-After": "9"})),
    ]
    launch.create(api, bodies[0], KEYS)
    runpod.list_pods(api)
    assert api.waited == [7, 9]
    assert len(fake.pods) == 1


@pytest.mark.parametrize("how", [500, 503, "drop"])
def test_reading_is_repeated(fake, api, how):
    fake.failures = [("GET", "/v2/pods", how)] * 3
    assert runpod.list_pods(api) == []
    assert len(fake.asked("GET", "/v2/pods")) == 4
    fake.failures = [("GET", "/v2/pods", how)] * 5
    with pytest.raises(runpod.ApiError):
        runpod.list_pods(api)


def test_a_pod_whose_answer_was_lost_is_found_and_not_paid_for_twice(fake, api, bodies):
    fake.failures = [("POST", "/v2/pods", "lost")]
    pod = launch.create(api, bodies[0], KEYS)
    assert list(fake.pods) == [pod.id]
    assert len(fake.asked("POST", "/v2/pods")) == 1


@pytest.mark.parametrize("how", [500, "drop"])
def test_creating_goes_on_only_after_a_look_at_the_list(fake, api, bodies, how):
    fake.failures = [("POST", "/v2/pods", how)]
    launch.create(api, bodies[0], KEYS)
    order = [(method, path) for method, path, _ in fake.requests]
    assert order == [("POST", "/v2/pods"), ("GET", "/v2/pods"), ("POST", "/v2/pods")]
    assert len(fake.pods) == 1


def test_a_timeout_is_no_answer(fake, bodies):
    fake.failures = [("POST", "/v2/pods", "silence"), ("GET", "/v2/pods", "silence"), ("POST", "/v2/pods", "silence")]
    with runpod.open_api(KEYS, timeout=0.1) as api:
        api.pause, api.tries = say_nothing, 2
        with pytest.raises(runpod.ApiError, match="ReadTimeout") as raised:
            launch.create(api, bodies[0], KEYS)
    assert raised.value.status is None
    assert [method for method, _, _ in fake.requests] == ["POST", "GET", "GET", "POST", "GET"]


def test_what_is_there_already_is_no_error(fake, api):
    fake.add({"name": "emogen-x-00000000-1700000000"}, "RUNNING")
    (pod,) = runpod.list_pods(api)
    runpod.act(api, pod, "stop")
    runpod.act(api, pod, "stop")  # 409
    assert fake.pods[pod.id]["status"] == "EXITED"
    assert runpod.terminate(api, pod.name) == 1  # 204, without a body
    assert runpod.terminate(api, pod.name) == 0
    assert runpod.get_pod(api, pod) is None
    with pytest.raises(runpod.ApiError):
        runpod.act(api, pod, "start")


def test_other_pods_of_the_account_are_left_alone(fake, api):
    for name in ("emogen", "my-emogen-x-00000000-1700000000", "emogen-x-00000000-1700000000"):
        fake.add({"name": name}, "RUNNING")
    assert [pod.name for pod in runpod.list_pods(api)] == ["emogen-x-00000000-1700000000"]
    with pytest.raises(InputError, match="no pod of that name"):
        runpod.find_pod(api, "my-emogen")


def test_reap_ends_what_is_older_than_its_limit(fake):
    now = int(time.time())
    fake.add({"name": f"emogen-new-00000000-{now}"}, "RUNNING")
    fake.add({"name": "emogen-old-00000000-1700000000"}, "EXITED")
    fake.add({"name": "emogen-long-00000000-1700000001", "env": {"EMOGEN_DEADLINE": str(now + 99)}}, "RUNNING")
    fake.add({"name": f"emogen-short-00000000-{now - 3000}", "env": {"EMOGEN_DEADLINE": str(now - 1000)}}, "RUNNING")
    fake.add({"name": "theirs"}, "RUNNING")
    said = emogen("pod", "reap", "--dry-run").stdout
    assert "emogen-old-" in said
    assert len(fake.pods) == 5
    fake.failures = [("DELETE", ".*", 409)]  # one that cannot be ended is no reason to leave the other
    assert "problem 409" in emogen("pod", "reap", code=1).stderr
    assert len(fake.pods) == 4
    emogen("pod", "reap")
    assert {pod["name"].split("-")[1] for pod in fake.pods.values() if "-" in pod["name"]} == {"new", "long"}
    listed = emogen("pod", "list").stdout
    assert "emogen-new-" in listed
    assert KEY not in listed


# ---------------------------------------------------------------------------------------------- keys


def test_keys_of_a_file_are_taken_only_if_nobody_else_can_read_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "of the environment")
    path = tmp_path / "emogen" / "keys"
    path.parent.mkdir()
    path.write_text("RUNPOD_API_KEY = 'abc'\nHF_TOKEN=of the file\nOTHER=1\n")
    path.chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        runpod.read_keys()
    path.chmod(0o600)
    assert runpod.read_keys() == {"RUNPOD_API_KEY": "abc", "HF_TOKEN": "of the environment"}


def test_a_key_is_refused_or_missing_or_would_be_sent_in_the_clear(fake, monkeypatch):
    with (
        runpod.open_api({"RUNPOD_API_KEY": "wrong-key"}) as api,
        pytest.raises(InputError, match="check RUNPOD_API_KEY"),
    ):
        runpod.list_pods(api)
    with pytest.raises(InputError, match="set RUNPOD_API_KEY"), runpod.open_api({}):
        pass
    monkeypatch.setenv("RUNPOD_API_URL", "http://192.0.2.1")
    with pytest.raises(InputError, match="https is needed"), runpod.open_api(KEYS):
        pass


def test_without_httpx_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(InputError, match=r"pip install 'emogen\[pods\]'"), runpod.open_api(KEYS):
        pass


def test_a_dry_run_prints_the_request_and_no_secret(fake, tiny_recipe, tmp_path):
    done = emogen("pod", "launch", tiny_recipe(), "--dry-run", "--gpu", "NVIDIA L40S", "--volume", "vol1")
    body = json.loads(done.stdout)
    assert body["gpu"]["id"] == "NVIDIA L40S"
    assert body["mounts"] == {"network": [{"volumeId": "vol1", "path": "/workspace"}]}
    assert body["dataCenterIds"] == ["EU-RO-1"]
    assert body["env"]["RUNPOD_API_KEY"] == body["env"]["HF_TOKEN"] == "***"
    fake_runpod.CreatePodRequest.model_validate_json(done.stdout)
    assert re.fullmatch(r"[\d,]+ characters of base64: runpod/start\.sh", body["env"]["EMOGEN_START"])
    assert KEY not in done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert "weights" in done.stderr
    assert fake.pods == {}


def test_a_dry_run_needs_neither_key_nor_network(tiny_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("RUNPOD_API_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    done = emogen("pod", "launch", tiny_recipe(), "--dry-run")
    assert json.loads(done.stdout)["name"].startswith("emogen-tiny-")
    assert "remembered" in done.stderr
    assert "set RUNPOD_API_KEY" in emogen("pod", "launch", tiny_recipe(), code=2).stderr


# ---------------------------------------------------------------------------------------------- logs


def test_a_log_that_breaks_off_goes_on_where_it_stopped(fake, api):
    pod = fake.add({"name": "emogen-x-00000000-1700000000"}, "RUNNING")
    container = fake.containers[pod["id"]]
    wanted = [f"line {k}" for k in range(7)] + ["twice", f"key {KEY}"]
    for line in wanted:  # two of them have the same id
        container.print(line)
    fake.drops = [0, 3, 1, 2, 1]
    fake.failures = [("GET", ".*/logs", 503), ("GET", ".*/logs", (429, {"Retry-After": "4"}))]
    heard = []
    for line in runpod.logs(api, runpod.list_pods(api)[0], poll=0):
        heard.append(line)
        if len(heard) == len(wanted):
            fake.halt(pod, "EXITED")
    assert heard == [*wanted[:-1], "key ***"]
    assert 4 in api.waited


def test_a_log_that_cannot_be_read_any_more_is_an_error(fake, api):
    pod = fake.add({"name": "emogen-x-00000000-1700000000"}, "RUNNING")
    fake.failures = [("GET", ".*/logs", "drop")] * 99 + [("GET", f"/v2/pods/{pod['id']}", "drop")] * 99
    with pytest.raises(runpod.ApiError, match="connection is lost"):
        list(runpod.logs(api, runpod.list_pods(api)[0], poll=0, patience=3))
    fake.failures = [("GET", ".*/logs", 403)]
    with pytest.raises(runpod.ApiError, match="403"):
        list(runpod.logs(api, runpod.list_pods(api)[0], poll=0))


# ---------------------------------------------------------------------------------------------- a job


def test_what_is_shipped_runs_elsewhere_and_tells_nothing(tiny_recipe, tmp_path, fake):
    recipe = load_recipe(tiny_recipe(eval_file=str(tmp_path / "train.csv")), ["learning_rate=0.5"])
    job = ship.job_of(recipe)
    with (tmp_path / "a.tgz").open("wb") as file:
        ship.write_archive(job, file)
    with tarfile.open(tmp_path / "a.tgz") as archive:
        names = set(archive.getnames())
        archive.extractall(tmp_path / "there", filter="data")
        assert {(member.uid, member.uname, member.mtime) for member in archive} == {(0, "", 0)}
    assert {"code/pyproject.toml", "code/constraints.txt", "code/emogen/train.py", "code/prompts/list.jinja"} <= names
    assert not [name for name in names if "__pycache__" in name or ".git" in name]
    there = tmp_path / "there" / "job"
    text = (there / "tiny.yaml").read_text()
    assert str(tmp_path) not in text
    shipped = load_recipe(there / "tiny.yaml")
    assert shipped.sft_args["learning_rate"] == 0.5
    for key in ("train_file", "eval_file", "prompt"):
        assert shipped.find(getattr(shipped, key)).is_relative_to(there)
    assert (there / shipped.model_name / "config.json").is_file()


def test_the_same_job_has_the_same_name_and_another_has_not(tiny_recipe, tmp_path):
    recipe = tiny_recipe()
    name = ship.job_of(load_recipe(recipe)).name
    assert ship.job_of(load_recipe(recipe, ["resume_from_checkpoint=true", "output_dir=elsewhere"])).name == name
    assert ship.job_of(load_recipe(recipe, ["seed=7"])).name != name
    (tmp_path / "train.csv").write_text((tmp_path / "train.csv").read_text().replace("lovely", "lovelier"))
    assert ship.job_of(load_recipe(recipe)).name != name
    assert runpod.NAME.fullmatch(f"{name}-1700000000")["recipe"] == "tiny"


def test_gpus_are_tried_by_what_the_run_costs_within_the_limits(tiny_recipe, api, tmp_path):
    recipe = tiny_recipe()
    planned, _, bodies = launch.prepare(recipe, [], launch.Limits(6, 10), api=api)
    assert [body["gpu"]["id"] for body in bodies] == ["NVIDIA A40", "NVIDIA L40S", "NVIDIA A100 80GB PCIe"]
    assert [option.price for option in planned.options[:3]] == [0.40, 0.86, 1.39]
    started, deadline = (int(bodies[1]["name"][-10:]), int(bodies[1]["env"]["EMOGEN_DEADLINE"]))
    assert deadline == started + 6 * 3600 - runpod.GRACE
    _, _, short = launch.prepare(recipe, [], launch.Limits(6, 0.86), gpus=["NVIDIA L40S"])
    assert int(short[0]["env"]["EMOGEN_DEADLINE"]) == int(short[0]["name"][-10:]) + 3600 - runpod.GRACE
    with pytest.raises(InputError, match=r"max-dollars 0\.01"):
        launch.prepare(recipe, [], launch.Limits(6, 0.01))
    with pytest.raises(InputError, match="not offered"):
        launch.prepare(recipe, [], launch.Limits(6, 10), gpus=["NVIDIA L40"])
    with pytest.raises(InputError, match=r"GB of GPU memory.*gradient_checkpointing"):
        launch.prepare(recipe, ["per_device_train_batch_size=2000000"], launch.Limits(6, 10))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").touch()
    with pytest.raises(InputError, match="not empty"):
        launch.prepare(recipe, [], launch.Limits(6, 10))


def test_what_the_account_lacks_is_said_before_anything_is_paid_for(fake, api, tiny_recipe):
    with pytest.raises(InputError, match="no such network volume"):
        launch.prepare(tiny_recipe(), [], launch.Limits(6, 10), volume="vol2", api=api)
    fake.keys = []
    with pytest.raises(InputError, match="no SSH public key"):
        launch.prepare(tiny_recipe(), [], launch.Limits(6, 10), api=api)


def test_a_pod_that_never_comes_up_is_terminated(fake, api, job, bodies):
    fake.looks = None
    with pytest.raises(ModelError, match="still PROVISIONING"):
        launch.launch(api, job, bodies, KEYS, say_nothing, QUICK)
    assert fake.pods == {}


def test_a_pod_that_breaks_while_it_comes_up_is_terminated(fake, api, job, bodies):
    def break_it(line):
        for pod in fake.pods.values():
            pod["status"] = "ERROR"

    with pytest.raises(ModelError, match="did not come up"):
        launch.launch(api, job, bodies, KEYS, break_it, QUICK)
    assert fake.pods == {}


def test_a_job_that_cannot_be_sent_ends_its_pod(fake, api, job, bodies, ssh):
    (ssh / "emogen").write_text("a file where a folder should be")
    with pytest.raises(ModelError, match="ssh root@"):
        launch.launch(api, job, bodies, KEYS, say_nothing, QUICK)
    assert fake.pods == {}


@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError])
def test_whatever_happens_while_following_the_pod_is_terminated(fake, api, job, bodies, ssh, tmp_path, how):
    (ssh / "lost").touch()  # the connection is lost once, too

    def say(line):
        if line.startswith("sending"):
            (pod,) = fake.containers.values()
            pod.print("training")
        if line == "training":
            raise how

    with pytest.raises(how):
        launch.launch(api, job, bodies, KEYS, say, QUICK, folder=tmp_path / "run")
    assert fake.pods == {}
    assert (ssh / "ssh.log").read_text().count("tar") == 2


def test_impatience_leaves_no_pod_behind(fake, api, job, bodies):
    """Ctrl-C, and again while the pod is being terminated."""

    def say(line):
        fake.failures = [("DELETE", ".*", 500)]
        api.pause = lambda seconds: os.kill(os.getpid(), signal.SIGINT)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        launch.launch(api, job, bodies, KEYS, say, QUICK)
    assert fake.pods == {}
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_is_done_but_cannot_be_fetched_is_not_thrown_away(fake, api, job, bodies, ssh, tmp_path):
    def say(line):
        if line.startswith("sending"):
            (pod,) = fake.containers.values()
            pod.print("[emogen] ended: done")

    with pytest.raises(ModelError, match=r"(?s)is done.*emogen pod fetch pod0 --into"):  # the pod has no run folder
        launch.launch(api, job, bodies, KEYS, say, QUICK, folder=tmp_path / "run")
    assert fake.pods["pod0"]["status"] == "EXITED"


@pytest.mark.parametrize(("said", "attempts"), [("Connection refused", 3), ("Permission denied (publickey).", 1)])
def test_sshd_is_waited_for_but_not_after_it_has_said_no(job, ssh, tmp_path, said, attempts):
    script = f"#!/bin/bash\necho asked >>{ssh}/ssh.log\necho '{said}' >&2\nexit 255\n"
    (tmp_path / "bin" / "ssh").write_text(script)
    address = ship.Address("192.0.2.7", 22, "root", ssh / "known_hosts", poll=0, patience=3)
    with pytest.raises(ModelError, match=re.escape(said)):
        ship.send(job, f"{job.name}-1700000000", address)
    assert (ssh / "ssh.log").read_text().count("asked") == attempts


def test_a_pod_that_is_terminated_by_somebody_else_is_an_error(fake, api, job, bodies, ssh, tmp_path):
    def say(line):
        if line.startswith("sending"):
            (pod,) = fake.containers.values()
            pod.print("training")
        if line == "training":
            fake.halt(fake.pods.popitem()[1], "TERMINATED")

    with pytest.raises(ModelError, match="before its job had ended"):
        launch.launch(api, job, bodies, KEYS, say, QUICK, folder=tmp_path / "run")


def test_a_pod_that_cannot_be_terminated_is_named(fake, api, job, bodies):
    fake.looks = None
    said = []

    def say(line):
        said.append(line)
        fake.failures = [("DELETE", ".*", 500)] * 99

    with pytest.raises(ModelError, match="still PROVISIONING"):
        launch.launch(api, job, bodies, KEYS, say, QUICK)
    assert "COULD NOT BE TERMINATED" in said[-1]
    assert bodies[0]["name"] in said[-1]


def test_a_job_that_failed_says_so_and_ends_its_pod(fake, api, job, bodies, ssh, tmp_path):
    def say(line):
        if line.startswith("sending"):
            (pod,) = fake.containers.values()
            pod.print("[emogen] ended: failed: training ended with 1")

    with pytest.raises(ModelError, match="training ended with 1"):
        launch.launch(api, job, bodies, KEYS, say, QUICK, folder=tmp_path / "run")
    assert fake.pods == {}
    assert not (tmp_path / "run").exists()


def test_a_second_launch_finds_the_first(fake, api, job):
    assert launch.same_job(api, job) is None
    first = fake.add({"name": f"{job.name}-1700000000"}, "RUNNING")
    fake.add({"name": "emogen-tiny-00000000-1700000000"}, "RUNNING")
    assert launch.same_job(api, job).id == first["id"]
    first["status"] = "EXITED"
    with pytest.raises(InputError, match="emogen pod fetch pod0"):
        launch.same_job(api, job)


def test_a_second_launch_pays_nothing_and_harms_nothing(fake, api, job, bodies, ssh):
    pod = launch.launch(api, job, bodies, KEYS, say_nothing, QUICK)
    assert launch.launch(api, job, bodies, KEYS, say_nothing, QUICK).id == pod.id
    assert len(fake.asked("POST", "/v2/pods")) == 1
    (ssh / "ssh.log").write_text("")
    (ssh / "emogen").rename(ssh / "away")
    (ssh / "emogen").write_text("a file where a folder should be")
    with pytest.raises(ModelError, match="ssh root@"):  # what is wrong with the second is no harm to the first
        launch.launch(api, job, bodies, KEYS, say_nothing, QUICK)
    assert list(fake.pods) == [pod.id]


# ---------------------------------------------------------------------------------------------- inside the pod


def container_environment(ssh, python=sys.executable):
    """What a container finds when it runs on this machine: the volume in a folder, and an interpreter with emogen."""
    return fake_runpod.clean_environment() | {
        "EMOGEN_WORKSPACE": str(ssh), "EMOGEN_PYTHON": str(python), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def start_pod(fake, ssh, name, python=sys.executable, **env):
    """A pod whose container runs `runpod/start.sh` on this machine."""
    fake.environment = container_environment(ssh, python)
    settings = {"EMOGEN_POD": name, "EMOGEN_DEADLINE": "99999999999", "EMOGEN_GRACE": "0", "RUNPOD_API_KEY": KEY}
    pod = fake.add(
        {"name": name, "args": shlex.join(["bash", str(ROOT / "runpod" / "start.sh")]), "env": settings | env}
    )
    fake.boot(pod)
    return pod


def wait_until(fake, pod, condition):
    """Wait for something to happen, as long as the pod's container lives."""
    container = fake.containers[pod["id"]]
    with container.heard:
        while not condition():
            process = container.process
            assert process is None or process.poll() is None, container.log
            container.heard.wait(0.05)


def printed(fake, pod):
    return [line for _, line in fake.containers[pod["id"]].log]


def test_a_pod_that_is_killed_goes_on_from_its_checkpoint_and_stops_itself_once(fake, ssh, tiny_recipe):
    job = ship.job_of(load_recipe(tiny_recipe(max_steps=30, save_strategy="steps", save_steps=3)))
    name = f"{job.name}-1700000000"
    ship.send(job, name, ship.Address("192.0.2.7", 22, "root", ssh / "known_hosts"))
    folder = ssh / "emogen" / job.name
    pod = start_pod(fake, ssh, name)
    wait_until(fake, pod, lambda: list(folder.glob("run/checkpoint-*/trainer_state.json")))
    fake.containers[pod["id"]].kill()
    assert not (folder / "done").exists()
    assert fake.stops() == 0

    fake.boot(pod)
    wait_until(fake, pod, lambda: pod["status"] == "EXITED")
    assert (folder / "done").is_file()
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()
    log = printed(fake, pod)
    assert any("Going on from" in line and "checkpoint-" in line for line in log), log
    assert log[-2:] == ["[emogen] ended: done", "[emogen] stopping the pod"]
    assert fake.stops() == 1

    fake.boot(pod)  # started once more, there is nothing to do
    wait_until(fake, pod, lambda: pod["status"] == "EXITED")
    assert fake.stops() == 2
    assert sum("training, for" in line for line in printed(fake, pod)) == 2
    said = "\n".join(printed(fake, pod)) + (folder / "run" / "manifest.json").read_text()
    assert KEY not in said + (ssh / "curl.log").read_text() + (ssh / "ssh.log").read_text()


@pytest.mark.parametrize(
    ("python", "env", "said"),
    [
        ("exit 3", {}, "failed: training ended with 3"),
        ("exec sleep 600", {"EMOGEN_DEADLINE": "+2"}, "failed: the time limit"),
        ("exit 0", {"EMOGEN_DEADLINE": "+0"}, "failed: the time limit"),
        ("kill -9 $PPID; exit 1", {}, "failed: the time limit, or out of memory (exit 137)"),
        ('[ -z "$RUNPOD_API_KEY" ] && exit 4', {}, "failed: training ended with 4"),  # training has no need of it
    ],
)
def test_a_job_that_fails_is_not_tried_again(fake, ssh, tmp_path, python, env, said):
    name = "emogen-x-00000000-1700000000"
    folder = ssh / "emogen" / name.rpartition("-")[0]
    (folder / "job").mkdir(parents=True)
    (folder / f"ready.{name}").touch()
    (tmp_path / "python").write_text(f"#!/bin/bash\n{python}\n")
    (tmp_path / "python").chmod(0o755)
    if env:
        env = {"EMOGEN_DEADLINE": str(int(time.time()) + int(env["EMOGEN_DEADLINE"]))}
    pod = start_pod(fake, ssh, name, tmp_path / "python", **env)
    wait_until(fake, pod, lambda: pod["status"] == "EXITED")
    assert any(line.startswith(f"[emogen] ended: {said}") for line in printed(fake, pod)), printed(fake, pod)
    assert not (folder / "done").exists()
    assert fake.stops() == 1
    trained = sum("training, for" in line for line in printed(fake, pod))
    fake.boot(pod)
    wait_until(fake, pod, lambda: pod["status"] == "EXITED")
    assert fake.stops() == 2
    assert sum("training, for" in line for line in printed(fake, pod)) == trained


def test_a_pod_without_a_job_or_that_dies_again_and_again_ends(fake, ssh):
    name = "emogen-x-00000000-1700000000"
    pod = start_pod(fake, ssh, name, EMOGEN_WAIT="0")
    wait_until(fake, pod, lambda: pod["status"] == "EXITED")
    assert "[emogen] ended: failed: no job came" in printed(fake, pod)
    again = "emogen-x-00000000-1700000001"
    folder = ssh / "emogen" / "emogen-x-00000000"
    (folder / f"ready.{again}").touch()
    (folder / f"attempts.{again}").write_text("3\n")
    pod = start_pod(fake, ssh, again)
    wait_until(fake, pod, lambda: pod["status"] == "EXITED")
    assert "[emogen] ended: failed: it was interrupted three times" in printed(fake, pod)


def test_from_launch_to_the_run_at_home(fake, ssh, tiny_recipe, tmp_path):
    """`runpod/launch.sh`: check, plan, rent, send, train, follow, fetch, terminate; and what it never tells."""
    fake.environment = container_environment(ssh)
    fake.drops, fake.failures = [5, 9], [("POST", "/v2/pods", 400)]
    recipe = tiny_recipe(eval_fraction=0.3, save_strategy="steps", save_steps=2)
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:{BIN}", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [ROOT / "runpod" / "launch.sh", recipe]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["train_rows"] + metrics["n"] == 12
    assert not list(run.glob("checkpoint-*"))
    assert fake.pods == {}
    assert [body["gpu"]["id"] for body in fake.asked("POST", "/v2/pods")] == ["NVIDIA A40", "NVIDIA L40S"]
    assert done.stdout.count("[emogen] training, for") == 1
    assert done.stdout.count("[emogen] ended: done") == 1
    told = done.stdout + done.stderr + "".join(p.read_text() for p in (run / "manifest.json", ssh / "ssh.log"))
    assert KEY not in told
    assert TOKEN not in told


def test_the_folds_of_a_cross_validation_are_trained_on_pods_of_their_own(fake, ssh, tiny_recipe, tmp_path, labels):
    fake.environment = container_environment(ssh)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [BIN / "emogen", "cv", tiny_recipe(max_steps=2), "--folds", "2", "--jobs", "2", "--pods", f"output_dir={tmp_path / 'cv'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    logs = [(tmp_path / "cv" / f"fold-{k}.log").read_text() for k in range(2)]
    assert done.returncode == 0, done.stdout + done.stderr + "".join(logs)
    names = [body["name"].rpartition("-")[0] for body in fake.asked("POST", "/v2/pods")]
    assert len(set(names)) == len(names) == 2
    assert all("[emogen] ended: done" in log for log in logs)
    assert fake.pods == {}
    records = [json.loads(line) for line in (tmp_path / "cv" / "predictions.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [f"p{i}" for i in range(12)]
    assert KEY not in done.stdout + done.stderr + "".join(logs)


def test_fetch_starts_a_pod_that_is_stopped_and_overwrites_nothing(fake, api, ssh, tmp_path):
    fake.add({"name": "emogen-x-00000000-1700000000", "env": {}}, "EXITED")
    run = ssh / "emogen" / "emogen-x-00000000" / "run"
    (run / "checkpoint-3").mkdir(parents=True)
    (run / "metrics.json").write_text("{}")
    pod = runpod.find_pod(api, "emogen-x")
    launch.fetch(api, pod, tmp_path / "mine", QUICK)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["metrics.json"]
    assert fake.pods[pod.id]["status"] == "EXITED"
    with pytest.raises(InputError, match="nothing is overwritten"):
        launch.fetch(api, pod, tmp_path / "mine", QUICK)
    shutil.rmtree(run)
    with pytest.raises(ModelError, match="ssh root@"):
        launch.fetch(api, pod, tmp_path / "other", QUICK)
    assert sorted(path.name for path in tmp_path.glob("*other*")) == []


def test_the_client_is_httpx_with_certificates_checked(fake):
    with runpod.open_api(KEYS) as api:
        assert isinstance(api.client, httpx.Client)
        assert api.client.follow_redirects is False  # a redirect would carry the key elsewhere
    listed = (ROOT / "runpod").iterdir()
    assert sorted(path.name for path in listed if not path.name.startswith(".")) == ["launch.sh", "start.sh"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
@pytest.mark.parametrize("script", ["launch.sh", "start.sh"])
def test_the_scripts_are_clean(script):
    subprocess.run(["shellcheck", ROOT / "runpod" / script], check=True)
    assert os.access(ROOT / "runpod" / script, os.X_OK)
    assert Path(ROOT / "runpod" / script).read_text().count("set -euo pipefail") == 1
