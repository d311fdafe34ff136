"""Chat messages -> the text of a chat, by the chat template of a tokenizer.

A chat template sees what it sees in transformers, and gives the same text. It is code of others, so it runs within the
limits of prompt templates; and as a prompt must not change from day to day, its clock stands still.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from emogen.errors import ModelError
from emogen.model.tokenizer import TextTokenizer
from emogen.task.prompt import Message
from emogen.task.sandbox import LimitedEnvironment, time_limit

TODAY = datetime(2024, 7, 26, 12)  # for templates that ask for the date, unless they get a `date_string`


def apply_chat_template(tokenizer: TextTokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """Write messages as a chat. Reasoning is switched off.

    Args:
        add_generation_prompt: whether the chat ends with the beginning of an answer.

    Raises:
        ModelError: the chat template fails.
    """
    try:
        with time_limit():
            return _compiled(tokenizer.chat_template).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,
                thinking=False,
                **tokenizer.special_tokens | {"date_string": TODAY.strftime("%d %b %Y")},
            )
    except Exception as error:  # a template may raise anything
        raise ModelError(f"{tokenizer.name}: the chat template fails: {error}") from error


@cache
def _compiled(template: str) -> Template:
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": TODAY.strftime}
    return environment.from_string(template)


class _Generation(Extension):
    """The block `{% generation %}`, which marks the text of an assistant and changes nothing in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`: unlike jinja's own, it does not write HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
