"""Prompt templates compared on the same rows and with the same model, and the differences that are significant.

runs/NAME-prompts/200-rows-1a2b3c4d/     one folder per set of rows, model and decoding (named by a digest of them)
    list-5e6f7a8b/                       what a template scores on them, named by it and a digest of its text:
                                         prompt.jinja, labels.yaml, predictions.jsonl, metrics.json (see `scores`)
    list-5e6f7a8b-200-steps-9c0d1e2f/    a run folder: the model tuned with this template for 200 steps
    rows-9c0d1e2f/                       the training rows of such runs, and the rows that they are scored on
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.run_folder import (
    ADAPTER,
    BASELINE,
    METRICS,
    kind_of,
    read_recipe,
)
from emogen.experiments.jobs import RunProcess, overrides_of, own_folder, run_all
from emogen.model.encode import Encoder, make_task_encoder
from emogen.model.tokenizer import TextTokenizer, read_chat_tokenizer
from emogen.prediction.ensemble import load_run
from emogen.prediction.generator import GenerativeClassifier
from emogen.prediction.remote import Endpoint
from emogen.task.prompt import Prompt, PromptError, fill, load_prompt, make_examples, render
from emogen.task.recipe import Recipe, load_recipe
from emogen.task.rows import Rows, normalise_text
from emogen.task.splits import all_rows, sample_rows
from emogen.task.task import Task, load_task, load_task_with_rows, prompt_warnings

log = logging.getLogger(__name__)

SCORES = 2  # raised when scores that are kept would now be others; those of 1 mixed up the instructions of templates


@dataclass(frozen=True)
class PromptBenchmark:
    """The rows and the model that templates are compared on.

    Attributes:
        task: what the recipe names; each template replaces its prompt.
        rows: n rows with gold labels that the model was not trained on.
        train_rows: the rows that a short tuning or nearest examples may use; None if the benchmark uses a tuned run.
        tokenizer: of the model; None for the model of an endpoint, whose tokens are not known.
        folder: what templates score on these rows.
        store: where the scores of single rows are kept; see `scores`.
        source: the recipe, or the run folder whose adapter is used.
        overrides: `key=value`, for the recipe.
        endpoint: where the model is, if it is behind one. All templates share what it may cost.
    """

    task: Task
    rows: Rows
    train_rows: Rows | None
    tokenizer: TextTokenizer | None
    folder: Path
    store: Path
    source: Path
    overrides: tuple[str, ...]
    endpoint: Endpoint | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe, or that of the tuned run."""
        return self.task.recipe

    def on(self, rows: Rows) -> "PromptBenchmark":
        """The same on other rows, whose scores have a folder of their own."""
        model = _digest_of_model(self.task, self.source, self.train_rows)
        digest = _digest(model, rows.ids, rows.texts, rows.truth.tolist())
        named = self.folder.with_name
        return replace(self, rows=rows, folder=named(f"{len(rows)}-rows-{digest}"), store=named(f"scores-{model}"))


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
    endpoint = Endpoint(recipe) if recipe.api_base else None
    everything = PromptBenchmark(
        task, rows, train_rows, tokenizer, folder / "rows", folder / "scores", source, tuple(overrides), endpoint
    )
    return everything.on(sample_rows(rows, limit, recipe.seed))


def _digest_of_model(task: Task, source: Path, train_rows: Rows | None) -> str:
    """A digest of everything that the answers depend on, except for the template and the text."""
    recipe = task.recipe
    weights = source / ADAPTER / "adapter_model.safetensors"
    shown = train_rows if recipe.examples_by == "nearest" else None  # those that are near a text are in its prompt
    return _digest(
        SCORES,
        recipe.model_name,
        [recipe.lm_args.get(key) for key in ("model_revision", "dtype", "load_in_4bit", "load_in_8bit")],
        hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
        [recipe.answer, recipe.decode, recipe.prob, recipe.max_length],
        [recipe.api_base, recipe.examples_by, recipe.examples] if recipe.api_base else None,
        [recipe.features, shown.texts, shown.truth.tolist()] if shown else None,
        task.label_set.to_yaml(),
    )


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Template:
    """A valid template with the folder of its scores and the warnings about it.

    Attributes:
        task: the task of the benchmark with this template.
        encoder: the template in tokens; None for the model of an endpoint.
        folder: what it scores on the rows of the benchmark.
        store: the scores of single rows.
    """

    prompt: Prompt
    task: Task
    encoder: Encoder | None
    folder: Path
    store: Path
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
    own = f"{Path(prompt.path).stem}-{_digest(prompt.source, examples)}"
    return Template(prompt, task, encoder, benchmark.folder / own, benchmark.store / own, warnings)


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
    if benchmark.recipe.api_base and style == "yes_no":  # as a recipe with both keys
        raise PromptError(f"{prompt.path}:{line}: the model of an endpoint is not asked one question for each label")
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
