"""The report in a browser: without errors, by keyboard alone, on a phone, in the dark, with pictures that are none of them blank."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

from c4c.retrieval.report import write_report
from shards.split import Split
from tests import browsers
from tests.browsers import pixels
from tests.c4c.retrieval import reports

pytestmark = [
    pytest.mark.slow,  # imports DALI
    pytest.mark.skipif(browsers.CHROMIUM is None, reason="needs the command chromium"),
]
pytest.importorskip("playwright.sync_api", reason="needs the package playwright")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    reports.make_split(folder)
    split = Split(folder / "test")
    made = reports.evaluation(split)
    write_report(
        folder / "report.html", made, reports.make_run(folder / "run"), "runs/x/checkpoints/step000020", reports.HOSTILE
    )
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with browsers.chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser, address):
    """opened(options of the window) -> the page. Afterwards: nothing went wrong on it, and it asked for nothing."""
    with browsers.harmless(browser, address) as open_page:
        yield open_page


def titles(page) -> list[str]:
    return page.locator(".card h3").all_text_contents()


def test_worst_failures_first(opened):
    page = opened()
    assert sorted(titles(page)) == sorted(reports.CAPTIONS[i] for i in reports.WORST)
    assert page.locator("#matches").text_content() == "5 of 12 queries"
    page.select_option("#show", "all")
    assert len(titles(page)) == reports.VIDEOS
    assert reports.HOSTILE in titles(page)
    ranks = [int(text.split()[1]) for text in page.locator(".rank").all_text_contents()]
    assert ranks == sorted(ranks, reverse=True)
    page.select_option("#order", "best")
    assert [int(text.split()[1]) for text in page.locator(".rank").all_text_contents()] == ranks[::-1]


def test_the_correct_video_is_marked(opened):
    page = opened()
    page.select_option("#show", "all")
    cards = page.locator(".card")
    for i in range(cards.count()):
        truth = cards.nth(i).locator(".found.truth")
        assert truth.count() == 1
        assert (
            f"{cards.nth(i).locator('.rank').text_content().split()[1]} ✓ correct" == truth.locator("b").text_content()
        )


def test_near_duplicates(opened):
    page = opened()
    page.select_option("#show", "near")
    assert titles(page) == [reports.CAPTIONS[3]]
    assert reports.CAPTIONS[2] in page.locator(".card .facts-line").text_content()


def test_filters_and_search(opened):
    page = opened()
    page.select_option("#show", "all")
    page.fill("#search", "PEOPLE chess")
    assert set(titles(page)) == {reports.CAPTIONS[2], reports.CAPTIONS[3]}
    page.fill("#search", "video5")
    assert titles(page) == [reports.CAPTIONS[5]]
    page.fill("#search", "nothing like this")
    assert titles(page) == []
    assert "No query matches" in page.locator("#matches").text_content()
    page.fill("#search", "")
    page.fill("#to", "1")
    assert len(titles(page)) == reports.VIDEOS - len(reports.WORST)
    page.fill("#to", "")
    page.fill("#from", "2")
    assert len(titles(page)) == len(reports.WORST)
    page.fill("#from", "")
    for control in ("#duration", "#words"):
        found = []
        for value in page.locator(f"{control} option").evaluate_all("all => all.map(o => o.value)")[1:]:
            page.select_option(control, value)
            found += titles(page)
        assert sorted(found) == sorted(reports.CAPTIONS)  # each in one of the bins
        page.select_option(control, "")


def test_a_row_of_a_breakdown_shows_its_failures(opened):
    page = opened()
    page.fill("#search", "dog")
    for table in range(3):
        rows = page.locator("table.kinds").nth(table).locator("tbody tr")
        shown = 0
        for i in range(rows.count()):
            rows.nth(i).locator("button").click()
            shown += len(titles(page))
            assert page.input_value("#search") == ""
        assert shown == page.evaluate(f"data.{'v2t' if table == 2 else 't2v'}.filter((query) => query.rank > 1).length")


def test_video_to_text(opened):
    page = opened()
    page.check("input[value=v2t]")
    page.select_option("#show", "all")
    assert sorted(titles(page)) == sorted(f"video{i}" for i in range(reports.VIDEOS))
    for i, name in enumerate(titles(page)):
        own = page.locator(".card").nth(i).locator(".truth-text .text")
        assert own.count() == 1
        assert own.text_content() == reports.CAPTIONS[int(name.removeprefix("video"))] + " (correct)"
    assert page.locator("[data-way=v2t]").is_visible() and page.locator("[data-way=t2v]").is_hidden()


def test_thumbnails_show_their_videos(opened):
    page = opened(viewport={"width": 1280, "height": 5000})
    films = page.locator(".card .found")
    assert films.count() == 6 * len(reports.WORST)
    page.wait_for_function("[...document.querySelectorAll('.film img')].every((picture) => picture.complete)")
    seen = pixels(page)
    for film in films.all():
        video = int(re.search(r"video(\d+)", film.get_attribute("aria-label"))[1])
        place = film.locator(".film").bounding_box()
        x, y, side = int(place["x"]), int(place["y"]), int(place["width"])
        inside = seen[y + 9 : y + side - 9, x + 9 : x + side - 9].reshape(-1, 3)
        assert np.abs(np.median(inside, axis=0) - reports.colour(video)).max() < 12, video
    assert page.locator(".film .none").count() == 0


def test_thumbnails_move_and_stop(opened):
    still = "document.querySelector('.film img.moving').getAnimations().length === 0"
    page = opened()
    assert not page.evaluate(still)
    page.click("#motion")
    assert page.evaluate(still)
    page.click("#motion")
    assert not page.evaluate(still)
    assert opened(reduced_motion="reduce").evaluate(still)


def test_keyboard_alone(opened):
    page = opened()
    active = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{active}.textContent") == "Skip to the gallery"
    assert page.evaluate(f"getComputedStyle({active}).outlineStyle") != "none"
    page.keyboard.press("/")
    assert page.evaluate(f"{active}.id") == "search"
    page.keyboard.type("a/")  # a slash in the search is a slash
    assert page.input_value("#search") == "a/"
    page.keyboard.press("Escape")
    assert page.input_value("#search") == "" and len(titles(page)) == len(reports.WORST)
    page.keyboard.press("ArrowDown")
    place = f"[...document.querySelectorAll('.card')].indexOf({active})"
    assert page.evaluate(place) == 0
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert page.evaluate(place) == 1
    page.keyboard.press("End")
    assert page.evaluate(place) == len(reports.WORST) - 1
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    second = f"[...document.querySelectorAll('.card')[0].querySelectorAll('.found')].indexOf({active})"
    assert page.evaluate(second) == 1
    page.keyboard.press("Enter")
    assert page.locator("#large").is_visible()
    assert page.locator("#large-title").text_content().startswith("video")
    page.keyboard.press("Escape")
    assert page.locator("#large").is_hidden() and page.evaluate(second) == 1
    page.keyboard.press("Escape")
    assert page.evaluate(place) == 0


def test_every_control_is_reached_by_tab(opened):
    page = opened()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "document.activeElement.id || document.activeElement.className || document.activeElement.name"
        )
        reached.add(name)
    assert {"theme", "way", "search", "show", "from", "to", "duration", "words", "order", "motion", "card"} <= reached


def test_show_more(opened):
    page = opened()
    page.evaluate("data.t2v.push(...Array.from({length: 40}, () => ({...data.t2v[0]}))); update()")
    assert len(titles(page)) == 20 and page.locator("#more").text_content() == "Show 20 more of 25"
    page.click("#more")
    assert len(titles(page)) == 40
    assert page.evaluate("[...document.querySelectorAll('.card')].indexOf(document.activeElement)") == 20
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")  # past the last shown one
    assert len(titles(page)) == 45 and page.locator("#more").is_hidden()


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_scrolls_in_one_direction_only(opened, width):
    page = opened(viewport={"width": width, "height": 780})
    for way in ("t2v", "v2t"):
        page.check(f"input[value={way}]", force=True)
        page.select_option("#show", "all")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        wide = "[...document.querySelectorAll('.card *, section h2, figure, .tile')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && getComputedStyle(e).position !== 'absolute' && !e.matches('.film *')).length"
        assert page.evaluate(wide) == 0


def brightness(page) -> float:
    return float(pixels(page.locator("#metrics")).mean())


def test_light_and_dark(opened):
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    assert brightness(light) > 200 and brightness(dark) < 80
    dark.click("#theme")
    assert brightness(dark) > 200
    light.click("#theme")
    assert brightness(light) < 80
    light.reload()
    assert brightness(light) < 80  # what was chosen stays


def test_print(opened):
    page = opened()
    page.emulate_media(media="print")
    assert page.locator("#controls").is_hidden() and page.locator("nav").is_hidden()
    assert page.locator(".card").first.is_visible()


def test_the_colours_of_a_legend_are_kept(opened):
    """On paper, and where the user's own colours replace those of the page: else nothing says which line is which."""
    page = opened(forced_colors="active")
    style = "(() => { const s = getComputedStyle(document.querySelectorAll('.legend i')[1]); return [s.backgroundColor, s.printColorAdjust]; })()"
    colour, on_paper = page.evaluate(style)
    line = page.evaluate(
        "getComputedStyle(document.querySelector('svg.chart path.b, svg.chart polyline.b, svg.chart .b')).stroke"
    )
    assert colour == line and on_paper == "exact"


def test_numbers_under_the_pointer(opened):
    page = opened()
    page.locator("svg.chart").first.hover()
    assert "text to video 58.333" in page.locator(".readout").first.text_content()


def test_without_scripts_the_numbers_are_there(opened):
    page = opened(java_script_enabled=False)
    assert page.locator(".metrics .own td").first.text_content() == "58.3"
    assert page.locator("#controls").is_hidden()
    assert "needs JavaScript" in page.locator("noscript").text_content()


def test_the_pictures_of_the_docs(address, tmp_path):
    script = Path(__file__).parents[3] / "docs" / "pictures.py"

    def take(source: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, script, "report", source, "--out", tmp_path], capture_output=True, text=True
        )

    made = take(urlparse(address).path)
    assert made.returncode == 0, made.stderr
    for name in ("report.png", "report-gallery.png"):
        picture = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert picture.shape == (880, 1280, 3)
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    missing = take("missing.html")
    assert missing.returncode == 1 and missing.stderr.startswith("error: there is no file missing.html")
