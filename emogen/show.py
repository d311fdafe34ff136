"""What the model will see: rows of a recipe, rendered and encoded, with the supervised tokens marked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from emogen.data import Rows

if TYPE_CHECKING:
    from emogen.encode import Encoder

SUPERVISED = "bold green"
SHARED = "dim"


def show_rows(console: Console, encoder: "Encoder", rows: Rows, *, tokens: bool = False) -> None:
    """Print rows exactly as the model reads them.

    The shared instruction is dim, the supervised answer green and between ⟦ ⟧, which also serve without colour.

    Args:
        tokens: print one token a line: position, id, text, and whether it is supervised.
    """
    n_prefix = len(encoder.prefix_ids)
    for i, text in enumerate(rows.texts):
        labels = None if rows.gold is None else encoder.label_set.names_of(rows.gold[i])
        for row in encoder.rows(text, labels):
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


def _print_tokens(console: Console, encoder: "Encoder", ids: Sequence[int], n_prefix: int, n_prompt: int) -> None:
    for position, token in enumerate(ids):
        part = "shared" if position < n_prefix else "prompt" if position < n_prompt else "SUPERVISED"
        style = SHARED if position < n_prefix else SUPERVISED if position >= n_prompt else ""
        console.print(Text(f"{position:5d} {token:7d}  {part:<10}  {encoder.tokenizer.decode([token])!r}", style=style))
