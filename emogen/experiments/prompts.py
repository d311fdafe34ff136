"""Prompt templates against each other: the same rows, the same model, and which differences are real.

runs/NAME-prompts/200-rows-1a2b3c4d/     by a digest of rows, model and decoding: what is in it can be compared
    list-5e6f7a8b/                       what came of a template, by its name and a digest of it: prompt.jinja,
                                         labels.yaml, predictions.jsonl, metrics.json. It is not computed again.
    list-5e6f7a8b-200-steps-9c0d1e2f/    a run folder, where it was tuned for some steps
    rows-9c0d1e2f/                       the rows that such runs learn from and are scored on
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from emogen import paths
from emogen.console import Bar
from emogen.errors import InputError
from emogen.evaluation import results, run_folder
from emogen.evaluation.metrics import evaluate
from emogen.evaluation.results import parse_audit, pred_matrix
from emogen.evaluation.run_folder import (
    ADAPTER,
    BASELINE,
    LABELS,
    PROMPT,
    PROMPTS,
    kind_of,
    label_set_of,
    read_recipe,
    write_manifest,
)
from emogen.experiments.jobs import RunProcess, overrides_of, own_folder, run_all
from emogen.model.encode import Encoder, encoder_of, load_chat_tokenizer
from emogen.prediction.classifier import prob_of
from emogen.prediction.ensemble import load_run
from emogen.prediction.generator import GenerativeClassifier
from emogen.report.compare import System, compare, with_interval
from emogen.task.prompt import Prompt, PromptError, fill, load_prompt, render
from emogen.task.recipe import Recipe, load_recipe
from emogen.task.rows import Rows, normalise_text
from emogen.task.splits import all_rows, make_folds, sample_rows
from emogen.task.task import Task, load_task, load_task_with_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptBenchmark:
    """What templates are held against each other on.

    Attributes:
        task: what the recipe names; a template takes the place of its prompt.
        rows: n rows with gold labels that the model was not trained on.
        train_rows: the rows that a short tuning may use; None if the benchmark is of a tuned run.
        folder: where what comes of templates is kept.
        source: the recipe, or the run folder whose adapter is used.
        overrides: of the recipe.
    """

    task: Task
    rows: Rows
    train_rows: Rows | None
    tokenizer: "PreTrainedTokenizerBase"
    folder: Path
    source: Path
    overrides: tuple[str, ...]

    @property
    def recipe(self) -> Recipe:
        """What it was opened with."""
        return self.task.recipe


def open_benchmark(
    path: str | Path, overrides: Sequence[str] = (), *, limit: int = 200, tuned: Path | None = None
) -> PromptBenchmark:
    """Load what a comparison of templates needs, but no model.

    Args:
        path: a recipe. Its rows are taken from its own evaluation file, or from all that it has.
        limit: how many rows; a stratified sample, always the same.
        tuned: a run folder: its model, labels and style of answers, on rows that it held out.

    Raises:
        InputError: what is missing or wrong, and where.
        ModelError: the tokenizer cannot be had.
    """
    recipe = load_recipe(path, overrides)
    folder = own_folder(recipe, overrides, "prompts")
    source, location = Path(path), None
    if tuned:
        source, location = tuned, str(tuned / ADAPTER)
        recipe, _ = read_recipe(tuned)
        overrides = ()
    if recipe.answer == "head" or kind_of(source) == BASELINE:
        what = "a baseline" if kind_of(source) == BASELINE else "a head"
        raise InputError(f"{source}: {what} reads each text as it stands; there is no prompt to compare")
    train_rows = None
    if tuned:
        task = load_task(recipe)
        rows = results.read_held_out(tuned, task.label_set)
    else:
        task, splits, _ = load_task_with_rows(recipe)
        train_rows = splits.train
        named = bool(recipe.eval_file or recipe.dataset_test_split)
        rows = splits.eval if named and splits.eval is not None else all_rows(recipe, task.label_set)
    shown = {normalise_text(example.text) for example in task.examples}
    rows = rows.take([i for i, text in enumerate(rows.texts) if normalise_text(text) not in shown])
    tokenizer, _ = load_chat_tokenizer(recipe, location)
    rows = sample_rows(rows, limit, recipe.seed)
    folder = folder / f"{len(rows)}-rows-{_digest_of(task, rows, source)}"
    return PromptBenchmark(task, rows, train_rows, tokenizer, folder, source, tuple(overrides))


def _digest_of(task: Task, rows: Rows, source: Path) -> str:
    """Of all that the figures of templates depend on besides them."""
    recipe = task.recipe
    weights = source / ADAPTER / "adapter_model.safetensors"
    return _digest(
        recipe.model_name,
        [recipe.lm_args.get(key) for key in ("model_revision", "dtype", "load_in_4bit", "load_in_8bit")],
        hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
        [recipe.answer, recipe.decode, recipe.prob, recipe.max_length],
        task.label_set.to_yaml(),
        [rows.ids, rows.texts, rows.truth.tolist()],
    )


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Template:
    """A template that keeps to the contract, encoded, and the folder that its figures are in or will be."""

    prompt: Prompt
    encoder: "Encoder"
    folder: Path

    @property
    def done(self) -> bool:
        """Whether its figures are there."""
        return (self.folder / run_folder.METRICS).is_file()


def prepare(benchmark: PromptBenchmark, prompt: Prompt) -> Template:
    """Check and encode a template for a benchmark.

    Raises:
        InputError: it breaks the contract, with file and line.
    """
    task = replace(benchmark.task, prompt=prompt)
    encoder = encoder_of(task, benchmark.tokenizer)
    _check_leak(task, benchmark.rows)
    shown = [repr(example) for example in task.examples if "examples" in prompt.variables]
    return Template(prompt, encoder, benchmark.folder / f"{Path(prompt.path).stem}-{_digest(prompt.source, shown)}")


def load_templates(benchmark: PromptBenchmark, files: Sequence[str | Path]) -> tuple[list[Template], list[str]]:
    """Templates from files, and what is said of those that are refused."""
    good, refused = [], []
    for file in files:
        try:
            prompt = load_prompt(file)
            good.append(prepare(benchmark, prompt))
            if "examples" in prompt.variables and not benchmark.task.examples:
                log.warning(f"{prompt.path} shows examples, but `examples` is 0")
        except InputError as error:
            refused.append(str(error))
    return good, refused


def _check_leak(task: Task, rows: Rows) -> None:
    """Refuse a template in which a row stands that it is scored on: its answer may stand there too."""
    prompt, examples = task.prompt, task.examples
    asked = task.label_set.labels[0] if task.recipe.answer == "yes_no" else None
    messages = fill(render(prompt, task.label_set, examples, asked), ["", *(example.text for example in examples)])
    said = normalise_text(" ".join(message["content"] for message in messages))
    for row_id, text in zip(rows.ids, rows.texts, strict=True):
        words = normalise_text(text)
        if len(words) >= 12 and words in said:
            lines = prompt.source.splitlines()
            begins = [
                n for n in range(len(lines)) if words in normalise_text("\n".join(lines[n:]))
            ]  # on the last of these
            where = f"{prompt.path}:{begins[-1] + 1}" if begins else prompt.path
            raise PromptError(
                f"{where}: the text of row {row_id} stands in the prompt, and it is scored on that row: its answer "
                "would be known. Take another example"
            )


def load_generator(benchmark: PromptBenchmark) -> GenerativeClassifier:
    """The model of a benchmark; which prompt it comes with does not matter."""
    generator = load_run(benchmark.source, benchmark.overrides)
    assert isinstance(generator, GenerativeClassifier)
    return generator


def score_template(
    benchmark: PromptBenchmark, template: Template, generator: GenerativeClassifier, bar: Bar
) -> dict[str, Any]:
    """The figures of a template; they are computed once, and kept in its folder.

    Returns:
        What `score.evaluate` says; `log_likelihood`: of the true answers, the mean over the texts in nats (of all the
        questions of `yes_no` together); `tokens`: how many the instruction has (`shared`) and a row after it, in the
        mean (`row`); `texts_per_second`, answers alone; and `parse`.
    """
    if template.done:
        return read_figures(template.folder)
    from emogen.model.probabilities import log_likelihood

    encoder, rows, label_set = template.encoder, benchmark.rows, benchmark.task.label_set
    generator = replace(generator, encoder=encoder)
    name = Path(template.prompt.path).stem
    started = time.perf_counter()
    with bar(f"{name}: answers", len(rows) * generator.n_questions) as advance:
        predictions = generator.predict(rows.texts, progress=advance)
    seconds = time.perf_counter() - started
    prob = prob_of(generator, rows.texts, predictions, bar, f"{name}: probabilities")
    true = [encoder.rows(text, label_set.names_of(vector)) for text, vector in zip(rows.texts, rows.truth, strict=True)]
    with bar(f"{name}: likelihood", len(rows) * generator.n_questions) as advance:
        of_answers = log_likelihood(
            generator.model, encoder, [row for questions in true for row in questions], progress=advance
        )
    try:
        folds = make_folds(rows, 5, benchmark.recipe.seed)
    except ValueError:
        folds = None  # too few rows
    pred = pred_matrix(predictions)
    figures = evaluate(rows.truth, pred, prob, folds, label_set.names) | {
        "log_likelihood": float(of_answers.sum() / len(rows)),
        "tokens": {
            "shared": len(encoder.prefix_ids),
            "row": float(np.mean([len(row) for questions in true for row in questions])),
        },
        "texts_per_second": len(rows) / seconds,
        "parse": parse_audit(predictions),
    }
    for name, text in {PROMPT: template.prompt.source, LABELS: label_set.to_yaml()}.items():
        with paths.writing(template.folder / name) as file:
            file.write(text)
    results.write_jsonl(template.folder / run_folder.PREDICTIONS, rows, pred, prob, label_set, predictions, folds)
    write_manifest(template.folder, PROMPTS, model=benchmark.recipe.model_name)
    paths.write_json(template.folder / run_folder.METRICS, figures)  # last: then it is done
    return figures


def read_figures(folder: Path) -> dict[str, Any]:
    """What `score_template` kept, or what a run said of itself."""
    figures: dict[str, Any] = json.loads((folder / run_folder.METRICS).read_text(encoding="utf-8"))
    return figures


def tune_templates(
    benchmark: PromptBenchmark,
    templates: Sequence[Template],
    n_steps: int,
    *,
    show: Callable[[list[RunProcess]], Any] = lambda runs: None,
) -> list[Path]:
    """Tune with each template for the same number of steps, and score it on the same rows, which are held out.

    Runs that are done stay done, and one that was stopped goes on.

    Returns:
        A run folder for each template.

    Raises:
        ModelError: a run failed; its log is named.
    """
    if benchmark.train_rows is None:
        raise InputError(f"{benchmark.source}: a tuned run is scored as it is; name its recipe to tune with templates")
    scored = {normalise_text(text) for text in benchmark.rows.texts}
    kept = [i for i, text in enumerate(benchmark.train_rows.texts) if normalise_text(text) not in scored]
    train_rows = benchmark.train_rows.take(kept)
    digest = _digest(benchmark.recipe.to_yaml(prompt=None, output_dir=None), train_rows.ids)
    data = benchmark.folder / f"rows-{digest}"
    train_file, eval_file = data / "train.jsonl", data / "eval.jsonl"
    results.write_rows(train_file, train_rows, benchmark.task.label_set)
    results.write_rows(eval_file, benchmark.rows, benchmark.task.label_set)
    runs, commands = [], []
    for k, template in enumerate(templates):
        run = RunProcess(k, template.folder.with_name(f"{template.folder.name}-{n_steps}-steps-{digest}"))
        own = {
            "prompt": str(Path(template.prompt.path).resolve()),
            "max_steps": n_steps,
            "eval_strategy": "no",  # scored once, at the end
            "select_best": None,
        }
        runs.append(run)
        commands.append([str(benchmark.source), *benchmark.overrides, *overrides_of(run, train_file, eval_file, own)])
    run_all(runs, commands, 1, show)
    return [run.folder for run in runs]


def ranking(folders: Sequence[Path], by: str) -> tuple[list[int], list[System]]:
    """Templates by macro-F1, the best first.

    Args:
        folders: what came of each template.
        by: `thresholds` (nested) or `answer`.

    Returns:
        Their positions in that order, and the systems that `compare` makes of them: differences are to the best.
    """
    label_set = label_set_of(folders[0])
    f1 = [system.metrics["f1_macro"] for system in compare(folders, label_set, by=by)]
    order = sorted(range(len(folders)), key=lambda k: -f1[k])
    return order, compare([folders[k] for k in order], label_set, by=by)


def ranking_table(templates: Sequence[Template], folders: Sequence[Path], by: str) -> Table:
    """The templates as a table, the best first; a difference is real if its 95 % interval leaves out 0."""
    order, systems = ranking(folders, by)
    figures = [read_figures(folders[k]) for k in order]
    view = Table(box=None, pad_edge=False)
    view.add_column("template", overflow="fold")
    headings = ["macro-F1, 95 %", "to the best", "real", "tokens"]
    if all("log_likelihood" in of for of in figures):
        headings += ["ln P", "texts/s"]
    for heading in headings:
        view.add_column(heading, justify="right", no_wrap=heading not in headings[:2])
    for k, system, of in zip(order, systems, figures, strict=True):
        encoder = templates[k].encoder
        cells = [with_interval(system.metrics["f1_macro"], system.interval), "", ""]
        if system is not systems[0]:
            real = system.difference_interval[1] < 0
            cells[1:] = [with_interval(system.difference, system.difference_interval, "+z"), "yes" if real else "no"]
        cells.append(
            f"{len(encoder.prefix_ids)} + {of['tokens']['row']:.0f}" if "tokens" in of else str(len(encoder.prefix_ids))
        )
        if "ln P" in headings:
            cells += [f"{of['log_likelihood']:.2f}", f"{of['texts_per_second']:.1f}"]
        view.add_row(Path(templates[k].prompt.path).stem, *cells)
    return view
