import re
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from tiny import SHORT
from typer.testing import CliRunner

from emogen.cli.__main__ import app
from emogen.errors import InputError, ModelError
from emogen.evaluation.results import Prediction
from emogen.experiments import scores
from emogen.experiments.lab import EDITOR, Lab, word_diff
from emogen.experiments.lab_page import serve
from emogen.experiments.prompts import load_generator, open_benchmark
from emogen.prediction.generator import GenerativeClassifier
from emogen.task.parse import parse_answer


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
    return Lab(replace(benchmark, folder=tmp_path / "scores", store=tmp_path / "store"), generator)


def test_every_token_is_shown_with_its_part(lab):
    text = lab.benchmark.rows.texts[0]
    template = lab.template(SHORT, "mine")
    labels = lab.benchmark.task.label_set
    (row,) = template.encoder.rows(text, labels.names_of(lab.benchmark.rows.truth[0]))
    n_shared = len(template.encoder.prefix_ids)
    warnings, _, seen = lab.see(SHORT, "mine", text).partition('<div class="seen">')
    assert warnings.startswith(
        '<p class="warning">mine.jinja: the prompt does not say that the answer for a text without labels'
    )
    counts, _, shown = seen.partition("</p>")
    assert shown.count('class="shared"') == n_shared
    assert shown.count('class="text"') == row.n_text
    assert shown.count('class="answer"') == row.n_answer
    assert shown.count("<span") == n_shared + len(row)
    assert counts.startswith(f"<p>{n_shared + len(row)} tokens: {n_shared} ")
    unknown = lab.see(SHORT, "mine", "a text of my own")
    assert 'class="answer" title' not in unknown  # its answer is not known


def test_a_text_is_escaped_and_stays_text(lab):
    shown = lab.see(SHORT, "mine", "<b>{{ names }}</b><|im_end|>").partition("</p>")[2]
    assert "<b>" not in shown
    assert "{{" in "".join(part.split(">")[1] for part in shown.split("</span>")[:-1])
    assert shown.count("title") > 60


def test_an_answer_comes_with_the_probability_of_each_label(lab):
    answer, prob = lab.answer(SHORT, "mine", "so happy")
    assert answer.endswith("(exact)")
    assert list(prob) == list(lab.benchmark.task.label_set.names)
    assert all(0 <= value <= 1 for value in prob.values())


def scored(lab, source, name):
    """Score a template to its end. Returns the result."""
    *_, result = lab.score(source, name)
    return result


def test_scored_templates_are_the_history_and_saved_templates_are_files(lab, tmp_path):
    n = len(lab.benchmark.rows)
    assert lab.history() == []
    assert "macro-F1" in scored(lab, SHORT, "mine")
    scored(lab, SHORT + "Answer:", "mine")
    history = lab.history()
    assert [line[:2] for line in history] == [["mine", f"{n} of {n}"]] * 2
    assert all(line[2].endswith("(no interval)") for line in history)  # 20 rows are too few
    assert {lab.source_of(line[-1]) for line in history} == {
        SHORT,
        SHORT + "Answer:\n",
    }  # the editor drops the newline
    version = history[1][-1]
    lab.keep_note(version, "asks <b>for</b> an answer\n")
    assert [line[-2] for line in lab.history()] == ["", "asks <b>for</b> an answer"]
    with pytest.raises(InputError, match="choose a version of the history"):
        lab.keep_note("../evil", "x")
    assert lab.save(SHORT, "mine").resolve() == tmp_path / "prompts" / "mine.jinja"
    assert (tmp_path / "prompts" / "mine.jinja").read_text() == SHORT
    with pytest.raises(InputError, match="exists, with another template"):
        lab.save(SHORT + "x", "mine")


def test_scoring_is_stopped_and_goes_on(lab, monkeypatch):
    n = len(lab.benchmark.rows)
    monkeypatch.setattr(scores, "PART", 8)
    answer = GenerativeClassifier.predict
    calls = []

    def predict(*args, **options):
        calls.append(lab.progress["done"])
        if len(calls) == 2:  # while the second part is computed
            with pytest.raises(InputError, match="mine is being scored: wait, or stop it first"):
                next(lab.score(SHORT + "other", "other"))
            lab.stop()
        return answer(*args, **options)

    monkeypatch.setattr(GenerativeClassifier, "predict", predict)
    assert scored(lab, SHORT, "mine") == f"mine: stopped after 16 of {n} rows, which are kept"
    assert calls == [0, 8]
    assert lab.progress is None
    (line,) = lab.history()
    assert line[:4] == ["mine", f"16 of {n}", "", ""]
    (column,) = lab.grid_news({})
    assert len(column["rows"]) == 16
    said = lab.differences(EDITOR, line[-1], SHORT, "mine", "so happy")
    assert f"is scored on 16 of {n} rows. Score it first." in said
    assert "macro-F1" in scored(lab, SHORT, "mine")
    assert calls == [0, 8, 16]
    (column,) = lab.grid_news({line[-1]: 16})
    assert len(column["rows"]) == n - 16


def test_an_error_while_scoring_is_told(lab, monkeypatch):
    monkeypatch.setattr(scores, "prob_of", lambda *args: np.full((8, 11), np.nan))
    with pytest.raises(ModelError, match="not numbers from 0 to 1"):
        scored(lab, SHORT, "mine")
    monkeypatch.undo()
    assert "macro-F1" in scored(lab, SHORT, "mine")


def test_versions_are_compared_as_the_model_sees_them(lab):
    scored(lab, SHORT, "mine")
    scored(lab, SHORT.replace("Feelings", "<i>Moods</i>"), "mine")
    first, second = sorted(lab.versions(), key=lambda version: "Moods" in lab.source_of(version))
    said = lab.differences(first, second, SHORT, "mine", "so <b>happy</b>")
    assert said.startswith(f"<p>On the same {len(lab.benchmark.rows)} rows, by ")
    assert "too few rows" in said
    assert "<del>Feelings</del><ins>&lt;i&gt;Moods&lt;/i&gt;</ins> (anger" in said
    assert "so &lt;b&gt;happy&lt;/b&gt;" in said
    assert lab.differences(EDITOR, first, SHORT, "mine", "x").startswith("<p>These are the same template.")


def test_words_that_differ_are_marked():
    assert word_diff("a b\nc", "a <x>\nc") == '<div class="seen diff">a <del>b</del><ins>&lt;x&gt;</ins>\nc</div>'
    assert word_diff("a", "a\nb") == '<div class="seen diff">a<ins>↵\nb</ins></div>'


def test_several_texts_are_answered_and_marked_against_gold(lab, monkeypatch):
    raws = iter([["joy, love", "none", "<b>joy</b>"], []])
    labels = lab.benchmark.task.label_set

    def predict(self, texts):
        return [Prediction(raw, parse_answer(raw, labels), 0) for raw in next(raws)]

    monkeypatch.setattr(GenerativeClassifier, "predict", predict)
    shown = lab.table(SHORT, "mine", "<script>one</script>\tjoy, anger\n\ntwo\tnone\nthree")
    assert shown.startswith("<p>1 of 2 answers are exactly right.</p>")
    assert re.findall(r'class="chip (\w*)">([^<]+)<', shown) == [
        ("missed", "○ anger"),
        ("right", "✓ joy"),
        ("false", "✕ love"),
        ("right", "✓ none"),
        ("", "joy"),
    ]
    assert "&lt;script&gt;one&lt;/script&gt;" in shown
    assert "&lt;b&gt;joy&lt;/b&gt;" in shown
    with pytest.raises(InputError, match=r"the pasted texts:3: .*glee"):
        lab.table(SHORT, "mine", "one\tjoy\n\ntwo\tglee")
    with pytest.raises(InputError, match="0 texts: paste 1 to 200"):
        lab.table(SHORT, "mine", " \n")


def test_what_an_edited_label_set_changes_is_shown(lab):
    labels = lab.benchmark.task.label_set
    text = labels.to_yaml()
    said = lab.effects(text, SHORT, "mine", "so happy")
    assert said == "<p>Valid answers stay as they are</p><p>What the model sees stays as it is</p>"
    source = (
        "{% user %}\n{{ task }} {% for label in labels %}{{ label }}: {{ label.definition }}; {% endfor %}{{ text }}\n"
    )
    edited = text.replace(labels.labels[4].definition, "<b>glad</b>")
    order = ["trust", *labels.names[:-1]]
    edited = edited.replace("order: []", f"order: [{', '.join(order)}]")
    said = lab.effects(edited, source, "mine", "so happy")
    assert "Valid answers:</p>" in said
    assert "in this order:<ins> trust,</ins> anger, " in said
    assert "&lt;b&gt;glad&lt;/b&gt;" in re.sub("</?(ins|del)>", "", said)
    assert "<b>" not in said
    with pytest.raises(InputError, match=r"^labels\.yaml:\d+: labels\.0\.colour: no such key"):
        lab.effects(text.replace("- name: anger", "- name: anger\n  colour: red"), SHORT, "mine", "x")
    with pytest.raises(InputError, match="the names under `labels` are those of the rows"):
        lab.effects(text.replace("name: anger", "name: wrath"), SHORT, "mine", "x")


def test_label_sets_are_saved_as_new_files_alone(lab, tmp_path):
    text = "# my own\n" + lab.benchmark.task.label_set.to_yaml().strip()
    path = tmp_path / "prompts" / "labels" / "mine.yaml"
    assert lab.save_labels(text, "mine").endswith("start the lab with labels=prompts/labels/mine.yaml")
    assert path.read_text() == text + "\n"
    with pytest.raises(InputError, match="exists; choose another name"):
        lab.save_labels(text, "mine")
    with pytest.raises(InputError, match="a name consists of"):
        lab.save_labels(text, "../evil")
    with pytest.raises(InputError, match="order must name each label once"):
        lab.save_labels(text.replace("order: []", "order: [joy]"), "other")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("{% user %}\n{{ txt }}{{ text }}", "mine", r"mine\.jinja:2: undefined variable"),
        ("{% user %}{{ text }}{{ ''.__class__.__mro__ }}", "mine", "Security"),
        (SHORT, "../evil", "a name consists of"),
        (SHORT, "", "a name consists of"),
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
        assert [status("/grid"), status("/grid/news"), status("/grid/stop", "POST")] == [401, 401, 401]
        assert status("/grid/stop", "POST", Cookie=cookie, Origin="http://evil.example") == 403
        assert status("/config", Cookie=cookie, Host="evil.example") == 403
        assert status("/gradio_api/queue/join", "POST", Cookie=cookie, Origin="http://evil.example") == 403
        assert status("/gradio_api/upload", "POST", Cookie=cookie) == 404
        page = visit(address)
        use_page(page, tmp_path)
        use_grid(page, monkeypatch)
        page.set_viewport_size({"width": 390, "height": 844})  # a phone
        assert page.evaluate("document.documentElement.scrollWidth") == 390
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
    page.get_by_role("button", name="Next row").click()
    page.get_by_role("button", name="Next row").click()
    page.get_by_role("button", name="Previous row").click()
    page.wait_for_function("[...document.querySelectorAll('textarea, input')].some(e => e.value.startsWith('2 of 2'))")
    page.get_by_label("Text", exact=True).fill("<script>document.title = 'evil'</script> so happy")
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
    page.keyboard.insert_text(SHORT)
    seen.get_by_text("Feelings").or_(seen.locator("span", has_text="Feel")).first.wait_for()
    page.get_by_role("button", name="Score on").click()
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(e => e.value.startsWith('list: macro-F1'))")
    page.get_by_role("tab", name="History and differences").click()
    line = page.locator("#history").get_by_test_id("cell-0-0")
    line.get_by_text("list").wait_for()

    page.get_by_label("Name").fill("kept")
    page.get_by_role("button", name="Save to prompts/").click()
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(e => e.value.startsWith('Saved as'))")
    assert (folder / "prompts" / "kept.jinja").read_text() == SHORT

    assert page.get_by_label("Start from").input_value() == "list"
    page.get_by_label("Start from").click()
    page.get_by_role("option", name="definitions").click()
    editor.get_by_text("The labels with their definitions").wait_for()
    line.click()  # the template that was scored comes back
    editor.get_by_text("Feelings").wait_for()

    page.get_by_label("Version B").click()
    page.get_by_role("option", name="list-").click()
    page.get_by_role("button", name="Compare A with B").click()
    page.locator("#compared").get_by_text("These are the same template.").wait_for()
    page.get_by_role("tab", name="Labels").click()
    page.locator(".cm-content").nth(1).click()
    page.keyboard.press("Control+Home")
    page.keyboard.insert_text("oops: 1\n")
    page.locator("#effects").get_by_text("labels.yaml:1: oops: no such key").wait_for()
    page.keyboard.press("Control+z")
    page.locator("#effects").get_by_text("Valid answers stay as they are").wait_for()
    page.get_by_role("button", name="Save to prompts/labels/").click()
    page.wait_for_function(
        "[...document.querySelectorAll('textarea')].some(e => e.value.startsWith('Saved as prompts/labels/'))"
    )
    assert (folder / "prompts" / "labels" / "semeval2018-2.yaml").is_file()
    page.get_by_role("tab", name="Several texts").click()
    page.locator("#pasted textarea").fill("<img src=x onerror=alert(1)>\tjoy")
    page.get_by_role("button", name="Ask about all of them").click()
    page.locator("#marked td", has_text="<img src=x onerror=alert(1)>").wait_for()
    assert page.locator("#marked .chip", has_text="joy").count() == 1


def use_grid(page, monkeypatch):
    """In a tab of its own, which sends a text to the editor, grows while a template is scored, and stops that."""
    with page.expect_popup() as opened:
        page.get_by_role("link", name="Rows × templates").click()
    grid = opened.value
    grid.locator("#heads th", has_text="list").wait_for()
    text = grid.locator("#rows .text > p").nth(3).text_content()
    grid.get_by_role("button", name="to the editor").nth(3).click()
    page.wait_for_function("text => document.querySelector('#text textarea').value === text", arg=text)
    page.locator(".cm-content").first.click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(SHORT + "Which?")
    go_on, predict = threading.Event(), GenerativeClassifier.predict
    monkeypatch.setattr(scores, "PART", 8)
    monkeypatch.setattr(
        GenerativeClassifier, "predict", lambda *args, **options: go_on.wait(60) and predict(*args, **options)
    )
    page.get_by_role("button", name="Score on").click()
    grid.get_by_role("status").get_by_text("list is being scored").wait_for()
    assert grid.get_by_role("progressbar").get_attribute("value") == "0"
    with grid.expect_response("**/grid/stop"):
        grid.get_by_role("button", name="Stop").click()
    go_on.set()
    page.wait_for_function(
        "[...document.querySelectorAll('textarea')].some(e => e.value.startsWith('list: stopped after 8 of'))"
    )
    grid.locator("#heads th").nth(3).get_by_text("8 of 2").wait_for()
    page.get_by_role("button", name="Score on").click()
    grid.locator("#heads th").nth(3).get_by_text("macro-F1").wait_for()
    assert grid.locator("#heads th").nth(3).inner_text().startswith("list (")  # another template of that name
    grid.close()
