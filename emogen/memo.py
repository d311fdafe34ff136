"""Results that take seconds to compute and depend on little, kept on disk between commands.

Each is a file in the cache folder, named by a digest of all that it depends on. Nothing is lost with such a file: its
content is computed again.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from emogen import paths

log = logging.getLogger(__name__)

MAX_FILES, MAX_BYTES = 200, 500_000_000  # of a kind; the oldest files are removed


def remembered(
    kind: str,
    depends_on: Any,
    compute: Callable[[], Any],
    *,
    packages: Sequence[str] = (),
    keep: Callable[[Any], bool] = lambda result: True,
    is_text: bool = False,
) -> Any:
    """The result of a computation, or of the same one in an earlier command.

    Args:
        kind: the name of the computation, and of its folder in the cache.
        depends_on: everything that determines the result, as JSON values.
        compute: makes the result, a JSON value. What it raises is not kept. After a change in its file, it is computed
            again.
        packages: the libraries whose versions the result depends on.
        keep: whether a result is kept.
        is_text: the result is a long string, which is kept as it is.
    """
    source = Path(inspect.getfile(compute)).read_bytes()
    versions = [_version(name) for name in packages]
    known = json.dumps([hashlib.sha256(source).hexdigest(), versions, depends_on])
    path = paths.cache_dir() / kind / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.json"
    try:
        content = path.read_text(encoding="utf-8")
        return content if is_text else json.loads(content)
    except (OSError, ValueError):  # there is none, or it is damaged
        result = compute()
    if keep(result):
        try:
            with paths.writing(path) as file:
                file.write(result if is_text else json.dumps(result))
            _remove_oldest(path.parent)
        except OSError as error:
            log.debug(f"{path}: not kept: {error}")  # a read-only home costs time, and nothing else
    return result


_version = cache(metadata.version)  # reads a file


def _remove_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    n_bytes = 0
    for k, file in enumerate(files):
        n_bytes += file.stat().st_size
        if k and (k >= MAX_FILES or n_bytes > MAX_BYTES):
            file.unlink(missing_ok=True)
