"""Reports in a real browser: opened from disk, filtered, searched, typed into."""

import json

import numpy as np
import pytest
from tiny import EVIL, invented_posts, write_run

from emogen.evaluation import results
from emogen.evaluation.metrics import nested_pred, row_log_loss
from emogen.report.page import report
from emogen.task.labels import load_label_set


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run of 40 rows, another one on them, both beside each other, and a run of 5,000 rows; with their reports."""
    labels, folder = load_label_set("semeval2018"), tmp_path_factory.mktemp("reports")
    small = write_run(folder / "small", labels)
    other = write_run(folder / "other", labels, seed=1)
    large = write_run(folder / "large", labels, n=5000)
    report([small])
    report([large])
    report([small, other], folder / "both.html")
    return folder


@pytest.fixture
def opened(visit, folders):
    """Opens a report from disk."""
    return lambda file, hash="", **context: visit(f"file://{folders / file}{hash}", **context)


@pytest.fixture
def scored(folders, labels):
    return results.read_scored(folders / "small", labels)


def ids_on(page):
    return page.locator("#list .meta a").all_inner_texts()


def shown(page, rows, of=40):
    """Wait until so many rows are found, and give the ids of those that are listed."""
    from playwright.sync_api import expect

    expect(page.locator("#count")).to_have_text(f"{rows:,} of {of:,} rows")
    return ids_on(page)


def test_posts_with_markup_are_text(opened):
    page = opened("small/report.html")
    texts = page.locator("#list .text").all_text_contents()
    assert {text for text, _ in EVIL} < set(texts)
    assert sorted(texts) == sorted(text for text, _ in invented_posts(40))
    assert page.locator("#list code", has_text="<b>bliss</b>").count() == 1
    assert page.locator("#list script, #list img, #list b >> text=bliss").count() == 0


def test_rows_are_filtered_by_label_error_confidence_and_status(opened, scored, labels):
    page = opened("small/report.html")
    gold, pred, ids = scored.gold, scored.pred, np.array(scored.ids)
    joy = list(labels.names).index("joy")
    missed, false = (gold & (1 - pred)), ((1 - gold) & pred)
    sure = np.maximum(scored.prob, 1 - scored.prob).min(axis=1)
    assert missed[:, joy].sum() > 0
    cases = [
        ({"#label": "joy", "#state": "missed"}, missed[:, joy] == 1),
        ({"#label": "joy", "#state": "gold"}, gold[:, joy] == 1),
        ({"#label": "joy", "#state": "right"}, (gold & pred)[:, joy] == 1),
        ({"#kind": "none: exactly right"}, (gold == pred).all(axis=1)),
        ({"#kind": "misses one and gives another"}, missed.any(axis=1) & false.any(axis=1)),
        ({"#kind": "any error", "#label": "joy"}, (gold != pred).any(axis=1) & (gold | pred)[:, joy].astype(bool)),
        ({"#status": "unknown"}, np.arange(40) == 3),
    ]
    for choices, expected in cases:
        for select, choice in choices.items():
            page.select_option(select, label=choice)
        assert sorted(shown(page, expected.sum())) == sorted(ids[expected]), choices
        page.click("button[type=reset]")
        shown(page, 40)
    page.fill("#low", "60")
    assert sorted(shown(page, (sure >= 0.6).sum())) == sorted(ids[sure >= 0.6])
    page.fill("#high", "70")
    between = (sure >= 0.6) & (sure <= 0.7)
    assert sorted(shown(page, between.sum())) == sorted(ids[between])


def test_search_order_and_the_other_decision(opened, scored):
    page = opened("small/report.html")
    loss = row_log_loss(scored.gold, scored.prob)
    assert [scored.ids.index(row_id) for row_id in shown(page, 40)] == np.argsort(-loss, kind="stable").tolist()
    page.select_option("#sort", "file")
    assert shown(page, 40) == scored.ids
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press("/")
    page.keyboard.type("</SCRIPT><script>")
    assert shown(page, 1) == ["r1"]
    page.fill("#search", "nothing has this")
    assert shown(page, 0) == []
    page.fill("#search", "")
    page.select_option("#kind", "right")
    nested = nested_pred(scored.gold, scored.prob, scored.folds)
    by = [(scored.gold == pred).all(axis=1) for pred in (scored.pred, nested)]
    assert (by[0] != by[1]).any()
    shown(page, by[0].sum())
    page.select_option("#system", label="nested thresholds")
    assert shown(page, by[1].sum()) == [row_id for row_id, right in zip(scored.ids, by[1], strict=True) if right]
    assert page.locator("#list .track b").count() == 11 * by[1].sum()


def test_labels_are_told_apart_by_sign_and_probabilities_shown(opened, scored, labels):
    page = opened("small/report.html", "#row=r7")
    row = page.locator("#linked .row")
    gold, pred = scored.gold[7], scored.pred[7]
    signs = [("✓" if g and p else "○" if g else "✕") + f" {name}" for name, g, p in zip(labels.names, gold, pred, strict=True) if g or p]  # fmt: skip
    assert row.locator(".decision").first.locator(".chip").all_inner_texts() == signs
    assert row.locator(".bars > div").count() == 11
    prob = round(float(scored.prob[7, 0]) * 1000) / 10
    assert row.locator(".bars > div").first.get_attribute("title") == f"anger: {prob:.1f} %"


def test_a_link_to_a_row_keeps_it_in_view(opened):
    page = opened("small/report.html", "#row=r1")
    linked = page.locator("#linked .row")
    assert linked.locator(".text").text_content() == EVIL[1][0]
    page.fill("#search", "no row has this")
    assert shown(page, 0) == []
    assert linked.count() == 1
    page.fill("#search", "")
    page.locator("#list .meta a", has_text="r12").first.click()
    assert page.url.endswith("#row=r12")
    assert linked.locator(".meta a").inner_text() == "r12"
    linked.locator("button").click()
    assert linked.count() == 0
    assert (
        opened("small/report.html", "#row=%E0%A4%A").locator("#linked .row").count() == 0
    )  # not a row, not even an address


def test_five_thousand_rows_a_page_at_a_time(opened, folders, labels):
    page = opened("large/report.html")
    assert len(shown(page, 5000, of=5000)) == 50
    page.select_option("#sort", "file")
    page.click("#next")
    assert ids_on(page)[0] == "r50"
    assert page.locator("#where").inner_text() == "page 2 of 100"
    page.locator("#search").press_sequentially("sea, 41")
    texts = [text for text, _ in invented_posts(5000)]
    expected = [f"r{i}" for i, text in enumerate(texts) if "sea, 41" in text]
    assert len(expected) > 1
    assert shown(page, len(expected), of=5000) == expected
    assert page.locator("#list .row").count() == len(expected)


def test_rows_that_one_run_has_right_and_the_other_wrong(opened, folders, scored, labels):
    page = opened("both.html")
    other = results.read_scored(folders / "other", labels)
    right = [(of.gold == nested_pred(of.gold, of.prob, of.folds)).all(axis=1) for of in (scored, other)]
    only_first, only_second = right[0] & ~right[1], right[1] & ~right[0]
    page.select_option("#system", label="small: nested thresholds")
    page.select_option("#against", label="right where “other: nested thresholds” is wrong")
    assert sorted(shown(page, only_first.sum())) == sorted(np.array(scored.ids)[only_first])
    page.select_option("#against", label="wrong where “other: nested thresholds” is right")
    shown(page, only_second.sum())
    cells = page.locator("#disagree td").all_inner_texts()
    assert cells == ["–", str(only_first.sum()), str(only_second.sum()), "–"]


@pytest.mark.parametrize("file", ["small/report.html", "both.html"])
def test_it_fits_a_phone_and_follows_the_dark(opened, file):
    phone = opened(file, viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    light = opened(file, color_scheme="light")
    lightness = "node => getComputedStyle(node).fill.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3"
    assert phone.eval_on_selector("figure svg text", lightness) > 180
    assert light.eval_on_selector("figure svg text", lightness) < 80


def test_data_and_page_agree(opened, scored):
    page = opened("small/report.html")
    data = json.loads(page.locator("#data").text_content())
    assert data["ids"] == scored.ids
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map(node => node.id)).size") == page.locator("[id]").count()  # fmt: skip
