"""The page of the lab, served by Gradio on 127.0.0.1, and the grid beside it.

Nothing is sent anywhere: no sharing, no analytics, no fonts from other servers.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emogen.distribution import install_hint
from emogen.errors import InputError, ModelError
from emogen.experiments.guard import Guard
from emogen.experiments.lab import EDITOR, HISTORY, LABEL_TERMS, TERMS, Lab, available_templates
from emogen.experiments.prompts import PromptBenchmark, load_generator
from emogen.task.prompt import VARIABLES, read_template

if TYPE_CHECKING:
    import gradio as gr
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

CSS = """
.seen { font: 13px/1.7 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.seen span { border-radius: 3px; box-shadow: inset 0 0 0 .5px #8885; color: inherit }
.seen .shared { opacity: .6 }
.seen .text { background: #3b82f640 }
.seen .answer { background: #22c55e59; font-weight: 600 }
.error, .warning { color: #dc2626; white-space: pre-wrap }
.warning { color: #b45309 }
.diff ins { background: #22c55e40; text-decoration: underline }
.diff del { background: #ef444440; text-decoration: line-through }
.pasted td, .pasted th { padding: .3rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }
.chip { display: inline-block; border: 1px solid #8888; border-radius: 1rem; padding: 0 .5rem; margin: 1px }
.chip.right { background: #22c55e30 }
.chip.missed { background: #f59e0b30; border-style: dashed }
.chip.false { background: #ef444430; text-decoration: underline }
"""
# A text that is sent by the grid, which is another tab of the same server.
HEAD = """<script>
new BroadcastChannel("emogen lab").onmessage = ({ data }) => {
  const box = document.querySelector("#text textarea");
  box.value = String(data);
  box.dispatchEvent(new Event("input", { bubbles: true }));
};
</script>"""


def serve(benchmark: PromptBenchmark, port: int) -> tuple["gr.Blocks", str]:
    """Serve the page in a thread, to nobody but who knows its address; see `guard`.

    Returns:
        The page, whose `block_thread` waits for Ctrl-C; and its address, which has a secret token.

    Raises:
        InputError: Gradio is not installed, or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported
    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ImportError:
        raise InputError(f"the lab needs Gradio: {install_hint('lab')}") from None
    token = secrets.token_urlsafe(16)
    generator = load_generator(benchmark)
    assert generator is not None  # see `lab` of the command line
    lab = Lab(benchmark, generator)
    blocks = make_page(lab)
    try:
        blocks.launch(
            prevent_thread_lock=True,
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            quiet=True,
            ssr_mode=False,
            mcp_server=False,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Guard, port=port, token=token)], "routes": grid_routes(lab)},
            css=CSS,
            head=HEAD,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )
    except OSError as error:
        raise InputError(f"--port {port}: {error}") from None
    return blocks, f"http://127.0.0.1:{port}/?token={token}"


def grid_routes(lab: Lab) -> list["Route"]:
    """The page of rows × templates, what is new in it, and its stop button."""
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    def page(request: "Request") -> "Response":
        return HTMLResponse(lab.grid_page())

    def news(request: "Request") -> "Response":
        have = {key: int(value) for key, value in request.query_params.items()}
        return JSONResponse({"news": lab.grid_news(have), "progress": lab.progress})

    def stop(request: "Request") -> "Response":
        lab.stop()
        return Response(status_code=204)

    def or_error(method: "Callable[[Request], Response]") -> "Callable[[Request], Response]":
        def endpoint(request: "Request") -> "Response":
            try:
                return method(request)
            except (InputError, ValueError) as error:
                return PlainTextResponse(str(error), 400)

        return endpoint

    return [
        Route("/grid", or_error(page)),
        Route("/grid/news", or_error(news)),
        Route("/grid/stop", stop, methods=["POST"]),
    ]


def make_page(lab: Lab) -> "gr.Blocks":
    """Lay out the page of a lab, and connect it to the lab's methods."""
    import gradio as gr

    rows, prompt = lab.benchmark.rows, lab.benchmark.task.prompt
    label_set, loaded = lab.benchmark.task.label_set, Path(prompt.path).stem
    title = f"{lab.benchmark.recipe.model_name}, {len(rows)} rows of {Path(rows.path).name}"
    first_seen = _or_error(lab.see, prompt.source, loaded, rows.texts[0])
    with gr.Blocks(title="emogen lab", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(
            f"<h2>emogen lab</h2><p>{escape(title)}. All answers side by side, in a tab of its own: "
            '<a href="/grid" target="_blank">Rows × templates</a></p>'
        )
        with gr.Row():
            with gr.Column():
                start_from = gr.Dropdown(
                    sorted({loaded, *available_templates()}),
                    value=loaded,
                    label="Start from",
                    info="What was loaded last. A choice replaces the template in the editor.",
                )
                source = gr.Code(
                    prompt.source, language="jinja2", label="Template", lines=6, max_lines=24, wrap_lines=True
                )
                with gr.Accordion("What a template can use", open=False):
                    gr.HTML(_terms({f"{{{{ {name} }}}}": meaning for name, meaning in VARIABLES.items()}))
                name = gr.Textbox(loaded, label="Name", info="Of its versions in the history, and of its file.")
                with gr.Row():
                    score = gr.Button(f"Score on {len(rows)} rows", variant="primary")
                    stop = gr.Button("Stop")
                    save = gr.Button("Save to prompts/")
                result = gr.Textbox(label="Result", interactive=False)
            with gr.Column():
                position = gr.State(0)  # of the row
                with gr.Row():
                    back = gr.Button("Previous row", size="sm")
                    forth = gr.Button("Next row", size="sm")
                text = gr.Textbox(rows.texts[0], label="Text", lines=2, elem_id="text")
                gold = gr.Textbox(_gold_of(lab, rows.texts[0]), label="Row and its true labels", interactive=False)
                ask = gr.Button("Ask the model")
                answer = gr.Textbox(
                    label="Answer",
                    interactive=False,
                    info="As it was written, and how it was read.",
                )
                prob = gr.Label(label="Probability of each label", num_top_classes=len(label_set), show_heading=False)
        with gr.Tabs():
            with gr.Tab("What the model sees"):
                seen = gr.HTML(first_seen, elem_id="seen")
            with gr.Tab("Several texts"):
                pasted = gr.Textbox(
                    label="Texts, one per line",
                    info="Copied from a spreadsheet: after a tab, the true labels, with commas between them.",
                    lines=4,
                    elem_id="pasted",
                )
                ask_all = gr.Button("Ask about all of them")
                marked = gr.HTML(elem_id="marked")
            with gr.Tab("History and differences"):
                gr.Markdown("Select a line to edit its template.")
                history = gr.Dataframe(
                    lab.history, headers=list(HISTORY), type="array", interactive=False, elem_id="history"
                )
                with gr.Accordion("What the columns mean", open=False):
                    gr.HTML(_terms(TERMS))
                with gr.Row():
                    first = gr.Dropdown([EDITOR, *lab.versions()], value=EDITOR, label="Version A")
                    second = gr.Dropdown([EDITOR, *lab.versions()], value=EDITOR, label="Version B")
                compare = gr.Button("Compare A with B")
                compared = gr.HTML(elem_id="compared")
                with gr.Row():
                    note = gr.Textbox(label="Note on version A")
                    keep_note = gr.Button("Keep the note")

            with gr.Tab("Labels"):
                labels = gr.Code(label_set.to_yaml(), language="yaml", label="Label set", lines=6, max_lines=24)
                with gr.Accordion("What a label set has", open=False):
                    gr.HTML(_terms(LABEL_TERMS))
                effects = gr.HTML("<p>What your changes change for the model is shown here.</p>", elem_id="effects")
                with gr.Row():
                    labels_name = gr.Textbox(f"{label_set.name}-2", label="Name of the new label set")
                    save_labels = gr.Button("Save to prompts/labels/")
                labels_result = gr.Textbox(label="Saved", interactive=False)

        def pick(table: list[list[Any]], event: gr.SelectData) -> tuple[str, str, str]:
            version, own = table[event.index[0]][-1], table[event.index[0]][0]
            return lab.source_of(version), own, version

        def versions(a: str, b: str) -> tuple[list[list[Any]], "gr.Dropdown", "gr.Dropdown"]:
            known = [EDITOR, *lab.versions()]
            return lab.history(), gr.Dropdown(known, value=a), gr.Dropdown(known, value=b)

        gr.on(
            [source.change, text.change],
            lambda *values: _or_error(lab.see, *values),
            [source, name, text],
            seen,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        text.change(lambda text: _gold_of(lab, text), text, gold, show_progress="hidden")
        back.click(lambda i: ((i - 1) % len(rows), rows.texts[(i - 1) % len(rows)]), position, [position, text])
        forth.click(lambda i: ((i + 1) % len(rows), rows.texts[(i + 1) % len(rows)]), position, [position, text])
        open_template = _with_toast(lambda chosen: (read_template(available_templates()[chosen]), chosen))
        start_from.input(open_template, start_from, [source, name])
        gr.on([ask.click, text.submit], _with_toast(lab.answer), [source, name, text], [answer, prob])
        ask_all.click(_with_toast(lab.table), [source, name, pasted], marked)
        scored = score.click(_steps_with_toast(lab.score), [source, name], result, concurrency_limit=None)
        scored.then(versions, [first, second], [history, first, second])
        stop.click(lab.stop)
        save.click(_with_toast(lambda source, name: f"Saved as {lab.save(source, name)}"), [source, name], result)
        history.select(pick, history, [source, name, first])
        compare.click(_with_toast(lab.differences), [first, second, source, name, text], compared)
        first.change(lambda version: lab.note(version) if version != EDITOR else "", first, note)
        keep_note.click(_with_toast(lab.keep_note), [first, note]).success(
            versions, [first, second], [history, first, second]
        )
        gr.on(
            [labels.change, source.change],
            lambda *values: _or_error(lab.effects, *values),
            [labels, source, name, text],
            effects,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        save_labels.click(_with_toast(lab.save_labels), [labels, labels_name], labels_result)
    return blocks


def _terms(terms: dict[str, str]) -> str:
    """Words and what they mean, as HTML."""
    return (
        "<dl>"
        + "".join(f"<dt><b>{escape(word)}</b></dt><dd>{escape(said)}</dd>" for word, said in terms.items())
        + "</dl>"
    )


def _gold_of(lab: Lab, text: str) -> str:
    """The number and the true labels of a row; nothing for another text."""
    rows, label_set = lab.benchmark.rows, lab.benchmark.task.label_set
    if text not in rows.texts:
        return "a text of your own"
    i = rows.texts.index(text)
    names = label_set.names_of(rows.truth[i])
    return f"{i + 1} of {len(rows)}, {rows.ids[i]}: {', '.join(names) or label_set.empty}"


def _or_error(method: Callable[..., str], *values: str) -> str:
    """What a method shows, or the error in its place: while somebody types, most files are not valid."""
    try:
        return method(*values)
    except InputError as error:
        return f'<p class="error">{escape(str(error))}</p>'


def _with_toast(method: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that shows errors of the input in the page."""

    def handler(*values: Any) -> Any:
        import gradio as gr

        try:
            return method(*values)
        except (InputError, ModelError, OSError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None

    return handler


def _steps_with_toast(method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same for a handler that tells how far it is."""

    def handler(*values: Any) -> Iterator[Any]:
        import gradio as gr

        try:
            yield from method(*values)
        except (InputError, ModelError, OSError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None

    return handler
