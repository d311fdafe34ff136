"""The life of a job on a rented GPU, against a fake Runpod (`fake_runpod.py`)."""

import json
import os
import re
import shutil
import signal
import sys
import threading

import pytest
from fake_runpod import KEY, KEYS, OPERATIONS, TOKEN, container_environment, request_errors

from emogen.cloud import launch, runpod
from emogen.cloud.runpod import Polling
from emogen.errors import InputError, ModelError

pytestmark = pytest.mark.slow

QUICK = Polling(poll=0, provision=5, patience=3)
LIMITS = launch.Limits(hours=6, dollars=10)


def ignore(line):
    pass


def printing(fake, line):
    """A `say` that lets the pod's container print a line as soon as its job is sent."""

    def say(said):
        if said.startswith("sending"):
            (container,) = fake.containers.values()
            container.print(line)

    return say


# ------------------------------------------------------------------------------------------------------- before a pod


def test_gpus_are_tried_by_the_cost_of_the_run_within_the_limits(tiny_recipe, api, tmp_path):
    recipe = tiny_recipe()
    plan, _, bodies = launch.prepare(recipe, [], LIMITS, api=api)
    assert [body["gpu"]["id"] for body in bodies] == ["NVIDIA A40", "NVIDIA L40S", "NVIDIA A100 80GB PCIe"]
    assert [option.price for option in plan.options[:3]] == [0.40, 0.86, 1.39]
    started, deadline = (int(bodies[1]["name"][-10:]), int(bodies[1]["env"]["EMOGEN_DEADLINE"]))
    assert deadline == started + 6 * 3600 - runpod.GRACE
    _, _, short = launch.prepare(recipe, [], launch.Limits(6, 0.86), gpus=["NVIDIA L40S"])
    assert int(short[0]["env"]["EMOGEN_DEADLINE"]) == int(short[0]["name"][-10:]) + 3600 - runpod.GRACE
    with pytest.raises(InputError, match=r"max-dollars 0\.01"):
        launch.prepare(recipe, [], launch.Limits(6, 0.01))
    with pytest.raises(InputError, match="not offered"):
        launch.prepare(recipe, [], LIMITS, gpus=["NVIDIA L40"])
    with pytest.raises(InputError, match=r"GB of GPU memory.*gradient_checkpointing"):
        launch.prepare(recipe, ["per_device_train_batch_size=2000000"], LIMITS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").touch()
    with pytest.raises(InputError, match="not empty"):
        launch.prepare(recipe, [], LIMITS)


def test_what_the_account_lacks_is_reported_before_anything_is_paid_for(fake, api, tiny_recipe):
    with pytest.raises(InputError, match="no such network volume"):
        launch.prepare(tiny_recipe(), [], LIMITS, volume="vol2", api=api)
    fake.keys = []
    with pytest.raises(InputError, match="no SSH public key"):
        launch.prepare(tiny_recipe(), [], LIMITS, api=api)


def test_a_dry_run_prints_the_request_without_keys(fake, tiny_recipe, emogen):
    printed = emogen("pod", "launch", tiny_recipe(), "--dry-run", "--gpu", "NVIDIA L40S", "--volume", "vol1")
    body = json.loads(printed.out)
    assert body["gpu"]["id"] == "NVIDIA L40S"
    assert body["mounts"] == {"network": [{"volumeId": "vol1", "path": "/workspace"}]}
    assert body["dataCenterIds"] == ["EU-RO-1"]
    assert body["env"]["RUNPOD_API_KEY"] == body["env"]["HF_TOKEN"] == "***"
    assert request_errors(OPERATIONS["createPod"], {}, body) == []
    assert re.fullmatch(r"[\d,]+ characters of base64: runpod/start\.sh", body["env"]["EMOGEN_START"])
    assert KEY not in printed.out + printed.err
    assert TOKEN not in printed.out + printed.err
    assert "weights" in printed.err
    assert fake.pods == {}


def test_a_dry_run_needs_neither_key_nor_network(tiny_recipe, monkeypatch, tmp_path, emogen):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("RUNPOD_API_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    printed = emogen("pod", "launch", tiny_recipe(), "--dry-run")
    assert json.loads(printed.out)["name"].startswith("emogen-tiny-")
    assert "Prices: built in" in printed.err
    assert "set RUNPOD_API_KEY" in emogen("pod", "launch", tiny_recipe(), code=2).err


# ----------------------------------------------------------------------------------------------------- creating a pod


def test_without_capacity_the_next_gpu_is_tried(fake, api, bodies):
    fake.failures = [("POST", "/v2/pods", 400)]
    said = []
    pod = launch.create_first(api, bodies, KEYS, said.append)
    assert [body["gpu"]["id"] for body in bodies] == ["NVIDIA A40", "NVIDIA L40S"]
    assert pod.gpu.id == "NVIDIA L40S"
    assert "NVIDIA A40" in said[0]
    assert fake.pods[pod.id]["env"].items() >= KEYS.items()


def test_without_capacity_anywhere_the_error_has_the_last_answer(fake, api, bodies):
    fake.failures = [("POST", "/v2/pods", 400)] * 2
    with pytest.raises(ModelError, match=r"no GPU type is available.*problem 400"):
        launch.create_first(api, bodies, KEYS, ignore)
    assert len(fake.bodies("POST", "/v2/pods")) == 2


@pytest.mark.parametrize(("status", "message"), [(402, "balance"), (422, "errors|problem 422"), (409, "problem 409")])
def test_an_error_that_no_other_gpu_would_avoid_ends_the_launch(fake, api, bodies, status, message):
    fake.failures = [("POST", "/v2/pods", status)]
    with pytest.raises(ModelError, match=message) as raised:
        launch.create_first(api, bodies, KEYS, ignore)
    assert len(fake.bodies("POST", "/v2/pods")) == 1
    assert KEY not in str(raised.value)
    assert TOKEN not in str(raised.value)


def test_a_pod_whose_answer_was_lost_is_found_and_not_paid_for_twice(fake, api, bodies):
    fake.failures = [("POST", "/v2/pods", "lost")]
    pod = launch.create(api, bodies[0], KEYS)
    assert list(fake.pods) == [pod.id]
    assert len(fake.bodies("POST", "/v2/pods")) == 1


@pytest.mark.parametrize("how", [500, "drop"])
def test_creating_is_repeated_only_after_the_pods_are_listed(fake, api, bodies, how):
    fake.failures = [("POST", "/v2/pods", how)]
    launch.create(api, bodies[0], KEYS)
    order = [(method, path) for method, path, _ in fake.requests]
    assert order == [("POST", "/v2/pods"), ("GET", "/v2/pods"), ("POST", "/v2/pods")]
    assert len(fake.pods) == 1


def test_a_running_pod_of_the_same_job_is_found(fake, api, job):
    assert launch.find_running_pod(api, job) is None
    first = fake.add({"name": f"{job.name}-1700000000"}, "RUNNING")
    fake.add({"name": "emogen-tiny-00000000-1700000000"}, "RUNNING")
    assert launch.find_running_pod(api, job).id == first["id"]
    first["status"] = "EXITED"
    with pytest.raises(InputError, match="emogen pod fetch pod0"):
        launch.find_running_pod(api, job)


def test_a_second_launch_pays_nothing_and_harms_nothing(fake, api, job, bodies, volume):
    pod = launch.launch_job(api, job, bodies, KEYS, ignore, QUICK)
    assert launch.launch_job(api, job, bodies, KEYS, ignore, QUICK).id == pod.id
    assert len(fake.bodies("POST", "/v2/pods")) == 1
    (volume / "ssh.log").write_text("")
    (volume / "emogen").rename(volume / "away")
    (volume / "emogen").write_text("a file where a folder should be")
    with pytest.raises(ModelError, match="ssh root@"):  # a failure of the second launch does not end the first
        launch.launch_job(api, job, bodies, KEYS, ignore, QUICK)
    assert list(fake.pods) == [pod.id]


# ----------------------------------------------------------------------------------------------------------- failures


def test_a_pod_that_never_comes_up_is_terminated(fake, api, job, bodies):
    fake.polls_to_run = None
    with pytest.raises(ModelError, match="still PROVISIONING"):
        launch.launch_job(api, job, bodies, KEYS, ignore, QUICK)
    assert fake.pods == {}


def test_a_pod_that_breaks_while_it_comes_up_is_terminated(fake, api, job, bodies):
    def break_pods(line):
        for pod in fake.pods.values():
            pod["status"] = "ERROR"

    with pytest.raises(ModelError, match="did not come up"):
        launch.launch_job(api, job, bodies, KEYS, break_pods, QUICK)
    assert fake.pods == {}


def test_a_job_that_cannot_be_sent_ends_its_pod(fake, api, job, bodies, volume):
    (volume / "emogen").write_text("a file where a folder should be")
    with pytest.raises(ModelError, match="ssh root@"):
        launch.launch_job(api, job, bodies, KEYS, ignore, QUICK)
    assert fake.pods == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_while_following_ends_the_pod(fake, api, job, bodies, volume, tmp_path, error):
    (volume / "lost").touch()  # the connection is lost once, too
    start = printing(fake, "training")

    def say(line):
        start(line)
        if line == "training":
            raise error

    with pytest.raises(error):
        launch.launch_job(api, job, bodies, KEYS, say, QUICK, folder=tmp_path / "run")
    assert fake.pods == {}
    assert (volume / "ssh.log").read_text().count("tar") == 2


def test_a_second_ctrl_c_leaves_no_pod_behind(fake, api, job, bodies):
    """Ctrl-C, and again while the pod is being terminated."""

    def say(line):
        fake.failures = [("DELETE", ".*", 500)]
        api.pause = lambda seconds: os.kill(os.getpid(), signal.SIGINT)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        launch.launch_job(api, job, bodies, KEYS, say, QUICK)
    assert fake.pods == {}
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_that_cannot_be_fetched_is_kept(fake, api, job, bodies, volume, tmp_path):
    say = printing(fake, "[emogen] ended: done")
    with pytest.raises(ModelError, match=r"(?s)is done.*emogen pod fetch pod0 --into"):  # the pod has no run folder
        launch.launch_job(api, job, bodies, KEYS, say, QUICK, folder=tmp_path / "run")
    assert fake.pods["pod0"]["status"] == "EXITED"


def test_a_failed_job_is_reported_and_its_pod_terminated(fake, api, job, bodies, volume, tmp_path):
    say = printing(fake, "[emogen] ended: failed: training ended with exit code 1")
    with pytest.raises(ModelError, match="the job failed: training ended with exit code 1"):
        launch.launch_job(api, job, bodies, KEYS, say, QUICK, folder=tmp_path / "run")
    assert fake.pods == {}
    assert not (tmp_path / "run").exists()


def test_a_pod_that_somebody_else_terminates_is_an_error(fake, api, job, bodies, volume, tmp_path):
    start = printing(fake, "training")

    def say(line):
        start(line)
        if line == "training":
            fake.halt(fake.pods.popitem()[1], "TERMINATED")

    with pytest.raises(ModelError, match="before its job ended"):
        launch.launch_job(api, job, bodies, KEYS, say, QUICK, folder=tmp_path / "run")


def test_a_pod_that_cannot_be_terminated_is_named(fake, api, job, bodies):
    fake.polls_to_run = None
    said = []

    def say(line):
        said.append(line)
        fake.failures = [("DELETE", ".*", 500)] * 99

    with pytest.raises(ModelError, match="still PROVISIONING"):
        launch.launch_job(api, job, bodies, KEYS, say, QUICK)
    assert "COULD NOT BE TERMINATED" in said[-1]
    assert bodies[0]["name"] in said[-1]


# ------------------------------------------------------------------------------------------------------------ the run


def test_fetch_starts_a_stopped_pod_and_overwrites_nothing(fake, api, volume, tmp_path):
    fake.add({"name": "emogen-x-00000000-1700000000", "env": {}}, "EXITED")
    run = volume / "emogen" / "emogen-x-00000000" / "run"
    (run / "checkpoint-3").mkdir(parents=True)
    (run / "metrics.json").write_text("{}")
    pod = runpod.find_pod(api, "emogen-x")
    launch.fetch_run(api, pod, tmp_path / "mine", QUICK)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["metrics.json"]
    assert fake.pods[pod.id]["status"] == "EXITED"
    with pytest.raises(InputError, match="nothing is overwritten"):
        launch.fetch_run(api, pod, tmp_path / "mine", QUICK)
    shutil.rmtree(run)
    with pytest.raises(ModelError, match="ssh root@"):
        launch.fetch_run(api, pod, tmp_path / "other", QUICK)
    assert sorted(path.name for path in tmp_path.glob("*other*")) == []


def kill_at_first_checkpoint(fake, volume, launched):
    """Kill the container of the only pod when it has written a checkpoint, and start it again, as Runpod does.

    Returns:
        Whether the job was still in training; None if the launch ended before there was a checkpoint.
    """
    while not list(volume.glob("emogen/*/run/checkpoint-*/files.json")):
        if launched.wait(0.02):
            return None
    (pod,) = fake.pods.values()
    fake.containers[pod["id"]].kill()
    in_training = not list(volume.glob("emogen/*/done"))
    fake.boot(pod)
    return in_training


def test_a_job_from_launch_to_its_run_at_home(fake, volume, tiny_recipe, tmp_path, monkeypatch, emogen):
    """Check, plan, rent, send, train, be killed and resumed, follow, fetch, terminate; and no key in any output."""
    monkeypatch.setattr("emogen.cloud.runpod.Polling", lambda: QUICK)
    fake.environment = container_environment(volume)
    fake.drops, fake.failures = [5, 9], [("POST", "/v2/pods", 400)]
    recipe = tiny_recipe(eval_fraction=0.3, max_steps=30, save_strategy="steps", save_steps=3)
    launched, killed = threading.Event(), []
    killer = threading.Thread(target=lambda: killed.append(kill_at_first_checkpoint(fake, volume, launched)))
    killer.start()
    try:
        printed = emogen("pod", "launch", "--follow", recipe)
    finally:
        launched.set()
        killer.join()
    assert killed == [True], "training ended before it could be killed"
    run = tmp_path / "run"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["train_rows"] + metrics["n"] == 12
    assert not list(run.glob("checkpoint-*"))
    assert fake.pods == {}
    assert fake.stops() == 0
    assert [body["gpu"]["id"] for body in fake.bodies("POST", "/v2/pods")] == ["NVIDIA A40", "NVIDIA L40S"]
    assert printed.out.count("[emogen] training for at most") == 2
    assert any("Resuming from" in line and "checkpoint-" in line for line in printed.out.splitlines())
    assert printed.out.count("[emogen] ended: done") == 1
    output = printed.out + printed.err + "".join(p.read_text() for p in (run / "manifest.json", volume / "ssh.log"))
    assert KEY not in output
    assert TOKEN not in output


# Stands for `python -m accelerate.commands.launch ... RECIPE KEY=VALUE...`: "predicts" the gold labels at once.
INSTANT_TRAINING = f"""#!{sys.executable}
import json, sys
from pathlib import Path

(run,) = [Path(word.removeprefix("output_dir=")) for word in sys.argv if word.startswith("output_dir=")]
run.mkdir()
with (run / "predictions.jsonl").open("w") as file:
    for line in Path("files/eval_file.jsonl").read_text().splitlines():
        row = json.loads(line)
        prob = {{name: float(name in row["labels"]) for name in LABELS}}
        record = row | {{"raw": "", "status": "exact", "unknown": [], "gold": row["labels"], "prob": prob}}
        file.write(json.dumps(record) + "\\n")
(run / "metrics.json").write_text("{{}}")
"""


def test_cross_validation_trains_each_fold_on_its_own_pod(
    fake, volume, tiny_recipe, tmp_path, labels, monkeypatch, emogen
):
    python = tmp_path / "python"
    python.write_text(INSTANT_TRAINING.replace("LABELS", repr(labels.names)))
    python.chmod(0o755)
    fake.environment = container_environment(volume, python)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    printed = emogen("cv", tiny_recipe(), "--folds", "2", "--jobs", "2", "--pods", f"output_dir={tmp_path / 'cv'}")
    logs = [(tmp_path / "cv" / f"fold-{k}.log").read_text() for k in range(2)]
    names = [body["name"].rpartition("-")[0] for body in fake.bodies("POST", "/v2/pods")]
    assert len(set(names)) == len(names) == 2
    assert all("[emogen] ended: done" in log for log in logs)
    assert fake.pods == {}
    records = [json.loads(line) for line in (tmp_path / "cv" / "predictions.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [f"p{i}" for i in range(12)]
    assert KEY not in printed.out + printed.err + "".join(logs)
