"""A local page to work on a prompt template: edit it, see what the model sees, try a text, score it, save it.

Gradio serves the page on 127.0.0.1. Nothing is sent anywhere: no sharing, no analytics, no fonts from other servers.
Scores are kept where `emogen prompts compare` keeps them; they are the history of the page.
"""

import os
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emogen import paths
from emogen.console import progress_bar
from emogen.distribution import install_hint
from emogen.errors import InputError
from emogen.evaluation.caveats import caveats, reference_line
from emogen.evaluation.run_folder import METRICS, PROMPT
from emogen.experiments.guard import Guard
from emogen.experiments.prompts import PromptBenchmark, Template, load_generator, prepare, read_metrics, score_template
from emogen.prediction.classifier import prob_of
from emogen.prediction.generator import GenerativeClassifier
from emogen.task.parse import parse_answer
from emogen.task.prompt import parse_prompt, read_template

if TYPE_CHECKING:
    import gradio as gr

PROMPTS = Path("prompts")  # in the current folder: where templates are saved
HISTORY = ("template", "macro-F1, thresholds", "macro-F1, answer", "ln P", "instruction tokens", "folder")
CSS = """
.seen { font: 13px/1.7 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.seen span { border-radius: 3px; box-shadow: inset 0 0 0 .5px #8885; color: inherit }
.seen .shared { opacity: .6 }
.seen .text { background: #3b82f640 }
.seen .answer { background: #22c55e59; font-weight: 600 }
.error, .warning { color: #dc2626; white-space: pre-wrap }
.warning { color: #b45309 }
"""


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
    blocks = make_page(Lab(benchmark, generator))
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
            app_kwargs={"middleware": [Middleware(Guard, port=port, token=token)]},
            css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )
    except OSError as error:
        raise InputError(f"--port {port}: {error}") from None
    return blocks, f"http://127.0.0.1:{port}/?token={token}"


class Lab:
    """What the page does. Methods take the source and the name of the template from the editor."""

    def __init__(self, benchmark: PromptBenchmark, generator: GenerativeClassifier):
        self.benchmark, self.generator = benchmark, generator

    def template(self, source: str, name: str) -> Template:
        """Check and encode a template.

        Raises:
            InputError: the template or its name is not valid; the message names the line.
        """
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"{name!r}: the name of a template consists of letters, digits, _ and -")
        return prepare(self.benchmark, parse_prompt(_whole(source), f"{name}.jinja"))

    def see(self, source: str, name: str, text: str) -> str:
        """Show what the model sees for a text, as HTML.

        Returns:
            The warnings about the template, and every token with its id as a tooltip. The answer is included if the
            text is one of the benchmark.
        """
        template, rows = self.template(source, name), self.benchmark.rows
        encoder = template.encoder
        assert encoder is not None
        labels = encoder.label_set.names_of(rows.truth[rows.texts.index(text)]) if text in rows.texts else None
        row = encoder.rows(text, labels)[0]
        n_shared, n_after_text = len(encoder.prefix_ids), len(row.suffix_ids) - row.n_text - row.n_answer
        parts = ["shared"] * n_shared + ["text"] * row.n_text + [""] * n_after_text + ["answer"] * row.n_answer
        spans = []
        for part, token in zip(parts, [*encoder.prefix_ids, *row.suffix_ids], strict=True):
            shown = escape(encoder.tokenizer.decode([token])).replace("\n", "↵\n")
            spans.append(f'<span class="{part}" title="{token}">{shown}</span>')
        cut = f"; {row.n_cut} tokens of the text were cut" if row.n_cut else ""
        counts = (
            f'{len(parts)} tokens: {n_shared} <span class="shared">instruction</span>, {row.n_text} '
            f'<span class="text">text</span>, {n_after_text} up to the answer, {row.n_answer} '
            f'<span class="answer">answer</span>{cut}'
        )
        warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in template.warnings)
        return f'{warnings}<div class="seen"><p>{counts}</p>{"".join(spans)}</div>'

    def answer(self, source: str, name: str, text: str) -> tuple[str, dict[str, float]]:
        """Ask the model.

        Returns:
            The answer with its parse status, and the probability of each label.
        """
        encoder = self.template(source, name).encoder
        assert encoder is not None
        generator = replace(self.generator, encoder=encoder)
        predictions = generator.predict([text], with_prob=True)
        (prob,) = prob_of(generator, [text], predictions, progress_bar, "Probabilities")
        (prediction,) = predictions
        parsed = parse_answer(prediction.raw, encoder.label_set, style=encoder.style)
        by_label = dict(zip(encoder.label_set.names, map(float, prob), strict=True))
        return f"{prediction.raw}  ({parsed.status})", by_label

    def score(self, source: str, name: str) -> str:
        """Score a template on the rows of the benchmark, and report its macro-F1 with what a reader has to know."""
        metrics = score_template(self.benchmark, self.template(source, name), self.generator, progress_bar)
        nested = metrics.get("by_thresholds")
        by_thresholds = f", {nested['f1_macro']:.3f} by nested thresholds" if nested else ""
        found = f"{name}: macro-F1 {metrics['f1_macro']:.3f} by answer{by_thresholds}, on {metrics['n']} rows"
        decided = [("answer", metrics), ("nested thresholds", nested)] if nested else [("", metrics)]
        return "\n".join([found, reference_line(metrics), *caveats(decided)])

    def history(self) -> list[list[Any]]:
        """A line for each template that was scored on these rows, the best first; see HISTORY for the columns."""
        lines = []
        for folder in self.benchmark.folder.glob("*/"):
            metrics = read_metrics(folder) if (folder / METRICS).is_file() else {}
            if "log_likelihood" not in metrics:
                continue  # not finished, or the run of a tuned model
            nested = metrics.get("by_thresholds", {}).get("f1_macro")
            lines.append(
                [
                    folder.name.rpartition("-")[0],
                    None if nested is None else round(nested, 3),
                    round(metrics["f1_macro"], 3),
                    round(metrics["log_likelihood"], 2),
                    metrics["tokens"]["shared"],
                    folder.name,
                ]
            )
        return sorted(lines, key=lambda line: -(line[2] if line[1] is None else line[1]))

    def source_of(self, folder: str) -> str:
        """The template of a folder in the history."""
        return (self.benchmark.folder / Path(folder).name / PROMPT).read_text(encoding="utf-8")

    def save(self, source: str, name: str) -> Path:
        """Save a template as prompts/NAME.jinja.

        Raises:
            InputError: the template is not valid, or the file exists with another template.
        """
        source = _whole(source)
        path = PROMPTS / self.template(source, name).prompt.path
        if path.exists() and path.read_text(encoding="utf-8") != source:
            raise InputError(f"{path} exists, with another template; choose another name")
        with paths.writing(path) as file:
            file.write(source)
        return path


def _whole(source: str) -> str:
    """A template with the newline at its end, which the editor drops."""
    return source if source.endswith("\n") else f"{source}\n"


def available_templates() -> dict[str, Path]:
    """The shipped templates and those of the current folder, by name. A template of the current folder comes first."""
    files = [*sorted(paths.shipped("prompts").glob("*.jinja")), *sorted(PROMPTS.glob("*.jinja"))]
    return {file.stem: file for file in files}


def make_page(lab: Lab) -> "gr.Blocks":
    """Lay out the page of a lab, and connect it to the lab's methods."""
    import gradio as gr

    rows, prompt = lab.benchmark.rows, lab.benchmark.task.prompt
    title = f"{lab.benchmark.recipe.model_name}, {len(rows)} rows of {Path(rows.path).name}"
    first_seen = _see_or_error(lab, prompt.source, Path(prompt.path).stem, rows.texts[0])
    with gr.Blocks(title="emogen lab", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(f"<h2>emogen lab</h2><p>{escape(title)}</p>")
        with gr.Row():
            with gr.Column():
                start_from = gr.Dropdown(sorted(available_templates()), value=None, label="Start from")
                source = gr.Code(
                    prompt.source, language="jinja2", label="Template", lines=6, max_lines=24, wrap_lines=True
                )
                name = gr.Textbox(Path(prompt.path).stem, label="Name")
                with gr.Row():
                    score = gr.Button(f"Score on {len(rows)} rows", variant="primary")
                    save = gr.Button("Save to prompts/")
                result = gr.Textbox(label="Result", interactive=False)
            with gr.Column():
                text = gr.Textbox(rows.texts[0], label="Text", lines=2)
                ask = gr.Button("Ask the model")
                answer = gr.Textbox(label="Answer", interactive=False)
                prob = gr.Label(
                    label="Probability of each label",
                    num_top_classes=len(lab.benchmark.task.label_set),
                    show_heading=False,
                )
        gr.Markdown("### What the model sees")
        seen = gr.HTML(first_seen, elem_id="seen")
        gr.Markdown("### History\nSelect a line to edit its template.")
        history = gr.Dataframe(lab.history, headers=list(HISTORY), type="array", interactive=False, elem_id="history")

        def pick(table: list[list[Any]], event: gr.SelectData) -> tuple[str, str]:
            line = table[event.index[0]]
            return lab.source_of(line[-1]), line[0]

        gr.on(
            [source.change, text.change],
            lambda *values: _see_or_error(lab, *values),
            [source, name, text],
            seen,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        open_template = _with_toast(lambda chosen: (read_template(available_templates()[chosen]), chosen))
        start_from.input(open_template, start_from, [source, name])
        one_at_a_time: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        gr.on([ask.click, text.submit], _with_toast(lab.answer), [source, name, text], [answer, prob], **one_at_a_time)
        scored = score.click(_with_toast(lab.score), [source, name], result, **one_at_a_time)
        scored.success(lab.history, None, history)
        save.click(_with_toast(lambda source, name: f"Saved as {lab.save(source, name)}"), [source, name], result)
        history.select(pick, history, [source, name])
    return blocks


def _see_or_error(lab: Lab, source: str, name: str, text: str) -> str:
    """`Lab.see`, or the error in its place: while somebody types, most templates are not valid."""
    try:
        return lab.see(source, name, text)
    except InputError as error:
        return f'<p class="error">{escape(str(error))}</p>'


def _with_toast(method: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that shows errors of the input in the page."""

    def handler(*values: Any) -> Any:
        import gradio as gr

        try:
            return method(*values)
        except InputError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None

    return handler
