"""Kills, pairs and full disks: the same command continues, and the result is that of an uninterrupted one."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tiny import POSTS, write_posts, write_recipe

from emogen import paths
from emogen.task.labels import load_label_set
from torture.forks import Command, Kill, fork_workers, run

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# What is compared. Recipes, manifests and reports also name folders and times.
RESULTS = (
    "adapter/adapter_model.safetensors",
    "predictions.jsonl",
    "thresholds.json",
    "labels.yaml",
    "folds.csv",
    "out.csv",
    "out.jsonl",
)


@cache
def base(scratch: Path) -> Path:
    """The recipe that all cases use, with its model, its posts, and a file to predict."""
    folder, labels = scratch / "base", load_label_set("semeval2018")
    if not folder.exists():
        folder.mkdir(parents=True)
        posts = [(f"{text} {k}", names) for k in range(2) for text, names in POSTS]
        write_recipe(
            folder, labels, posts=posts, eval_fraction=0.3, save_strategy="steps", save_steps=2, lora_dropout=0.1,
            max_length=1024,
        )  # fmt: skip
        write_posts(folder / "new.csv", labels, [(f"{text} {k}", names) for k in range(12) for text, names in POSTS])
        (folder / "space.yaml").write_text("lora_r: [2, 4]\n")
    return folder / "tiny.yaml"


def small_chunks() -> None:
    """Predictions are written in chunks of 16 rows, so that 144 rows have several."""
    from emogen.prediction import files

    files.CHUNK = 16


def train_setup() -> None:
    """Runs start as forks, and without the pictures of their reports, which take longer than these trainings."""
    from emogen.experiments import crossval
    from emogen.report import page

    def write_page(folder: Path) -> None:
        with paths.writing(folder / "report.html") as file:
            file.write("a page")

    page.report_finished = crossval.report_finished = write_page
    fork_workers()


def report_setup() -> None:
    """Nothing: the whole report is written."""


SETUPS = {"predict": small_chunks, "report": report_setup}


def command(name: str, recipe: Path, folder: Path, resume: bool) -> tuple[list, Callable[[], None]]:
    """The words of a command that writes into `folder`, and what is set up before it."""
    output = f"output_dir={folder / 'out'}"
    words = {
        "train": ["train", recipe, output, *(["resume_from_checkpoint=true"] if resume else [])],
        "cv": ["cv", recipe, "--folds", 2, output],
        "sweep": ["sweep", recipe, recipe.parent / "space.yaml", "--trials", 2, output],
        "prompts": ["prompts", "compare", recipe, "prompts/list.jinja", "prompts/definitions.jinja", "--limit", 20, output],
        "predict": [
            "predict", recipe.parent / "reference" / "out", recipe.parent / "new.csv",
            "-o", folder / "out.csv", "--jsonl", folder / "out.jsonl",
        ],
        "report": ["report", folder / "out"],
    }  # fmt: skip
    return words[name], SETUPS.get(name, train_setup)


def contents(folder: Path, *, pages: bool = False) -> dict[str, bytes]:
    """The results in a folder, by their path.

    Args:
        pages: whether reports are compared, too.
    """
    named = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    endings = (*RESULTS, "report.html") if pages else RESULTS
    return {
        name: path.read_bytes() for name, path in named.items() if name.endswith(endings) and "checkpoint-" not in name
    }


@cache
def reference(name: str, scratch: Path) -> tuple[dict[str, bytes], float]:
    """The results of an uninterrupted command, and its seconds."""
    recipe = base(scratch)
    if name == "predict":
        run_reference = recipe.parent / "reference"
        if not (run_reference / "out" / "metrics.json").exists():
            shutil.rmtree(run_reference, ignore_errors=True)
            words, setup = command("train", recipe, run_reference, False)
            run_reference.mkdir()
            assert run(words, scratch, setup=setup).code == 0
    folder = scratch / f"reference-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    prepare(name, recipe, folder, scratch)
    words, setup = command(name, recipe, folder, False)
    ended = run(words, scratch, setup=setup)
    assert ended.code == 0, ended.output
    return contents(folder, pages=name == "report"), ended.seconds


def prepare(name: str, recipe: Path, folder: Path, scratch: Path) -> None:
    """A new folder for a case; a report needs a finished run in it."""
    folder.mkdir(parents=True)
    if name == "report":
        reference("predict", scratch)
        shutil.copytree(recipe.parent / "reference" / "out", folder / "out")


def killed(name: str, number: int, scratch: Path) -> list[str]:
    """Kill a command up to three times, at a file event or at any time; let it end; compare."""
    draw = random.Random(f"{name}-{number}")
    recipe, (expected, seconds) = base(scratch), reference(name, scratch)
    folder = scratch / f"kill-{name}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    prepare(name, recipe, folder, scratch)
    problems, n_kills = [], draw.randint(1, 3)
    for attempt in range(n_kills + 2):
        if name == "predict" and contents(folder).keys() >= expected.keys():
            break  # the kill came after its last write; it would now refuse to overwrite its outputs
        kill = None
        if attempt < n_kills:
            kill = Kill(draw.choice(SIGNALS))
            if draw.random() < 0.5:
                kill.event = int(60 ** draw.random())
            else:
                kill.seconds = draw.random() * seconds
        words, setup = command(name, recipe, folder, resume=attempt > 0)
        ended = run(words, scratch, kill, setup)
        # A signal may also hit a run that the command has started; the command then ends with 1.
        codes = {0, 130, -signal.SIGKILL, -signal.SIGTERM} | ({1} if name in ("cv", "sweep") else set())
        problems += problems_of(ended, codes if kill else {0}, words)
        if ended.code == 0:
            break
    found = contents(folder, pages=name == "report")
    problems += [f"other bytes in {path}" for path in expected if found.get(path) != expected[path]]
    problems += [f"left over: {path}" for path in found.keys() - expected.keys()]
    if not problems:
        shutil.rmtree(folder)
    return problems


def pair(name: str, number: int, scratch: Path) -> list[str]:
    """The same command twice at once: one does the work, the other is told who does it."""
    draw = random.Random(f"pair-{name}-{number}")
    recipe, (expected, seconds) = base(scratch), reference(name, scratch)
    folder = scratch / f"pair-{name}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    prepare(name, recipe, folder, scratch)
    words, setup = command(name, recipe, folder, False)
    first = Command(words, scratch, setup=setup)
    time.sleep(draw.random() ** 2 * seconds)
    second = Command(words, scratch, setup=setup)
    ended = [first.end(120), second.end(120)]
    problems = [problem for one in ended for problem in problems_of(one, {0, 2}, words)]
    if not any(one.code == 0 for one in ended):
        problems.append("neither of two calls did its work")
    found = contents(folder, pages=name == "report")
    problems += [f"other bytes in {path}" for path in expected if found.get(path) != expected[path]]
    if not problems:
        shutil.rmtree(folder)
    return problems


def full_disk(number: int, scratch: Path) -> list[str]:
    """A disk that is full at some moment of a training; then there is space, and it continues."""
    draw = random.Random(f"disk-{number}")
    recipe, (expected, _) = base(scratch), reference("train", scratch)
    disk = scratch / f"disk-{number}"
    disk.mkdir(exist_ok=True)
    size = f"{draw.randint(8, 1500)}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    try:
        words, setup = command("train", recipe, disk, False)
        ended = run(words, scratch, setup=setup)
        problems = problems_of(ended, {0, 1, 2}, words)
        if draw.random() < 0.3:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            problems += problems_of(run(command("train", recipe, disk, True)[0], scratch), {0, 1, 2}, words)
        subprocess.run(["mount", "-o", "remount,rw,size=100m", disk], check=True)
        words, setup = command("train", recipe, disk, True)
        problems += problems_of(run(words, scratch, setup=setup), {0}, words)
        found = contents(disk)
        problems += [f"other bytes in {path}" for path in expected if found.get(path) != expected[path]]
    finally:
        subprocess.run(["umount", "-l", disk], check=False)
    return problems


def can_mount() -> bool:
    """Whether disks of any size can be made here."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


def problems_of(ended, codes, words) -> list[str]:
    """What is wrong with the end of a command."""
    what = " ".join(map(str, words[:2]))
    if ended.code is None:
        return [f"{what}: hangs\n{ended.output[-800:]}"]
    if "Traceback (most recent call last)" in ended.output and ended.code != 130:
        place = ended.output.index("Traceback (most recent call last)")
        return [f"{what}: exit code {ended.code}, traceback\n{ended.output[max(place - 300, 0) : place + 3000]}"]
    if ended.code not in codes:
        return [f"{what}: exit code {ended.code}\n{ended.output[-800:]}"]
    return []
