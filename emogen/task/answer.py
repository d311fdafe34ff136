"""Label names -> the text of an answer, in one of four styles. `parse.py` is the way back.

An answer is put together from pieces, always in one order of the labels (`LabelSet.answer_order`). The same pieces make
the training target, the few-shot answers in a prompt, and (as token ids) the grammar of constrained decoding, so that
the three cannot disagree.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from emogen.task.labels import LabelSet

STYLES = ("list", "count", "json", "yes_no")
YES, NO = "yes", "no"


@dataclass(frozen=True)
class Pieces:
    """A set-valued answer: `first[i]`, `following[j]` for each label named later, `close`; or `empty` alone."""

    first: tuple[str, ...]
    following: tuple[str, ...]
    close: str
    empty: str


def pieces(label_set: LabelSet, style: str) -> Pieces:
    """The pieces of a `list` answer (`anger, joy` or `none`) or a `json` answer (`["anger", "joy"]` or `[]`)."""
    names = label_set.names
    if style == "list":
        return Pieces(names, tuple(f", {name}" for name in names), "", label_set.empty)
    if style == "json":
        # Cut where tokenizers cut (`["` `anger` `", "` `joy` `"]`), so that the tokens are those of the whole text.
        return Pieces(tuple(f'["{name}' for name in names), tuple(f'", "{name}' for name in names), '"]', "[]")
    raise ValueError(f"a {style!r} answer is not built from pieces; the styles that are: list, json")


def answer_text(names: Iterable[str], label_set: LabelSet, style: str) -> str:
    """The canonical answer for a set of labels.

    Args:
        names: names of the set, in any order.
        style: `list` -> `anger, joy`; `count` -> `2: anger, joy`; `json` -> `["anger", "joy"]`; `yes_no` -> a line
            `label: yes` or `label: no` for every label. (In `yes_no` the model answers one question a label; the lines
            are what those answers add up to.)

    Raises:
        ValueError: a name that is not in the set, or an unknown style.
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
