"""Label names -> answer text, in one of four styles. `parse.py` is the inverse.

An answer is built from pieces, which always name the labels in the same order (`LabelSet.answer_order`). The training
target, the few-shot answers of a prompt and the grammar of constrained decoding use the same pieces, so they cannot
disagree.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from emogen.task.labels import LabelSet

STYLES = ("list", "count", "json", "yes_no")
YES, NO = "yes", "no"


@dataclass(frozen=True)
class Pieces:
    """The pieces of an answer that lists its labels.

    An answer is `first[i]`, then `following[j]` for each further label, then `close`; or `empty` alone.
    """

    first: tuple[str, ...]
    following: tuple[str, ...]
    close: str
    empty: str


def pieces(label_set: LabelSet, style: str) -> Pieces:
    """The pieces of a `list` answer (`anger, joy` or `none`) or a `json` answer (`["anger", "joy"]` or `[]`).

    Raises:
        ValueError: the style has no pieces.
    """
    names = label_set.names
    if style == "list":
        return Pieces(names, tuple(f", {name}" for name in names), "", label_set.empty)
    if style == "json":
        # Split where tokenizers split (`["` `anger` `", "` `joy` `"]`), so that the tokens are those of the whole text.
        return Pieces(tuple(f'["{name}' for name in names), tuple(f'", "{name}' for name in names), '"]', "[]")
    raise ValueError(f"a {style!r} answer is not built from pieces; use list or json")


def answer_text(names: Iterable[str], label_set: LabelSet, style: str) -> str:
    """The canonical answer for a set of labels.

    Args:
        names: label names, in any order.
        style: `list` -> `anger, joy`; `count` -> `2: anger, joy`; `json` -> `["anger", "joy"]`; `yes_no` -> one line
            `label: yes` or `label: no` per label. (A `yes_no` model answers one question per label; the lines combine
            its answers.)

    Raises:
        ValueError: a name is not in the label set, or the style is unknown.
    """
    present = label_set.sort(names)
    if style == "yes_no":
        return "\n".join(f"{name}: {YES if name in present else NO}" for name in label_set.names)
    parts = pieces(label_set, "list" if style == "count" else style)
    if not present:
        return parts.empty
    index = [i for i in label_set.answer_order if label_set.names[i] in present]
    first = parts.first[index[0]]
    if style == "count":
        first = counted(len(index), first)
    return first + "".join(parts.following[i] for i in index[1:]) + parts.close


def counted(n: int, first: str) -> str:
    """The first piece of a `count` answer with n labels."""
    return f"{n}: {first}"
