"""Pictures of scored predictions. Each function draws one; `save` makes a file of it, `inline_svg` a part of a page."""

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GENERATOR = "emogen report"  # in every file that is drawn or written: what bears it may be replaced
INK = "#2b2f34"  # text and axes; in a page, the colour of its text, be that dark or light
COLORS = ("#3d7ebf", "#d9802e", "#8a8f94")  # blue and orange tell systems apart, also to the colour-blind; grey: others
WRITTEN = 16  # up to so many labels, a matrix of them has its figures written in its cells


matplotlib.rcParams |= {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a label may be called $
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


def save(figure: Figure, path: Path) -> None:
    """A picture as an .svg, .png or .pdf file on white: the whole file or none of it."""
    scratch = path.with_name(f".{path.name}")
    kind = path.suffix[1:]
    metadata = {"Software": GENERATOR} if kind == "png" else {"Creator": GENERATOR}
    try:
        with matplotlib.rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(scratch, format=kind, dpi=200, facecolor="white", metadata=metadata)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """A picture as an <svg> element that can stand in a page with others, and has the colour of its text.

    Args:
        name: of letters and hyphens; no other picture of the page may have it.
        alt: what it shows, for who does not see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # a style is the page's
    width, height = (round(float(size) * 4 / 3) for size in re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    attributes = f'role="img" aria-label="{html.escape(alt)}" width="{width}" height="{height}"'
    svg = re.sub(r'<svg (.*?)width="[\d.]+pt"(.*?)height="[\d.]+pt"|<svg ', rf"<svg \1\2{attributes} ", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return svg.replace(INK, "currentColor").strip()


def _grid(n: int, size: float = 1.9, columns: int = 4) -> tuple[Figure, list["Axes"]]:
    """A figure with n small square axes that share their scales."""
    columns = min(columns, n)
    rows = -(-n // columns)
    figure = Figure(figsize=(size * columns + 0.3, (size + 0.15) * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes in grid[n:]:
        axes.set_visible(False)
    for axes in grid[max(n - columns, 0) : n]:  # also above an empty place
        axes.tick_params(labelbottom=True)
    for axes in grid[:n]:
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    return figure, list(grid[:n])


def draw_reliability(calibration: dict[str, Any]) -> Figure:
    """The reliability diagram of each label (DeGroot and Fienberg 1983): of the rows that were given a probability, how
    many have the label; on the dotted line as many as were said. Each point is a bin, the larger the more rows.

    Args:
        calibration: what `score.calibration` returned.
    """
    labels = calibration["per_label"]
    figure, grid = _grid(len(labels))
    for axes, (name, label) in zip(grid, labels.items(), strict=True):
        prob, positive, n = (np.array([bin[key] for bin in label["bins"]]) for key in ("prob", "positive", "n"))
        axes.plot([0, 1], [0, 1], ":", color=INK, alpha=0.6, linewidth=1)
        axes.plot(prob, positive, color=COLORS[0], linewidth=1)
        axes.scatter(prob, positive, s=4 + 90 * (n / n.sum()) ** 0.5, color=COLORS[0], alpha=0.6, linewidth=0)
        axes.set_title(f"{name}  (ECE {label['ece']:.3f})")
    figure.supxlabel("probability", fontsize=9)
    figure.supylabel("share that has the label", fontsize=9)
    return figure


def draw_precision_recall(
    gold: np.ndarray, prob: np.ndarray, names: Sequence[str], systems: Sequence[tuple[str, np.ndarray]]
) -> Figure:
    """The precision-recall curve of each label, and where on it (or beside it) the systems decide.

    Args:
        gold, prob: [n, L].
        systems: of each its title, and its pred [n, L]. One that decides by nested thresholds is not quite on the
            curve: it has a threshold for each fold.
    """
    from sklearn.metrics import precision_recall_curve

    figure, grid = _grid(len(names))
    for k, (axes, name) in enumerate(zip(grid, names, strict=True)):
        axes.set_title(name)
        if gold[:, k].any():
            precision, recall, _ = precision_recall_curve(gold[:, k], prob[:, k])
            shown = np.unique(np.linspace(0, len(recall) - 1, 200).astype(int))  # what the eye can tell apart
            axes.plot(recall[shown], precision[shown], color=INK, alpha=0.55, linewidth=1)
        for (title, pred), color, marker in zip(systems, COLORS, "oD", strict=False):
            hits = int((gold[:, k] & pred[:, k]).sum())
            at = hits / max(gold[:, k].sum(), 1), hits / max(pred[:, k].sum(), 1)
            axes.scatter(*at, s=30, color=color, marker=marker, label=title, zorder=3, linewidth=0, alpha=0.9)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return figure


def draw_labels(per_label: dict[str, Any], intervals: dict[str, tuple[float, float]], color: str) -> Figure:
    """Precision, recall and F1 of each label: F1 as a bar with its interval, the two others as marks.

    Args:
        per_label: of `score.score`.
        intervals: of `f1/<label>`.
    """
    figure = Figure(figsize=(4.6, 0.9 + 0.3 * len(per_label)), layout="constrained")
    axes = figure.subplots()
    for k, (name, label) in enumerate(per_label.items()):
        axes.barh(k, label["f1"], color=color, alpha=0.45, label="F1, 95 %" if k == 0 else None)
        axes.plot(intervals[f"f1/{name}"], (k, k), color=INK, linewidth=1.4)
    for key, marker in (("precision", ">"), ("recall", "o")):
        values = [label[key] for label in per_label.values()]
        axes.scatter(values, range(len(values)), s=20, marker=marker, color=color, label=key, zorder=3)
    axes.set_yticks(range(len(per_label)), [f"{name} ({label['support']:,})" for name, label in per_label.items()])
    axes.set(xlim=(0, 1.02))
    axes.invert_yaxis()
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
    axes.tick_params(left=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_curves(
    logs: Sequence[Sequence[dict[str, Any]]], curves: Sequence[tuple[str, str]], title: str, top: float | None = None
) -> Figure:
    """What a trainer logged, by step.

    Args:
        logs: of each run what `results.read_log` returned; the folds of a cross-validation are drawn over each other.
        curves: keys of the log, and what they are called.
        title: of the vertical axis, which ends at `top`.
    """
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.subplots()
    for (key, name), color in zip(curves, COLORS, strict=False):
        seen = [[(entry["step"], entry[key]) for entry in log if key in entry] for log in logs]
        for k, points in enumerate(points for points in seen if points):
            (line,) = axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, label="" if k else name)
            line.set(marker="o" if len(points) < 30 else "", markersize=4, alpha=1 if len(logs) == 1 else 0.6)
    axes.set(xlabel="step", ylabel=title, xlim=(0, None), ylim=(0, top))
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    axes.legend(loc="best")
    return figure


def draw_folds(folds: dict[str, dict[str, Sequence[float]]]) -> Figure:
    """Macro-F1 and micro-F1 of each fold as points, and their mean as a line.

    Args:
        folds: `folds` of a cross-validation's metrics: by system and figure, the value of each fold.
    """
    figure = Figure(figsize=(6.5, 0.9 + 0.32 * 2 * len(folds)), layout="constrained")
    axes = figure.subplots()
    ticks: list[str] = []
    for (system, of), color in zip(folds.items(), COLORS, strict=False):
        for key, title in (("f1_macro", "macro-F1"), ("f1_micro", "micro-F1")):
            y, values = len(ticks), of[key]
            axes.scatter(values, [y] * len(values), s=26, color=color, alpha=0.7, linewidth=0)
            axes.plot([np.mean(values)] * 2, (y - 0.3, y + 0.3), color=INK, linewidth=1.4)
            ticks.append(f"{title}, {system}")
    axes.set_yticks(range(len(ticks)), ticks)
    axes.invert_yaxis()
    axes.tick_params(left=False)
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
    return figure


def draw_matrix(
    share: np.ndarray, shown: Sequence[Sequence[str]], names: Sequence[str], rows: str, columns: str
) -> Figure:
    """A matrix of labels by labels, the deeper the colour the larger the share.

    Args:
        share: [L, L], 0 to 1; NaN leaves a cell empty.
        shown: [L][L], what is written in the cells (of up to `WRITTEN` labels).
        rows, columns: what these are.
    """
    side = 1.2 + 0.3 * len(names)
    figure = Figure(figsize=(side + 0.2, side), layout="constrained")
    axes = figure.subplots()
    _cells(axes, share, shown if len(names) <= WRITTEN else None, COLORS[0])
    axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=50, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.set(xlabel=columns, ylabel=rows)
    axes.invert_yaxis()
    return figure


def _cells(axes: "Axes", values: np.ndarray, shown: Sequence[Sequence[str]] | None, color: str) -> None:
    """Cells that are see-through where `values` [R, C] is 0 and of a colour where it is 1: good on light and dark."""
    shades = LinearSegmentedColormap.from_list("", [(*to_rgb(color), 0.0), (*to_rgb(color), 0.8)])
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=shades, vmin=0, vmax=1)
    for k, row in enumerate(shown or []):
        for j, text in enumerate(row):
            axes.text(j + 0.5, k + 0.5, text, ha="center", va="center", fontsize=7)
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)


def draw_comparison(systems: Sequence[tuple[str, float, tuple[float, float] | None, dict[str, float]]]) -> Figure:
    """Macro-F1 by system as bars, and beside it the F1 of each label.

    Args:
        systems: of each its name, macro-F1, 95 % interval (None for a published one), and F1 by label.
    """
    names = list(dict.fromkeys(label for *_, f1 in systems for label in f1))
    figure = Figure(figsize=(9.6, 1.0 + 0.29 * len(systems)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5), sharey=True)
    for k, (_, macro, interval, _) in enumerate(systems):
        left.barh(k + 0.5, macro, color=COLORS[0] if interval else COLORS[2], alpha=0.45)
        if interval:
            left.plot(interval, (k + 0.5, k + 0.5), color=INK, linewidth=1.5)
        left.text(0.01, k + 0.5, f"{macro:.3f}", va="center", fontsize=8)
    left.set_yticks(np.arange(len(systems)) + 0.5, [name for name, *_ in systems])
    left.set(xlim=(0, 0.05 + max(macro for _, macro, *_ in systems)), xlabel="macro-F1")
    left.invert_yaxis()
    left.tick_params(left=False)
    cells = np.array([[f1.get(label, np.nan) for label in names] for *_, f1 in systems])
    _cells(right, cells, [["" if np.isnan(value) else f"{value:.2f}" for value in row] for row in cells], COLORS[0])
    right.set_xticks(np.arange(len(names)) + 0.5, names, rotation=40, ha="right", rotation_mode="anchor")
    return figure
