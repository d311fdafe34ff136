"""Runs on a real Ray cluster of this machine, one of whose workers is killed."""

import json
import signal
import subprocess

import psutil
import pytest
import ray
from tiny import invented_posts, write_posts
from typer.testing import CliRunner

from emogen.cli.__main__ import app
from emogen.errors import ModelError
from emogen.evaluation.results import read_records
from emogen.experiments import crossval, on_ray
from emogen.experiments.crossval import cross_validate
from emogen.experiments.jobs import RAY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster of two cores, which the processes of the runs find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_worker_niceness", "0")  # Ray would give way to the other tests
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
        ray.shutdown()


def kill_a_worker():
    """Kill one process of Ray that trains, and what it has started. Returns whether there was one."""
    for process in psutil.process_iter(["cmdline"]):
        if "ray::_train_here" in " ".join(process.info["cmdline"] or ()):
            process.send_signal(signal.SIGKILL)
            return True
    return False


def test_folds_come_home_and_a_lost_worker_is_replaced(tiny_recipe, tmp_path, labels, monkeypatch):
    monkeypatch.setattr(crossval, "report_finished", lambda folder: None)
    recipe = str(tiny_recipe(max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=None))
    write_posts(tmp_path / "train.csv", labels, invented_posts(40))
    killed = []

    def kill_once(runs):
        if not killed and any(list(run.folder.glob("checkpoint-*/files.json")) for run in runs):
            killed.append(kill_a_worker())

    n_jobs, share = on_ray.connect(2)
    assert (n_jobs, share) == (2, "cpus=1")
    there, metrics = cross_validate(
        recipe, 2, [f"output_dir={tmp_path / 'there'}"], jobs=n_jobs, where=(*RAY, share), show=kill_once
    )
    assert killed == [True]
    here, expected = cross_validate(recipe, 2, [f"output_dir={tmp_path / 'here'}"])
    logs = "".join(log.read_text() for log in there.glob("fold-*.log"))
    assert "The worker was lost (" in logs
    assert "Starting at step" in logs
    assert f"The run is in {there / 'fold-0'}. Next: emogen predict {there / 'fold-0'} YOUR.csv" in logs
    assert "/job" not in logs
    found, wanted = (
        {record["id"]: record["prob"] for record in read_records(folder / "predictions.jsonl")}
        for folder in (there, here)
    )
    assert {row: pytest.approx(prob, abs=1e-4) for row, prob in wanted.items()} == found
    assert metrics["n"] == expected["n"] == 40
    for fold in ("fold-0", "fold-1"):
        names = [{str(p.relative_to(f / fold)) for p in (f / fold).rglob("*") if p.is_file()} for f in (there, here)]
        assert names[0] == names[1]
        assert not [name for name in names[0] if name.endswith(".partial")]


def test_a_run_that_fails_is_an_error_and_is_not_tried_again(tiny_recipe, tmp_path):
    recipe = str(tiny_recipe(max_steps=2, output_dir=str(tmp_path / "run")))
    (tmp_path / "train.csv").write_text("ID,Tweet,nothing\n1,hello,1\n")
    _, share = on_ray.connect(1)
    done = subprocess.run(
        ["python", "-m", "emogen.worker", *RAY[2:], share, recipe],
        input="",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0


def test_trials_of_a_search_run_on_the_cluster(tiny_recipe, tmp_path, labels):
    recipe = str(tiny_recipe(max_steps=2, eval_fraction=0.4))
    write_posts(tmp_path / "train.csv", labels, invented_posts(40))
    (tmp_path / "space.yaml").write_text("lora_r: [2, 4]\n")
    words = ["sweep", recipe, str(tmp_path / "space.yaml"), "--trials", "2", "--jobs", "2", "--on", "ray"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = [json.loads(path.read_text())["f1_macro"] for path in (tmp_path / "run-sweep").glob("trial-*/metrics.json")]
    assert 1 <= len(found) <= 2


def test_too_many_lost_workers_are_an_error(tiny_recipe, monkeypatch, tmp_path):
    class Lost:
        def remote(self, *args):
            raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(ray, "remote", lambda **options: lambda function: Lost())
    monkeypatch.setattr(ray, "init", lambda **options: None)
    with pytest.raises(ModelError, match=f"{on_ray.WORKERS} workers were lost"):
        on_ray.train_on_ray(["cpus=1", str(tiny_recipe())])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--on", "slurm"], "--on is ray, not slurm"), (["--on", "ray", "--pods"], "exclude each other")],
)
def test_places_that_are_not_known_or_two_of_them_are_refused(tiny_recipe, words, message):
    result = CliRunner().invoke(app, ["cv", str(tiny_recipe()), *words])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
