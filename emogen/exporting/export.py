"""A run -> files for other programs, and what that changed."""

import json
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from emogen import paths
from emogen.console import Bar
from emogen.errors import InputError
from emogen.evaluation import results
from emogen.evaluation.results import pred_matrix
from emogen.evaluation.run_folder import CARD, MODEL, PREDICTIONS, RUN, THRESHOLDS, kind_of, read_recipe
from emogen.exporting.llama_cpp import convert, find_server, llama_server
from emogen.exporting.shift import Labelled, describe, measure_shift, require_small
from emogen.model.encode import Encoder
from emogen.prediction.classifier import Classifier, prob_of
from emogen.prediction.ensemble import load_rule, load_run
from emogen.task.answer_patterns import answer_gbnf, answer_regex
from emogen.task.labels import LabelSet
from emogen.task.parse import parse_answer
from emogen.task.rows import Rows

log = logging.getLogger(__name__)

EXPORT, GGUF, GRAMMAR, MODELFILE = "export.json", "model.gguf", "answer.gbnf", "Modelfile"
LLAMA_CPP = ("gguf", "ollama")  # the targets that llama.cpp runs
MERGED_USE = "\n`model/` is the merged model; `emogen predict` and plain transformers load it.\n"


def export(
    run: Path, folder: Path, target: str, *, kind: str = "f16", force: bool = False, bar: Bar
) -> dict[str, dict[str, Any]]:
    """Export a run, score what was exported on the held-out rows of the run, and keep the difference.

    The folder is a run folder: `emogen predict FOLDER` works with it. `gguf` adds `model.gguf`, `answer.gbnf` and
    `prompt.json`; `ollama` adds a `Modelfile`, too. That of `onnx` has the ONNX file in the place of the model, for
    other programs alone.

    Args:
        run: a finished run of a single training.
        folder: a new or empty folder.
        target: `merged`, `gguf` or `ollama`; `onnx` for a head.
        kind: the type of the weights in a GGUF file.
        force: keep an export that scores otherwise than the run, or that cannot be scored.

    Returns:
        The differences, by the decision: `answer` and, where the run has thresholds, `thresholds`; for GGUF also
        `llama.cpp`. Empty if nothing was scored.

    Raises:
        InputError: the run cannot be exported so, the folder is not empty, or a program is missing.
        ModelError: the model cannot be loaded or converted, or it scores otherwise.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not empty; name a new folder with -o")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        unfinished = Path(scratch) / folder.name
        shifts = _export(run, unfinished, target, kind, force, bar)
        if folder.exists():
            folder.rmdir()  # it is empty
        unfinished.rename(folder)
    return shifts


def _export(run: Path, folder: Path, target: str, kind: str, force: bool, bar: Bar) -> dict[str, dict[str, Any]]:
    """See `export`; `folder` is not there yet."""
    from emogen.exporting.merged import write_merged
    from emogen.exporting.onnx_head import usage, write_onnx
    from emogen.prediction.head import HeadClassifier

    recipe, label_set = read_recipe(run)
    _check_target(run, target, recipe.answer, label_set, force)
    rows = results.read_held_out(run, label_set) if (run / PREDICTIONS).is_file() else None
    if rows is None and not force:
        raise InputError(
            f"{run}: it has no held-out rows, so nothing could show that the export labels as the run does; train with "
            "eval_file or eval_fraction, or use --force"
        )
    before = None if rows is None else _label(load_run(run, force=force), rows, bar, "The run")
    merged_folder = folder.with_name(f"{folder.name}-merged") if target == "onnx" else folder
    write_merged(run, merged_folder, force=force)
    exported, use = load_run(merged_folder), MERGED_USE
    if target == "onnx":
        assert isinstance(exported, HeadClassifier)
        exported = write_onnx(exported, merged_folder, folder)
        use = usage(exported, folder)
    shifts: dict[str, dict[str, Any]] = {}
    if rows is not None and before is not None:
        after = _label(exported, rows, bar, "The export")
        shifts["answer"] = measure_shift(rows.truth, label_set.names, before, after)
        if (run / THRESHOLDS).is_file() or label_set.exactly_one:
            rule = load_rule([run], label_set, "thresholds")
            probs = [labelled.prob for labelled in (before, after) if labelled.prob is not None]
            decided = [Labelled(rule.decide(prob), prob) for prob in probs]
            shifts["thresholds"] = measure_shift(rows.truth, label_set.names, *decided)
    if target in LLAMA_CPP:
        encoder = exported.encoder  # type: ignore[attr-defined]
        convert(folder / MODEL, folder / GGUF, kind)
        _write_prompt(folder, encoder, label_set, recipe.answer)
        if rows is not None and before is not None:
            pred = _answers_of_llama_cpp(folder, encoder, rows, label_set, recipe.answer, bar)
            shifts["llama.cpp"] = measure_shift(rows.truth, label_set.names, before, Labelled(pred, None))
    if target == "ollama":
        _write_modelfile(folder, exported.encoder)  # type: ignore[attr-defined]
    for name, shift in shifts.items():
        log.info(f"{name}: {describe(shift)}")
    facts = {"target": target, "type": kind if target in LLAMA_CPP else None, "shift": shifts}
    paths.write_json(folder / EXPORT, facts)
    _add_to_card(folder, target, use, label_set, recipe.answer, shifts)
    if not force:
        for name, shift in shifts.items():
            require_small(shift, f"the export of {run} ({name})")
    return shifts


def _check_target(run: Path, target: str, style: str, label_set: LabelSet, force: bool) -> None:
    """Refuse what a run cannot become, and what this machine cannot make of it, before anything is computed."""
    if kind_of(run) != RUN or not run.is_dir():
        raise InputError(f"{run}: not a run; export the run of a single training")
    if target == "onnx":
        if style != "head":
            raise InputError(f"{run}: it generates its answers; --to onnx is for heads, --to gguf for it")
        from emogen.exporting.onnx_head import require_onnx

        require_onnx()
    if target in LLAMA_CPP:
        if style == "head":
            raise InputError(f"{run}: a head generates no answers; --to merged and --to onnx are for it")
        answer_gbnf(label_set, style)  # refuses yes_no
        if not force:
            find_server()


def _label(classifier: Classifier, rows: Rows, bar: Bar, title: str) -> Labelled:
    with bar(f"{title}: answers", len(rows) * classifier.n_questions) as advance:
        predictions = classifier.predict(rows.texts, with_prob=True, progress=advance)
    prob = prob_of(classifier, rows.texts, predictions, bar, f"{title}: probabilities")
    return Labelled(pred_matrix(predictions), prob)


def _answers_of_llama_cpp(
    folder: Path, encoder: Encoder, rows: Rows, label_set: LabelSet, style: str, bar: Bar
) -> np.ndarray:
    prompts = [[*encoder.prefix_ids, *encoder.rows(text)[0].suffix_ids] for text in rows.texts]
    n_answer = encoder.grammar.max_length
    grammar = (folder / GRAMMAR).read_text(encoding="utf-8")
    with llama_server(folder / GGUF, max(map(len, prompts)) + n_answer) as server:
        answers = server.answer(prompts, grammar, n_answer, bar)
    return np.array([parse_answer(answer.strip(), label_set, style=style).vector for answer in answers], dtype=np.int8)


def _around_text(encoder: Encoder) -> tuple[str, str]:
    """What a chat has before a text and after it, control tokens included."""
    plain = encoder.plain
    before = plain.reveal(encoder.protected_prefix)
    return before, plain.reveal(encoder.frame.after[0])


def _write_prompt(folder: Path, encoder: Encoder, label_set: LabelSet, style: str) -> None:
    """Write how another program asks: the text before and after the user's text, and the grammar of the answer."""
    before, after = _around_text(encoder)
    lead = encoder.plain.reveal(encoder.frame.lead)
    (folder / GRAMMAR).write_text(answer_gbnf(label_set, style, lead), encoding="utf-8")
    asked = {
        "before": before,
        "after": after,
        "stop": encoder.plain.reveal(encoder.frame.end),
        "regex": answer_regex(label_set, style),
        "max_tokens": encoder.grammar.max_length,
    }
    with paths.writing(folder / "prompt.json") as file:
        json.dump(asked, file, indent=2, ensure_ascii=False)


def _write_modelfile(folder: Path, encoder: Encoder) -> None:
    before, after = _around_text(encoder)
    stop = encoder.plain.reveal(encoder.frame.end).strip()
    lines = [
        "# ollama create NAME -f Modelfile; then send the text alone: it is the prompt.",
        "# Ollama takes no grammar; read the answer with emogen.parse_answer, or set `format` to a JSON schema.",
        f"FROM ./{GGUF}",
        f'TEMPLATE """{_go_escaped(before)}{{{{ .Prompt }}}}{_go_escaped(after)}"""',
        f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}",
        "PARAMETER temperature 0",
        f"PARAMETER num_predict {encoder.grammar.max_length}",
    ]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _go_escaped(text: str) -> str:
    """Text in a template of Go, whose `{{` begins code, within three quotation marks, which would end it."""

    def escaped(found: re.Match[str]) -> str:
        return '{{ "{{" }}' if found[0] == "{{" else '{{ "\\"" }}' * len(found[0])

    return re.sub(r'\{\{|"{2,}|"\Z', escaped, text)


def _add_to_card(
    folder: Path, target: str, use: str, label_set: LabelSet, style: str, shifts: dict[str, dict[str, Any]]
) -> None:
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {folder.name}\n"
    text += f"\n## Use in other programs\n{use}"
    if style not in ("head", "yes_no"):
        regex = answer_regex(label_set, style)
        text += (
            "\nvLLM: `vllm serve model/`, and with each request the structured output\n\n"
            f"```json\n{json.dumps({'structured_outputs': {'regex': regex}})}\n```\n"
        )
    if target in LLAMA_CPP:
        text += (
            f"\nllama.cpp: `llama-server -m {GGUF}`; `prompt.json` has what stands before and after the text, and "
            f"`{GRAMMAR}` the grammar of the answer.\n"
        )
    text += "\n" + "".join(f"- {name}: {describe(shift)}\n" for name, shift in shifts.items())
    with paths.writing(card) as file:
        file.write(text)


def export_folder(run: Path, target: str) -> Path:
    """Where an export goes by default: beside the run."""
    return run.with_name(f"{run.name}-{target}")
