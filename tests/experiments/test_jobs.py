import json
import os
import subprocess

import pytest

from emogen.errors import ModelError
from emogen.experiments import jobs
from emogen.experiments.jobs import POD, RunProcess, failure, overrides_of, own_folder, run_all, start
from emogen.task.recipe import load_recipe

PYTHON = ("-c",)  # a run is a line of Python here
DONE = "from pathlib import Path; Path({folder!r}, 'metrics.json').write_text('{{}}')"
WAITS = "import sys; sys.stdin.read()"  # until its standard input closes


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)


@pytest.fixture
def runs(tmp_path):
    return [RunProcess(k, tmp_path / f"fold-{k}") for k in range(3)]


def done_command(run):
    return [DONE.format(folder=str(run.folder))]


def silent(runs):
    pass


def test_all_runs_are_done_and_a_done_run_is_not_started_again(runs):
    runs[1].folder.mkdir()
    (runs[1].folder / "metrics.json").write_text("{}")
    commands = [done_command(runs[0]), ["raise SystemExit('started again')"], done_command(runs[2])]
    run_all(runs, commands, 2, silent, PYTHON)
    assert all(run.done for run in runs)
    assert all(run.process is None for run in runs)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_no_more_runs_than_jobs_at_a_time(runs, n_jobs):
    counts = set()
    run_all(runs, list(map(done_command, runs)), n_jobs, lambda runs: counts.add(sum(bool(r.process) for r in runs)), PYTHON)  # fmt: skip
    assert max(counts) == n_jobs


def test_a_failed_run_stops_the_others_and_its_log_is_quoted(runs):
    processes = []
    commands = [[WAITS], ["print('before'); raise SystemExit('out of luck')"], done_command(runs[2])]
    show = lambda runs: processes.append(runs[0].process)  # noqa: E731
    with pytest.raises(ModelError, match=r"(?s)fold-1 failed; the same command resumes it\..*fold-1\.log.*  before\n  out of luck"):  # fmt: skip
        run_all(runs, commands, 2, show, PYTHON)
    assert processes[0].returncode is not None  # fold-0 was stopped
    assert not runs[0].done
    assert not runs[2].folder.exists()


def test_a_run_that_ends_without_metrics_has_failed(runs):
    with pytest.raises(ModelError, match="fold-0 failed"):
        run_all(runs[:1], [["print('all is well')"]], 1, silent, PYTHON)


def test_an_interrupt_stops_all_runs(runs):
    seen = []

    def interrupt(runs):
        seen.extend(run.process for run in runs if run.process)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(runs, [[WAITS]] * 3, 3, interrupt, PYTHON)
    assert len(seen) == 3
    assert all(process.returncode is not None for process in seen)


def test_a_failure_quotes_the_last_lines_of_the_log_with_the_whole_folder_name(tmp_path):
    for name in ("rate-0.03", "rate-0.1"):
        (tmp_path / f"{name}.log").write_text("".join(f"line {k} of {name}\n\n" for k in range(9)))
    message = failure(RunProcess(0, tmp_path / "rate-0.03"))
    assert message.splitlines()[0].endswith("rate-0.03.log:")
    assert message.splitlines()[1:] == [f"  line {k} of rate-0.03" for k in range(4, 9)]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="CPU affinity is a matter of Linux")
def test_each_job_has_its_share_of_the_cores(runs, monkeypatch):
    monkeypatch.setattr(jobs, "_count_gpus", lambda: 0)
    cores = os.sched_getaffinity(0)
    shares = []

    def look(runs):
        if not shares:
            shares.extend(os.sched_getaffinity(run.process.pid) for run in runs if run.process)
            for run in runs:
                if run.process:
                    run.process.stdin.close()

    commands = [[f"{WAITS}; {done_command(run)[0]}"] for run in runs]
    run_all(runs[:2], commands[:2], 2, look, PYTHON)
    assert len(shares) == 2
    assert shares[0] | shares[1] == cores
    if len(cores) > 1:
        assert not shares[0] & shares[1]
        assert abs(len(shares[0]) - len(shares[1])) <= 1


def visible_gpu(run):
    return [f"import os; {done_command(run)[0]}; print('gpu', os.environ.get('CUDA_VISIBLE_DEVICES'))"]


@pytest.mark.parametrize(
    ("visible", "own"), [(None, ["0", "1"]), ("3, 5", ["3", "5"]), ("GPU-a1,GPU-b2", ["GPU-a1", "GPU-b2"])]
)
def test_each_job_has_its_own_gpu_among_the_visible_ones(runs, monkeypatch, visible, own):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(jobs, "_count_gpus", lambda: 2)
    run_all(runs[:2], list(map(visible_gpu, runs)), 2, silent, PYTHON)
    logs = [run.folder.with_name(f"{run.folder.name}.log").read_text() for run in runs[:2]]
    assert logs == [f"gpu {gpu}\n" for gpu in own]


def test_rented_gpus_take_no_share_of_this_machine(runs, monkeypatch):
    """A run on a pod is a process here that only waits for the pod."""
    monkeypatch.setattr(jobs, "_count_gpus", lambda: pytest.fail("counted the GPUs of this machine"))
    asked = []

    def start(run, argv, where, **share):
        asked.append((where, share))
        run.folder.mkdir()
        (run.folder / "metrics.json").write_text("{}")
        run.process = subprocess.Popen(["true"])

    monkeypatch.setattr(jobs, "start", start)
    run_all(runs, [["recipe.yaml"]] * 3, 2, silent, POD)
    assert asked == [(POD, {})] * 3


def test_a_run_ends_with_its_parent(tmp_path):
    """Its standard input closes when the parent is killed; see `emogen.worker`."""
    run = RunProcess(0, tmp_path / "run")
    start(run, [WAITS], PYTHON)
    assert run.process.poll() is None
    run.process.stdin.close()
    assert run.process.wait() == 0


def test_the_newest_value_of_each_metric(tmp_path):
    run = RunProcess(0, tmp_path)
    assert run.last_logged() == {}
    entries = [{"loss": 2.0, "step": 1}, {"eval_f1_macro": 0.3, "step": 1}, {"loss": 1.5, "step": 2}]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "train_log.jsonl").write_text(text + '{"loss": 1.')  # the last line is being written
    assert run.last_logged() == {"loss": 1.5, "eval_f1_macro": 0.3, "step": 2}


def test_several_runs_go_to_a_folder_beside_the_single_run(tiny_recipe, tmp_path):
    path = tiny_recipe()
    assert own_folder(load_recipe(path), [], "cv") == tmp_path / "run-cv"
    overrides = [f"output_dir={tmp_path / 'mine'}"]
    assert own_folder(load_recipe(path, overrides), overrides, "cv") == tmp_path / "mine"


def test_overrides_name_the_files_of_a_run_and_forget_the_form_of_the_users_files(tiny_recipe, tmp_path):
    path = tiny_recipe(text_column="Tweet", separator=",", eval_fraction=0.3)
    run = RunProcess(0, tmp_path / "fold-0")
    (tmp_path / "train.jsonl").touch()
    overrides = overrides_of(run, tmp_path / "train.jsonl", tmp_path / "eval.jsonl", {"max_steps": 7})
    recipe = load_recipe(path, overrides)
    assert recipe.train_file == str(tmp_path / "train.jsonl")
    assert recipe.eval_file == str(tmp_path / "eval.jsonl")
    assert recipe.output_dir == tmp_path / "fold-0"
    assert (recipe.text_column, recipe.separator, recipe.eval_fraction) == (None, None, 0)
    assert recipe.sft_args["max_steps"] == 7
    assert recipe.sft_args["resume_from_checkpoint"] is True
