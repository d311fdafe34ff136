import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from tiny import POSTS, write_posts

from emogen.errors import InputError
from emogen.experiments.lab import Lab
from emogen.experiments.prompts import load_generator, open_benchmark

MANY = [(f"{text} {k}", names) for k in range(3) for text, names in POSTS]
SOURCE = "{% user %}\nFeelings ({{ names | join(' ') }})?\n{{ text }}\n"


@pytest.fixture
def recipe(tiny_recipe, tmp_path, labels, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tiny_recipe()
    write_posts(tmp_path / "train.csv", labels, MANY)
    return path


@pytest.fixture
def lab(recipe):
    bench = open_benchmark(recipe, limit=20)
    return Lab(bench, load_generator(bench))


def test_every_token_is_shown_as_what_it_is(lab):
    text = lab.bench.rows.texts[0]
    template = lab.template(SOURCE, "mine")
    labels = lab.bench.task.label_set
    (row,) = template.encoder.rows(text, labels.names_of(lab.bench.rows.truth[0]))
    shown = lab.see(SOURCE, "mine", text).partition("</p>")[2]
    assert shown.count('class="shared"') == len(template.encoder.prefix_ids)
    assert shown.count('class="text"') == row.n_text
    assert shown.count('class="answer"') == row.n_answer
    assert shown.count("<span") == len(template.encoder.prefix_ids) + len(row)
    unknown = lab.see(SOURCE, "mine", "a text of my own")
    assert 'class="answer" title' not in unknown  # its answer is not known


def test_a_text_stays_text(lab):
    shown = lab.see(SOURCE, "mine", "<b>{{ names }}</b><|im_end|>").partition("</p>")[2]
    assert "<b>" not in shown
    assert "{{" in "".join(part.split(">")[1] for part in shown.split("</span>")[:-1])
    assert shown.count("title") > 60


def test_an_answer_comes_with_a_probability_for_each_label(lab):
    said, prob = lab.answer(SOURCE, "mine", "so happy")
    assert said.endswith("(exact)")
    assert list(prob) == list(lab.bench.task.label_set.names)
    assert all(0 <= value <= 1 for value in prob.values())


def test_what_is_scored_is_history_and_what_is_saved_is_a_file(lab, tmp_path):
    assert lab.history() == []
    assert "macro-F1" in lab.score(SOURCE, "mine")
    lab.score(SOURCE + "Answer:", "mine")
    history = lab.history()
    assert [line[0] for line in history] == ["mine", "mine"]
    assert {lab.source_of(line[-1]) for line in history} == {SOURCE, SOURCE + "Answer:"}
    assert lab.save(SOURCE, "mine").resolve() == tmp_path / "prompts" / "mine.jinja"
    assert (tmp_path / "prompts" / "mine.jinja").read_text() == SOURCE
    with pytest.raises(InputError, match="exists, with another template"):
        lab.save(SOURCE + "x", "mine")


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("{% user %}\n{{ txt }}{{ text }}", "mine", r"mine\.jinja:2: undefined variable"),
        ("{% user %}{{ text }}{{ ''.__class__.__mro__ }}", "mine", "Security"),
        (SOURCE, "../evil", "the name of a template is made of"),
        (SOURCE, "", "the name of a template is made of"),
    ],
)
def test_what_cannot_be_saved(lab, tmp_path, source, name, said):
    with pytest.raises(InputError, match=said):
        lab.save(source, name)
    assert not (tmp_path / "prompts").exists()
    assert not (tmp_path.parent / "evil.jinja").exists()


@pytest.fixture
def address(recipe, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "emogen", "lab", recipe, "--limit", "20", "--port", str(port)]
    with (tmp_path / "lab.log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log)  # fmt: skip
    address = f"http://127.0.0.1:{port}/"
    while True:
        try:
            urllib.request.urlopen(address)
            break
        except OSError:
            assert process.poll() is None, (tmp_path / "lab.log").read_text()
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
    yield address
    process.terminate()
    process.wait()


def test_the_page_in_a_browser(address, visit, tmp_path):
    page = visit(address)
    seen = page.locator("#seen")
    seen.locator("span.text").first.wait_for()
    page.get_by_label("Text", exact=True).fill("<script>document.title = 'evil'</script> so happy")
    seen.get_by_text("evil").wait_for()
    page.get_by_role("button", name="Ask the model").click()
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(e => e.value.endsWith('(exact)'))")
    assert page.title() == "emogen lab"

    editor = page.locator(".cm-content").first
    editor.click()
    page.keyboard.press("Control+End")
    page.keyboard.insert_text("{{ oops }}")
    seen.get_by_text("list.jinja:5: undefined variable 'oops'").wait_for()
    page.get_by_role("button", name="Score on").click()
    page.get_by_test_id("toast-body").get_by_text("list.jinja:5").wait_for()
    editor.click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(SOURCE)
    seen.get_by_text("Feelings").or_(seen.locator("span", has_text="Feel")).first.wait_for()
    page.get_by_role("button", name="Score on").click()
    history = page.locator("#history")
    history.scroll_into_view_if_needed()
    line = history.get_by_test_id("cell-0-0")
    line.get_by_text("list").wait_for()

    page.get_by_label("Name").fill("kept")
    page.get_by_role("button", name="Save to prompts/").click()
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(e => e.value.startsWith('Saved as'))")
    assert (tmp_path / "prompts" / "kept.jinja").read_text() == SOURCE

    page.get_by_label("Start from").click()
    page.get_by_role("option", name="definitions").click()
    editor.get_by_text("The labels with their definitions").wait_for()
    line.click()  # what was scored comes back
    editor.get_by_text("Feelings").wait_for()
