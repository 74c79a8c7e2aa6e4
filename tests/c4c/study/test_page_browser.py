"""The page of a study in a browser: without errors, by keyboard alone, on a phone, in the dark, without scripts."""

import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

from c4c.study.page import write_page
from tests import browsers
from tests.browsers import pixels
from tests.c4c.study import pages

pytestmark = [
    pytest.mark.slow,  # imports DALI
    pytest.mark.skipif(browsers.CHROMIUM is None, reason="needs the command chromium"),
]
pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

LABELS = "[...document.querySelectorAll('#{} .row th bdi')].map(e => e.textContent)"
ACTIVE = "document.activeElement"
R1, TIME = 1, 10  # columns of a table without pairs


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.html"
    write_page(path, pages.whole(title=pages.HOSTILE))
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with browsers.chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser, address):
    """opened(options of the window) -> the page. Afterwards: nothing went wrong on it, and it asked for nothing."""
    with browsers.harmless(browser, address) as open_page:
        yield open_page


def labels(page, table: str) -> list[str]:
    return page.evaluate(LABELS.format(table))


def head(page, table: str, column: int):
    return page.locator(f"#{table} .sorting th").nth(column)


def test_columns_sort(opened):
    page = opened()
    rows = {row.row.label: row for row in pages.whole().tables[1].rows}
    before = labels(page, "pretraining")
    assert before == list(rows)
    by_r1 = sorted((one for one in rows if rows[one].done), key=lambda one: -rows[one].estimate("t2v_R1").mean)
    nothing = [one for one in rows if not rows[one].done]
    head(page, "pretraining", R1).locator("button").click()
    assert labels(page, "pretraining") == by_r1 + nothing
    assert head(page, "pretraining", R1).get_attribute("aria-sort") == "descending"
    assert page.locator("#pretraining .sorted").text_content() == "Sorted by R@1, text to video, largest first"
    head(page, "pretraining", R1).locator("button").click()
    assert labels(page, "pretraining") == by_r1[::-1] + nothing
    head(page, "pretraining", R1).locator("button").click()
    assert labels(page, "pretraining") == before
    assert head(page, "pretraining", R1).get_attribute("aria-sort") is None
    head(page, "pretraining", TIME).locator("button").click()  # less is better
    seconds = {one: rows[one].cost("wall_s").mean for one in rows if rows[one].done}
    assert labels(page, "pretraining") == sorted(seconds, key=seconds.get) + nothing


# [anchor, classes of the lines up to the next row, anchor of its seeds] of each row
BLOCKS = """[...document.querySelectorAll('#frames .row')].map(row => {
  const kinds = [];
  let line = row.nextElementSibling;
  for (; line && !line.matches('.row'); line = line.nextElementSibling) kinds.push(line.className.split(' ')[0]);
  return [row.id, kinds, row.parentNode.querySelector(`#${row.id}-more`).closest('tr').previousElementSibling.id];
})"""


def test_a_row_moves_with_what_belongs_to_it(opened):
    page = opened()
    before = page.evaluate(BLOCKS)
    assert [kinds for _, kinds, _ in before] == [["published", "more"], ["more"]] * 3
    head(page, "frames", 0).locator("button").click()
    head(page, "frames", 0).locator("button").click()
    assert labels(page, "frames") == ["12 frames", "8 frames", "6 frames", "4 frames", "2 frames", "1 frame"]
    assert page.evaluate(BLOCKS) == before[::-1]


def test_sweeps_stay_apart(opened):
    page = opened()
    head(page, "sensitivity", R1).locator("button").click()
    groups = page.evaluate(
        "[...document.querySelectorAll('#sensitivity .results > tbody')].map(b => [b.rows[0].textContent.trim(), b.querySelectorAll('.row').length])"
    )
    assert groups == [["batch size", 3], ["learning rate of the head", 3], ["sampling", 3], ["frozen layers", 6]]


def visible(page, table: str) -> set[str]:
    return set(
        page.evaluate(
            f"[...document.querySelectorAll('#{table} .plot')].filter(e => e.offsetParent).map(e => e.dataset.metric)"
        )
    )


def test_the_plotted_metric_is_switched_everywhere(opened):
    page = opened()
    tables = ("frames", "pretraining", "temporal", "sensitivity")
    assert [visible(page, one) for one in tables] == [{"t2v_R1"}] * 4
    page.locator("#pretraining input[value=t2v_R10]").check(force=True)
    assert [visible(page, one) for one in tables] == [{"t2v_R10"}] * 4
    page.locator("#temporal input[value=pairs_own_first]").check(force=True)  # no other table has pairs
    assert [visible(page, one) for one in tables] == [{"t2v_R10"}] * 2 + [{"pairs_own_first"}] + [{"t2v_R10"}]
    assert page.locator("#frames input[value=t2v_R10]").is_checked()


def test_keyboard_alone(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate(f"{ACTIVE}.textContent") == "Skip to the first table"
    assert page.evaluate(f"getComputedStyle({ACTIVE}).outlineStyle") != "none"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")  # the switch of the first table
    assert page.evaluate(f"{ACTIVE}.name") == "metric-frames"
    page.keyboard.press("ArrowRight")
    assert visible(page, "frames") == {"t2v_R5"}
    page.keyboard.press("Tab")  # the region that scrolls
    assert page.evaluate(f"{ACTIVE}.getAttribute('role')") == "region"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert head(page, "frames", R1).get_attribute("aria-sort") == "descending"
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate(f"{ACTIVE}.tagName") == "SUMMARY":
            break
    page.keyboard.press("Enter")
    opened_row = page.locator("#frames .more details[open]")
    assert opened_row.count() == 1 and opened_row.locator("pre").is_visible()
    page.keyboard.press("Tab")  # the command
    page.keyboard.press("Tab")
    assert page.evaluate(f"{ACTIVE}.textContent") == "Copy"


def test_a_command_is_copied(opened):
    page = opened()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#frames .more summary").first.click()
    button = page.locator("#frames .copy").first
    button.click()
    page.wait_for_function("document.querySelector('#frames .copy').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == pages.whole().tables[0].rows[0].command


def test_where_nothing_can_be_copied_it_is_selected(opened):
    page = opened()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.locator("#frames .more summary").first.click()
    page.locator("#frames .copy").first.click()
    page.wait_for_function("document.querySelector('#frames .copy').textContent === 'Selected'")
    assert page.evaluate("getSelection().toString()") == pages.whole().tables[0].rows[0].command


def test_failed_rows_are_linked_and_opened(opened):
    page = opened()
    page.locator(".troubles summary").click()
    page.locator(".troubles a").first.click()
    error = page.locator("#frames .error")
    assert error.is_visible() and pages.ERROR in error.text_content()


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_scrolls_in_one_direction_only(opened, width):
    page = opened(viewport={"width": width, "height": 780})
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    page.locator("#temporal input[value=pairs_own_first]").check(force=True)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = "[...document.querySelectorAll('h1, h2, p, .tile, figure, fieldset, .dots, .chart, .inside, .facts')].filter(e => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 1 && !e.matches('.inside *') && getComputedStyle(e).position !== 'absolute').map(e => e.outerHTML.slice(0, 60))"
    assert page.evaluate(wide) == []
    region = page.locator("#frames .scroll")
    region.evaluate("e => { e.scrollLeft = 300; }")
    # the table scrolls in its own region, and its rows keep their names
    assert region.evaluate("e => e.scrollLeft") == 300
    assert page.locator("#frames .row th").first.bounding_box()["x"] >= 0


def test_light_and_dark(opened):
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    assert pixels(light.locator("#summary")).mean() > 200 and pixels(dark.locator("#summary")).mean() < 80
    dark.click("#theme")
    assert pixels(dark.locator("#summary")).mean() > 200


def test_plots_have_names_for_screen_readers(opened):
    page = opened()
    for one in page.locator("[role=img]").all():
        assert "The table below has the numbers." in one.get_attribute("aria-label")
    assert page.locator("[role=img]").count() == 4 + 4 + 5 + 4 * 4


def test_numbers_under_the_pointer(opened):
    page = opened()
    chart = page.locator("#frames .chart").first
    box = chart.bounding_box()
    readout = page.locator("#frames .readout").first

    def read(share: float) -> str:
        chart.hover(position={"x": share * box["width"], "y": box["height"] / 2})
        return readout.text_content()

    estimate = pages.whole().tables[0].rows[-1].estimate("t2v_R1")
    # nothing was published there
    assert read(0.93) == f"data.num_frames 12: ours {estimate.mean:.1f} ± {estimate.sd:.1f}"
    assert "published" in read(0.14)


def test_without_scripts_everything_is_there(opened):
    page = opened(java_script_enabled=False)
    assert page.locator("#frames .switch").is_hidden() and page.locator(".copy").count() == 0
    assert page.locator("#frames .plot").first.is_visible()
    page.locator("#frames .more summary").nth(2).click()
    assert page.locator("#frames .error").is_visible()
    assert page.locator("#frames .command pre").nth(2).is_visible()


def test_print(opened):
    page = opened()
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden() and page.locator("#frames .switch").is_hidden()
    assert page.locator("#frames .row").first.is_visible()


def test_the_picture_of_the_docs(address, tmp_path):
    script = Path(__file__).parents[3] / "docs" / "pictures.py"

    def take(source: str) -> subprocess.CompletedProcess:
        command = [sys.executable, script, "study", source, "--out", tmp_path]
        return subprocess.run(command, capture_output=True, text=True)

    made = take(urlparse(address).path)
    assert made.returncode == 0, made.stderr
    picture = np.asarray(Image.open(tmp_path / "study.png").convert("RGB"))
    assert picture.shape[1] == 1280 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    missing = take("missing.html")
    assert missing.returncode == 1 and missing.stderr.startswith("error: there is no file missing.html")
