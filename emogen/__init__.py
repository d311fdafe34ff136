"""emogen: multi-label text classification by instruction generation.

What is named here may be imported by others and stays; everything else may move. Nothing heavy is loaded before it is
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emogen.distribution import __version__

if TYPE_CHECKING:
    from emogen.estimator import EmogenClassifier
    from emogen.evaluation.metrics import score
    from emogen.prediction.ensemble import load_run
    from emogen.prediction.loaded import LoadedClassifier, load
    from emogen.task.labels import load_label_set
    from emogen.task.parse import parse_answer

__all__ = [
    "EmogenClassifier",
    "LoadedClassifier",
    "__version__",
    "load",
    "load_label_set",
    "load_run",
    "parse_answer",
    "score",
]

_HOME = {
    "EmogenClassifier": "emogen.estimator",
    "LoadedClassifier": "emogen.prediction.loaded",
    "load": "emogen.prediction.loaded",
    "load_label_set": "emogen.task.labels",
    "load_run": "emogen.prediction.ensemble",
    "parse_answer": "emogen.task.parse",
    "score": "emogen.evaluation.metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'emogen' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
