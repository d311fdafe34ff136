"""Damaged files of runs and checkpoints, and crafted pickles: a message, or the right result; never a traceback."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

from emogen.training.checkpoints import list_files
from torture.forks import run
from torture.kills import base, command, contents, problems_of, reference

KINDS = ("empty", "cut", "flipped", "noise", "bytes", "missing", "other json", "many zeros")


def damage(path: Path, kind: str, draw: random.Random) -> None:
    """Damage a file in one of several ways."""
    content = path.read_bytes()
    place = draw.randrange(len(content)) if content else 0
    if kind == "missing":
        path.unlink()
        return
    changed = {
        "empty": b"",
        "cut": content[:place],
        "flipped": content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :] if content else b"",
        "noise": content[:place] + draw.randbytes(20) + content[place + 20 :],
        "bytes": draw.randbytes(300),
        "other json": draw.choice([b"[]", b"{}", b"null", b"3", b'"x"', b'{"labels": 3}', b"[[1]]", b"{\"a\": {\"b\": []}}"]),
        "many zeros": bytes(len(content)),
    }  # fmt: skip
    path.write_bytes(changed[kind])


def damaged_run(number: int, scratch: Path) -> list[str]:
    """Damage a file of a finished run, and use the run."""
    draw = random.Random(f"damage-{number}")
    recipe = base(scratch)
    reference("predict", scratch)
    folder = scratch / f"damage-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(recipe.parent / "reference" / "out", folder / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    out = folder / "out"
    files = sorted(path for path in out.rglob("*") if path.is_file())
    path, kind = draw.choice(files), draw.choice(KINDS)
    before = path.read_bytes()
    damage(path, kind, draw)
    is_same = path.exists() and path.read_bytes() == before
    new = recipe.parent / "new.csv"
    words = draw.choice(
        [
            ["predict", out, new, "-o", folder / "p.csv"],
            ["predict", out, new, "--jsonl", folder / "p.jsonl", "predict_by=thresholds"],
            ["score", new, out / "predictions.jsonl"],
            ["score", new, out],
            ["report", out],
            ["compare", out, recipe.parent / "reference" / "out"],
            ["check", out / "recipe.yaml"],
            ["show", out / "recipe.yaml"],
            ["train", recipe, f"output_dir={out}", "resume_from_checkpoint=true"],
        ]
    )
    ended = run(words, scratch, limit=60)
    problems = problems_of(ended, {0, 1, 2}, words)
    weights = path.name == "adapter_model.safetensors"
    if words[0] == "predict" and weights and ended.code == 0 and not is_same:
        problems.append("predict: a damaged adapter was accepted")
    if problems:
        return [f"{path.relative_to(out)} {kind}: {problem}" for problem in problems]
    shutil.rmtree(folder)
    return []


def damaged_checkpoint(number: int, scratch: Path) -> list[str]:
    """Damage a file of the newest checkpoint, and resume: the result is that of an uninterrupted training."""
    draw = random.Random(f"checkpoint-{number}")
    recipe, (expected, _) = base(scratch), reference("train", scratch)
    folder = scratch / f"checkpoint-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scratch / "reference-train" / "out", folder / "out")
    out = folder / "out"
    for name in ("metrics.json", "predictions.jsonl", "report.html"):
        (out / name).unlink()
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoint-4")
    for _ in range(draw.randint(1, 2)):
        files = sorted(path for path in (out / "checkpoint-2").rglob("*") if path.is_file())
        damage(draw.choice(files), draw.choice(KINDS), draw)
    words, setup = command("train", recipe, folder, True)
    problems = problems_of(run(words, scratch, setup=setup), {0}, words)
    found = contents(folder)
    problems += [f"other bytes in {path}" for path in expected if found.get(path) != expected[path]]
    if not problems:
        shutil.rmtree(folder)
    return problems


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


PICKLES = (
    "out/adapter/adapter_model.bin", "out/adapter/training_args.bin", "model/pytorch_model.bin", "out/checkpoint-2/optimizer.pt",
    "out/checkpoint-2/scheduler.pt", "out/checkpoint-2/rng_state.pth", "out/checkpoint-2/training_args.bin",
)  # fmt: skip


def pickled(number: int, scratch: Path) -> list[str]:
    """Put a pickle that runs code where a library could open it, and predict or resume."""
    name = PICKLES[number % len(PICKLES)]
    recipe = base(scratch)
    reference("train", scratch)
    folder, mark = scratch / f"pickle-{number}", scratch / f"code-has-run-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scratch / "reference-train" / "out", folder / "out")
    shutil.copytree(recipe.parent / "model-llama", folder / "model")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    if "checkpoint" in name:
        list_files(path.parent)  # whoever plants it can also list it
        for finished in ("metrics.json", "predictions.jsonl"):
            (folder / "out" / finished).unlink()
        shutil.rmtree(folder / "out" / "checkpoint-4")
        words = command("train", recipe, folder, True)[0]
    elif name.startswith("model"):
        (folder / "model" / "model.safetensors").unlink()
        words = [
            "predict",
            recipe,
            recipe.parent / "new.csv",
            "-o",
            folder / "p.csv",
            f"model_name_or_path={folder / 'model'}",
        ]
    else:
        (folder / "out" / "adapter" / "adapter_model.safetensors").unlink()
        words = ["predict", folder / "out", recipe.parent / "new.csv", "-o", folder / "p.csv", "--force"]
    problems = problems_of(run(words, scratch), {0, 1, 2}, words)
    if mark.exists():
        problems.append(f"{name}: its code has run")
    if not problems:
        shutil.rmtree(folder)
    return [f"{name}: {problem}" for problem in problems]


def other_base(number: int, scratch: Path) -> list[str]:
    """Another model of the same shapes takes the folder of the base model: it is not predicted with."""
    from tiny import make_model

    recipe = base(scratch)
    reference("predict", scratch)
    folder = scratch / f"other-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(recipe.parent / "model-llama", folder / "model")
    run_folder = shutil.copytree(recipe.parent / "reference" / "out", folder / "out")
    make_model(seed=number + 1).save_pretrained(folder / "model")
    words = [
        "predict",
        run_folder,
        recipe.parent / "new.csv",
        "-o",
        folder / "p.csv",
        f"model_name_or_path={folder / 'model'}",
    ]
    ended = run(words, scratch)
    problems = problems_of(ended, {2}, words)
    manifest = json.loads((run_folder / "manifest.json").read_text())
    assert "base model" in manifest["sha256"]
    shutil.rmtree(folder)
    return problems
