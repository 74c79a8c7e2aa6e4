"""The search page when something went wrong before, or while one types: it goes on, and shows nothing that is no longer true."""

import pytest

from tests import browsers
from tests.launch.pages import TOKEN, WORDS, make_films, names, playing, search, status, until, visits
from tests.launch.servers import ServerProcess

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(browsers.CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
FOCUS = "document.activeElement.id"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_films(tmp_path_factory.mktemp("again"))


@pytest.fixture(scope="module")
def server(folder):
    with ServerProcess(folder / "my.index", "--token", TOKEN) as it:
        yield it


@pytest.fixture(scope="module")
def browser():
    with browsers.chromium(*WORDS) as browser:
        yield browser


@pytest.fixture
def open_page(browser, server):
    with visits(browser, server) as open_it:
        yield open_it


def test_the_same_sentence_again_once_the_server_is_back(open_page):
    page = open_page(expected=["ERR_FAILED"])
    page.route("**/api/search?*", lambda route: route.abort())
    search(page, "red")
    assert status(page) == "The server does not answer. Is it still running?" and not names(page)
    page.unroute("**/api/search?*")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.card').length === 24")
    assert "results" in status(page)


def test_who_asks_again_gets_a_new_answer(open_page):
    page = open_page()
    search(page, "red")
    asked, entries = [], page.evaluate("history.length")
    page.on("request", lambda request: asked.append(request.url) if "/api/search" in request.url else None)
    page.click("button[type=submit]")
    until(page, "document.querySelector('#status').textContent.includes('result')")
    assert len(asked) == 1 and page.evaluate("history.length") == entries


def test_one_types_on_in_the_filters_while_the_page_searches(open_page):
    page = open_page("?q=red")
    page.wait_for_selector(".card")
    page.click("#filters summary")
    page.fill("#min", "1")
    page.keyboard.press("Tab")
    until(page, "location.search.includes('min_duration=1')")
    page.wait_for_timeout(400)  # for the answer
    assert page.evaluate(FOCUS) == "max"
    page.keyboard.type("4")
    page.keyboard.press("Tab")
    until(page, "location.search.includes('max_duration=4') && !document.body.classList.contains('busy')")
    assert page.input_value("#min") == "1" and page.input_value("#max") == "4" and "similar" not in page.url
    page.fill("#path", "scenes/*")
    page.keyboard.press("Enter")  # a change and a search at once
    until(page, "document.activeElement.matches('.card')")
    assert set(names(page)) == {"scenes/blue.webm", "scenes/red.mp4"}


def test_a_filter_in_the_address_that_cannot_be(open_page):
    page = open_page("?q=red&min_duration=-5", expected=["422"])
    until(page, "document.querySelector('#status').textContent.includes('greater than or equal to 0')")
    assert page.evaluate("document.querySelector('#filters').open")
    page.fill("#min", "")
    search(page, "blue")
    until(page, "document.querySelectorAll('.card').length === 24")


def test_a_sentence_that_is_too_long_leaves_nothing_of_the_last_one(open_page):
    page = open_page()
    search(page, "一匹の犬")
    page.wait_for_selector("#note:not([hidden])")
    search(page, "x" * 10_001)
    assert "10001 characters" in status(page) and not names(page) and page.locator("#note").is_hidden()
    search(page, "一匹の犬")
    until(page, "document.querySelectorAll('.card').length === 24")


def test_a_video_stops_where_the_next_one_cannot_be_played(open_page):
    page = open_page("?q=red&path=long%2F*&per_video=false", expected=["410", "500"])
    page.locator(".card").first.click()
    playing(page, 0.1)
    answer = {"status": 410, "json": {"detail": "This video was removed or moved after it was indexed."}}
    page.route("**/api/play/*", lambda route: route.fulfill(**answer))
    page.locator("#next:enabled, #previous:enabled").first.click()
    until(page, "document.querySelector('#player-message').textContent.includes('removed')")
    assert page.evaluate("video.paused && !video.getAttribute('src')")
    assert page.locator("#similar").is_disabled() and page.locator("#timeline .moment").count() > 1
    first = page.url
    page.unroute("**/api/play/*")
    page.keyboard.press("ArrowRight")  # from the one that failed on
    playing(page, 0.1)
    assert page.url != first
    assert page.locator("#similar").is_enabled()


def test_a_moment_that_the_index_does_not_have(open_page):
    page = open_page("?play=bm9uZQ", expected=["404"])
    until(page, "document.querySelector('#player-message').textContent.includes('no such segment')")
    assert page.locator("#similar").is_disabled() and page.locator("#next").is_disabled()
    assert page.locator("#player-ends").is_hidden()


def test_a_name_that_is_none_has_a_hint(open_page):
    page = open_page("?q=red&path=red")
    until(page, "document.querySelector('#status').textContent === 'Nothing was found with these filters.'")
    assert page.inner_text("#note") == "No name in the index matches 'red'; did you mean '*red*'?"
    page.fill("#path", "*red*")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card")
    assert names(page) == ["scenes/red.mp4"] and not page.is_visible("#note")
