import socket
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from tiny import POSTS, write_posts, write_recipe
from typer.testing import CliRunner

from emogen.cli.__main__ import app
from emogen.errors import InputError
from emogen.experiments.lab import Lab, serve
from emogen.experiments.prompts import load_generator, open_benchmark

MANY = [(f"{text} {k}", names) for k in range(3) for text, names in POSTS]
SOURCE = "{% user %}\nFeelings ({{ names | join(' ') }})?\n{{ text }}\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, labels):
    """A recipe with 36 posts. Tests do not change its files."""
    folder = tmp_path_factory.mktemp("recipe")
    path = write_recipe(folder, labels)
    write_posts(folder / "train.csv", labels, MANY)
    return path


@pytest.fixture(scope="module")
def benchmark(recipe):
    return open_benchmark(recipe, limit=20)


@pytest.fixture(scope="module")
def generator(benchmark):
    return load_generator(benchmark)


@pytest.fixture
def lab(benchmark, generator, tmp_path, monkeypatch):
    """A lab in an empty folder, without a history."""
    monkeypatch.chdir(tmp_path)
    return Lab(replace(benchmark, folder=tmp_path / "scores"), generator)


def test_every_token_is_shown_with_its_part(lab):
    text = lab.benchmark.rows.texts[0]
    template = lab.template(SOURCE, "mine")
    labels = lab.benchmark.task.label_set
    (row,) = template.encoder.rows(text, labels.names_of(lab.benchmark.rows.truth[0]))
    n_shared = len(template.encoder.prefix_ids)
    warnings, _, seen = lab.see(SOURCE, "mine", text).partition('<div class="seen">')
    assert warnings.startswith(
        '<p class="warning">mine.jinja: the prompt does not say that the answer for a text without labels'
    )
    counts, _, shown = seen.partition("</p>")
    assert shown.count('class="shared"') == n_shared
    assert shown.count('class="text"') == row.n_text
    assert shown.count('class="answer"') == row.n_answer
    assert shown.count("<span") == n_shared + len(row)
    assert counts.startswith(f"<p>{n_shared + len(row)} tokens: {n_shared} ")
    unknown = lab.see(SOURCE, "mine", "a text of my own")
    assert 'class="answer" title' not in unknown  # its answer is not known


def test_a_text_is_escaped_and_stays_text(lab):
    shown = lab.see(SOURCE, "mine", "<b>{{ names }}</b><|im_end|>").partition("</p>")[2]
    assert "<b>" not in shown
    assert "{{" in "".join(part.split(">")[1] for part in shown.split("</span>")[:-1])
    assert shown.count("title") > 60


def test_an_answer_comes_with_the_probability_of_each_label(lab):
    answer, prob = lab.answer(SOURCE, "mine", "so happy")
    assert answer.endswith("(exact)")
    assert list(prob) == list(lab.benchmark.task.label_set.names)
    assert all(0 <= value <= 1 for value in prob.values())


def test_scored_templates_are_the_history_and_saved_templates_are_files(lab, tmp_path):
    assert lab.history() == []
    assert "macro-F1" in lab.score(SOURCE, "mine")
    lab.score(SOURCE + "Answer:", "mine")
    history = lab.history()
    assert [line[0] for line in history] == ["mine", "mine"]
    assert {lab.source_of(line[-1]) for line in history} == {
        SOURCE,
        SOURCE + "Answer:\n",
    }  # the editor drops the newline
    assert lab.save(SOURCE, "mine").resolve() == tmp_path / "prompts" / "mine.jinja"
    assert (tmp_path / "prompts" / "mine.jinja").read_text() == SOURCE
    with pytest.raises(InputError, match="exists, with another template"):
        lab.save(SOURCE + "x", "mine")


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("{% user %}\n{{ txt }}{{ text }}", "mine", r"mine\.jinja:2: undefined variable"),
        ("{% user %}{{ text }}{{ ''.__class__.__mro__ }}", "mine", "Security"),
        (SOURCE, "../evil", "the name of a template consists of"),
        (SOURCE, "", "the name of a template consists of"),
    ],
)
def test_invalid_templates_and_names_are_not_saved(lab, tmp_path, source, name, message):
    with pytest.raises(InputError, match=message):
        lab.save(source, name)
    assert not (tmp_path / "prompts").exists()
    assert not (tmp_path.parent / "evil.jinja").exists()


@pytest.mark.slow
def test_a_port_that_is_taken_is_an_error(benchmark):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}"):
            serve(benchmark, port)


def test_the_page_in_a_browser(recipe, visit, tmp_path, monkeypatch):
    """`emogen lab`, used in the place where it waits for Ctrl-C."""
    import gradio as gr

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("secrets.token_urlsafe", lambda n_bytes: "t0ken")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = f"http://127.0.0.1:{port}"
    address = f"{server}/?token=t0ken"

    def status(path, method="GET", **headers):
        request = urllib.request.Request(server + path, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def use(blocks):
        assert status("/?token=t0ken") == 200
        assert [status("/"), status("/config"), status("/gradio_api/info")] == [401, 401, 401]
        cookie = f"emogen_lab_{port}=t0ken"
        assert status("/config", Cookie=cookie) == 200
        assert status("/config", Cookie=cookie, Host="evil.example") == 403
        assert status("/gradio_api/queue/join", "POST", Cookie=cookie, Origin="http://evil.example") == 403
        assert status("/gradio_api/upload", "POST", Cookie=cookie) == 404
        page = visit(address)
        use_page(page, tmp_path)
        page.close()  # before the server is: a page reports that its server is gone

    monkeypatch.setattr(gr.Blocks, "block_thread", use)
    words = ["lab", recipe, "--limit", 20, "--port", port, f"output_dir={tmp_path / 'out'}"]
    try:
        done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    finally:
        gr.close_all()
    assert done.exit_code == 0, done.output
    assert f"emogen lab is at {address}" in done.output


def use_page(page, folder):
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
    seen.get_by_text("list.jinja:10: undefined variable 'oops'").wait_for()
    page.get_by_role("button", name="Score on").click()
    page.get_by_test_id("toast-body").get_by_text("list.jinja:10").wait_for()
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
    assert (folder / "prompts" / "kept.jinja").read_text() == SOURCE

    page.get_by_label("Start from").click()
    page.get_by_role("option", name="definitions").click()
    editor.get_by_text("The labels with their definitions").wait_for()
    line.click()  # the template that was scored comes back
    editor.get_by_text("Feelings").wait_for()
