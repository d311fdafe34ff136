import hashlib
import json
import shutil
import subprocess
import sys
import threading

import optuna
import pytest
from tiny import POSTS, write_posts

from emogen.errors import InputError, ModelError
from emogen.experiments import sweep as sweep_module
from emogen.experiments.jobs import RunProcess
from emogen.experiments.sweep import load_space, sweep, watch
from emogen.train import main as train


def write_space(path, text):
    path.write_text(text)
    return path


def write_done_trial(folder, params, f1_macro):
    """Write the metrics of a finished trial into the folder that `sweep` gives it."""
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:8]
    (folder / f"trial-{digest}").mkdir(parents=True)
    metrics = {"f1_macro": f1_macro, "by_thresholds": {"f1_macro": 1 - f1_macro}}
    (folder / f"trial-{digest}" / "metrics.json").write_text(json.dumps(metrics))


DONE = (
    "import json, pathlib; folder = pathlib.Path({folder!r}); "
    "(folder / 'metrics.json').write_text(json.dumps({{'f1_macro': 0.5}}))"
)


@pytest.mark.slow
def test_a_search_starts_from_a_seed_and_each_trial_is_a_run(tiny_recipe, tmp_path, labels, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = str(tiny_recipe(eval_fraction=0.4, max_steps=2))
    write_posts(tmp_path / "train.csv", labels, [(f"{text} {k}", names) for k in range(3) for text, names in POSTS])
    train([recipe])
    space = write_space(tmp_path / "space.yaml", "learning_rate: {low: 1e-3, high: 1e-1, log: true}\nlora_r: [2, 4]\n")
    shown = []
    study = sweep(recipe, space, n_trials=1, seeds=[tmp_path / "run"], show=lambda study, runs: shown.append(runs))
    seed, trial = study.trials
    assert seed.params == {"learning_rate": 0.01, "lora_r": 4}
    assert seed.value == json.loads((tmp_path / "run" / "metrics.json").read_text())["f1_macro"]
    assert 1e-3 <= trial.params["learning_rate"] <= 1e-1
    (metrics,) = (tmp_path / "run-sweep").glob("trial-*/metrics.json")
    assert trial.value == json.loads(metrics.read_text())["f1_macro"]
    assert shown[0][0].folder == metrics.parent
    assert shown[-1] == []
    # The same call has nothing left to do, and does not add the seed again.
    again = sweep(recipe, space, n_trials=1, seeds=[tmp_path / "run"])
    assert [known.params for known in again.trials] == [seed.params, trial.params]


@pytest.fixture
def done_trials(tiny_recipe, tmp_path):
    """A recipe and a space whose trials are all done, so that no process has to start."""
    recipe = tiny_recipe(eval_fraction=0.4)
    for lora_r, f1_macro in ((2, 0.3), (4, 0.6)):
        write_done_trial(tmp_path / "run-sweep", {"lora_r": lora_r}, f1_macro)
    return recipe, write_space(tmp_path / "space.yaml", "lora_r: [2, 4]\n")


def test_a_search_continues_and_finds_the_best_value(done_trials):
    recipe, space = done_trials
    first = [trial.params for trial in sweep(recipe, space, n_trials=3).trials]
    again = sweep(recipe, space, n_trials=8)
    assert [trial.params for trial in again.trials[:3]] == first
    assert len(again.trials) == 8
    assert again.best_params == {"lora_r": 4}
    assert again.best_value == 0.6


def test_a_search_in_several_calls_tries_what_one_call_would(tiny_recipe, tmp_path):
    recipe = tiny_recipe(eval_fraction=0.4)
    for lora_r in range(1, 10):
        write_done_trial(tmp_path / "run-sweep", {"lora_r": lora_r}, lora_r / 10)
    space = write_space(tmp_path / "space.yaml", f"lora_r: {list(range(1, 10))}\n")
    shutil.copytree(tmp_path / "run-sweep", tmp_path / "several")
    whole = [trial.params["lora_r"] for trial in sweep(recipe, space, n_trials=12).trials]
    for n_trials in (1, 2, 5, 12):
        study = sweep(recipe, space, [f"output_dir={tmp_path / 'several'}"], n_trials=n_trials)
    assert [trial.params["lora_r"] for trial in study.trials] == whole
    assert len(set(whole)) > 2


def test_a_search_whose_trials_could_not_be_compared_is_refused(done_trials):
    recipe, space = done_trials
    with pytest.raises(InputError, match="it has no f1_marco"):
        sweep(recipe, space, n_trials=1, metric="f1_marco")
    sweep(recipe, space, ["logging_steps=3"], n_trials=2)  # nothing was finished, so nothing is compared
    with pytest.raises(
        InputError,
        match=r"learning_rate \(0\.01 before, 0\.5 now\), --metric \(f1_macro before, f1_micro now\) changed",
    ):
        sweep(recipe, space, ["learning_rate=0.5"], n_trials=3, metric="f1_micro")
    assert sweep(recipe, space, ["logging_steps=9"], n_trials=3).best_value in (0.3, 0.6)


def test_a_metric_may_be_nested(done_trials):
    recipe, space = done_trials
    study = sweep(recipe, space, n_trials=8, metric="by_thresholds.f1_macro")
    assert study.best_params == {"lora_r": 2}
    assert study.best_value == pytest.approx(0.7)


@pytest.mark.parametrize(
    "metric", ["f1_marco", "by_threshold.f1_macro", "by_thresholds.f1_marco", "calibration.by_thresholds"]
)
def test_an_unknown_metric_is_named(done_trials, metric):
    recipe, space = done_trials
    with pytest.raises(InputError, match=rf"metrics\.json: it has no {metric}; name another"):
        sweep(recipe, space, n_trials=1, metric=metric)


def test_why_there_are_no_nested_thresholds_is_said(done_trials, tmp_path):
    recipe, space = done_trials
    for path in tmp_path.glob("run-sweep/trial-*/metrics.json"):
        path.write_text('{"f1_macro": 0.5}')
    with pytest.raises(InputError, match=r"it has no by_thresholds\.f1_macro; too few rows are held out"):
        sweep(recipe, space, n_trials=1, metric="by_thresholds.f1_macro")


def test_a_trial_that_was_interrupted_is_tried_again(done_trials, tmp_path):
    recipe, space = done_trials
    study = sweep(recipe, space, n_trials=1)
    study.enqueue_trial({"lora_r": 2})
    interrupted = study.ask({"lora_r": optuna.distributions.CategoricalDistribution([2, 4])})  # as a kill leaves it
    again = sweep(recipe, space, n_trials=2)
    assert again.trials[interrupted.number].state == optuna.trial.TrialState.FAIL
    assert again.trials[-1].params == {"lora_r": 2}
    assert again.trials[-1].state == optuna.trial.TrialState.COMPLETE


def start_process(folder, code):
    """A run whose process is a line of Python, which prints to the run's log."""
    folder.mkdir(exist_ok=True)
    with folder.with_name(f"{folder.name}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log, stderr=log)
    return RunProcess(0, folder, process)


@pytest.fixture
def experienced_study(monkeypatch):
    """A study of five finished trials, each with a macro-F1 of 0.6 at step 10."""
    monkeypatch.setattr(sweep_module, "POLL_SECONDS", 0.02)
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=5))
    for _ in range(5):
        trial = study.ask()
        trial.report(0.6, 10)
        study.tell(trial, 0.6)
    return study


def log_evaluation(folder, f1_macro):
    folder.mkdir(exist_ok=True)
    (folder / "train_log.jsonl").write_text(json.dumps({"eval_f1_macro": f1_macro, "step": 10}) + "\n")


def test_a_bad_trial_is_stopped_early(experienced_study, tmp_path):
    log_evaluation(tmp_path / "trial", 0.5)
    run = start_process(tmp_path / "trial", "import sys; sys.stdin.read()")
    with pytest.raises(optuna.TrialPruned):
        watch(run, experienced_study.ask(), lambda: None, threading.Event())
    assert run.process.returncode is not None


def test_a_good_trial_runs_to_its_end(experienced_study, tmp_path):
    log_evaluation(tmp_path / "trial", 0.7)
    metrics = str(tmp_path / "trial" / "metrics.json")
    run = start_process(tmp_path / "trial", f"import sys; sys.stdin.read(); open({metrics!r}, 'w')")
    trial, shown = experienced_study.ask(), []

    def show():
        shown.append(run.process.poll())
        run.process.stdin.close()

    watch(run, trial, show, threading.Event())
    assert shown
    assert run.done
    assert experienced_study.trials[trial.number].intermediate_values == {10: 0.7}


def test_a_failed_trial_ends_the_search_with_its_log(experienced_study, tmp_path):
    run = start_process(tmp_path / "trial", "raise SystemExit('out of luck')")
    with pytest.raises(ModelError, match=r"(?s)trial failed.*out of luck"):
        watch(run, experienced_study.ask(), lambda: None, threading.Event())


def test_errors_are_reported_before_anything_is_tried(tiny_recipe, tmp_path):
    recipe = tiny_recipe(eval_fraction=0.4)
    space = tmp_path / "space.yaml"
    with pytest.raises(InputError, match=r"space.yaml:2: lora_r: expected a list"):
        load_space(write_space(space, "learning_rate: [1e-3]\nlora_r: 4\n"))
    with pytest.raises(InputError, match="lora_rr: no such key"):
        sweep(recipe, write_space(space, "lora_rr: [1, 2]\n"))
    with pytest.raises(InputError, match="lora_dropout"):
        sweep(recipe, write_space(space, "lora_dropout: {low: 0.1, high: lots}\n"))
    with pytest.raises(InputError, match="nothing to score on"):
        sweep(recipe, write_space(space, "lora_r: [1, 2]\n"), ["eval_fraction=0"])
    assert not (tmp_path / "run-sweep").exists()


def test_seeds_have_to_be_finished_runs_that_set_the_keys(tiny_recipe, tmp_path):
    recipe = tiny_recipe(eval_fraction=0.4)
    space = write_space(tmp_path / "space.yaml", "lora_r: [2, 4]\n")
    seed = tmp_path / "seed"
    seed.mkdir()

    def refused(message):
        with pytest.raises(InputError, match=message):
            sweep(recipe, space, seeds=[seed])

    refused(r"seed: not a run folder: it has no recipe\.yaml")
    (seed / "recipe.yaml").write_text("max_steps: 2\n")
    refused("seed: cannot seed this search: its recipe does not set lora_r")
    (seed / "recipe.yaml").write_text("lora_r: 4\n")
    refused(r"seed: it has no metrics\.json: the run has not finished")
    (seed / "metrics.json").write_text('{"f1_macro": 0.5}')
    (seed / "recipe.yaml").write_text("lora_r: 8\n")
    refused("seed: cannot seed this search: .*8")


def test_trials_at_a_time_are_as_many_as_asked_for_and_all_stop_when_one_fails(tiny_recipe, tmp_path, monkeypatch):
    recipe = str(tiny_recipe(eval_fraction=0.4))
    space = write_space(tmp_path / "space.yaml", "lora_r: [2, 4]\nlora_alpha: [8, 16, 32]\n")
    at_a_time, processes = [], []

    def start(run, argv, where, **share):
        fails = len(processes) == 4
        code = "raise SystemExit(3)" if fails else DONE.format(folder=str(run.folder))
        (run.folder).mkdir(parents=True)
        (run.folder.with_name(f"{run.folder.name}.log")).write_text("")
        run.process = subprocess.Popen([sys.executable, "-c", code])
        processes.append(run.process)

    monkeypatch.setattr(sweep_module, "start", start)
    monkeypatch.setattr(sweep_module, "POLL_SECONDS", 0.05)
    with pytest.raises(ModelError, match="failed; the same command resumes it"):
        sweep(recipe, space, n_trials=40, jobs=2, show=lambda study, runs: at_a_time.append(len(runs)))
    assert max(at_a_time) == 2
    assert all(process.poll() is not None for process in processes)
