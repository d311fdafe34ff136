"""The commands of emogen in forks of this process, which has loaded the heavy libraries once."""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Ended:
    """How a command ended. `code` is None if it was stopped because it took too long."""

    code: int | None
    output: str
    seconds: float


@dataclass
class Kill:
    """A signal that a command sends itself at its n-th file event, or that it gets after some seconds."""

    how: signal.Signals
    event: int | None = None
    seconds: float | None = None


class Command:
    """A command of emogen in a fork. `setup` runs in the fork before it."""

    def __init__(self, words: list, scratch: Path, kill: Kill | None = None, setup: Callable[[], None] = lambda: None):
        self.output = scratch / f"output-{time.monotonic_ns()}-{random.getrandbits(32)}"
        self.started = time.monotonic()
        self.kill = kill
        self.pid = os.fork()
        if not self.pid:
            _become(list(map(str, words)), self.output, kill, setup)

    def end(self, limit: float) -> Ended:
        """Wait for the end of the command; stop it after `limit` seconds."""
        code, when = None, self.kill.seconds if self.kill else None
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            passed = time.monotonic() - self.started
            if pid:
                code = os.waitstatus_to_exitcode(status)
                break
            if when is not None and passed > when:
                os.kill(self.pid, self.kill.how)
                when = None
            if passed > limit:
                break
            time.sleep(0.01)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # and what it has started
        if code is None:
            os.waitpid(self.pid, 0)
        text = self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""
        self.output.unlink(missing_ok=True)
        return Ended(code, text, passed)


def run(words, scratch, kill=None, setup=lambda: None, limit=120.0) -> Ended:
    """Run a command to its end."""
    return Command(words, scratch, kill, setup).end(limit)


def _become(words: list[str], output: Path, kill: Kill | None, setup: Callable[[], None]) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, _opened(output)), (2, _opened(output))):
            os.dup2(target, stream)
        # Buffers and consoles of this process are those of the terminal; the fork gets its own.
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["emogen", *words]
        setup()
        if kill and kill.event is not None:
            _kill_self_at(kill)
        from emogen.cli.__main__ import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def _kill_self_at(kill: Kill) -> None:
    left = kill.event

    def watch(event: str, args: tuple) -> None:
        nonlocal left
        is_write = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and isinstance(args[2], int) and args[2] & WRITES
        )
        if is_write:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), kill.how)

    sys.addaudithook(watch)


class ForkedWorker:
    """Stands for `subprocess.Popen` of `emogen.worker`: the same run, in a fork instead of a new interpreter."""

    def __init__(self, command, stdin, stdout, stderr, env):
        reader, self._writer = os.pipe()
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            os.close(reader)
            return
        os.close(self._writer)
        for target, stream in ((reader, 0), (stdout.fileno(), 1), (stderr.fileno(), 2)):
            os.dup2(target, stream)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = command[command.index("emogen.worker") :]
        code = 1
        try:
            from emogen import worker

            worker.main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def terminate(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    kill = terminate

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode


def fork_workers() -> None:
    """Let the runs of a cross-validation or a sweep start as forks."""
    from emogen.experiments import jobs

    start = jobs.subprocess.Popen

    def fork_or_start(command, *args, **settings):
        return (ForkedWorker if "emogen.worker" in command else start)(command, *args, **settings)

    jobs.subprocess.Popen = fork_or_start
    jobs.POLL_SECONDS = 0.05
