"""What the lab does: see, ask, score and save prompt templates, and compare their versions. `lab_page` is its page.

Scores are kept where `emogen prompts compare` keeps them; they are the history of the lab.
"""

import difflib
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from emogen import paths
from emogen.console import no_bar
from emogen.errors import InputError
from emogen.evaluation.caveats import caveats, reference_line
from emogen.evaluation.run_folder import PROMPT, read_text
from emogen.experiments import grid
from emogen.experiments.prompts import PromptBenchmark, Template, prepare
from emogen.experiments.scores import (
    KeptScores,
    difference_in_words,
    ranking,
    read_metrics,
    row_keys,
    score_rows,
    score_template,
)
from emogen.prediction.classifier import prob_of
from emogen.prediction.generator import GenerativeClassifier
from emogen.report.compare import with_interval
from emogen.task.label_cells import LabelCells
from emogen.task.labels import LabelSet, load_label_set
from emogen.task.parse import parse_answer
from emogen.task.prompt import make_examples, parse_prompt
from emogen.task.rows import Mistakes

PROMPTS = Path("prompts")  # in the current folder: where templates are saved
NOTE = "note.txt"  # in the folder of a template in the store
EDITOR = "the editor"  # a version that may be compared with those of the history
MAX_PASTED = 200  # texts
TERMS = {  # the words of the page, in the order in which it shows them
    "rows": "of the rows of this lab, those that are scored with the template; there are no figures before all are",
    "macro-F1": "the mean of the F1 of all labels, with its 95 % interval over the rows (none for fewer than 30 rows)",
    "thresholds": "labels decided by the probability of each, with thresholds tuned on other rows (nested)",
    "answer": "labels as the model has written them",
    "ln P": "mean log-likelihood of the true answers: 0 is certainty; it tells templates apart on fewer rows than F1",
    "tokens": "of the instruction, which is computed once for all rows",
}
LABEL_TERMS = {  # the keys of a label set
    "task": "a sentence for the prompt, {{ task }}: what is labelled, and what the labels are",
    "labels": "each with its definition and its aliases: other words for it that a free answer may use",
    "order": "all names, in the order of prompts and answers; without it, it is that of the labels",
    "empty": "the answer for a text without labels",
    "exactly_one": "true if every text has one label, no more and no less",
}
HISTORY = ("template", "rows", "macro-F1, thresholds", "macro-F1, answer", "ln P", "tokens", "note", "folder")


class Lab:
    """What the page does. Methods take the source and the name of the template from the editor.

    Attributes:
        progress: of the template that is being scored, as the grid shows it: `title`, `done` and `total`; or None.
    """

    def __init__(self, benchmark: PromptBenchmark, generator: GenerativeClassifier):
        self.benchmark, self.generator = benchmark, generator
        self.progress: dict[str, Any] | None = None
        self._grid = grid.GrowingGrid(benchmark)
        self._grid_lock, self._model_lock, self._scoring = threading.Lock(), threading.Lock(), threading.Lock()
        self._stopping = threading.Event()

    def template(self, source: str, name: str) -> Template:
        """Check and encode a template.

        Raises:
            InputError: the template or its name is not valid; the message names the line.
        """
        return prepare(self.benchmark, parse_prompt(_whole(source), f"{_checked_name(name)}.jinja"))

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
        with self._model_lock:
            predictions = generator.predict([text], with_prob=True)
            (prob,) = prob_of(generator, [text], predictions, no_bar, "")
        (prediction,) = predictions
        parsed = parse_answer(prediction.raw, encoder.label_set, style=encoder.style)
        by_label = dict(zip(encoder.label_set.names, map(float, prob), strict=True))
        return f"{prediction.raw}  ({parsed.status})", by_label

    def table(self, source: str, name: str, pasted: str) -> str:
        """Ask the model about several texts, and mark its answers against gold where that is known.

        Args:
            pasted: a text per line, as a spreadsheet copies them; after a tab, its true labels.

        Returns:
            A table, as HTML.

        Raises:
            InputError: there is no text or there are too many, or a label is not in the label set.
        """
        encoder = self.template(source, name).encoder
        assert encoder is not None
        label_set, mistakes = encoder.label_set, Mistakes()
        numbered = enumerate(pasted.split("\n"), start=1)
        lines = [(number, *line.rstrip("\r").partition("\t")) for number, line in numbered if line.strip()]
        if not 0 < len(lines) <= MAX_PASTED:
            raise InputError(f"{len(lines)} texts: paste 1 to {MAX_PASTED}, one per line")
        cells = LabelCells(label_set)
        golds = [cells.read(labels, number, mistakes) for number, _, _, labels in lines]
        if problems := mistakes.take("the pasted texts"):
            raise InputError("\n".join(map(str, problems)))
        texts = [text for _, text, _, _ in lines]
        with self._model_lock:
            predictions = replace(self.generator, encoder=encoder).predict(texts)
        rows = [
            f"<tr><td>{escape(text)}</td><td>{_chips(label_set.names, gold, prediction.parsed.vector, label_set.empty)}"
            f"</td><td>{escape(prediction.raw)} ({prediction.parsed.status})</td></tr>"
            for text, gold, prediction in zip(texts, golds, predictions, strict=True)
        ]
        known = [
            (gold, prediction.parsed.vector)
            for gold, prediction in zip(golds, predictions, strict=True)
            if gold is not None
        ]
        n_exact = sum(tuple(gold) == vector for gold, vector in known)
        count = f"<p>{n_exact} of {len(known)} answers are exactly right.</p>" if known else ""
        head = "<tr><th>text</th><th>labels: ✓ right, ○ missed, ✕ falsely given</th><th>answer</th></tr>"
        return f'{count}<table class="pasted">{head}{"".join(rows)}</table>'

    def score(self, source: str, name: str) -> Iterator[str]:
        """Score a template on the rows of the benchmark, in a thread that goes on if nobody listens.

        Yields:
            How far it is; at last its macro-F1 with what a reader has to know.

        Raises:
            InputError: another template is being scored; or see `template`.
            ModelError: the model computes no valid output.
        """
        template = self.template(source, name)
        if not self._scoring.acquire(blocking=False):
            raise InputError(f"{self.progress['title'] if self.progress else 'a template'}: wait, or stop it first")
        ended = threading.Event()
        failures: list[Exception] = []

        def work() -> None:
            try:
                self._score(template)
            except Exception as error:
                failures.append(error)  # raised below, for the page
            finally:
                self.progress = None
                self._scoring.release()
                ended.set()

        self._stopping.clear()
        self.progress = {"title": f"{name} is being scored", "done": 0, "total": len(self.benchmark.rows)}
        threading.Thread(target=work, daemon=True).start()
        while not ended.wait(0.5):
            if progress := self.progress:
                yield f"{progress['title']}: {progress['done']} of {progress['total']} rows"
        if failures:
            raise failures[0]
        yield self._result(template)

    def _score(self, template: Template) -> None:
        with closing(score_rows(self.benchmark, template, self.generator)) as parts:
            while not self._stopping.is_set():
                with self._model_lock:
                    n_rows = next(parts, None)
                if n_rows is None:
                    return
                assert self.progress is not None
                self.progress = self.progress | {"done": self.progress["done"] + n_rows}

    def _result(self, template: Template) -> str:
        n_done = self._n_done(template.store)
        if n_done < len(self.benchmark.rows):
            return f"{template.name}: stopped after {n_done} of {len(self.benchmark.rows)} rows, which are kept"
        metrics = score_template(self.benchmark, template, None, no_bar)
        nested = metrics.get("by_thresholds")
        by_thresholds = f", {nested['f1_macro']:.3f} by nested thresholds" if nested else ""
        found = f"{template.name}: macro-F1 {metrics['f1_macro']:.3f} by answer{by_thresholds}, on {metrics['n']} rows"
        decided = [("answer", metrics), ("nested thresholds", nested)] if nested else [("", metrics)]
        return "\n".join([found, reference_line(metrics), *caveats(decided)])

    def stop(self) -> None:
        """Stop the scoring after the rows that the model is at."""
        self._stopping.set()

    def _n_done(self, store: Path) -> int:
        of_row = KeptScores(store).read().of_row
        return sum(key in of_row for key in row_keys(self.benchmark.rows))

    def versions(self) -> list[str]:
        """The versions of templates in the store, by their folders: each was scored, at least on some rows."""
        return sorted(folder.name for folder in self.benchmark.store.glob("*/") if (folder / PROMPT).is_file())

    def history(self) -> list[list[Any]]:
        """A line for each version, the best first, and then those without figures; see HISTORY for the columns."""
        rows, done, unfinished = self.benchmark.rows, {}, []
        for version in self.versions():
            name, n_done = version.rpartition("-")[0], self._n_done(self.benchmark.store / version)
            line = [name, f"{n_done} of {len(rows)}", "", "", None, None, self.note(version), version]
            if n_done < len(rows):
                unfinished.append(line)
                continue
            try:
                template = self.template(self.source_of(version), name)
                metrics = score_template(self.benchmark, template, None, no_bar)
            except InputError:
                unfinished.append(line)  # its prompt has the text of a row, or other examples than today
                continue
            line[4:6] = round(metrics["log_likelihood"], 2), metrics["tokens"]["shared"]
            done[template.folder] = line
        order: list[Path] = []
        for column, by in ((3, "answer"), (2, "thresholds")):
            if done and (by == "answer" or self._has_thresholds(next(iter(done)))):
                folders = list(done)
                ranked, systems = ranking(folders, by)
                order = [folders[k] for k in ranked]
                for folder, system in zip(order, systems, strict=True):
                    done[folder][column] = with_interval(system.metrics["f1_macro"], system.interval)
        return [*(done[folder] for folder in order), *unfinished]

    def _has_thresholds(self, folder: Path) -> bool:
        return "by_thresholds" in read_metrics(folder)

    def source_of(self, version: str) -> str:
        """The template of a version in the history."""
        return read_text(self._of(version) / PROMPT) or ""

    def note(self, version: str) -> str:
        """What somebody noted about a version."""
        return read_text(self._of(version) / NOTE) or ""

    def keep_note(self, version: str, note: str) -> None:
        """Keep a note about a version."""
        with paths.writing(self._of(version) / NOTE) as file:
            file.write(note.strip())

    def _of(self, version: str) -> Path:
        if version not in self.versions():
            raise InputError(f"{version!r}: choose a version of the history")
        return self.benchmark.store / version

    def differences(self, first: str, second: str, source: str, name: str, text: str) -> str:
        """How two versions differ, as HTML: what the model sees of a text, word by word, and what they score.

        Args:
            first, second: versions of the history, or EDITOR for the template in the editor.

        Raises:
            InputError: a version is not valid.
        """
        templates = [
            self.template(source, name)
            if version == EDITOR
            else self.template(self.source_of(version), version.rpartition("-")[0])
            for version in (first, second)
        ]
        chats = [self._chat(template, text) for template in templates]
        return f"<p>{escape(self._difference(templates, (first, second)))}</p>" + word_diff(*chats)

    def _difference(self, templates: Sequence[Template], versions: Sequence[str]) -> str:
        for template, version in zip(templates, versions, strict=True):
            if (n_done := self._n_done(template.store)) < len(self.benchmark.rows):
                return (
                    f"Which one is better is not known: {version} is scored on {n_done} of {len(self.benchmark.rows)} "
                    "rows. Score it first."
                )
            score_template(self.benchmark, template, None, no_bar)
        folders = [template.folder for template in templates]
        if folders[0] == folders[1]:
            return "These are the same template."
        by = "thresholds" if self._has_thresholds(folders[0]) else "answer"
        return difference_in_words(folders, versions, by)

    def _chat(self, template: Template, text: str) -> str:
        encoder = template.encoder
        assert encoder is not None
        row = encoder.rows(text, None)[0]
        return encoder.tokenizer.decode([*encoder.prefix_ids, *row.suffix_ids])

    def edited_labels(self, text: str) -> LabelSet:
        """Read an edited label set.

        Raises:
            InputError: it is not valid, or its labels are not those of the rows; the message names the line.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "labels.yaml"
            path.write_text(text, encoding="utf-8")
            try:
                edited = load_label_set(path)
            except InputError as error:
                raise InputError(str(error).replace(f"{folder}{os.sep}", "")) from None
        names = self.benchmark.task.label_set.names
        if edited.names != names:
            raise InputError(
                f"labels.yaml: the names under `labels` are those of the rows, in their order: {', '.join(names)}. "
                "`order` sets the order of prompts and answers"
            )
        return edited

    def effects(self, labels: str, source: str, name: str, text: str) -> str:
        """What an edited label set changes, as HTML: the valid answers, and what the model sees of a text.

        Raises:
            InputError: the label set or the template is not valid.
        """
        edited, old = self.edited_labels(labels), self.template(source, name)
        task = self.benchmark.task
        examples = make_examples([(each.text, each.labels) for each in task.examples], edited, task.recipe.answer)
        changed = replace(self.benchmark, task=replace(task, label_set=edited, examples=examples))
        new = prepare(changed, old.prompt)
        said = [_answers_in_words(each.task.label_set, each.task.recipe.answer) for each in (old, new)]
        chats = [self._chat(template, text) for template in (old, new)]
        parts = []
        for title, (before, after) in (("Valid answers", said), ("What the model sees", chats)):
            is_same = " stay as they are" if title == "Valid answers" else " stays as it is"
            parts.append(f"<p>{title}{is_same if before == after else ':'}</p>")
            parts.append("" if before == after else word_diff(before, after))
        if self.benchmark.train_rows is None:
            parts.append(
                f'<p class="warning">{escape(str(self.benchmark.source))} was tuned with the labels as they were.</p>'
            )
        return "".join(parts)

    def save_labels(self, labels: str, name: str) -> str:
        """Save an edited label set as prompts/labels/NAME.yaml, and say how to use it.

        Raises:
            InputError: it or its name is not valid, or the file exists.
        """
        self.edited_labels(labels)
        path = PROMPTS / "labels" / f"{_checked_name(name)}.yaml"
        if path.exists():
            raise InputError(f"{path} exists; choose another name")
        with paths.writing(path) as file:
            file.write(_whole(labels))
        return f"Saved as {path}. To score with it, start the lab with labels={path}"

    def grid_page(self) -> str:
        """The page of rows × templates, which asks for news."""
        return grid.render(self.benchmark, self.grid_news({}), live=True)

    def grid_news(self, have: Mapping[str, int]) -> list[dict[str, Any]]:
        """What is new in the grid; see `GrowingGrid.news`."""
        with self._grid_lock:
            return self._grid.news(have)

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


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[\w-]+", name):
        raise InputError(f"{name!r}: a name consists of letters, digits, _ and -")
    return name


def _answers_in_words(label_set: LabelSet, style: str) -> str:
    """The answers that the grammar allows."""
    names = ", ".join(label_set.names[i] for i in label_set.answer_order)
    if style == "yes_no":
        return f"yes or no, for each of: {names}"
    if label_set.exactly_one:
        return f"one of: {names}"
    form = {"list": "", "json": "as a JSON list, ", "count": "after their number, "}[style]
    return f"{form}one or several, in this order: {names}; or: {label_set.empty}"


def word_diff(first: str, second: str) -> str:
    """Two texts in one, as HTML: words of the first alone are <del>, and words of the second alone are <ins>."""
    old, new = (re.findall(r"\s|[^\W_]+|.", text) for text in (first, second))
    parts = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(escape("".join(old[a:b])))
            continue
        for tag, part in (("del", old[a:b]), ("ins", new[c:d])):
            if part:
                shown = escape("".join(part)).replace("\n", "↵\n")
                parts.append(f"<{tag}>{shown}</{tag}>")
    return f'<div class="seen diff">{"".join(parts)}</div>'


def _chips(names: Sequence[str], gold: Sequence[float] | None, vector: Sequence[int], empty: str) -> str:
    """The labels of an answer, marked against gold by a sign and a class; without a mark if gold is not known."""
    chips = []
    for name, is_gold, is_given in zip(names, vector if gold is None else gold, vector, strict=True):
        if is_gold or is_given:
            kind, sign = ("right", "✓") if is_gold and is_given else ("missed", "○") if is_gold else ("false", "✕")
            chips.append((kind, f"{sign} {name}") if gold is not None else ("", name))
    if not chips:
        chips = [("right", f"✓ {empty}") if gold is not None else ("", empty)]
    return " ".join(f'<span class="chip {kind}">{escape(word)}</span>' for kind, word in chips)


def _whole(source: str) -> str:
    """A file with the newline at its end, which the editor drops."""
    return source if source.endswith("\n") else f"{source}\n"


def available_templates() -> dict[str, Path]:
    """The shipped templates and those of the current folder, by name. A template of the current folder comes first."""
    files = [*sorted(paths.shipped("prompts").glob("*.jinja")), *sorted(PROMPTS.glob("*.jinja"))]
    return {file.stem: file for file in files}
