"""The marked blocks of a template, and other wordings for them.

    {# improve: NAME #}
    the text that the template has
    {# or: another wording #}
    {# or: one more #}
    {# end #}

The marks are Jinja comments, so a template with them is valid everywhere, and uses the text that it has. A search
changes the blocks alone; what is around them stays.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment

from emogen.task.prompt import Prompt, PromptError

_COMMENT = re.compile(r"\{#[-+]?(.*?)[-+]?#\}", re.DOTALL)
_MARK = re.compile(r"\s*(?:improve:\s*(?P<name>.*?)|or:(?P<wording>.*)|(?P<end>end))\s*", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A marked block.

    Attributes:
        name: what its first mark calls it.
        texts: its text, as the file has it, and the other wordings.
    """

    name: str
    texts: tuple[str, ...]

    def fit(self, text: str) -> str:
        """Another wording, with the white space around it that the block's own text has."""
        return _fitted(text, self.texts[0])


@dataclass(frozen=True)
class BlockTemplate:
    """A template in parts.

    Attributes:
        prompt: the template.
        frame: the K + 1 parts around K blocks. The marks that begin and end blocks belong to it.
        blocks: the K blocks.
    """

    prompt: Prompt
    frame: tuple[str, ...]
    blocks: tuple[Block, ...]

    def source(self, texts: Sequence[str]) -> str:
        """The template with the given texts as its K blocks, and without the other wordings."""
        return "".join(part for pair in zip(self.frame, [*texts, ""], strict=True) for part in pair)


def find_blocks(prompt: Prompt) -> BlockTemplate:
    """Find the marked blocks of a template.

    Raises:
        PromptError: a mark is out of place or bears no name of its own, a block is not closed, or a text stands between
            other wordings.
    """
    source = prompt.source

    def error(place: int, reason: str) -> PromptError:
        return PromptError(f"{prompt.path}:{source.count(chr(10), 0, place) + 1}: {reason}")

    comments = list(_COMMENT.finditer(source))
    lexed = [value for _, kind, value in Environment(autoescape=True).lex(source) if kind == "comment"]
    if [comment[1] for comment in comments] != lexed:
        raise error(0, "`{#` stands in a {% raw %} block or in a string, where no blocks can be found; leave it out")
    frame: list[str] = []
    blocks: list[Block] = []
    name = ""  # of the block that is open
    texts: list[str] = []
    begun: int | None = None  # where it begins
    taken = 0  # everything before is read
    for comment in comments:
        mark = _MARK.fullmatch(comment[1])
        if mark is None:
            continue  # a comment like any other
        here = comment.start()
        if mark["name"] is not None:
            if begun is not None:
                raise error(begun, f"the block {name!r} is not closed; close it with {{# end #}}")
            name = mark["name"]
            if not re.fullmatch(r"[\w-]+", name) or name in [block.name for block in blocks]:
                raise error(here, f"a block called {name!r}: names consist of letters, digits, _ and -, and differ")
            frame.append(source[taken : comment.end()])
            begun, taken, texts = here, comment.end(), []
            continue
        if begun is None:
            raise error(here, "a mark outside of a block; a block begins with {# improve: NAME #}")
        part, taken = source[taken:here], comment.end()
        if texts and part.strip():
            raise error(
                here, "a text after other wordings; the text of a block comes first, and then each {# or: ... #}"
            )
        texts = texts or [part]
        if mark["end"] is None:
            texts.append(_fitted(mark["wording"], texts[0]))
        else:
            blocks.append(Block(name, tuple(texts)))
            begun, taken = None, here
    if begun is not None:
        raise error(begun, f"the block {name!r} is not closed; close it with {{# end #}}")
    return BlockTemplate(prompt, (*frame, source[taken:]), tuple(blocks))


def _fitted(text: str, own: str) -> str:
    lead, end = own[: len(own) - len(own.lstrip())], own[len(own.rstrip()) :]
    text = text.strip()
    if "\n" in lead:  # the block has lines of its own
        return f"\n{text}\n" if text else "\n"
    return f"{lead}{text}{end}" if own.strip() else text
