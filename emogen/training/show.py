"""Rows as the model reads them, rendered and encoded, with the supervised tokens marked."""

import difflib
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from emogen.model.encode import Encoder
from emogen.task.rows import Rows

SUPERVISED = "bold green"
SHARED = "dim"


def show_rows(console: Console, encoder: Encoder, rows: Rows, *, tokens: bool = False) -> None:
    """Print rows exactly as the model reads them.

    The shared prefix is dim. The supervised answer is green, and between ⟦ ⟧ for terminals without colour.

    Args:
        tokens: print one token per line instead: position, id, part of the row, and text.
    """
    n_prefix = len(encoder.prefix_ids)
    for i, text in enumerate(rows.texts):
        for row in encoder.rows(text, _names(encoder, rows, i)):
            ids = [*encoder.prefix_ids, *row.suffix_ids]
            n_prompt = len(ids) - row.n_answer
            cut = f", {row.n_cut} tokens of the text cut" if row.n_cut else ""
            console.rule(f"{rows.path}:{rows.lines[i]}  id {rows.ids[i]}", style="cyan")
            console.print(f"{len(ids)} tokens: {n_prefix} shared, {row.n_answer} supervised{cut}", style="cyan")
            if tokens:
                _print_tokens(console, encoder, ids, n_prefix, n_prompt)
            else:
                decode = encoder.tokenizer.decode
                console.print(
                    Text.assemble(
                        (decode(ids[:n_prefix]), SHARED),
                        decode(ids[n_prefix:n_prompt]),
                        (f"⟦{decode(ids[n_prompt:])}⟧" if row.n_answer else "", SUPERVISED),
                    ),
                    soft_wrap=True,
                )


def show_templates(
    console: Console, templates: Sequence[tuple[str, Encoder]], rows: Rows, *, tokens: bool = False
) -> None:
    """Print rows as the model reads them under each of several templates, then the differences of the first row.

    Args:
        templates: (name, encoder); the others are compared with the first one.
        tokens: see `show_rows`.
    """
    for name, encoder in templates:
        encoded = [row for i, text in enumerate(rows.texts) for row in encoder.rows(text, _names(encoder, rows, i))]
        n_text = sum(row.n_text for row in encoded) / len(encoded)
        n_answer = sum(row.n_answer for row in encoded) / len(encoded)
        console.print(
            Text.assemble(
                (name, "bold"),
                f": instruction {len(encoder.prefix_ids)} tokens, the same for all rows; then on average {n_text:.0f} "
                f"of text, {len(encoder.question_ids[0])} up to the answer, {n_answer:.0f} of answer",
            )
        )
        show_rows(console, encoder, rows, tokens=tokens)
    first, *others = [(name, _first_row(encoder, rows)) for name, encoder in templates]
    for name, lines in others:
        console.rule(f"{first[0]} → {name}", style="cyan")
        for line in difflib.unified_diff(first[1], lines, first[0], name, lineterm=""):
            colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[0], "")
            console.print(Text(line, style=colour), soft_wrap=True)


def _first_row(encoder: Encoder, rows: Rows) -> list[str]:
    """The lines of the first row, answer included."""
    row = encoder.rows(rows.texts[0], _names(encoder, rows, 0))[0]
    return encoder.tokenizer.decode([*encoder.prefix_ids, *row.suffix_ids]).splitlines()


def _names(encoder: Encoder, rows: Rows, i: int) -> tuple[str, ...] | None:
    """The label names of a row, if they are known."""
    return None if rows.gold is None else encoder.label_set.names_of(rows.gold[i])


def _print_tokens(console: Console, encoder: Encoder, ids: Sequence[int], n_prefix: int, n_prompt: int) -> None:
    for position, token in enumerate(ids):
        part = "shared" if position < n_prefix else "prompt" if position < n_prompt else "SUPERVISED"
        style = SHARED if position < n_prefix else SUPERVISED if position >= n_prompt else ""
        console.print(Text(f"{position:5d} {token:7d}  {part:<10}  {encoder.tokenizer.decode([token])!r}", style=style))
