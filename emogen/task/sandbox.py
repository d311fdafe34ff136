"""Limits for templates of others: time, and the size of what an expression makes.

Jinja's sandbox keeps a template away from attributes and calls that reach beyond its data. It does not stop a template
that never ends (nested loops over `range`) or that fills the memory (`'a ' * 10**9`, doubled strings).
"""

import functools
import operator
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 5.0  # of one rendering; a prompt takes milliseconds
MAX_SIZE = 1_000_000  # characters of a text, items of a list together with theirs, and the value of an integer
MAX_WORK = 100_000_000  # the sizes of the operands of one call, multiplied


class TemplateLimitError(Exception):
    """A template takes too long, or makes too much."""


@contextmanager
def time_limit(seconds: float = MAX_SECONDS) -> Iterator[None]:
    """End the rendering of a template in this thread after some seconds.

    The clock is read at each template line that is executed.

    Raises:
        TemplateLimitError: the time is over.
    """
    deadline = time.monotonic() + seconds

    def watch(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename != "<template>":
            return None  # the code of libraries is not watched line by line
        if time.monotonic() > deadline:
            raise TemplateLimitError(f"it takes longer than {seconds:g} s; does a loop end?")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


class _CodeGenerator(CodeGenerator):
    """Compiles `a ~ b` to a call, so that its length is checked."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits for the size of what an expression makes. Use it within `time_limit`.

    Its templates raise `TemplateLimitError`.
    """

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **options: Any):
        # Without optimization nothing is computed at compile time, where no limit holds.
        super().__init__(optimized=False, **options)
        self.filters = {name: _limited_filter(name, function) for name, function in self.filters.items()}

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the output of a template, a macro or a `{% set %}` block."""
        return "".join(_checked_items(parts))

    def join(self, parts: Iterable[Any]) -> str:
        """`a ~ b`."""
        return self.concat(map(str, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**"):
            _check_work(left, right, power=operator == "**")
        if operator == "%":
            _check_widths(left)
        return _checked(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Called for each attribute; it is not None for `"...".format`."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_work(getattr(__obj, "__self__", None), *args, *kwargs.values())
        return _checked(super().call(__context, __obj, *args, **kwargs))


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _check_widths(args[0])
        _check_work(*args, *kwargs.values())
        return _checked(function(*args, **kwargs))

    return limited


def _check_work(*operands: Any, power: bool = False) -> None:
    """Refuse a call whose result could be very large, before it is made."""
    sizes = [max(2 if power else 1, _size(operand)) for operand in operands]
    work = functools.reduce(operator.mul, sizes, 1)
    if power and isinstance(operands[1], int | float) and operands[1] > 64:
        raise TemplateLimitError(f"it computes a power of {operands[1]}")
    if work > MAX_WORK:
        raise TemplateLimitError("it makes a very large value")


def _check_widths(pattern: Any) -> None:
    """Refuse a pattern of `%`, `format` or `.format` with a very large width."""
    if isinstance(pattern, str) and re.search(r"\d{6,}", pattern):
        raise TemplateLimitError("it formats a very large value")


def _checked(value: Any) -> Any:
    """The value, or an iterator that checks each of its items as it comes."""
    if isinstance(value, Iterator):
        return _checked_items(value)
    if _size(value) > MAX_SIZE:
        raise TemplateLimitError(f"it makes a value of a size above {MAX_SIZE:,}")
    return value


def _checked_items(items: Iterable[Any]) -> Iterator[Any]:
    total = 0
    for item in items:
        total += 1 + _size(item)
        if total > MAX_SIZE:
            raise TemplateLimitError(f"it makes a value of a size above {MAX_SIZE:,}")
        yield item


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, list | tuple | set | frozenset):
        return len(value) + sum(len(item) if isinstance(item, str) else _items_in(item) for item in value)
    if isinstance(value, dict):
        return _size(list(value)) + _size(list(value.values()))
    return 1


def _items_in(value: Any) -> int:
    """The size of an item of a list; an integer counts as one item there."""
    return 1 if isinstance(value, int) else _size(value)
