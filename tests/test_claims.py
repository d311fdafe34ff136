"""One process at a time works in a folder or writes a file."""

import json
import os
import subprocess
import sys

import pytest

from emogen.claims import claim, claim_folder
from emogen.errors import InputError

HOLD = "import sys, pathlib; from emogen.claims import claim\nwith claim(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"


@pytest.fixture
def held_elsewhere(tmp_path):
    """Another process that holds the claim of a path."""
    processes = []

    def hold(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["folder", "out.csv"])
def test_a_second_process_is_told_who_holds_it_and_a_killed_one_leaves_nothing(held_elsewhere, tmp_path, name):
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    other = held_elsewhere(path)
    with pytest.raises(InputError, match=rf"{name}: in use by process {other.pid} on .* since 20"), claim(path):
        pass
    other.kill()
    other.wait()
    with claim(path):
        lock_file = path / ".claim" if path.is_dir() else tmp_path / ".out.csv.claim"
        assert json.loads(lock_file.read_text())["pid"] == os.getpid()
    assert not lock_file.exists()


def test_a_claim_is_free_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="x"), claim(tmp_path):
        raise ValueError("x")
    with claim(tmp_path):
        pass


def test_a_new_folder_that_stays_empty_is_removed(tmp_path):
    with claim_folder(tmp_path / "a"):
        (tmp_path / "a" / "result").write_text("x")
    with pytest.raises(InputError), claim_folder(tmp_path / "b"):
        raise InputError("refused")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_waits_for_a_run_that_has_just_lost_its_parent(held_elsewhere, tmp_path):
    other = held_elsewhere(tmp_path)
    other.stdin.write("\n")  # it ends, in a moment
    other.stdin.flush()
    with claim_folder(tmp_path):
        pass
