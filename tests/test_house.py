"""Rules of the house that nobody should have to remember."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import emogen
from emogen import paths
from emogen.distribution import NAME, install_hint
from emogen.task.readers import read_rows
from emogen.task.rows import checked, normalise_text

PACKAGE = Path(emogen.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for path in PACKAGE.rglob("*.py")
}
# Importing one of these takes from half a second to ten.
HEAVY_LIBRARIES = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "matplotlib",
    "sklearn",
    "ray",
}
LIGHT_ROOMS = ("emogen.task.", "emogen.evaluation.", "emogen.cloud.", "emogen.cli.")


def imported_modules(nodes):
    """The names of the modules that import statements name, with the statement of each."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else str(node.module)), node


def loads_heavy_library(module, seen=frozenset()):
    """Whether importing a module of emogen imports a heavy library."""
    names = [name for name, _ in imported_modules(MODULES[module].body)]
    if any(name.partition(".")[0] in HEAVY_LIBRARIES for name in names):
        return True
    own = {name for name in names if name in MODULES} - seen
    return any(loads_heavy_library(name, seen | {module}) for name in own)


def test_no_module_or_folder_has_the_name_of_another_package():
    """`accelerate launch emogen/train.py` puts emogen/ first on sys.path, where such a name would shadow the package."""
    names = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert {"task", "cli", "train", "console"} <= names
    taken = set(sys.stdlib_module_names) | (set(metadata.packages_distributions()) - {"emogen"})
    assert not (names - {"__init__"}) & taken


def test_emogen_is_imported_inside_a_function_only_if_that_loads_a_heavy_library():
    misplaced = []
    for module, tree in MODULES.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for name, node in imported_modules(node for function in functions for node in ast.walk(function)):
            # The commands of the CLI import what they need, so that `emogen --help` stays quick.
            if name in MODULES and not module.startswith("emogen.cli.") and not loads_heavy_library(name):
                misplaced.append(f"{module}:{node.lineno}: {name}")
    assert misplaced == []


def test_light_rooms_load_no_heavy_library_and_reports_only_matplotlib():
    light = [name for name in MODULES if name.startswith(LIGHT_ROOMS)]
    report = [name for name in MODULES if name.startswith("emogen.report.")]
    assert len(light) > 20
    assert len(report) > 5
    assert [name for name in light if loads_heavy_library(name)] == []
    code = "import importlib, sys\n" + "".join(
        f"for name in {names}: importlib.import_module(name)\nprint(sorted({HEAVY_LIBRARIES} & set(sys.modules)))\n"
        for names in (light, report)
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['matplotlib']"]


def test_the_drawing_and_the_table_of_the_architecture_have_every_room_on_its_floor():
    root = PACKAGE.parent
    layers = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    floors = [layer.split(" | ") for layer in layers]
    drawing = (root / "docs" / "architecture.svg").read_text(encoding="utf-8")
    drawn = drawing.partition("Data flow</text>")[0].split("<!-- floor ")[1:]
    assert [sorted(re.findall(r'class="name"[^>]*>(\w+)<', floor)) for floor in drawn] == list(map(sorted, floors))
    table = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.*?) \|", table, re.MULTILINE)
    found = [(int(floor), room) for floor, rooms in rows for room in re.findall(r"`emogen/(\w+)", rooms)]
    assert sorted(found) == sorted((8 - k, room) for k, floor in enumerate(floors) for room in floor)


def test_the_public_face_is_lazy_and_complete():
    code = "import emogen, sys; print([name for name in sys.modules if name.startswith('emogen.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['emogen.distribution']"
    assert dir(emogen) == [
        *("EmogenClassifier", "LoadedClassifier", "__version__", "load", "load_label_set", "load_run", "parse_answer"),
        "score",
    ]
    assert emogen.parse_answer("joy, anger", emogen.load_label_set("semeval2018")).labels == ("anger", "joy")
    assert emogen.__version__ == metadata.version(NAME)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        emogen.nothing  # noqa: B018


@pytest.mark.parametrize(("extra", "library"), [("lab", "gradio"), ("pods", "httpx"), ("ray", "ray[data]"), ("sweep", "optuna")])  # fmt: skip
def test_an_install_hint_names_the_libraries_and_never_the_foreign_package(extra, library):
    hint = install_hint(extra)
    assert hint.startswith(f"pip install '{library}>=")
    assert "emogen" not in hint


@pytest.mark.parametrize(("file", "least", "least_a_label"), [("train.csv", 480, 25), ("test.csv", 120, 5)])
def test_the_sample_has_enough_rows_of_every_label(labels, file, least, least_a_label):
    rows = checked(read_rows(paths.shipped(f"sample/{file}"), labels, need_labels=True))
    assert len(rows) >= least
    assert rows.gold.sum(0).min() >= least_a_label
    assert (rows.gold.sum(1) == 0).any()
    assert len({normalise_text(text) for text in rows.texts}) == len(rows)
    # The shares of the labels are near those of the task's training file.
    expected = [0.372, 0.143, 0.381, 0.182, 0.362, 0.102, 0.290, 0.116, 0.294, 0.053, 0.052]
    assert abs(rows.gold.mean(0) - expected).max() < 0.05


def test_sample_train_and_test_share_no_text(labels):
    train, test = (checked(read_rows(paths.shipped(f"sample/{n}.csv"), labels)) for n in ("train", "test"))
    assert not {normalise_text(text) for text in train.texts} & {normalise_text(text) for text in test.texts}
