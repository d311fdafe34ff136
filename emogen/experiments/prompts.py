"""Prompt templates compared on the same rows and with the same model, and the differences that are significant.

runs/NAME-prompts/200-rows-1a2b3c4d/     one folder per set of rows, model and decoding (named by a digest of them)
    list-5e6f7a8b/                       the scores of a template, named by it and a digest of its text: prompt.jinja,
                                         labels.yaml, predictions.jsonl, metrics.json; they are not computed again
    list-5e6f7a8b-200-steps-9c0d1e2f/    a run folder: the model tuned with this template for 200 steps
    rows-9c0d1e2f/                       the training rows of such runs, and the rows that they are scored on
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from emogen import paths
from emogen.claims import claim_folder
from emogen.console import Bar
from emogen.errors import InputError, ModelError
from emogen.evaluation import results
from emogen.evaluation.caveats import caveats, reference_line
from emogen.evaluation.metrics import check_prob, evaluate
from emogen.evaluation.results import parse_audit, pred_matrix
from emogen.evaluation.run_folder import (
    ADAPTER,
    BASELINE,
    LABELS,
    METRICS,
    PREDICTIONS,
    PROMPT,
    PROMPTS,
    kind_of,
    label_set_of,
    read_json,
    read_recipe,
    write_manifest,
)
from emogen.experiments.jobs import RunProcess, overrides_of, own_folder, run_all
from emogen.model.encode import Encoder, make_task_encoder
from emogen.model.tokenizer import TextTokenizer, read_chat_tokenizer
from emogen.prediction.classifier import Classifier, prob_of
from emogen.prediction.ensemble import load_run
from emogen.prediction.generator import GenerativeClassifier
from emogen.prediction.remote import RemoteClassifier
from emogen.report.compare import System, compare, with_interval
from emogen.task.prompt import Prompt, PromptError, fill, load_prompt, make_examples, render
from emogen.task.recipe import Recipe, load_recipe
from emogen.task.rows import Rows, normalise_text
from emogen.task.splits import all_rows, make_folds, sample_rows
from emogen.task.task import Task, load_task, load_task_with_rows, prompt_warnings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptBenchmark:
    """The rows and the model that templates are compared on.

    Attributes:
        task: what the recipe names; each template replaces its prompt.
        rows: n rows with gold labels that the model was not trained on.
        train_rows: the rows that a short tuning or nearest examples may use; None if the benchmark uses a tuned run.
        tokenizer: of the model; None for the model of an endpoint, whose tokens are not known.
        folder: where the scores of templates are kept.
        source: the recipe, or the run folder whose adapter is used.
        overrides: `key=value`, for the recipe.
    """

    task: Task
    rows: Rows
    train_rows: Rows | None
    tokenizer: TextTokenizer | None
    folder: Path
    source: Path
    overrides: tuple[str, ...]

    @property
    def recipe(self) -> Recipe:
        """The recipe, or that of the tuned run."""
        return self.task.recipe


def open_benchmark(
    path: str | Path, overrides: Sequence[str] = (), *, limit: int = 200, tuned: Path | None = None
) -> PromptBenchmark:
    """Load everything that a comparison of templates needs, except for the model.

    Args:
        path: a recipe. Its rows are those of its evaluation file, or else all that it has.
        limit: number of rows, a fixed stratified sample.
        tuned: a run folder: its model, labels and answer style are used, on its held-out rows.

    Raises:
        InputError: something is missing or wrong, or the model has no prompt.
        ModelError: the tokenizer cannot be loaded.
    """
    recipe = load_recipe(path, overrides)
    folder = own_folder(recipe, overrides, "prompts")
    source = Path(path)
    if tuned:
        source, overrides = tuned, ()
        recipe, _ = read_recipe(tuned)
    if recipe.answer == "head" or kind_of(source) == BASELINE:
        model = "a baseline" if kind_of(source) == BASELINE else "a head"
        raise InputError(f"{source}: {model} reads each text without a prompt; there is none to compare")
    train_rows = None
    if tuned:
        task = load_task(recipe)
        rows = results.read_held_out(tuned, task.label_set)
    else:
        task, splits, _ = load_task_with_rows(recipe)
        train_rows = splits.train
        has_eval_rows = bool(recipe.eval_file or recipe.dataset_test_split)
        rows = splits.eval if has_eval_rows and splits.eval is not None else all_rows(recipe, task.label_set)
    in_prompt = {normalise_text(example.text) for example in task.examples}
    rows = rows.take([i for i, text in enumerate(rows.texts) if normalise_text(text) not in in_prompt])
    tokenizer = None if recipe.api_base else read_chat_tokenizer(recipe, str(tuned / ADAPTER) if tuned else None)
    rows = sample_rows(rows, limit, recipe.seed)
    folder = folder / f"{len(rows)}-rows-{_digest_of_benchmark(task, rows, train_rows, source)}"
    return PromptBenchmark(task, rows, train_rows, tokenizer, folder, source, tuple(overrides))


def _digest_of_benchmark(task: Task, rows: Rows, train: Rows | None, source: Path) -> str:
    """A digest of everything that the scores of a template depend on, except for the template."""
    recipe = task.recipe
    weights = source / ADAPTER / "adapter_model.safetensors"
    return _digest(
        recipe.model_name,
        [recipe.lm_args.get(key) for key in ("model_revision", "dtype", "load_in_4bit", "load_in_8bit")],
        hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
        [recipe.answer, recipe.decode, recipe.prob, recipe.max_length],
        *([[recipe.api_base, recipe.examples_by, recipe.examples]] if recipe.api_base else []),
        *([[recipe.features, train.texts, train.truth.tolist()]] if recipe.examples_by == "nearest" and train else []),
        task.label_set.to_yaml(),
        [rows.ids, rows.texts, rows.truth.tolist()],
    )


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Template:
    """A valid template with the folder of its scores and the warnings about it.

    Attributes:
        task: the task of the benchmark with this template.
        encoder: the template in tokens; None for the model of an endpoint.
    """

    prompt: Prompt
    task: Task
    encoder: Encoder | None
    folder: Path
    warnings: list[str]

    @property
    def name(self) -> str:
        """The file name without its ending."""
        return Path(self.prompt.path).stem

    @property
    def done(self) -> bool:
        """Whether it has been scored."""
        return (self.folder / METRICS).is_file()


def prepare(benchmark: PromptBenchmark, prompt: Prompt) -> Template:
    """Check and encode a template for a benchmark.

    An untuned model answers in the style that the template declares, and a tuned one in the style of its run.

    Raises:
        InputError: the template is not valid, or declares another style than that of the tuned run; the message names
            file and line.
    """
    task = _with_prompt(benchmark, prompt)
    warnings = [str(warning) for warning in prompt_warnings(task)]
    if prompt.style is not None and prompt.style[0] != benchmark.recipe.answer:
        style, line = prompt.style
        own = f"the recipe has `answer: {benchmark.recipe.answer}`"
        warnings.append(f"{prompt.path}:{line}: is used with `answer: {style}`, which it asks for; {own}")
    encoder = make_task_encoder(task, benchmark.tokenizer) if benchmark.tokenizer else None
    _check_leak(task, benchmark.rows)
    examples = [repr(example) for example in task.examples if "examples" in prompt.variables]
    folder = benchmark.folder / f"{Path(prompt.path).stem}-{_digest(prompt.source, examples)}"
    return Template(prompt, task, encoder, folder, warnings)


def _with_prompt(benchmark: PromptBenchmark, prompt: Prompt) -> Task:
    """The task of a benchmark with another prompt, and with the answer style that the prompt declares if it may."""
    task = benchmark.task
    if prompt.style is None or prompt.style[0] == task.recipe.answer:
        return replace(task, prompt=prompt)
    style, line = prompt.style
    if benchmark.train_rows is None:
        raise PromptError(
            f"{prompt.path}:{line}: the template asks for `answer: {style}`, but {benchmark.source} was tuned with "
            f"`answer: {task.recipe.answer}`"
        )
    examples = make_examples([(example.text, example.labels) for example in task.examples], task.label_set, style)
    recipe = task.recipe.model_copy(update={"answer": style})
    return Task(recipe, task.label_set, prompt, examples)


def load_templates(benchmark: PromptBenchmark, files: Sequence[str | Path]) -> tuple[list[Template], list[str]]:
    """Load templates from files.

    Returns:
        The valid templates, and the error messages of the others.
    """
    accepted, refused = [], []
    for file in files:
        try:
            accepted.append(prepare(benchmark, load_prompt(file)))
        except InputError as error:
            refused.append(str(error))
    for warning in dict.fromkeys(warning for template in accepted for warning in template.warnings):
        log.warning(warning)
    return accepted, refused


def _check_leak(task: Task, rows: Rows) -> None:
    """Refuse a template that contains the text of a row: the answer to that row may be in it, too."""
    prompt, examples = task.prompt, task.examples
    label = task.label_set.labels[0] if task.recipe.answer == "yes_no" else None
    messages = fill(render(prompt, task.label_set, examples, label), ["", *(example.text for example in examples)])
    content = normalise_text(" ".join(message["content"] for message in messages))
    for row_id, text in zip(rows.ids, rows.texts, strict=True):
        words = normalise_text(text)
        if len(words) >= 12 and words in content:
            lines = prompt.source.splitlines()
            # The text may span lines: it starts on the last line from which the rest of the template contains it.
            starts = [n for n in range(len(lines)) if words in normalise_text("\n".join(lines[n:]))]
            where = f"{prompt.path}:{starts[-1] + 1}" if starts else prompt.path
            raise PromptError(f"{where}: the prompt contains the text of row {row_id}, which it is scored on")


def load_generator(benchmark: PromptBenchmark) -> GenerativeClassifier | None:
    """Load the model of a benchmark; None for the model of an endpoint.

    Its encoder is that of its own prompt; `score_template` replaces it.
    """
    if benchmark.recipe.api_base:
        return None
    generator = load_run(benchmark.source, benchmark.overrides)
    assert isinstance(generator, GenerativeClassifier)
    return generator


def score_template(
    benchmark: PromptBenchmark, template: Template, generator: GenerativeClassifier | None, bar: Bar
) -> dict[str, Any]:
    """Score a template, and keep its metrics and predictions in its folder. A second call only reads them.

    Args:
        generator: what `load_generator` returned; None will do if the template is done.

    Returns:
        The metrics of `evaluate`, and `texts_per_second`, of the answers alone, and `parse`. Beside them, but not for
        the model of an endpoint: `log_likelihood`, of the true answers, in nats, the mean over the texts (with
        `yes_no`, the sum of all questions of a text); and `tokens`, of the instruction (`shared`) and the mean of what
        follows it per question (`row`).

    Raises:
        ModelError: a probability or a likelihood is not a number, or the endpoint fails.
    """
    if template.done:
        return read_metrics(template.folder)
    with claim_folder(template.folder):
        return _score(benchmark, template, generator, bar)


def _score(
    benchmark: PromptBenchmark, template: Template, generator: GenerativeClassifier | None, bar: Bar
) -> dict[str, Any]:
    rows, label_set = benchmark.rows, benchmark.task.label_set
    classifier: Classifier
    if template.encoder is None:
        classifier = RemoteClassifier(template.task, benchmark.train_rows)
    else:
        assert generator is not None
        classifier = generator = replace(generator, encoder=template.encoder)
    started = time.perf_counter()
    with bar(f"{template.name}: answers", len(rows) * classifier.n_questions) as advance:
        predictions = classifier.predict(rows.texts, progress=advance)
    seconds = time.perf_counter() - started
    pred = pred_matrix(predictions)
    if generator is None:
        prob = pred.astype(np.float32)
    else:
        prob = prob_of(generator, rows.texts, predictions, bar, f"{template.name}: probabilities")
    check_prob(prob)
    try:
        folds = make_folds(rows, 5, benchmark.recipe.seed)
    except ValueError:
        folds = None  # too few rows for nested thresholds
    metrics = evaluate(rows.truth, pred, prob, None if label_set.exactly_one else folds, label_set.names) | {
        "texts_per_second": len(rows) / seconds,
        "parse": parse_audit(predictions),
    }
    if generator is not None:
        metrics |= _likelihood(benchmark, template, generator, bar)
    for name, text in {PROMPT: template.prompt.source, LABELS: label_set.to_yaml()}.items():
        with paths.writing(template.folder / name) as file:
            file.write(text)
    results.write_jsonl(template.folder / PREDICTIONS, rows, pred, prob, label_set, predictions, folds)
    write_manifest(template.folder, PROMPTS, model=benchmark.recipe.model_name)
    paths.write_json(template.folder / METRICS, metrics)  # last: a template with metrics is done
    return metrics


def _likelihood(
    benchmark: PromptBenchmark, template: Template, generator: GenerativeClassifier, bar: Bar
) -> dict[str, Any]:
    """The log-likelihood of the true answers and the numbers of tokens, as metrics."""
    from emogen.model.probabilities import log_likelihood

    rows, label_set, encoder = benchmark.rows, benchmark.task.label_set, generator.encoder
    true_answers = [  # one per question
        row
        for text, truth in zip(rows.texts, rows.truth, strict=True)
        for row in encoder.rows(text, label_set.names_of(truth))
    ]
    with bar(f"{template.name}: likelihood", len(rows) * generator.n_questions) as advance:
        found = log_likelihood(generator.model, encoder, true_answers, progress=advance)
    if not np.isfinite(found).all():
        n_wrong = (~np.isfinite(found)).sum()
        raise ModelError(f"{template.name}: the likelihood of {n_wrong} true answers is not a number")
    tokens = {"shared": len(encoder.prefix_ids), "row": float(np.mean([len(row) for row in true_answers]))}
    return {"log_likelihood": float(found.sum() / len(rows)), "tokens": tokens}


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a scored template or of a run.

    Raises:
        InputError: the file is not valid.
    """
    metrics = read_json(folder / METRICS)
    if "f1_macro" not in metrics:
        raise InputError(f"{folder / METRICS}: it has no f1_macro; was the file changed? Remove it to score again")
    return metrics


def tune_templates(
    benchmark: PromptBenchmark,
    templates: Sequence[Template],
    n_steps: int,
    *,
    show: Callable[[list[RunProcess]], Any] = lambda runs: None,
) -> list[Path]:
    """Tune the model with each template for the same number of steps, and score it on the rows of the benchmark.

    The same call resumes an interrupted one.

    Args:
        show: called twice a second with all runs, while they run.

    Returns:
        A run folder per template.

    Raises:
        InputError: the benchmark uses a tuned run.
        ModelError: a run failed; the message names its log.
    """
    benchmark.recipe.require_own_model("is not tuned")
    if benchmark.train_rows is None:
        raise InputError(f"{benchmark.source}: already tuned; name its recipe to tune it with other templates")
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
            "answer": template.task.recipe.answer,
            "max_steps": n_steps,
            "eval_strategy": "no",  # scored once, at the end
            "select_best": None,
        }
        runs.append(run)
        commands.append([str(benchmark.source), *benchmark.overrides, *overrides_of(run, train_file, eval_file, own)])
    run_all(runs, commands, 1, show)
    return [run.folder for run in runs]


def ranking(folders: Sequence[Path], by: str) -> tuple[list[int], list[System]]:
    """Rank templates by macro-F1, the best first.

    Args:
        folders: the folder of each template, or of its run.
        by: `thresholds` (nested) or `answer`.

    Returns:
        The positions of the folders in that order, and their systems in the same order, with the difference of each to
        the best one.
    """
    label_set = label_set_of(folders[0])
    f1 = [system.metrics["f1_macro"] for system in compare(folders, label_set, by=by)]
    order = sorted(range(len(folders)), key=lambda k: -f1[k])
    return order, compare([folders[k] for k in order], label_set, by=by)


def ranking_table(templates: Sequence[Template], folders: Sequence[Path], by: str) -> tuple[Table, list[str]]:
    """Rank templates, the best first. A difference is real if its 95 % interval excludes 0.

    Returns:
        A table, and what a reader has to know about it, in sentences.
    """
    order, systems = ranking(folders, by)
    metrics = [read_metrics(folders[k]) for k in order]
    has_likelihood = all("log_likelihood" in template_metrics for template_metrics in metrics)
    view = Table(box=None, pad_edge=False)
    view.add_column("template", overflow="fold")
    for heading in ("macro-F1, 95 %", "to the best"):
        view.add_column(heading, justify="right")
    for heading in ("real", "tokens", *(("ln P", "texts/s") if has_likelihood else ())):
        view.add_column(heading, justify="right", no_wrap=True)
    for k, system, template_metrics in zip(order, systems, metrics, strict=True):
        cells = [with_interval(system.metrics["f1_macro"], system.interval), "", ""]
        if system is not systems[0]:
            ends = system.difference_interval
            is_real = "?" if ends is None else "yes" if ends[1] < 0 else "no"
            cells[1:] = [with_interval(system.difference, ends, "+z"), is_real]
        encoder, tokens = templates[k].encoder, template_metrics.get("tokens")
        n_shared = str(len(encoder.prefix_ids)) if encoder else ""
        cells.append(f"{n_shared} + {tokens['row']:.0f}" if tokens else n_shared)
        if has_likelihood:
            cells += [f"{template_metrics['log_likelihood']:.2f}", f"{template_metrics['texts_per_second']:.1f}"]
        view.add_row(templates[k].name, *cells)
    notes = caveats([(templates[k].name, system.metrics) for k, system in zip(order, systems, strict=True)])
    return view, [reference_line(systems[0].metrics), *notes]
