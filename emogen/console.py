"""Terminal output: consoles, progress bars, log messages and exit codes."""

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from emogen import processes
from emogen.errors import InputError, ModelError

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but the tab and the end of a line


def printable(text: str) -> str:
    """Write control characters as escapes: those of a file name or a text could move the cursor, or hide a line."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class PlainConsole(Console):
    """A console for names and texts of others: neither markup, nor emoji codes, nor control characters have an effect.

    Styles are set with `rich.text.Text`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Render as rich does, with every piece of text made printable."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


out = PlainConsole()  # standard output: results
err = PlainConsole(stderr=True)  # standard error: progress and messages
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]  # (title, total) -> a bar, as `progress_bar`


def no_bar(title: str, total: int) -> AbstractContextManager[Callable[[int], Any]]:
    """A bar, as `progress_bar`, that shows nothing."""
    return nullcontext(lambda n: None)


@contextmanager
def progress_bar(title: str, total: int, unit: str = "row") -> Iterator[Callable[[int], Any]]:
    """Show a progress bar with its rate on standard error.

    With several processes, only the main one shows the bar; the others are assumed to be equally fast.

    Args:
        title: text before the bar.
        total: number of units in all processes together.
        unit: name of a unit.

    Yields:
        A function that advances the bar by the number of units that this process has done.
    """
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit=unit, mininterval=0.5, disable=not processes.is_main_process()) as bar:
        yield lambda n: bar.update(min(n * processes.world_size(), total - bar.n))


def message(word: str, style: str, text: str) -> Text:
    """A word in a style, such as a red "error", and what it is about."""
    return Text.assemble((word, style), " ", text)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up_logging() -> None:
    """Log to standard error, one line per message: emogen from INFO, other libraries from WARNING.

    With several processes, all but the main one log emogen's errors only.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(levelname)-8s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("emogen").setLevel(logging.INFO if processes.is_main_process() else logging.ERROR)
    quiet_libraries()


def quiet_libraries() -> None:
    """Leave out warnings of other libraries that no user of emogen can do anything about."""
    # The defaults of TRL 1.16 still use this old name.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
    # Warns at every import that an optional kernel package is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def run_command(command: Callable[[], Any]) -> None:
    """Run a command, and turn errors that a user can fix into a message and an exit code.

    The exit codes are 0 for success, 1 for an external failure (disk, network), 2 for invalid input, and 130 for an
    interrupt (Ctrl-C). Any other exception is a bug and propagates.

    Raises:
        SystemExit: with one of these codes, except after success.
    """
    set_up_logging()
    processes.share_machine()
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, ModelError, OSError) as error:
        err.print(message("error", "red", str(error)), soft_wrap=True)
        sys.exit(2 if isinstance(error, InputError | FileNotFoundError) else 1)
    finally:
        processes.shut_down()
