"""Report pages in a real browser: opened from disk, filtered and searched."""

import json

import numpy as np
import pytest
from tiny import EVIL, invented_posts

from emogen.evaluation import results
from emogen.evaluation.metrics import nested_pred, row_log_loss


@pytest.fixture
def opened(visit, reports):
    """Opens a report from disk. Fails if the page logs, asks or loads anything."""
    return lambda file, hash="", **context: visit(f"file://{reports / file}{hash}", **context)


@pytest.fixture(scope="module")
def scored(reports, labels):
    return results.read_scored(reports / "small", labels)


def ids_on(page):
    return page.locator("#list .meta a").all_inner_texts()


def shown(page, rows, n=40):
    """Wait until this number of the n rows is found. Returns the ids of those that are listed."""
    from playwright.sync_api import expect

    expect(page.locator("#count")).to_have_text(f"{rows:,} of {n:,} rows")
    return ids_on(page)


def test_markup_in_posts_and_answers_is_shown_as_text(opened):
    page = opened("small/report.html")
    texts = page.locator("#list .text").all_text_contents()
    assert {text for text, _ in EVIL} < set(texts)
    assert sorted(texts) == sorted(text for text, _ in invented_posts(40))
    assert page.locator("#list code", has_text="<b>bliss</b>").count() == 1
    assert page.locator("#list script, #list img, #list b >> text=bliss").count() == 0


def test_the_data_are_those_of_the_run_and_every_id_is_unique(opened, scored):
    page = opened("small/report.html")
    data = json.loads(page.locator("#data").text_content())
    assert data["ids"] == scored.ids
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
    assert len(set(ids)) == len(ids) > 20


def test_rows_are_filtered_by_label_error_confidence_and_status(opened, scored, labels):
    page = opened("small/report.html")
    gold, pred, ids = scored.gold, scored.pred, np.array(scored.ids)
    joy = list(labels.names).index("joy")
    missed, false_positive = (gold & (1 - pred)), ((1 - gold) & pred)
    confidence = np.maximum(scored.prob, 1 - scored.prob).min(axis=1)
    assert missed[:, joy].sum() > 0
    cases = [
        ({"#label": "joy", "#state": "missed"}, missed[:, joy] == 1),
        ({"#label": "joy", "#state": "gold"}, gold[:, joy] == 1),
        ({"#label": "joy", "#state": "correct"}, (gold & pred)[:, joy] == 1),
        ({"#label": "joy", "#state": "a false positive"}, false_positive[:, joy] == 1),
        ({"#kind": "none (exact match)"}, (gold == pred).all(axis=1)),
        ({"#kind": "missed label and false positive"}, missed.any(axis=1) & false_positive.any(axis=1)),
        ({"#kind": "any error", "#label": "joy"}, (gold != pred).any(axis=1) & (gold | pred)[:, joy].astype(bool)),
        ({"#status": "unknown"}, np.arange(40) == 3),
    ]
    for choices, expected in cases:
        for select, choice in choices.items():
            page.select_option(select, label=choice)
        assert 0 < expected.sum() < 40, choices
        assert sorted(shown(page, expected.sum())) == sorted(ids[expected]), choices
        page.click("button[type=reset]")
        shown(page, 40)
    page.fill("#low", "60")
    assert sorted(shown(page, (confidence >= 0.6).sum())) == sorted(ids[confidence >= 0.6])
    page.fill("#high", "70")
    is_between = (confidence >= 0.6) & (confidence <= 0.7)
    assert sorted(shown(page, is_between.sum())) == sorted(ids[is_between])


def test_rows_are_searched_ordered_and_decided_by_thresholds(opened, scored):
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
    by_answer, by_thresholds = [(scored.gold == pred).all(axis=1) for pred in (scored.pred, nested)]
    assert (by_answer != by_thresholds).any()
    shown(page, by_answer.sum())
    page.select_option("#decision", label="nested thresholds")
    assert shown(page, by_thresholds.sum()) == np.array(scored.ids)[by_thresholds].tolist()
    assert page.locator("#list .track b").count() == 11 * by_thresholds.sum()


def test_a_row_shows_its_labels_with_signs_and_its_probabilities(opened, scored, labels):
    page = opened("small/report.html", "#row=r7")
    row = page.locator("#linked .row")
    signs = [
        ("✓" if is_gold and is_predicted else "○" if is_gold else "✕") + f" {name}"
        for name, is_gold, is_predicted in zip(labels.names, scored.gold[7], scored.pred[7], strict=True)
        if is_gold or is_predicted
    ]
    assert row.locator(".decision").first.locator(".chip").all_inner_texts() == signs
    assert row.locator(".bars > div").count() == 11
    prob = round(float(scored.prob[7, 0]) * 1000) / 10
    assert row.locator(".bars > div").first.get_attribute("title") == f"anger: {prob:.1f} %"


def test_a_linked_row_stays_in_view_whatever_the_filters_are(opened):
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
    for address in ("#row=r40", "#row=%E0%A4%A"):  # no such row; not a valid address
        page.evaluate("address => location.hash = address", address)
        shown(page, 40)
        assert linked.count() == 0


def test_five_thousand_rows_are_listed_page_by_page(opened):
    page = opened("large/report.html")
    assert len(shown(page, 5000, n=5000)) == 50
    page.select_option("#sort", "file")
    page.click("#next")
    assert ids_on(page)[0] == "r50"
    assert page.locator("#where").inner_text() == "page 2 of 100"
    page.locator("#search").press_sequentially("sea, 41")
    expected = [f"r{i}" for i, (text, _) in enumerate(invented_posts(5000)) if "sea, 41" in text]
    assert len(expected) > 1
    assert shown(page, len(expected), n=5000) == expected
    assert page.locator("#list .row").count() == len(expected)


def test_rows_that_one_run_predicts_exactly_and_the_other_does_not(opened, reports, scored, labels):
    page = opened("both.html")
    other = results.read_scored(reports / "other", labels)
    exact = [(rows.gold == rows.pred).all(axis=1) for rows in (scored, other)]
    only_first, only_second = exact[0] & ~exact[1], exact[1] & ~exact[0]
    assert only_first.any()
    assert only_second.any()
    page.select_option("#decision", label="small: answer")
    page.select_option("#other", label="exact where “other: answer” is wrong")
    assert sorted(shown(page, only_first.sum())) == sorted(np.array(scored.ids)[only_first])
    page.select_option("#other", label="wrong where “other: answer” is exact")
    shown(page, only_second.sum())
    cells = page.locator("#disagreement td").all_inner_texts()
    assert cells == ["–", str(only_first.sum()), str(only_second.sum()), "–"]


@pytest.mark.parametrize("file", ["small/report.html", "both.html"])
def test_a_page_fits_a_phone_and_follows_the_colour_scheme(opened, file):
    phone = opened(file, viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    lightness = "node => getComputedStyle(node).fill.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3"
    assert phone.eval_on_selector("figure svg text", lightness) > 180
    phone.emulate_media(color_scheme="light")
    assert phone.eval_on_selector("figure svg text", lightness) < 80
