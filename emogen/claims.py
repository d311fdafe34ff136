"""Claims: one process at a time works in a folder or writes a file."""

import errno
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from emogen.errors import InputError

GRACE = 2.0  # seconds in which a run that lost its parent ends


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Create a folder, and hold it for this process; see `claim`. A new one that stays empty is removed.

    Raises:
        InputError: another process holds it, or it cannot be written to.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".claim").open("a"):
            pass
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise  # not wrong input
        raise InputError(f"{folder}: cannot be written to: {error.strerror}") from None
    try:
        with claim(folder, GRACE):
            yield
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()


@contextmanager
def claim(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder, or a file that is to be written, for this process.

    The claim is a lock of the operating system on `.claim` in the folder, or on `.NAME.claim` beside the file. It ends
    with its process, however that ends, so that a claim is never left behind. The lock file names its holder.

    Args:
        path: a folder that exists, or a file in a folder that exists.
        wait: seconds to wait for a process that holds it.

    Raises:
        InputError: another process holds the claim; the message says which.
        OSError: the folder cannot be written to.
    """
    lock_file = path / ".claim" if path.is_dir() else path.with_name(f".{path.name}.claim")
    lock = FileLock(lock_file, timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{path}: in use{_holder(lock_file)}; wait until it is done, or stop it") from None
    try:
        holder = {
            "host": platform.node(),
            "pid": os.getpid(),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
        }
        lock_file.write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        lock_file.unlink(missing_ok=True)  # before the release: a waiting process then takes a new file
        lock.release()


def _holder(lock_file: Path) -> str:
    try:
        holder = json.loads(lock_file.read_text(encoding="utf-8"))
        return f" by process {holder['pid']} on {holder['host']} since {holder['started']} ({holder['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # the holder is just now writing it
        return " by another process"
