"""The notebooks and the worked example run from top to bottom, in an empty folder, without a GPU."""

import json
import lzma
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import POSTS, save_model

from emogen.evaluation.run_folder import read_json

PAGE = Path(__file__).parent.parent / "docs" / "example.md"
EXAMPLES = Path(__file__).parent.parent / "examples"


def cells(notebook):
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_and_valid_code(notebook):
    for cell in cells(notebook):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        compile("".join(cell["source"]), notebook.name, "exec")


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells(notebook)), encoding="utf-8")
    env = os.environ | {"HF_HUB_OFFLINE": "1"}  # the model comes from PyPI
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "reviews" / "report.html").is_file()


def write_index(folder):
    """A small index of Debian, in the place of what the page downloads: programs with tags, and programs without."""
    kinds = ["audio", "image:raster, works-with::text", "mail", "software:source", "font"]
    packages, descriptions = [], []
    for i in range(60):
        tags = f"role::program, works-with::{kinds[i % 5]}" if i < 45 else "role::program,\n use::editing"
        packages.append(f"Package: p{i}\nDepends: a,\n b\nTag: {tags}\nSection: misc\n")
        about = f"tool {i} for {kinds[i % 5].split(':')[0]}\n {POSTS[i % len(POSTS)][0]}: {i}.\n .\n Not used."
        descriptions.append(f"Package: p{i}\nDescription-md5: {i}\nDescription-en: {about}\n")
    packages.append("Package: library\nTag: role::shared-lib, works-with::audio\n")
    for name, stanzas in (("Packages.xz", packages), ("Translation-en.xz", descriptions)):
        (folder / name).write_bytes(lzma.compress("\n".join(stanzas).encode()))


@pytest.mark.slow
def test_the_commands_of_the_worked_example_run_in_their_order(tmp_path, emogen, monkeypatch, capsys):
    """With a tiny model and few rows; everything else is as the page says."""
    monkeypatch.chdir(tmp_path)
    write_index(tmp_path)
    save_model(tmp_path / "tiny")
    ran = []
    for language, title, code in re.findall(
        r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$', PAGE.read_text(), re.M | re.S
    ):
        if title:
            small = {"HuggingFaceTB/SmolLM2-135M-Instruct": "tiny", "max_length: 320": "max_length: 1024"}
            for value, replacement in small.items():
                code = code.replace(value, replacement)
            (tmp_path / title).write_text(code)
        elif language == "sh":
            for words in map(shlex.split, code.splitlines()):
                ran.append(" ".join(words[:2]))
                if words[0] == "emogen":
                    emogen(*words[1:])
                elif words[0] == "python":
                    runpy.run_path(words[1])
                    assert capsys.readouterr().out == (
                        "packages.csv: 45 of 45 programs\nuntagged.csv: 15 of 15 programs\n"
                    )
    assert set(ran) >= {"curl -O", "python debtags.py", *(f"emogen {name}" for name in
        ("check", "show", "baseline", "cv", "compare", "audit", "select", "report", "predict"))}  # fmt: skip
    rows = (tmp_path / "packages.csv").read_text().splitlines()
    assert "p1,tool 1 for image. " + POSTS[1][0] + ": 1.,image; text" in [row.replace('"', "") for row in rows]
    assert sum(row.endswith(",none") for row in rows) == 9  # fonts are none of the kinds
    assert read_json(tmp_path / "runs" / "programs-cv" / "metrics.json")["n"] == 45
    for made in ("corrected.jsonl", "to-tag.csv", "tagged.csv", "both.html", "runs/programs-cv/audit.json"):
        assert (tmp_path / made).is_file(), made
