"""The pictures of a page: which there are, where they are, and what they are made of."""

import re
import warnings
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from tiny import write_run

from emogen.report import figures
from emogen.report.compare import published_rows
from emogen.report.pictures import draw_run
from emogen.report.runs import read_run
from emogen.task.labels import Label, LabelSet


@pytest.fixture(scope="module")
def pictures(small_run):
    return {picture.name: picture for picture in draw_run(small_run)}


@pytest.fixture(scope="module")
def with_published(small_run, labels):
    return {picture.name: picture for picture in draw_run(small_run, published_rows([small_run.folder], labels))}


def test_a_scored_run_has_these_pictures(pictures):
    assert [(picture.section, name) for name, picture in pictures.items()] == [
        ("learning", "learning-loss"),
        ("learning", "learning-f1"),
        ("labels", "labels-answer"),
        ("labels", "labels-nested-thresholds"),
        ("curves", "precision-recall"),
        ("calibration", "reliability"),
        ("cooccurrence", "cooccurrence-gold"),
        ("cooccurrence", "cooccurrence-answer"),
        ("cooccurrence", "cooccurrence-nested-thresholds"),
        ("confusion", "confusion-answer"),
        ("confusion", "confusion-nested-thresholds"),
    ]
    assert all(re.fullmatch(r"[A-Z].*\.", picture.caption) for picture in pictures.values())


def test_the_published_systems_are_grey_and_the_run_is_not(with_published):
    left, _ = with_published["published"].figure.axes
    names = [tick.get_text() for tick in left.get_yticklabels()]
    assert names[:2] == ["small, answer", "small, nested thresholds"]
    assert sum("(reference)" in name for name in names) == 2
    assert len(names) == 2 + 2 + 9
    grey = [bar.get_facecolor()[:3] == figures.to_rgb(figures.COLORS[2]) for bar in left.patches]
    assert grey == [False] * 2 + [True] * (len(grey) - 2)


def test_precision_and_recall_of_each_decision_are_marked(pictures, small_run):
    joy = list(small_run.label_set.names).index("joy")
    axes = pictures["precision-recall"].figure.axes[joy]
    for marks, decision in zip(axes.collections, small_run.scores.decisions, strict=True):
        label = decision.metrics["per_label"]["joy"]
        assert marks.get_offsets().tolist() == [pytest.approx([label["recall"], label["precision"]])]


def test_every_point_of_a_reliability_diagram_is_a_bin(pictures, small_run):
    bins = small_run.scores.calibration["per_label"]["anger"]["bins"]
    points = pictures["reliability"].figure.axes[0].collections[0].get_offsets()
    assert points.tolist() == [pytest.approx([entry["prob"], entry["positive"]]) for entry in bins]


def test_the_dotted_lines_are_what_each_label_scores_if_every_row_gets_it(tmp_path):
    """Also with `exactly_one`, where no prediction gives all of them. Of 40 rows 30 and 10: 2p / (1 + p)."""
    one = LabelSet(name="one", labels=(Label(name="red"), Label(name="blue")), exactly_one=True)
    posts = [("x", ("red",))] * 30 + [("y", ("blue",))] * 10
    drawn = {picture.name: picture for picture in draw_run(read_run(write_run(tmp_path / "run", one, posts=posts)))}
    (axes,) = drawn["labels-answer"].figure.axes
    dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert dotted == pytest.approx([60 / 70, 20 / 50])


def test_a_matrix_of_many_labels_has_no_numbers(small_run):
    def texts_of(n):
        names = [f"l{k}" for k in range(n)]
        figure = figures.draw_matrix(small_run.scores.rows.prob[:n, :1] @ [[0.0] * n], [["7"] * n] * n, names, "a", "b")
        return [text.get_text() for text in figure.axes[0].texts]

    assert texts_of(figures.MAX_WRITTEN) == ["7"] * figures.MAX_WRITTEN**2
    assert texts_of(figures.MAX_WRITTEN + 1) == []


def test_an_inline_picture_follows_the_text_colour_and_has_its_own_ids():
    figure = Figure(figsize=(3, 2))
    figure.subplots().set(title="a & b", xlabel="x")
    svg = figures.inline_svg(figure, "one", "Shows <this> & that.")
    element = ElementTree.fromstring(svg)
    assert (element.get("width"), element.get("height"), element.get("role")) == ("288", "192", "img")
    assert element.get("aria-label") == "Shows <this> & that."
    ids = [node.get("id") for node in element.iter() if node.get("id")]
    assert ids
    assert all(name.startswith("one-") for name in ids)
    assert set(re.findall(r"(?:url\(|href=\")#([\w-]+)", svg)) <= set(ids)
    assert figures.INK not in svg
    assert "currentColor" in svg
    assert "<style" not in svg


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_a_saved_picture_is_marked_as_written_by_emogen(tmp_path, kind):
    path = tmp_path / f"picture.{kind}"
    figures.save(Figure(figsize=(1, 1)), path)
    assert figures.GENERATOR.encode() in path.read_bytes()[:2000]
    assert list(tmp_path.iterdir()) == [path]  # no scratch file


@pytest.mark.parametrize(("suffix", "n_warnings"), [(".svg", 0), (".png", 1)])
def test_characters_without_a_glyph_are_named_once_where_they_are_missing(suffix, n_warnings, tmp_path, caplog):
    figure = Figure()
    figure.subplots().set(title="日本 日", xlabel="本")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.save(figure, tmp_path / f"labels{suffix}")
        figures.inline_svg(figure, "labels", "labels")
    assert len(caplog.messages) == n_warnings
    assert all("labels.png: the font has no 日, 本; an .svg" in message for message in caplog.messages)
