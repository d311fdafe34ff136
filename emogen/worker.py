"""One run in a process of its own, which exits when its parent does.

    python -m emogen.worker [--on-ray gpus=1|cpus=K] RECIPE [key=value ...]

`emogen cv`, `sweep` and `prompts compare --train-steps` start it. Its standard input is a pipe to which nothing is
written. The pipe closes when the parent exits or is killed. With `--on-ray` the process waits for a run on a cluster.
"""

import os
import sys
import threading
from typing import NoReturn

from emogen import train
from emogen.console import run_command
from emogen.experiments.on_ray import train_on_ray


def main() -> None:
    """Train, and exit at once when the parent has gone. The steps since the last checkpoint are lost."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if sys.argv[1:2] == ["--on-ray"]:
        run_command(lambda: train_on_ray(sys.argv[2:]))
    else:
        run_command(train.main)


def _exit_with_parent() -> NoReturn:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
