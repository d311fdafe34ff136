"""The page of rows × templates, in a real browser."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import EVIL, invented_posts, write_posts, write_recipe, write_run

from emogen.evaluation.results import read_records, read_scored
from emogen.experiments import grid
from emogen.experiments.grid import GrowingGrid, unique_titles, write_grid
from emogen.experiments.prompts import PromptBenchmark, open_benchmark
from emogen.experiments.scores import KeptScores, RowScore, row_keys
from emogen.task.labels import LabelSet

EVIL_NAME = "</script><b>bold</b>"  # of a template file


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory, labels):
    """40 rows, three of them hostile, without a model."""
    folder = tmp_path_factory.mktemp("grid")
    recipe = write_recipe(folder, labels)
    write_posts(folder / "train.csv", labels, invented_posts(40))
    return open_benchmark(recipe, [f"output_dir={folder / 'out'}"], limit=100)


@pytest.fixture(scope="module")
def folders(benchmark, tmp_path_factory, labels):
    """Three systems on these rows, of which the third is the first again."""
    folder = tmp_path_factory.mktemp("systems")
    made = []
    for name, seed in {"first": 0, "second": 1, "third": 0}.items():
        posts = [
            (text, labels.names_of(gold)) for text, gold in zip(benchmark.rows.texts, benchmark.rows.truth, strict=True)
        ]
        made.append(write_run(folder / name, labels, posts=posts, seed=seed, noise=0.55))
        for file in (made[-1] / "predictions.jsonl",):
            records = [
                record | {"id": row_id} for record, row_id in zip(read_records(file), benchmark.rows.ids, strict=True)
            ]
            file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return made


@pytest.fixture(scope="module")
def scored(folders, labels):
    return [read_scored(folder, labels) for folder in folders]


@pytest.fixture
def opened(visit, benchmark, folders):
    path = write_grid(benchmark, ["first", EVIL_NAME, "third"], folders)
    return lambda **context: visit(f"file://{path}", **context)


def ids_on(page):
    return page.locator("#rows > tr .meta > span:first-child").all_inner_texts()


def shown(page, n_rows, n=40):
    """Wait until this number of the n rows is found. Returns the ids of those that are listed."""
    from playwright.sync_api import expect

    expect(page.locator("#count")).to_have_text(f"{n_rows:,} of {n:,} rows")
    return ids_on(page)


def test_markup_is_shown_as_text(opened, benchmark):
    page = opened()
    texts = page.locator("#rows .text > p").all_text_contents()
    assert {text for text, _ in EVIL} < set(texts)
    assert sorted(texts) == sorted(benchmark.rows.texts)
    assert page.locator("#heads th").nth(3).text_content().startswith(EVIL_NAME)
    assert page.locator("#rows script, #rows img, #rows b, #heads b, #shown b").count() == 0
    page.locator("#rows tr", has_text="it ends here: </script>").get_by_role("button", name="probabilities").click()
    assert page.locator(".prob").get_by_text("<b>bliss</b>").or_(page.locator(".prob")).count() == 1


def test_rows_are_filtered_by_what_templates_have_right(opened, benchmark, scored, labels):
    page = opened()
    gold, first, second = benchmark.rows.truth, scored[0].pred, scored[1].pred
    ids = np.array(benchmark.rows.ids)
    joy = labels.names.index("joy")
    wrong_right = (first != gold).any(1) & (second == gold).all(1)
    differ = (first != second).any(1)
    of_joy = (gold[:, joy] | first[:, joy] | second[:, joy]).astype(bool)
    cases = [
        ({"#relation": "ab"}, wrong_right),
        ({"#relation": "differ"}, differ),
        ({"#relation": "any"}, differ),
        ({"#relation": "wrong"}, (first != gold).any(1) & (second != gold).any(1)),
        ({"#relation": "right"}, (first == gold).all(1) & (second == gold).all(1)),
        ({"#label": str(joy)}, of_joy),
        ({"#label": str(joy), "#relation": "ab"}, (first[:, joy] != gold[:, joy]) & (second[:, joy] == gold[:, joy])),
        ({"#label": str(joy), "#relation": "right"}, of_joy & (first[:, joy] == gold[:, joy]) & (second[:, joy] == gold[:, joy])),
        ({"#a": "1", "#b": "0", "#relation": "ab"}, (second != gold).any(1) & (first == gold).all(1)),
    ]  # fmt: skip
    for choices, expected in cases:
        for select, choice in choices.items():
            page.select_option(select, choice)
        assert 0 < expected.sum() < 40, choices
        assert sorted(shown(page, expected.sum())) == sorted(ids[expected]), choices
        page.evaluate("() => { document.getElementById('filters').reset(); select(); }")
        page.select_option("#b", "1")
    page.locator("#search").fill("</SCRIPT><script>")
    assert len(shown(page, 1)) == 1


def test_rows_are_sorted_by_disagreement_and_cells_marked_by_sign(opened, benchmark, scored, labels):
    page = opened()
    preds = np.stack([system.pred for system in scored])  # [3, n, L]
    given = preds.sum(0)
    disagreement = (given * (3 - given)).sum(1)
    order = np.argsort(-disagreement, kind="stable")
    assert shown(page, 40) == [benchmark.rows.ids[i] for i in order]
    i = int(order[0])
    cell = page.locator("#rows > tr").first.locator("td[data-title=first]")
    signs = [
        ("✓" if is_gold and is_given else "○" if is_gold else "✕") + f" {name}"
        for name, is_gold, is_given in zip(labels.names, benchmark.rows.truth[i], scored[0].pred[i], strict=True)
        if is_gold or is_given
    ]
    assert cell.locator(".chip").all_inner_texts() == signs
    name = signs[0][2:]
    prob = round(float(scored[0].prob[i, labels.names.index(name)]) * 1000) / 10
    assert cell.locator(".chip").first.get_attribute("title") == f"{name}: {prob:.1f} %"
    page.get_by_role("checkbox", name="third").uncheck()  # of two templates
    given = preds[:2].sum(0)
    assert (
        page.locator("#rows .meta > span:nth-child(2)").first.inner_text()
        == f"disagreement {(given * (2 - given)).sum(1).max()}"
    )
    page.select_option("#decision", "nested thresholds")
    f1 = json.loads((scored[1].path.parent / "metrics.json").read_text())["by_thresholds"]["f1_macro"]
    assert page.locator("#heads th").nth(3).locator("small").inner_text() == f"macro-F1 {f1:.3f} on 40 rows"


def test_what_is_filtered_is_saved(opened, benchmark, scored, labels):
    page = opened()
    page.select_option("#relation", "ab")
    expected = np.flatnonzero((scored[0].pred != scored[0].gold).any(1) & (scored[1].pred == scored[1].gold).all(1))
    assert len(expected)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as CSV").click()
    assert page.evaluate("csvCell('=1+1')") == "'=1+1"  # a spreadsheet computes nothing
    lines = list(csv.DictReader(io.StringIO(saved.value.path().read_bytes().decode("utf-8-sig"), newline="")))
    assert sorted(line["id"] for line in lines) == sorted(benchmark.rows.ids[i] for i in expected)
    for line in lines:
        i = benchmark.rows.ids.index(line["id"])
        assert line["text"] == benchmark.rows.texts[i]
        assert line["first"] == (", ".join(labels.names_of(scored[0].pred[i])) or labels.empty)
        assert line[EVIL_NAME] == line["gold"] == (", ".join(labels.names_of(scored[1].gold[i])) or labels.empty)
    page.evaluate("() => { document.getElementById('filters').reset(); select(); }")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as JSONL").click()
    records = [json.loads(line) for line in saved.value.path().read_text(encoding="utf-8").split("\n")[:-1]]
    assert {record["text"] for record in records} == set(benchmark.rows.texts)
    record = next(record for record in records if record["id"] == benchmark.rows.ids[7])
    assert record["templates"]["first"]["labels"] == list(labels.names_of(scored[0].pred[7]))
    assert record["templates"]["first"]["prob"]["joy"] == pytest.approx(
        scored[0].prob[7, labels.names.index("joy")], abs=6e-4
    )


def test_the_page_works_with_the_keyboard_and_fits_a_phone(opened):
    page = opened(viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.keyboard.press("/")
    page.keyboard.type("lovely morning")
    n_found = sum("lovely morning" in text for text, _ in invented_posts(40))
    shown(page, n_found)
    page.keyboard.press("Tab")  # to the label
    page.keyboard.type("joy")
    assert page.locator("#label").evaluate("select => select.selectedOptions[0].text") == "joy"
    button = page.locator("#rows").get_by_role("button", name="probabilities").first
    for _ in range(30):
        page.keyboard.press("Tab")
        if button.evaluate("button => button === document.activeElement"):
            break
    page.keyboard.press("Enter")
    assert page.locator(".prob tr").count() == 13  # titles, labels, answers
    assert button.evaluate("button => button === document.activeElement")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_templates_of_one_name_are_told_apart(folders):
    paths = [folders[0].with_name(name) for name in ("mine-1a", "mine-2b", "list-3c")]
    assert unique_titles(["mine", "mine", "list"], paths) == ["mine (1a)", "mine (2b)", "list"]


def test_a_growing_grid_tells_what_is_new(benchmark, tmp_path, labels):
    growing: PromptBenchmark = replace(benchmark, store=tmp_path)
    folder = tmp_path / "mine-1a2b3c4d"
    folder.mkdir()
    (folder / "prompt.jinja").write_text("{% user %}\n{{ text }}\n")
    keys, page = row_keys(growing.rows), GrowingGrid(growing)

    def keep(index):
        kept = KeptScores(folder).read()
        kept.write([RowScore(keys[i], "joy", 0, [i / 100] * len(labels), -1.0, 0.1) for i in index])

    keep([3, 5])
    (column,) = page.news({})
    assert (column["title"], column["rows"], column["f1"], column["decided"]) == ("mine", [3, 5], {}, None)
    assert column["prob"][1][0] == 50
    assert page.news({folder.name: 2}) == []
    keep([0, *range(6, 40), 1, 2, 4])
    (column,) = page.news({folder.name: 2})
    assert column["rows"] == [0, *range(6, 40), 1, 2, 4]
    joy = [int(name == "joy") for name in labels.names]
    gold = growing.rows.truth
    f1 = 2 * (gold @ joy).sum() / (40 + (gold @ joy).sum()) / len(labels)
    assert column["f1"]["answer"] == pytest.approx(f1)
    assert len(column["decided"]) == 40
    assert grid.render(growing, page.news({}), live=True).count("connect-src 'self'") == 1


def test_with_exactly_one_label_the_most_probable_one_takes_the_place_of_thresholds(benchmark, tmp_path, labels):
    single = LabelSet.model_validate(labels.model_dump() | {"exactly_one": True})
    growing = replace(benchmark, store=tmp_path, task=replace(benchmark.task, label_set=single))
    folder = tmp_path / "mine-1a2b3c4d"
    folder.mkdir()
    (folder / "prompt.jinja").write_text("{% user %}\n{{ text }}\n")
    prob = [0.1] * 10 + [0.3]
    KeptScores(folder).write([RowScore(key, "joy", 0, prob, -1.0, 0.1) for key in row_keys(growing.rows)])
    (column,) = GrowingGrid(growing).news({})
    assert set(column["decided"]) == {"0" * 10 + "1"}
    assert list(column["f1"]) == ["answer", "most probable label"]
