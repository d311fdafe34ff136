"""Fixtures of all tests."""

import os

# Under pytest-xdist each worker keeps to one core, and so do the processes that it starts: threads of several workers
# on the same cores would spin while they wait for each other. torch counts the cores when it is imported.
if (_worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})

from collections import Counter
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fake_endpoint import fake_endpoint
from tiny import CONFIGS, make_model, make_tokenizer, write_recipe
from transformers import PreTrainedTokenizerFast

from emogen.cli.__main__ import app
from emogen.console import run_command
from emogen.prediction import remote
from emogen.task.labels import LabelSet, load_label_set

CHROMIUM = Path("/usr/bin/chromium")  # Debian's


def pytest_collection_modifyitems(items):
    """Every test that opens a browser bears the marker. Files with many slow tests go first, so that no worker waits."""
    n_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -n_slow[item.path])
    for item in items:
        if "chromium" in item.fixturenames:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def labels() -> LabelSet:
    return load_label_set("semeval2018")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


# Gemma 3 has most of what models have: windows, norms of its own.
@pytest.fixture(params=[pytest.param(kind, marks=[] if kind == "gemma3" else [pytest.mark.slow]) for kind in CONFIGS])
def model(request):
    return make_model(request.param)


@pytest.fixture
def tiny_recipe(tmp_path: Path, labels: LabelSet):
    """Writes a recipe for a tiny model and twelve posts; returns its path. Arguments as for `tiny.write_recipe`."""
    return partial(write_recipe, tmp_path, labels)


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """A chat endpoint; see `fake_endpoint`. Nobody waits for it."""
    monkeypatch.setenv("EMOGEN_CACHE", str(tmp_path / "cache"))
    with fake_endpoint() as served:
        monkeypatch.setattr(remote, "_sleep", served.waited.append)
        yield served


@pytest.fixture(scope="session")
def chromium():
    """A headless browser. Where there is none, the tests that need one are skipped, and say so; CI insists."""
    if not CHROMIUM.is_file() and not os.environ.get("EMOGEN_REQUIRE_BROWSER"):
        pytest.skip(f"{CHROMIUM} is not there: no page was opened in a browser (on Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens an address. At the end of the test nothing may have been said on the console, run, or asked of others."""
    said, contexts = [], []

    def visit(address: str, **context):
        contexts.append(chromium.new_context(**context))
        page, own = contexts[-1].new_page(), urlsplit(address)[:2]
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: urlsplit(request.url)[:2] == own or said.append(request.url))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture
def emogen(monkeypatch, capsys):
    """Runs a command in this process, as the entry point does; returns its standard output and error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words, code=0):
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: app([*map(str, words)]))
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == code, printed.out + printed.err
        return printed

    return run
