"""Pictures of scored predictions. `draw_` functions draw them; `save` and `inline_svg` put them in a file or a page."""

import html
import io
import logging
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from emogen.evaluation.caveats import listed
from emogen.evaluation.metrics import MIN_ROWS, Interval
from emogen.report.compare import ComparisonRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

GENERATOR = "emogen report"  # is in every file that is written here; such a file may be replaced
INK = "#2b2f34"  # text and axes; `inline_svg` replaces it by the text colour of the page, which is dark or light
COLORS = ("#3d7ebf", "#d9802e", "#8a8f94")  # blue and orange, which the colour-blind can tell apart; grey: others
MAX_WRITTEN = 16  # a matrix of more labels has no numbers in its cells

matplotlib.rcParams |= {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a label may contain $
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


@contextmanager
def own_words_for_missing_glyphs(picture: str | None) -> Iterator[None]:
    """Replace matplotlib's warnings of characters that its font lacks, of which there is one for each character.

    Args:
        picture: its name. None for an SVG: it keeps its text, and the reader's fonts draw it, so nothing is missing.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    missing = [w for w in caught if str(w.message).startswith("Glyph ")]
    for other in caught:
        if other not in missing:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if missing and picture is not None:
        lacking = listed(sorted({chr(int(str(w.message).split()[1])) for w in missing}))
        log.warning(f"{picture}: the font has no {lacking}; an .svg keeps its text, and the reader's fonts draw it")


def save(figure: Figure, path: Path) -> None:
    """Write a picture as an .svg, .png or .pdf file with a white background, atomically."""
    scratch = path.with_name(f".{path.name}")
    kind = path.suffix[1:]
    metadata = {"Software": GENERATOR} if kind == "png" else {"Creator": GENERATOR}
    picture = None if kind == "svg" else str(path)
    try:
        with matplotlib.rc_context({"svg.hashsalt": path.stem}), own_words_for_missing_glyphs(picture):
            figure.savefig(scratch, format=kind, dpi=200, facecolor="white", metadata=metadata)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """Convert a picture to an <svg> element for a page that contains other pictures.

    The ink takes the text colour of the page.

    Args:
        name: letters and hyphens, unique in the page; the prefix of all ids in the element.
        alt: a description for screen readers.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), own_words_for_missing_glyphs(None):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # A style would apply to the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    width, height = (round(float(size) * 4 / 3) for size in re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    attributes = f'role="img" aria-label="{html.escape(alt)}" width="{width}" height="{height}"'
    svg = re.sub(r'<svg (.*?)width="[\d.]+pt"(.*?)height="[\d.]+pt"|<svg ', rf"<svg \1\2{attributes} ", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return svg.replace(INK, "currentColor").strip()


def _grid(n: int, size: float = 1.9, columns: int = 4) -> tuple[Figure, list["Axes"]]:
    """Create a figure with n small square axes that share their scales."""
    columns = min(columns, n)
    rows = -(-n // columns)
    figure = Figure(figsize=(size * columns + 0.3, (size + 0.15) * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes in grid[n:]:
        axes.set_visible(False)
    for axes in grid[max(n - columns, 0) : n]:  # also above an empty cell
        axes.tick_params(labelbottom=True)
    for axes in grid[:n]:
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    return figure, list(grid[:n])


def draw_reliability(calibration: dict[str, Any]) -> Figure:
    """Draw the reliability diagram of each label (DeGroot and Fienberg 1983).

    Each point is a bin: its mean probability against its share of positives, with an area that grows with its rows. On
    the dotted line both are equal.

    Args:
        calibration: the result of `metrics.calibration`.
    """
    labels = calibration["per_label"]
    figure, grid = _grid(len(labels))
    for axes, (name, label) in zip(grid, labels.items(), strict=True):
        prob, positive, n = (np.array([bin[key] for bin in label["bins"]]) for key in ("prob", "positive", "n"))
        axes.plot([0, 1], [0, 1], ":", color=INK, alpha=0.6, linewidth=1)
        axes.plot(prob, positive, color=COLORS[0], linewidth=1)
        axes.scatter(prob, positive, s=4 + 90 * (n / n.sum()) ** 0.5, color=COLORS[0], alpha=0.6, linewidth=0)
        # One bin or few rows give an ECE that says little.
        says_much = len(label["bins"]) > 1 and n.sum() >= MIN_ROWS
        axes.set_title(f"{name}  (ECE {label['ece']:.3f})" if says_much else name)
    figure.supxlabel("probability", fontsize=9)
    figure.supylabel("share of positives", fontsize=9)
    return figure


def draw_precision_recall(
    gold: np.ndarray, prob: np.ndarray, names: Sequence[str], decisions: Sequence[tuple[str, np.ndarray]]
) -> Figure:
    """Draw the precision-recall curve of each label, with a mark for the precision and recall of each decision.

    The dotted line is the precision of a label that is given to every row.

    Args:
        gold, prob: [n, L].
        decisions: (title, pred [n, L]). Nested thresholds may be off the curve, because each fold has its own.
    """
    from sklearn.metrics import precision_recall_curve

    figure, grid = _grid(len(names))
    for k, (axes, name) in enumerate(zip(grid, names, strict=True)):
        if not gold[:, k].any():
            axes.set_title(f"{name}  (no positives)")  # neither recall nor a curve is defined
            continue
        axes.set_title(name)
        precision, recall, _ = precision_recall_curve(gold[:, k], prob[:, k])
        shown = np.unique(np.linspace(0, len(recall) - 1, 200).astype(int))  # more points would not be visible
        axes.plot(recall[shown], precision[shown], color=INK, alpha=0.55, linewidth=1)
        axes.axhline(gold[:, k].mean(), color=INK, alpha=0.6, linewidth=1, linestyle=":")
        for (title, pred), color, marker in zip(decisions, COLORS, "oD", strict=False):
            hits = int((gold[:, k] & pred[:, k]).sum())
            point = hits / gold[:, k].sum(), hits / max(pred[:, k].sum(), 1)  # recall, precision
            axes.scatter(*point, s=30, color=color, marker=marker, label=title, zorder=3, linewidth=0, alpha=0.9)
    marked = next((axes for axes in grid if axes.collections), grid[0])
    figure.legend(*marked.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return figure


def draw_labels(
    per_label: dict[str, Any], intervals: dict[str, Interval], constant: dict[str, float], color: str
) -> Figure:
    """Draw the F1 of each label as a bar with its interval, and precision and recall as marks.

    Args:
        per_label: `per_label` of `metrics.score`.
        intervals: the interval of each `f1/<label>`; None draws none.
        constant: the F1 of each label if every row gets it, drawn as a stroke.
    """
    figure = Figure(figsize=(4.6, 0.9 + 0.3 * len(per_label)), layout="constrained")
    axes = figure.subplots()
    for k, (name, label) in enumerate(per_label.items()):
        axes.barh(k, label["f1"], color=color, alpha=0.45, label="F1, 95 %" if k == 0 else None)
        if ends := intervals[f"f1/{name}"]:
            axes.plot(ends, (k, k), color=INK, linewidth=1.4)
        every_row = "every row" if k == 0 else None
        axes.plot([constant[name]] * 2, (k - 0.4, k + 0.4), ":", color=INK, linewidth=1.2, label=every_row)
    for key, marker in (("precision", ">"), ("recall", "o")):
        values = [label[key] for label in per_label.values()]
        axes.scatter(values, range(len(values)), s=20, marker=marker, color=color, label=key, zorder=3)
    axes.set_yticks(range(len(per_label)), [f"{name} ({label['support']:,})" for name, label in per_label.items()])
    axes.set(xlim=(0, 1.02))
    axes.invert_yaxis()
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
    axes.tick_params(left=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_curves(
    logs: Sequence[Sequence[dict[str, Any]]], curves: Sequence[tuple[str, str]], title: str, top: float | None = None
) -> Figure:
    """Draw values of trainer logs by step.

    Args:
        logs: the result of `results.read_log` for each run; the folds of a cross-validation share the axes.
        curves: (key of the log, title).
        title: title of the vertical axis.
        top: upper end of the vertical axis; None fits it to the values.
    """
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.subplots()
    for (key, name), color in zip(curves, COLORS, strict=False):
        points_by_log = [[(entry["step"], entry[key]) for entry in log if key in entry] for log in logs]
        for k, points in enumerate(points for points in points_by_log if points):
            (line,) = axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, label="" if k else name)
            line.set(marker="o" if len(points) < 30 else "", markersize=4, alpha=1 if len(logs) == 1 else 0.6)
    axes.set(xlabel="step", ylabel=title, xlim=(0, None), ylim=(0, top))
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    axes.legend(loc="best")
    return figure


def draw_folds(values_by_decision: dict[str, dict[str, list[float]]], mean: dict[str, dict[str, float]]) -> Figure:
    """Draw macro-F1 and micro-F1 of each fold as points, and their means as lines.

    Args:
        values_by_decision: decision -> `f1_macro`, `f1_micro` -> the value of each fold.
        mean: decision -> metric -> the mean; empty, and not drawn, until all folds are finished.
    """
    figure = Figure(figsize=(6.5, 0.9 + 0.32 * 2 * len(values_by_decision)), layout="constrained")
    axes = figure.subplots()
    ticks: list[str] = []
    for (decision, by_metric), color in zip(values_by_decision.items(), COLORS, strict=False):
        for key, title in (("f1_macro", "macro-F1"), ("f1_micro", "micro-F1")):
            y, values = len(ticks), by_metric[key]
            axes.scatter(values, [y] * len(values), s=26, color=color, alpha=0.7, linewidth=0)
            if decision in mean:
                axes.plot([mean[decision][key]] * 2, (y - 0.3, y + 0.3), color=INK, linewidth=1.4)
            ticks.append(f"{title}, {decision}")
    axes.set_yticks(range(len(ticks)), ticks)
    axes.invert_yaxis()
    axes.tick_params(left=False)
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
    return figure


def draw_matrix(
    share: np.ndarray, texts: Sequence[Sequence[str]], names: Sequence[str], rows: str, columns: str
) -> Figure:
    """Draw a matrix of labels by labels; a larger share has a deeper colour.

    Args:
        share: [L, L], 0 to 1; NaN leaves a cell uncoloured.
        texts: [L][L], the texts of the cells, which are written for up to `MAX_WRITTEN` labels.
        rows, columns: titles of the axes.
    """
    side = 1.2 + 0.3 * len(names)
    figure = Figure(figsize=(side + 0.2, side), layout="constrained")
    axes = figure.subplots()
    _draw_cells(axes, share, texts if len(names) <= MAX_WRITTEN else ())
    axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=50, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.set(xlabel=columns, ylabel=rows)
    axes.invert_yaxis()
    return figure


def _draw_cells(axes: "Axes", values: np.ndarray, texts: Sequence[Sequence[str]]) -> None:
    """Draw cells that are transparent where `values` [R, C] is 0 and blue where it is 1, for light and dark pages."""
    blue = to_rgb(COLORS[0])
    shades = LinearSegmentedColormap.from_list("", [(*blue, 0.0), (*blue, 0.8)])
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=shades, vmin=0, vmax=1)
    for k, row in enumerate(texts):
        for j, text in enumerate(row):
            axes.text(j + 0.5, k + 0.5, text, ha="center", va="center", fontsize=7)
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)


def draw_comparison(rows: Sequence[ComparisonRow]) -> Figure:
    """Draw the macro-F1 of each system as a bar, and beside it the F1 of each label.

    The dashed line is the highest macro-F1 of the constant predictions among the rows.
    """
    labels = list(dict.fromkeys(label for row in rows for label in row.f1_by_label))
    names = [textwrap.fill(row.name, 32) for row in rows]
    has_numbers = len(labels) <= MAX_WRITTEN
    heights = np.array([0.29 + 0.13 * name.count("\n") for name in names])
    figure = Figure(figsize=(9.6 if has_numbers else 5 + 0.22 * len(labels), 1.0 + heights.sum()), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5 if has_numbers else 0.06 * len(labels)), sharey=True)
    for k, row in enumerate(rows):
        left.barh(k + 0.5, row.f1_macro, color=COLORS[0] if row.kind == "run" else COLORS[2], alpha=0.45)
        if row.interval:
            left.plot(row.interval, (k + 0.5, k + 0.5), color=INK, linewidth=1.5)
        left.text(0.01, k + 0.5, f"{row.f1_macro:.3f}", va="center", fontsize=8)
    constant = [row.f1_macro for row in rows if row.kind == "reference"]
    if constant:
        left.axvline(max(constant), color=INK, alpha=0.7, linewidth=1, linestyle="--")
    left.set_yticks(np.arange(len(rows)) + 0.5, names)
    # The axis holds every bar and the whole of every interval.
    ends = [value for row in rows for value in (row.f1_macro, *(row.interval or ()))]
    left.set(xlim=(0, 0.05 + max(ends)), xlabel="macro-F1")
    left.invert_yaxis()
    left.tick_params(left=False)
    cells = np.array([[row.f1_by_label.get(label, np.nan) for label in labels] for row in rows])
    texts = [["" if np.isnan(value) else f"{value:.2f}" for value in row] for row in cells]
    _draw_cells(right, cells, texts if has_numbers else ())
    right.set_xticks(np.arange(len(labels)) + 0.5, labels, rotation=40, ha="right", rotation_mode="anchor")
    return figure
