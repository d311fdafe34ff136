"""A search for a better prompt: other wordings of the marked blocks of a template, and other keys of the recipe.

Each round tries changes of the best prompt so far: every single one, at first some random combinations, and wordings
that a model behind an endpoint proposes for rows that are wrong (reflection, as in GEPA, Agrawal et al. 2025, arXiv
2507.19457). Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) drops the worse half of them on ever
more rows. The last ones are compared by macro-F1 on all rows of the search, and the best one is scored once on rows
that the search never saw.

The package `gepa` is not used: it is a whole search with a state and a budget of its own, kept as a pickle, of which
only the question to the model would be left.

runs/NAME-prompts/
    improve-500-rows-1a2b3c4d/        what was found; named like the rows that no search sees
        mine-5e6f7a8b.jinja           a template that was found, named by a digest of its text
        mine-tried.csv                everything that was tried for mine.jinja
        unseen.json                   what was scored on those rows
    200-rows-1a2b3c4d/mine-.../       the scores of a template (see prompts.py), and row_scores.json: its figure for
                                      each row that it was tried on
"""

import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, product
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from emogen import paths
from emogen.claims import claim_folder
from emogen.console import Bar
from emogen.errors import InputError
from emogen.evaluation.metrics import MIN_ROWS, Interval, row_jaccard
from emogen.evaluation.results import pred_matrix, read_records
from emogen.evaluation.run_folder import PREDICTIONS, read_json
from emogen.experiments.prompts import (
    PromptBenchmark,
    Template,
    load_generator,
    open_benchmark,
    prepare,
)
from emogen.experiments.scores import likelihood, score_template
from emogen.prediction.generator import GenerativeClassifier
from emogen.prediction.remote import BudgetError, Endpoint, RemoteClassifier
from emogen.report.compare import System, compare
from emogen.task.blocks import BlockTemplate, find_blocks
from emogen.task.delimited import csv_text
from emogen.task.prompt import VARIABLES, Message, load_prompt, parse_prompt
from emogen.task.recipe import load_recipe
from emogen.task.rows import Rows, normalise_text
from emogen.task.splits import hold_out, sample_rows
from emogen.task.task import load_task_with_rows

log = logging.getLogger(__name__)

ROW_SCORES, UNSEEN = "row_scores.json", "unseen.json"
ORDERS = ("canonical", "frequent_first", "rare_first")
EXAMPLES = (0, 2, 4, 8)  # numbers of few-shot examples
FIRST_ROUND = 48  # candidates
MIN_RUNG = 20  # rows of the first halving, at least
FINALISTS = 3  # candidates that are scored in full in each round
REWRITES = 4  # wordings that the endpoint is asked for in each round
SHOWN_ROWS = 8  # wrong rows that it sees for each
REWRITE_TOKENS = 1024
PATIENCE = 2  # rounds of new wordings without a better one
_TAGS = re.compile(r"\{%[-+]?\s*(?:system|user|assistant|answer)\b|\{#")  # what a proposed wording may not contain

Choice = tuple[int, ...]  # for each block and each group of keys the number of its option; 0 is as it is now


@dataclass
class Space:
    """What can be changed.

    Attributes:
        template: the template that the search starts from.
        wordings: for each block its texts. The endpoint adds to them.
        keys: for each group of keys its options, each with its overrides of the recipe.
    """

    template: BlockTemplate
    wordings: list[list[str]]
    keys: list[list[tuple[str, ...]]]

    @property
    def sizes(self) -> list[int]:
        """The number of options of each block and each group of keys."""
        return [*map(len, self.wordings), *map(len, self.keys)]

    def source(self, choice: Choice) -> str:
        """The text of the template."""
        return self.template.source([texts[k] for texts, k in zip(self.wordings, choice, strict=False)])

    def overrides(self, choice: Choice) -> tuple[str, ...]:
        """The overrides of the recipe."""
        chosen = zip(self.keys, choice[len(self.wordings) :], strict=True)
        return tuple(override for options, k in chosen for override in options[k])

    def all_overrides(self) -> list[tuple[str, ...]]:
        """The overrides of every choice."""
        own = (0,) * len(self.wordings)
        return [self.overrides((*own, *chosen)) for chosen in product(*map(range, map(len, self.keys)))]

    def name(self, choice: Choice) -> str:
        """What differs from the start, such as `opening 2, order=rare_first`."""
        parts = []
        for block, k in zip(self.template.blocks, choice, strict=False):
            own = len(block.texts)
            if k:
                parts.append(f"{block.name} {k + 1}" if k < own else f"{block.name} rewritten {k - own + 1}")
        return ", ".join([*parts, *self.overrides(choice)]) or "as it is"

    def neighbours(self, choice: Choice) -> list[Choice]:
        """All choices with one change."""
        return [
            (*choice[:i], k, *choice[i + 1 :])
            for i, size in enumerate(self.sizes)
            for k in range(size)
            if k != choice[i]
        ]


@dataclass(frozen=True)
class Tried:
    """A candidate of a search.

    Attributes:
        name: what differs from the start.
        rows: the number of rows that it was tried on before it was dropped.
        gain: the mean figure of these rows minus that of the start, with its 95 % interval.
        system: its macro-F1 on all rows, and the difference to that of the start; None if it was dropped before.
        refused: why it could not be tried, or None.
    """

    name: str
    rows: int = 0
    gain: float | None = None
    gain_interval: Interval = None
    system: System | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Improvement:
    """What a search found.

    Attributes:
        tried: the candidates, the best first.
        figure: the figure by which candidates were dropped.
        n_rows: the number of rows of the search.
        best: the name of the best candidate.
        template: its template: a new file, or the one that the search started from, if only keys differ.
        overrides: the overrides of the recipe to use it with.
        unseen: the start and the best candidate on rows that the search never saw; nothing if the start is the best
            one.
        unseen_folders: the folders of these scores.
        n_looks: the number of prompts that were scored on those rows so far, without starts.
        stopped: what ended the search before its end, or None.
        folder: where everything is kept.
    """

    tried: list[Tried]
    figure: str
    n_rows: int
    best: str
    template: Path
    overrides: tuple[str, ...]
    unseen: list[System]
    unseen_folders: list[Path]
    n_looks: int
    stopped: str | None
    folder: Path


class _OutOfTime(Exception):
    """The minutes of a search are over."""


def improve(
    path: str | Path,
    template_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    limit: int = 200,
    unseen: int = 1000,
    tuned: Path | None = None,
    minutes: float | None = None,
    rewriter: str | Path | None = None,
    by: str = "thresholds",
    bar: Bar,
) -> Improvement:
    """Search for a better prompt. The same call continues an interrupted one: scores are not computed again.

    Args:
        path: a recipe with rows to score on (`eval_file`, `eval_fraction`). The search has its training rows.
        overrides: `key=value`. A key that they set is not searched over.
        limit: number of rows of the search.
        unseen: number of rows of the final score, at most.
        tuned: a run folder, whose adapter is used. Its held-out rows are divided: one half for the search, the other
            for the final score. Only the wording is searched over: everything else is what the run was tuned with.
        minutes: after these the search ends, and its best candidate is scored.
        rewriter: a recipe with an endpoint (`api_base`) that proposes wordings; by default that of the recipe, if it
            has one.
        by: how labels are decided: `thresholds` (nested) or `answer`.

    Raises:
        InputError: a part is missing or invalid, or there is nothing to change.
        ModelError: the model or the endpoint fails.
    """
    base = open_benchmark(path, overrides, limit=sys.maxsize, tuned=tuned)
    recipe = base.recipe
    held_out = base.rows if tuned else load_task_with_rows(recipe)[1].eval
    if held_out is None:
        raise InputError(
            f"{path}: no rows for the final score: set eval_file or eval_fraction, as in eval_fraction=0.3"
        )
    prompt = load_prompt(template_path)
    space = open_space(base, find_blocks(prompt), overrides)
    asked, asked_last = _half(base.endpoint), _half(base.endpoint)  # by the search, and for the final score
    proposer = _open_rewriter(rewriter) if rewriter else asked
    if max(space.sizes, default=0) < 2 and not (proposer and space.wordings):
        raise InputError(
            f"{prompt.path}: nothing to change: put {{# improve: NAME #}} before a block and {{# end #}} after it, and "
            "write other wordings into it as {# or: TEXT #}"
        )
    benchmarks = {keys: _with_keys(base, path, [*overrides, *keys]) for keys in space.all_overrides()}
    search_rows, unseen_rows = _divide(held_out, list(benchmarks.values()), limit, unseen)
    if not len(search_rows) or not len(unseen_rows):
        raise InputError(
            f"{path}: too few rows: {len(search_rows)} for the search, {len(unseen_rows)} for the final score"
        )
    searched = {keys: replace(each, endpoint=asked).on(search_rows) for keys, each in benchmarks.items()}
    final = {keys: replace(each, endpoint=asked_last).on(unseen_rows) for keys, each in benchmarks.items()}
    start = prepare(final[()], prompt)  # refuses a template that shows a row which the search does not see
    folder = final[()].folder.with_name(f"improve-{final[()].folder.name}")
    with claim_folder(folder):
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        search = _Search(space, searched, load_generator(base), proposer, by, deadline, bar)
        search.run()
        best, tried = search.best(), search.tried()
        _write_tried(folder / f"{start.name}-tried.csv", tried, search.figure)
        template, found = search.templates[best], Path(prompt.path)
        for warning in template.warnings:
            log.warning(warning)
        folders: list[Path] = []
        seen = read_json(folder / UNSEEN) if (folder / UNSEEN).is_file() else {}
        if best != search.start:
            if space.source(best) != space.source(search.start):
                found = folder / f"{template.folder.name}.jinja"
                with paths.writing(found) as file:
                    file.write(template.prompt.source)
            seen[f"{template.folder.parent.name}/{template.folder.name}"] = space.name(best)
            paths.write_json(folder / UNSEEN, seen)
            for choice in (search.start, best):
                benchmark = final[space.overrides(choice)]
                own = prepare(benchmark, search.templates[choice].prompt)
                score_template(benchmark, own, search.generator, bar)
                folders.append(own.folder)
    style = template.task.recipe.answer
    return Improvement(
        tried=tried,
        figure=search.figure,
        n_rows=len(search_rows),
        best=space.name(best),
        template=found,
        overrides=(*space.overrides(best), *([f"answer={style}"] if style != recipe.answer else [])),
        unseen=compare(folders, base.task.label_set, by=by) if folders else [],
        unseen_folders=folders,
        n_looks=len(seen),
        stopped=search.stopped,
        folder=folder,
    )


def open_space(benchmark: PromptBenchmark, template: BlockTemplate, overrides: Sequence[str]) -> Space:
    """What a search may change: the wording of blocks, and keys of the recipe that the command line does not set.

    Of a tuned model the wording alone: the keys are those that it was tuned with.
    """
    space = Space(template, [list(block.texts) for block in template.blocks], [])
    if benchmark.train_rows is None:
        return space
    recipe, given = benchmark.recipe, {override.partition("=")[0] for override in overrides}
    if "order" not in given:
        space.keys.append([(), *((f"order={order}",) for order in ORDERS if order != recipe.order)])
    if not given & {"examples", "examples_by"} and _shows_examples(space):
        ways = ("drawn", "coverage", *(("nearest",) if recipe.api_base else ()))
        pairs = [(0, "drawn"), *((n, by) for n in EXAMPLES[1:] for by in ways)]
        others = [pair for pair in pairs if pair != (recipe.examples, recipe.examples_by)]
        space.keys.append([(), *((f"examples={n}", f"examples_by={by}") for n, by in others)])
    return space


def _shows_examples(space: Space) -> bool:
    """Whether the template, or one with another wording, shows few-shot examples."""
    start = (0,) * len(space.sizes)
    for choice in [start, *space.neighbours(start)]:
        with suppress(InputError):  # it is refused, with its reason, when it is tried
            if "examples" in parse_prompt(space.source(choice)).variables:
                return True
    return False


def _open_rewriter(path: str | Path) -> Endpoint:
    """The endpoint of a recipe."""
    recipe = load_recipe(path)
    if not recipe.api_base:
        raise InputError(f"{path}: it names no endpoint that could propose wordings; set api_base")
    return Endpoint(recipe)


def _half(endpoint: Endpoint | None) -> Endpoint | None:
    """The endpoint with half of `max_dollars`: a search may spend that much, and the final score the other half."""
    if endpoint is None or endpoint.recipe.max_dollars is None:
        return endpoint
    return Endpoint(endpoint.recipe.model_copy(update={"max_dollars": endpoint.recipe.max_dollars / 2}))


def _with_keys(base: PromptBenchmark, path: str | Path, overrides: Sequence[str]) -> PromptBenchmark:
    """The benchmark of a recipe with other keys: its order of labels, and the examples that it draws."""
    if base.train_rows is None:
        return base
    task, splits, _ = load_task_with_rows(load_recipe(path, overrides))
    return replace(base, task=task, train_rows=splits.train)


def _divide(held_out: Rows, benchmarks: Sequence[PromptBenchmark], limit: int, unseen: int) -> tuple[Rows, Rows]:
    """The rows of the search, in random order, and those of the final score. No candidate shows one as an example.

    The search has training rows; with a tuned model, one half of the rows that it was not trained on.
    """
    seed, train_rows = benchmarks[0].recipe.seed, benchmarks[0].train_rows
    shown = {normalise_text(example.text) for benchmark in benchmarks for example in benchmark.task.examples}
    final = _without(held_out, shown)
    if train_rows is None:
        rest, last = hold_out(final, 0.5, seed)
        rows, final = final.take(rest), final.take(last)
    else:
        rows = _without(train_rows, shown | set(map(normalise_text, final.texts)))
    rows = sample_rows(rows, limit, seed)
    return rows.take(np.random.default_rng(seed).permutation(len(rows))), sample_rows(final, unseen, seed)


def _without(rows: Rows, texts: set[str]) -> Rows:
    return rows.take([i for i, text in enumerate(rows.texts) if normalise_text(text) not in texts])


class _Search:
    """The state of a search.

    Attributes:
        start: the choice that changes nothing.
        templates: each candidate that was looked at.
        refused: why a candidate cannot be tried.
        stopped: what ended the search before its end, or None.
    """

    def __init__(
        self,
        space: Space,
        benchmarks: Mapping[tuple[str, ...], PromptBenchmark],
        generator: GenerativeClassifier | None,
        rewriter: Endpoint | None,
        by: str,
        deadline: float | None,
        bar: Bar,
    ):
        self.space, self.benchmarks, self.generator = space, benchmarks, generator
        self.rewriter, self.by, self.deadline, self.bar = rewriter, by, deadline, bar
        self.start: Choice = (0,) * len(space.sizes)
        self.templates: dict[Choice, Template] = {}
        self.refused: dict[Choice, str] = {}
        self.stopped: str | None = None
        self._rows = benchmarks[()].rows
        self._figures: dict[Choice, np.ndarray] = {}  # of the first rows
        self._scored: list[Choice] = []  # in full, the start first

    @property
    def figure(self) -> str:
        """The figure by which candidates are dropped.

        It is the log-likelihood of the true answer among all valid ones. Over the whole vocabulary it would mostly tell
        whether a prompt shows the form of an answer, which constrained decoding sees to. The model of an endpoint gives
        no likelihood, but answers.
        """
        return "ln P" if self.generator else "Jaccard"

    def run(self) -> None:
        """Search until no change of the best prompt is better, or time or dollars are over."""
        if not self._admit(self.start):
            raise InputError(self.refused[self.start])
        self._score(self.start)
        self._look_at(self.start, len(self._rows))
        best, idle = self.start, 0
        try:
            for n_round in count():
                candidates = [choice for choice in self._propose(best, n_round) if self._admit(choice)]
                if candidates:
                    for choice in self._halve([best, *candidates]):
                        self._check_time()
                        self._score(choice)
                before, best = best, self.best()
                idle = idle + 1 if best == before else 0
                if idle == (PATIENCE if self.rewriter else 1):
                    return
        except (_OutOfTime, BudgetError) as reason:
            self.stopped = str(reason)
        leader = self._leader()
        if leader and self.generator:  # without dollars, nothing more can be asked
            self._score(leader)

    def best(self) -> Choice:
        """The candidate with the highest macro-F1 on all rows."""
        f1 = [system.metrics["f1_macro"] for system in self._systems()]
        return self._scored[int(np.argmax(f1))]

    def tried(self) -> list[Tried]:
        """Everything that was tried: what was scored in full first, by macro-F1; then by rows and figures."""
        systems = dict(zip(self._scored, self._systems(), strict=True))
        found = []
        for choice in self.templates:
            n = len(self._figures.get(choice, ()))
            gain, ends = self._gain(choice, n) if n else (None, None)
            found.append(Tried(self.space.name(choice), n, gain, ends, systems.get(choice)))
        found.sort(
            key=lambda each: (-each.system.metrics["f1_macro"] if each.system else 1, -each.rows, -(each.gain or 0))
        )
        return [*found, *(Tried(self.space.name(choice), refused=why) for choice, why in self.refused.items())]

    def _gain(self, choice: Choice, n: int) -> tuple[float, Interval]:
        """The mean figure of the first n rows minus that of the start, and its 95 % interval."""
        gains = self._figures[choice] - self._figures[self.start][:n]
        mean = float(gains.mean())
        if n < MIN_ROWS or not gains.any():
            return mean, None
        half = 1.96 * float(gains.std(ddof=1)) / n**0.5
        return mean, (mean - half, mean + half)

    def _systems(self) -> list[System]:
        folders = [self.templates[choice].folder for choice in self._scored]
        return compare(folders, self.benchmarks[()].task.label_set, by=self.by)

    def _admit(self, choice: Choice) -> bool:
        """Check a candidate that is new; False if it cannot be tried, or was looked at before."""
        if choice in self.templates or choice in self.refused:
            return False
        try:
            prompt = parse_prompt(self.space.source(choice), self.space.template.prompt.path)
            template = prepare(self.benchmarks[self.space.overrides(choice)], prompt)
        except InputError as error:
            self.refused[choice] = str(error)
            return False
        if any(template.folder == other.folder for other in self.templates.values()):
            return False  # another number of examples, which this wording does not show
        self.templates[choice] = template
        return True

    def _propose(self, best: Choice, n_round: int) -> list[Choice]:
        """Changes of the best candidate: every single one; in the first round also random combinations of all."""
        proposed = self.space.neighbours(best)
        if n_round == 0:
            rng = np.random.default_rng(self._seed)
            n_more = min(FIRST_ROUND - len(proposed), int(np.prod(self.space.sizes)) - 1 - len(proposed))
            known = {best, *proposed}
            while n_more > 0:
                choice = tuple(int(rng.integers(size)) for size in self.space.sizes)
                if choice not in known:
                    known.add(choice)
                    proposed.append(choice)
                    n_more -= 1
        return [*proposed, *self._rewrite(best, n_round)]

    @property
    def _seed(self) -> int:
        return self.benchmarks[()].recipe.seed

    def _rewrite(self, best: Choice, n_round: int) -> list[Choice]:
        """The best candidate with wordings that the endpoint proposes, each for one block and some wrong rows."""
        blocks = [k for k, texts in enumerate(self.space.wordings) if not _TAGS.search(texts[best[k]])]
        records = read_records(self.templates[best].folder / PREDICTIONS)
        wrong = [record for record in records if set(record["labels"]) != set(record["gold"])]
        if not self.rewriter or not blocks or not wrong:
            return []
        order = np.random.default_rng(self._seed).permutation(len(wrong))
        proposed = []
        for i in range(n_round * REWRITES, (n_round + 1) * REWRITES):
            self._check_time()
            k = blocks[i % len(blocks)]
            shown = [wrong[order[j % len(wrong)]] for j in range(i * SHOWN_ROWS, (i + 1) * SHOWN_ROWS)]
            answer = self.rewriter.answer(self._question(best, k, shown), REWRITE_TOKENS)
            text = re.fullmatch(r".*<block>(.*)</block>.*", answer, re.DOTALL)
            if text is None or _TAGS.search(text[1]):
                log.warning(f"a proposal is not used: it has no text in <block>, or begins a turn: {answer[:80]!r}")
                continue
            self.space.wordings[k].append(self.space.template.blocks[k].fit(text[1]))
            proposed.append((*best[:k], len(self.space.wordings[k]) - 1, *best[k + 1 :]))
        return proposed

    def _question(self, best: Choice, k: int, wrong: Sequence[dict[str, Any]]) -> list[Message]:
        """Ask for another wording of block k."""
        label_set = self.benchmarks[()].task.label_set
        name, own = self.space.template.blocks[k].name, self.space.wordings[k][best[k]].strip()
        cases = [
            f"Text: {record['text']}\nRight labels: {', '.join(record['gold']) or label_set.empty}\n"
            f"Given labels: {', '.join(record['labels']) or label_set.empty}"
            for record in wrong
        ]
        parts = [
            "A language model labels texts. Its prompt is made from this template, a Jinja file:",
            f"<template>\n{self.space.source(best)}\n</template>",
            f"The block {name!r} of it, between its marks, is to be improved. It says now:",
            f"<block>\n{own}\n</block>",
            "A block may use these Jinja variables: "
            + "; ".join(
                f"{variable}: {what}" for variable, what in VARIABLES.items() if variable not in ("text", "label")
            ),
            "With this prompt the model was wrong about these texts:",
            *cases,
            "What does the block not tell the model that it needs for such texts? Write a better block: short, "
            "general, and without quoting a text. Keep the form of the answer that the template asks for. End with the "
            "new block alone, between <block> and </block>.",
        ]
        return [{"role": "user", "content": "\n\n".join(parts)}]

    def _halve(self, choices: Sequence[Choice]) -> list[Choice]:
        """Drop the worse half of the candidates again and again, on twice as many rows each time.

        Returns:
            The best `FINALISTS`.
        """
        left = list(choices)
        n = len(self._rows)
        for m in sorted({n, *(m for m in (n // 8, n // 4, n // 2) if m >= MIN_RUNG)}):
            with self.bar(f"{m} rows", len(left)) as advance:
                for choice in left:
                    self._check_time()
                    self._look_at(choice, m)
                    advance(1)
            left.sort(key=lambda choice: -self._figures[choice][:m].mean())
            del left[FINALISTS if m == n else max(FINALISTS, ceil(len(left) / 2)) :]
        return left

    def _leader(self) -> Choice | None:
        """The best of the candidates that were tried on the most rows, but not scored in full."""
        figures = {choice: own for choice, own in self._figures.items() if choice not in self._scored and len(own)}
        return max(figures, key=lambda choice: (len(figures[choice]), figures[choice].mean()), default=None)

    def _look_at(self, choice: Choice, m: int) -> None:
        """Compute the figure of a candidate for the first m rows, and keep it."""
        template = self.templates[choice]
        kept = template.folder / ROW_SCORES
        if choice not in self._figures:
            self._figures[choice] = np.array(read_json(kept)[self.figure]) if kept.is_file() else np.zeros(0)
        done = len(self._figures[choice])
        if done >= m:
            return
        rows = self._rows.take(range(done, m))
        if self.generator:
            assert template.encoder is not None
            more = likelihood(replace(self.generator, encoder=template.encoder), rows, template.name, among_valid=True)
        else:
            benchmark = self.benchmarks[self.space.overrides(choice)]
            classifier = RemoteClassifier(template.task, benchmark.train_rows, benchmark.endpoint)
            more = row_jaccard(rows.truth, pred_matrix(classifier.predict(rows.texts)))
        self._figures[choice] = np.concatenate([self._figures[choice], more])
        paths.write_json(kept, {self.figure: self._figures[choice].tolist()})

    def _score(self, choice: Choice) -> None:
        """Score a candidate on all rows."""
        if choice not in self._scored:
            benchmark = self.benchmarks[self.space.overrides(choice)]
            score_template(benchmark, self.templates[choice], self.generator, self.bar)
            self._scored.append(choice)

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise _OutOfTime("--minutes are over; the same command with more of them goes on from here")


def _write_tried(path: Path, tried: Sequence[Tried], figure: str) -> None:
    """Write everything that was tried as a CSV file."""
    ends = ("low", "high")
    lines = [
        ["candidate", "rows", f"{figure} to start", *ends, "f1_macro", *ends, "f1_macro to start", *ends, "refused"]
    ]
    for each in tried:
        cells = [each.name, str(each.rows), *_cells(each.gain, each.gain_interval)]
        if each.system:
            cells += _cells(each.system.metrics["f1_macro"], each.system.interval)
            cells += _cells(each.system.difference, each.system.difference_interval)
        else:
            cells += [""] * 6
        lines.append([*cells, each.refused or ""])
    with paths.writing(path) as file:
        file.write(csv_text(lines))


def _cells(value: float | None, ends: Interval) -> list[str]:
    """A value and the ends of its interval, each empty if there is none."""
    return ["" if number is None else f"{number:.4f}" for number in (value, *(ends or (None, None)))]
