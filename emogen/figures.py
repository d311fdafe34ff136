"""Pictures of scored predictions, as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("svg")  # no display is needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_reliability(calibration: dict[str, Any], path: Path) -> None:
    """The reliability diagram of each label (DeGroot and Fienberg 1983): of the rows that were given a probability, how
    many have the label; on the dotted line as many as were said. Each point is a bin, the larger the more rows.

    Args:
        calibration: what `score.calibration` returned.
        path: an .svg, .png or .pdf file.
    """
    from matplotlib import pyplot

    labels = calibration["per_label"]
    columns = min(4, len(labels))
    rows = -(-len(labels) // columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(2.4 * columns, 2.4 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (name, label) in zip(grid.flat, labels.items(), strict=False):
        _reliability(axes, label["bins"])
        axes.set_title(f"{name}  (ECE {label['ece']:.3f})", fontsize=9)
    for axes in grid.flat[len(labels) :]:
        axes.set_visible(False)
    figure.supxlabel("probability", fontsize=9)
    figure.supylabel("share that has the label", fontsize=9)
    _save(figure, path)
    pyplot.close(figure)


def _reliability(axes: "Axes", bins: Sequence[dict[str, float]]) -> None:
    total = sum(bin["n"] for bin in bins)
    axes.plot([0, 1], [0, 1], ":", color="gray", linewidth=1)
    axes.plot([bin["prob"] for bin in bins], [bin["positive"] for bin in bins], color="C0", linewidth=1)
    sizes = [4 + 120 * (bin["n"] / total) ** 0.5 for bin in bins]
    axes.scatter([bin["prob"] for bin in bins], [bin["positive"] for bin in bins], s=sizes, color="C0", alpha=0.6)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.tick_params(labelsize=8)


def _save(figure: Any, path: Path) -> None:
    """The whole file or none of it."""
    scratch = path.with_name(f".{path.name}")
    figure.savefig(scratch, format=path.suffix[1:])
    scratch.replace(path)
