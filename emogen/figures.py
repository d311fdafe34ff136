"""Pictures of scored predictions, as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("svg")  # no display is needed
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text

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


def draw_comparison(
    systems: Sequence[tuple[str, float, tuple[float, float] | None, dict[str, float]]], path: Path
) -> None:
    """Macro-F1 by system as bars, and beside it the F1 of each label.

    Args:
        systems: of each its name, macro-F1, 95 % interval (None for a published one), and F1 by label.
        path: an .svg, .png or .pdf file.
    """
    from matplotlib import pyplot

    names = list(dict.fromkeys(label for *_, f1 in systems for label in f1))
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 1.4 + 0.34 * len(systems)), width_ratios=(1, 1.4), sharey=True, layout="constrained"
    )
    for k, (_, macro, interval, _) in enumerate(systems):
        left.barh(k, macro, color="C0" if interval else "lightgray")
        if interval:
            left.plot(interval, (k, k), color="black", linewidth=1.5)
        left.text(0.01, k, f"{macro:.3f}", va="center", fontsize=8, color="white" if interval else "black")
    left.set_yticks(range(len(systems)), [name for name, *_ in systems], fontsize=8)
    left.set(xlim=(0, 0.05 + max(macro for _, macro, *_ in systems)), xlabel="macro-F1")
    left.invert_yaxis()
    cells = [[f1.get(label, float("nan")) for label in names] for *_, f1 in systems]
    right.imshow(cells, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for k, row in enumerate(cells):
        for j, value in enumerate(row):
            if value == value:  # not NaN
                color = "white" if value > 0.55 else "black"
                right.text(j, k, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    right.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    right.tick_params(left=False)
    _save(figure, path)
    pyplot.close(figure)


def _save(figure: Any, path: Path) -> None:
    """The whole file or none of it."""
    scratch = path.with_name(f".{path.name}")
    figure.savefig(scratch, format=path.suffix[1:])
    scratch.replace(path)
