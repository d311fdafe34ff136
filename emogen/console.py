"""What people see on a terminal: consoles, progress bars, log messages, and exit codes."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

from emogen import processes
from emogen.errors import InputError, ModelError

out = Console()
err = Console(stderr=True)
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]  # makes one of a title and a number of rows


@contextmanager
def progress_bar(what: str, total: int, unit: str = "row") -> Iterator[Callable[[int], Any]]:
    """A progress bar on standard error, with the rate; gives a function that moves it on.

    Of several processes the main one shows it, as if the others kept pace.
    """
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, mininterval=0.5, disable=not processes.is_main_process()) as bar:
        yield lambda n: bar.update(min(n * processes.world_size(), total - bar.n))


def set_up_logging() -> None:
    """emogen's messages to standard error, one line each; other libraries only from warnings on. Of several processes
    the main one speaks."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)-8s %(message)s")
    logging.getLogger("emogen").setLevel(logging.INFO if processes.is_main_process() else logging.ERROR)
    # TRL 1.16 still sets it by its old name, in its own defaults.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
    # Says at every import that an optional kernel package is not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def run_command(command: Callable[[], Any]) -> None:
    """Run a command; what a user can mend becomes a message and an exit code, and no traceback.

    2: the input is wrong. 1: something outside gave way (a full disk, a model that cannot be fetched). 130: Ctrl-C.
    """
    set_up_logging()
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, ModelError, OSError) as error:
        err.print(f"[red]error[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2 if isinstance(error, InputError | FileNotFoundError) else 1)
    finally:
        processes.shut_down()
