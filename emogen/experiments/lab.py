"""A page to work on a prompt template: edit it, see what the model sees, try a text, score it, keep what is good.

It is served by Gradio on 127.0.0.1, and nothing is sent anywhere: no sharing, no analytics, no fonts from elsewhere.
What is scored is kept where `emogen prompts compare` keeps it, and is the page's history.
"""

import os
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emogen import paths
from emogen.console import progress_bar
from emogen.distribution import install_hint
from emogen.errors import InputError
from emogen.evaluation.run_folder import PROMPT
from emogen.experiments.prompts import PromptBenchmark, Template, load_generator, prepare, read_figures, score_template
from emogen.prediction.generator import GenerativeClassifier
from emogen.task.parse import parse_answer
from emogen.task.prompt import parse_prompt

if TYPE_CHECKING:
    import gradio as gr

PROMPTS = Path("prompts")  # of the current folder: where templates are saved
HISTORY = ("template", "macro-F1, thresholds", "macro-F1, answer", "ln P", "tokens", "folder")
CSS = """
.seen { font: 13px/1.7 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.seen span { border-radius: 3px; box-shadow: inset 0 0 0 .5px #8885; color: inherit }
.seen .shared { opacity: .6 }
.seen .text { background: #3b82f640 }
.seen .answer { background: #22c55e59; font-weight: 600 }
.error { color: #dc2626; white-space: pre-wrap }
"""


def serve(benchmark: PromptBenchmark, port: int) -> "gr.Blocks":
    """Serve the page, in a thread of its own; `block_thread` of what is returned waits for Ctrl-C.

    Raises:
        InputError: Gradio is not installed, or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    try:
        import gradio as gr
    except ImportError:
        raise InputError(f"the lab needs Gradio: {install_hint('lab')}") from None
    lab = Lab(benchmark, load_generator(benchmark))
    fonts = ["system-ui", "sans-serif"]
    blocks = page(lab)
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
            css=CSS,
            theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        )
    except OSError as error:
        raise InputError(f"--port {port}: {error}") from None
    return blocks


class Lab:
    """What the page does. Each method takes the template as it stands in the editor."""

    def __init__(self, benchmark: PromptBenchmark, generator: GenerativeClassifier):
        self.benchmark, self.generator = benchmark, generator

    def template(self, source: str, name: str) -> Template:
        """Check and encode it. Raises InputError: what is wrong with it, with the line, or with its name."""
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"{name!r}: the name of a template is made of letters, digits, _ and -")
        return prepare(self.benchmark, parse_prompt(source, f"{name}.jinja"))

    def see(self, source: str, name: str, text: str) -> str:
        """HTML: the tokens of a text's row, each with its id; with the true answer if the benchmark has the text."""
        encoder, rows = self.template(source, name).encoder, self.benchmark.rows
        names = None
        if text in rows.texts:
            names = encoder.label_set.names_of(rows.truth[rows.texts.index(text)])
        row = encoder.rows(text, names)[0]
        ids = [*encoder.prefix_ids, *row.suffix_ids]
        n_prefix, n_prompt = len(encoder.prefix_ids), len(ids) - row.n_answer
        parts = []
        for k, token in enumerate(ids):
            part = (
                "shared" if k < n_prefix else "answer" if k >= n_prompt else "text" if k < n_prefix + row.n_text else ""
            )
            shown = escape(encoder.tokenizer.decode([token])).replace("\n", "↵\n")
            parts.append(f'<span class="{part}" title="{token}">{shown}</span>')
        cut = f", {row.n_cut} of the text left out" if row.n_cut else ""
        counts = (
            f'{len(ids)} tokens: {n_prefix} <span class="shared">of instruction</span>, {row.n_text} '
            f'<span class="text">of text</span>, {row.n_answer} <span class="answer">of answer</span>{cut}'
        )
        return f'<div class="seen"><p>{counts}</p>{"".join(parts)}</div>'

    def answer(self, source: str, name: str, text: str) -> tuple[str, dict[str, float]]:
        """What the model answers, and how that was read; and the probability of each label."""
        from dataclasses import replace

        encoder = self.template(source, name).encoder
        generator = replace(self.generator, encoder=encoder)
        (said,) = generator.predict([text])
        prob = generator.predict_proba([text])[0]
        read = parse_answer(said.raw, encoder.label_set, style=encoder.style)
        return f"{said.raw}  ({read.status})", dict(zip(encoder.label_set.names, map(float, prob), strict=True))

    def score(self, source: str, name: str) -> str:
        """Score it on the benchmark's rows; says what came out."""
        figures = score_template(self.benchmark, self.template(source, name), self.generator, progress_bar)
        by_thresholds = figures.get("by_thresholds")
        nested = f", by nested thresholds {by_thresholds['f1_macro']:.3f}" if by_thresholds else ""
        return f"{name}: macro-F1 by answer {figures['f1_macro']:.3f}{nested}, on {figures['n']} rows"

    def history(self) -> list[list[Any]]:
        """A line for each template that was scored on these rows, the best first; see HISTORY."""
        lines = []
        for folder in self.benchmark.folder.glob("*/"):
            if not (folder / "metrics.json").is_file():
                continue
            figures = read_figures(folder)
            if "log_likelihood" not in figures:
                continue  # of a tuned model
            nested = figures.get("by_thresholds", {}).get("f1_macro")
            lines.append(
                [
                    folder.name.rpartition("-")[0],
                    None if nested is None else round(nested, 3),
                    round(figures["f1_macro"], 3),
                    round(figures["log_likelihood"], 2),
                    figures["tokens"]["shared"],
                    folder.name,
                ]
            )
        return sorted(lines, key=lambda line: -(line[1] or line[2]))

    def source_of(self, folder: str) -> str:
        """The template that was scored in this folder of the history."""
        return (self.benchmark.folder / Path(folder).name / PROMPT).read_text(encoding="utf-8")

    def save(self, source: str, name: str) -> Path:
        """Save it as prompts/NAME.jinja. Raises InputError if it is not valid, or the file is there already."""
        path = PROMPTS / self.template(source, name).prompt.path
        if path.exists() and path.read_text(encoding="utf-8") != source:
            raise InputError(f"{path} exists, with another template; choose another name")
        with paths.writing(path) as file:
            file.write(source)
        return path


def shipped_and_own() -> dict[str, str]:
    """The templates that there are, by name: those of the current folder, then the shipped ones."""
    files = [*sorted(paths.shipped("prompts").glob("*.jinja")), *sorted(PROMPTS.glob("*.jinja"))]
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


def page(lab: Lab) -> "gr.Blocks":
    """The page of a lab."""
    import gradio as gr

    rows, prompt = lab.benchmark.rows, lab.benchmark.task.prompt

    def told(work: Any) -> Any:
        """A handler whose errors are shown in the page."""

        def handler(*values: Any) -> Any:
            try:
                return work(*values)
            except InputError as error:
                raise gr.Error(str(error), duration=None, print_exception=False) from None

        return handler

    def see(*values: str) -> str:
        try:
            return lab.see(*values)
        except InputError as error:  # while one types: in place of what would be seen
            return f'<p class="error">{escape(str(error))}</p>'

    def pick(table: list[list[Any]], event: gr.SelectData) -> tuple[str, str]:
        line = table[event.index[0]]
        return lab.source_of(line[-1]), line[0]

    with gr.Blocks(title="emogen lab", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(f"## emogen lab\n{lab.benchmark.recipe.model_name}, {len(rows)} rows of {Path(rows.path).name}")
        with gr.Row():
            with gr.Column():
                chosen = gr.Dropdown(sorted(shipped_and_own()), value=None, label="Start from")
                source = gr.Code(
                    prompt.source, language="jinja2", label="Template", lines=6, max_lines=24, wrap_lines=True
                )
                name = gr.Textbox(Path(prompt.path).stem, label="Name")
                with gr.Row():
                    score = gr.Button(f"Score on {len(rows)} rows", variant="primary")
                    save = gr.Button("Save to prompts/")
                said = gr.Textbox(label="Result", interactive=False)
            with gr.Column():
                text = gr.Textbox(rows.texts[0], label="Text", lines=2)
                run = gr.Button("Ask the model")
                answer = gr.Textbox(label="Answer", interactive=False)
                bars = gr.Label(
                    label="Probability of each label",
                    num_top_classes=len(lab.benchmark.task.label_set),
                    show_heading=False,
                )
        gr.Markdown("### What the model sees")
        seen = gr.HTML(see(prompt.source, Path(prompt.path).stem, rows.texts[0]), elem_id="seen")
        gr.Markdown("### History\nSelect a line to edit its template.")
        history = gr.Dataframe(lab.history, headers=list(HISTORY), type="array", interactive=False, elem_id="history")

        gr.on(
            [source.change, text.change],
            see,
            [source, name, text],
            seen,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        chosen.input(lambda of: (shipped_and_own()[of], of), chosen, [source, name])
        # The model is one, and takes one request after another.
        model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        gr.on([run.click, text.submit], told(lab.answer), [source, name, text], [answer, bars], **model)
        score.click(told(lab.score), [source, name], said, **model).success(lab.history, None, history)
        save.click(told(lambda source, name: f"Saved as {lab.save(source, name)}"), [source, name], said)
        history.select(pick, history, [source, name])
    return blocks
