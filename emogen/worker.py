"""One run in a process of its own, which ends when its parent does.

    python -m emogen.worker RECIPE [key=value ...]

`emogen cv`, `sweep` and `prompts compare --train-steps` start it. Its standard input is a pipe that nobody writes to:
the pipe ends when the parent does, however that ends.
"""

import os
import sys
import threading
from typing import NoReturn

from emogen import train
from emogen.console import run_command


def main() -> None:
    """Train, and stop as soon as the parent is gone. The work since the last checkpoint is done again."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    run_command(train.main)


def _exit_with_parent() -> NoReturn:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
