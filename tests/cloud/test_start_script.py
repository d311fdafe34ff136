"""The scripts in `runpod/`: `start.sh` runs for real on this machine, with a stand-in for the training process."""

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from fake_runpod import KEY, container_environment

from emogen import paths

FOLDER = paths.shipped("runpod")
NAME = "emogen-x-00000000-1700000000"


@pytest.fixture
def job_folder(volume):
    """The folder of a job that has been sent."""
    folder = volume / "emogen" / NAME.rpartition("-")[0]
    (folder / "job").mkdir(parents=True)
    (folder / "job" / "x.yaml").touch()
    (folder / f"ready.{NAME}").touch()
    return folder


def start_pod(fake, volume, training, name=NAME, **env):
    """Start a pod that runs `start.sh`. `training`: a bash script that stands for `python -m accelerate...launch`."""
    python = volume / "python"
    python.write_text(f"#!/bin/bash\n{training}\n")
    python.chmod(0o755)
    fake.environment = container_environment(volume, python)
    settings = {"EMOGEN_POD": name, "EMOGEN_DEADLINE": "99999999999", "EMOGEN_GRACE": "0", "RUNPOD_API_KEY": KEY}
    pod = fake.add({"name": name, "args": shlex.join(["bash", str(FOLDER / "start.sh")]), "env": settings | env})
    fake.boot(pod)
    return pod


def wait_until_stopped(fake, pod):
    fake.wait_until(pod, lambda: pod["status"] == "EXITED")


def count_trainings(fake, pod):
    return sum("training for at most" in line for line in fake.printed(pod))


# Trains in two attempts: the first one writes a checkpoint and is still running when the container is killed.
TRAINING = """
[[ "$*" == "-m accelerate.commands.launch "*"/code/emogen/train.py ./x.yaml output_dir="*"/run resume_from_checkpoint=true" ]] || exit 9
run=../run
if [ -e $run/checkpoint-3 ]; then
    echo "Resuming from checkpoint-3"
    exec touch $run/adapter
fi
mkdir -p $run
mkdir $run/checkpoint-3
exec sleep 600
"""


def test_a_killed_pod_resumes_its_job_and_stops_itself_once(fake, volume, job_folder):
    pod = start_pod(fake, volume, TRAINING)
    fake.wait_until(pod, (job_folder / "run" / "checkpoint-3").exists)
    fake.containers[pod["id"]].kill()
    assert not (job_folder / "done").exists()
    assert fake.stops() == 0

    fake.boot(pod)
    wait_until_stopped(fake, pod)
    assert (job_folder / "done").is_file()
    assert (job_folder / "run" / "adapter").is_file()
    printed = fake.printed(pod)
    assert "Resuming from checkpoint-3" in printed
    assert printed[-2:] == ["[emogen] ended: done", "[emogen] stopping the pod"]
    assert fake.stops() == 1

    fake.boot(pod)  # after another restart, there is nothing to do
    wait_until_stopped(fake, pod)
    assert fake.stops() == 2
    assert count_trainings(fake, pod) == 2
    assert KEY not in "\n".join(fake.printed(pod)) + (volume / "curl.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "seconds", "reason"),
    [
        ("exit 3", None, "training ended with exit code 3"),
        ("exec sleep 600", 2, "time limit reached"),
        ("exit 0", 0, "time limit reached"),
        ("kill -9 $PPID; exit 1", None, "time limit reached, or out of memory (exit code 137)"),
        ('[ -z "$RUNPOD_API_KEY" ] && exit 4', None, "training ended with exit code 4"),  # training gets no key
    ],
)
def test_a_failed_job_is_not_tried_again(fake, volume, job_folder, training, seconds, reason):
    env = {} if seconds is None else {"EMOGEN_DEADLINE": str(int(time.time()) + seconds)}
    pod = start_pod(fake, volume, training, **env)
    wait_until_stopped(fake, pod)
    assert any(line.startswith(f"[emogen] ended: failed: {reason}") for line in fake.printed(pod)), fake.printed(pod)
    assert not (job_folder / "done").exists()
    assert fake.stops() == 1
    trainings = count_trainings(fake, pod)
    fake.boot(pod)
    wait_until_stopped(fake, pod)
    assert fake.stops() == 2
    assert count_trainings(fake, pod) == trainings


def test_a_pod_without_a_job_stops(fake, volume):
    pod = start_pod(fake, volume, "exit 0", EMOGEN_WAIT="0")
    wait_until_stopped(fake, pod)
    assert "[emogen] ended: failed: no job arrived" in fake.printed(pod)


def test_a_job_that_was_interrupted_three_times_is_not_tried_again(fake, volume, job_folder):
    (job_folder / f"attempts.{NAME}").write_text("3\n")
    pod = start_pod(fake, volume, "exit 0")
    wait_until_stopped(fake, pod)
    assert "[emogen] ended: failed: interrupted three times" in fake.printed(pod)
    assert count_trainings(fake, pod) == 0


def test_launch_sh_passes_its_arguments_to_the_command(tmp_path, monkeypatch):
    recorder = tmp_path / "emogen"
    recorder.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit 7\n')
    recorder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command = [FOLDER / "launch.sh", "a recipe.yaml", "lora_r=8", "--max-dollars", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["pod", "launch", "--follow", "a recipe.yaml", "lora_r=8", "--max-dollars", "5"]
    assert done.returncode == 7


def test_the_folder_has_two_scripts():
    names = sorted(path.name for path in FOLDER.iterdir() if not path.name.startswith("."))
    assert names == ["launch.sh", "start.sh"]


@pytest.mark.parametrize("script", ["launch.sh", "start.sh"])
def test_the_scripts_stop_at_errors_and_can_be_executed(script):
    assert os.access(FOLDER / script, os.X_OK)
    assert Path(FOLDER / script).read_text().count("set -euo pipefail") == 1


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (on Debian: apt-get install shellcheck)"
)
@pytest.mark.parametrize("script", ["launch.sh", "start.sh"])
def test_shellcheck_finds_nothing(script):
    subprocess.run(["shellcheck", FOLDER / script], check=True)
