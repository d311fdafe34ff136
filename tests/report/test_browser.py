"""Report pages in a real browser: opened from disk, filtered and searched."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import EVIL, invented_posts, write_run

from emogen.evaluation import results
from emogen.evaluation.metrics import nested_pred, row_log_loss
from emogen.report.page import report
from emogen.task.labels import Label, LabelSet


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


def test_with_exactly_one_label_confidence_is_the_probability_of_the_most_probable_one(visit, tmp_path):
    """Of three labels the likely one may have 0.4: that the others are unlikely is no certainty about it."""
    names = ("red", "green", "blue")
    one = LabelSet(name="one", labels=tuple(Label(name=name) for name in names), exactly_one=True)
    folder = write_run(tmp_path / "run", one, posts=[(f"post {i}", (names[i % 3],)) for i in range(40)])
    report([folder])
    page = visit(f"file://{folder}/report.html")
    rows = results.read_scored(folder, one)
    is_unsure = rows.prob.round(3).max(axis=1) <= 0.8  # as the page has them
    assert 0 < is_unsure.sum() < 40
    page.fill("#high", "80")
    assert sorted(shown(page, is_unsure.sum())) == sorted(np.array(rows.ids)[is_unsure])


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


def test_filters_search_order_page_and_section_are_in_the_address_and_back_undoes_them(opened):
    page = opened("large/report.html")
    page.select_option("#label", label="joy")
    of_joy = page.locator("#count").inner_text()
    page.select_option("#sort", "file")
    page.click("#next")
    page.locator("#search").press_sequentially("sea")
    page.locator("nav a", has_text="Calibration").click()
    page.wait_for_url("**&section=calibration")
    found, ids = page.locator("#count").inner_text(), ids_on(page)
    assert page.url.partition("#")[2] == "label=joy&sort=file&search=sea&section=calibration"

    sent = opened("large/report.html", f"#{page.url.partition('#')[2]}")  # to a colleague
    assert sent.locator("#count").inner_text() == found
    assert ids_on(sent) == ids
    assert sent.input_value("#search") == "sea"
    assert -5 <= sent.locator("#calibration").bounding_box()["y"] < 300

    for address, where in (
        ("label=joy&sort=file&search=sea", "page 1"),  # the letters of a search are one step
        ("label=joy&sort=file&page=2", "page 2"),
        ("label=joy&sort=file", "page 1"),
        ("label=joy", "page 1"),
    ):
        page.go_back()
        page.wait_for_url(f"**#{address}")
        assert page.locator("#where").inner_text().startswith(where)
    assert page.locator("#count").inner_text() == of_joy
    page.go_back()
    page.wait_for_url("**/report.html")
    shown(page, 5000, n=5000)
    page.go_forward()
    assert page.locator("#label").input_value() == "joy"
    page.reload()
    assert page.locator("#count").inner_text() == of_joy


def test_a_link_to_a_section_or_a_row_keeps_the_filters(opened):
    page = opened("small/report.html")
    page.select_option("#kind", "wrong")
    count = page.locator("#count").inner_text()
    row_id = ids_on(page)[0]
    page.locator("#list .meta a").first.click()
    page.wait_for_url(f"**#kind=wrong&row={row_id}")
    page.locator("nav a", has_text="Folds" if page.locator("#folds").count() else "Labels").first.click()
    page.wait_for_url(f"**#kind=wrong&row={row_id}&section=labels")
    assert page.locator("#count").inner_text() == count
    assert page.locator("#linked .row").count() == 1


def test_the_address_names_a_decision_and_what_it_is_compared_with(opened):
    page = opened("both.html")
    page.select_option("#decision", label="other: nested thresholds")
    page.select_option("#other", label="exact where “small: answer” is wrong")
    count = page.locator("#count").inner_text()
    sent = opened("both.html", f"#{page.url.partition('#')[2]}")
    assert sent.locator("#count").inner_text() == count != "40 of 40 rows"


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("label=jooy", "label=jooy"),
        ("label=joy&nothing=%3Cb%3E1", "nothing=<b>1"),
        ("page=2", "page=2"),
        ("page=x&row=r40", "row=r40, page=x"),
        ("low=sure&kind=wrong", "low=sure"),
        ("nowhere", "section=nowhere"),
    ],
)
def test_what_an_address_names_and_the_report_does_not_have_is_said(opened, address, named):
    page = opened("small/report.html", f"#{address}")
    assert page.locator("#unknown").inner_text().endswith(f"ignored: {named}")
    assert "unknown" not in page.url
    page.click("button[type=reset]")
    page.select_option("#kind", "wrong")
    page.go_back()


def saved(page, button):
    with page.expect_download() as download:
        page.click(button)
    return Path(download.value.path()).read_bytes().decode()


def test_the_rows_that_are_found_are_saved_as_jsonl(opened, reports):
    page = opened("audited/report.html")
    page.select_option("#decision", label="answer")
    page.select_option("#label", label="joy")
    page.select_option("#sort", "file")
    rows = [json.loads(line) for line in saved(page, "#jsonl").split("\n")[:-1]]
    assert [row["id"] for row in rows] == ids_on(page)
    own = {record["id"]: record for record in results.read_records(reports / "audited" / "predictions.jsonl")}
    for row in rows:
        record = own[row["id"]]
        assert {key: row[key] for key in record if key not in ("prob", "unknown", "tokens_cut")} == {
            key: value for key, value in record.items() if key not in ("prob", "unknown", "tokens_cut")
        }
        assert row["prob"] == pytest.approx(record["prob"], abs=6e-4)
    assert rows[0]["doubts"] == ["joy <i>is</i> wrong"]


def test_the_rows_that_are_found_are_saved_as_a_csv_file_that_is_harmless_in_a_spreadsheet(opened, reports, two_labels):
    page = opened("audited/report.html")
    page.select_option("#decision", label="answer")
    page.select_option("#sort", "file")
    text = saved(page, "#csv")
    assert text.startswith("\ufeffid,text,gold,labels,")
    rows = list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline="")))
    assert len(rows) == 40
    texts = [record["text"] for record in results.read_records(reports / "audited" / "predictions.jsonl")]
    assert [row["text"] for row in rows] == [*(f"'{text}" for text in texts[:5]), *texts[5:]]
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert [rows[k]["gold"] for k in range(3)] == ["joy", "none", "anger"]
    scored = results.read_scored(reports / "audited", two_labels)
    assert [float(row["prob anger"]) for row in rows] == pytest.approx(scored.prob[:, 1], abs=6e-4)
    page.fill("#search", "nothing has this")
    assert page.locator("#csv").is_disabled()


def test_what_an_audit_said_leads_to_its_rows(opened):
    page = opened("audited/report.html")
    cells = page.locator("#label-errors tbody tr, #label-errors table > tr").all_inner_texts()
    assert [cell.split("\t")[2:4] for cell in cells] == [["1", "2"], ["1", "0"]]
    page.locator("#label-errors td a").nth(1).click()  # joy, missing but probable
    assert shown(page, 2) == ["r4", "r2"]
    assert "label=joy&state=probable&sort=doubt" in page.url
    assert page.locator("#list .reasons li").first.inner_text() == "joy <i>is</i> wrong"
    assert page.locator("#list .reasons", has_text="suggested: anger").count() == 2
    page.go_back()
    shown(page, 40)
    page.locator("#label-errors li a").nth(1).click()
    assert sorted(shown(page, 2)) == ["r7", "r8"]
    page.locator("#list .reasons a").first.click()
    assert page.locator("#linked .meta a").inner_text() in ("r7", "r8")
    page.locator("#label-errors li a").nth(2).click()
    assert shown(page, 1) == ["r9"]
    page.select_option("#doubts", label="a label is probably wrong")
    page.select_option("#sort", "doubt")
    assert shown(page, 3) == ["r4", "r2", "r0"]


def test_the_filters_and_the_saving_of_rows_are_reached_by_keyboard(opened):
    page = opened("audited/report.html")
    page.keyboard.press("/")
    page.keyboard.type("=1")
    assert shown(page, 1) == ["r0"]
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "csv":
            break
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "rows.csv"


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
    page.locator("#disagreement td a").first.click()
    assert sorted(shown(page, only_first.sum())) == sorted(np.array(scored.ids)[only_first])


@pytest.mark.parametrize("file", ["small/report.html", "both.html", "audited/report.html"])
def test_a_page_fits_a_phone_and_follows_the_colour_scheme(opened, file):
    phone = opened(file, viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    lightness = "node => getComputedStyle(node).fill.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3"
    assert phone.eval_on_selector("figure svg text", lightness) > 180
    phone.emulate_media(color_scheme="light")
    assert phone.eval_on_selector("figure svg text", lightness) < 80
