"""Fixtures for jobs on rented GPUs: a fake Runpod, and an `ssh` that runs its commands on this machine."""

import os
import shutil

import pytest
from fake_runpod import KEYS, FakeRunpod

from emogen.cloud import launch, runpod, ship
from emogen.task.recipe import load_recipe


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A fake Runpod, which the environment names. At the end of the test all requests must have been valid."""
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
    """A client of the fake. It does not wait, and keeps in `waited` how long it would have."""
    with runpod.open_api(KEYS) as api:
        api.waited = []
        api.pause = api.waited.append
        yield api


@pytest.fixture
def job(tiny_recipe):
    return ship.make_job(load_recipe(tiny_recipe()))


@pytest.fixture
def bodies(tiny_recipe):
    """The requests that would create the pod of the job: the first on an A40, the second on an L40S."""
    return launch.prepare(tiny_recipe(), [], launch.Limits(6, 10), gpus=["NVIDIA A40", "NVIDIA L40S"])[2]


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """The folder that stands for the /workspace of every pod; an `ssh` on PATH runs its command there.

    The file `ssh.log` in it gets the arguments of `ssh`, and `curl.log` those of `curl`. A file `lost` makes `ssh` lose
    the connection once.
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
