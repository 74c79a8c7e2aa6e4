"""The search page in a browser: headless Chromium, driven by Playwright."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import browsers
from tests.c4c.retrieval import stand_in
from tests.launch.pages import (
    TOKEN,
    WORDS,
    as_file,
    inks,
    luminance,
    make_films,
    names,
    playing,
    search,
    shown_colour,
    status,
    until,
    visits,
)  # fmt: skip
from tests.launch.servers import ServerProcess

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(browsers.CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_films(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(folder):
    with ServerProcess(folder / "my.index", "--token", TOKEN) as it:
        yield it
        code, _, err, _ = it.end()
    assert (code, err) == (0, "")


@pytest.fixture(scope="module")
def browser():
    with browsers.chromium(*WORDS) as browser:
        yield browser


@pytest.fixture
def open_page(browser, server):
    with visits(browser, server) as open_it:
        yield open_it


def test_a_search(open_page, server):
    page = open_page()
    until(page, "document.querySelector('#size').textContent === '40 moments of 36 videos'")
    search(page, "something red")
    assert re.fullmatch(r"24 results in .+", status(page))
    assert set(names(page)[:2]) == {"scenes/red.mp4", "long/all.mp4"}
    assert page.url.endswith("/?q=something+red") and page.title().startswith("something red")
    until(
        page,
        "[...document.querySelectorAll('.card img')].slice(0, 8).every((image) => image.complete && image.naturalWidth > 0)",
    )
    picture = np.asarray(Image.open(io.BytesIO(page.locator(".card .frame").first.screenshot())).convert("RGB"))
    assert picture.std() > 20 and picture[20:60, 60:].mean(axis=(0, 1)).argmax() == 0  # a red thumbnail
    page.click("#more")
    until(page, "document.querySelectorAll('.card').length === 36")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.card')[24]")
    assert page.locator("#more").is_hidden() and len(set(names(page))) == 36


def test_an_address_is_a_search(open_page):
    page = open_page("?q=blue&path=scenes%2F*")
    page.wait_for_selector(".card")
    assert page.input_value("#q") == "blue" and page.input_value("#path") == "scenes/*"
    assert names(page) == ["scenes/blue.webm", "scenes/red.mp4"] and "1 on" in page.inner_text("#filters")


def test_back_and_forward(open_page):
    page = open_page()
    search(page, "red")
    search(page, "green")
    page.locator(".card").first.click()
    page.wait_for_selector("#player[open]")
    page.go_back()
    page.wait_for_selector("#player:not([open])", state="attached")
    page.go_back()
    until(
        page,
        "document.querySelector('#q').value === 'red' && document.querySelector('.card .name').textContent.match(/red|all/)",
    )
    page.go_forward()
    until(page, "document.querySelector('#q').value === 'green'")
    page.go_back()
    page.go_back()
    until(page, "document.body.classList.contains('start') && !document.querySelector('.card')")


def test_filters(open_page):
    page = open_page("?q=red")
    page.wait_for_selector(".card")
    page.click("#filters summary")
    page.fill("#min", "5")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.card').length === 1")
    assert names(page) == ["long/all.mp4"] and "min_duration=5" in page.url
    page.check("#several")
    until(page, "document.querySelectorAll('.card').length === 5")
    page.fill("#path", "nothing/*")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#status').textContent.includes('filters')")
    assert status(page) == "Nothing was found with these filters."
    page.click("#clear-filters")
    until(page, "document.querySelectorAll('.card').length === 24")
    assert page.url.endswith("?q=red")


def test_a_match_plays_from_its_time(open_page):
    page = open_page("?q=blue&path=long%2F*")
    page.locator(".card").first.click()
    at = playing(page, 4.2)
    assert at < 8 and shown_colour(page) == "blue"
    assert "0:04 – 0:08 of 0:12" in page.inner_text("#player-time")
    assert page.locator("#timeline button").count() == 5
    page.click("#next")
    playing(page, 6.1)
    assert shown_colour(page) == "yellow" and "0:06 – 0:10" in page.inner_text("#player-time")
    page.click("#previous")
    until(page, "document.querySelector('#player-time').textContent.startsWith('0:04')")
    page.locator("#timeline button").nth(4).click()
    playing(page, 8.1)
    assert page.locator("#next").is_disabled()
    until(page, "video.currentTime >= 11.9 && video.paused")  # it stops where the segment ends
    page.click("#close")
    assert page.locator("#player").is_hidden()
    assert page.evaluate("document.activeElement.classList.contains('card')")


@pytest.mark.parametrize(
    ("video", "colour"),
    [
        ("scenes/blue.webm", "blue"),
        ("old/green.avi", "green"),
        ("old/yellow.mp4", "yellow"),
        ("odd/名前 ä&b#c.mp4", "grey"),
    ],
)
def test_every_kind_of_file_plays(open_page, server, video, colour):
    page = open_page(f"?q={colour}&path={video.split('/')[0]}%2F*")
    page.locator(f".card[aria-label^='{video},']").click()
    playing(page, 0.3)
    assert shown_colour(page) == colour and page.inner_text("#player-title") == video


def test_a_file_that_the_browser_turns_out_not_to_play(open_page, server, folder):
    """The page asks for a clip then. The server's answer is changed on its way, as if it had been mistaken."""
    page = open_page("?q=green&path=old%2F*")
    page.route(
        "**/api/play/*", lambda route: as_file(route) if "clip=true" not in route.request.url else route.continue_()
    )
    page.locator(".card[aria-label^='old/green.avi']").click()
    playing(page, 0.3)
    assert shown_colour(page) == "green" and "clip=true" in page.evaluate("video.src")


def test_a_video_that_was_removed(open_page, folder):
    page = open_page("?q=grey&path=more%2F29.mp4", expected=["410"])
    page.wait_for_selector(".card")
    (folder / "videos" / "more" / "29.mp4").unlink()
    page.locator(".card").click()
    until(page, "document.querySelector('#player-message').textContent.includes('removed')")
    assert page.inner_text("#player-message") == "This video was removed or moved after it was indexed."
    page.keyboard.press("Escape")
    assert page.locator("#player").is_hidden()


def test_a_clip_and_a_picture_as_examples(open_page, tmp_path):
    page = open_page()
    clip = stand_in.film(tmp_path / "mine.mp4", ["yellow"])
    page.set_input_files("#file", clip)
    page.wait_for_selector(".card")
    assert set(names(page)[:2]) == {"old/yellow.mp4", "long/all.mp4"}
    assert "mine.mp4" in page.inner_text("#example")
    picture = tmp_path / "photo.jpg"
    picture.write_bytes(stand_in.jpeg(stand_in.COLOURS["green"]))
    page.set_input_files("#file", picture)
    until(page, "document.querySelector('.card .name').textContent.match(/green|all/)")
    until(page, "document.querySelector('#example img').naturalWidth > 0")
    page.go_back()  # to the clip, which the page still has
    until(page, "document.querySelector('.card .name').textContent.match(/yellow|all/)")
    page.click(".chip-remove")
    until(page, "!document.querySelector('.card')")


def test_a_dropped_picture(open_page):
    page = open_page()
    page.evaluate(
        """async (bytes) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], 'dropped.jpg', { type: 'image/jpeg' }));
        document.body.dispatchEvent(new DragEvent('dragenter', { dataTransfer: data, bubbles: true, cancelable: true }));
        if (document.querySelector('#drop').hidden) throw new Error('nothing says where to drop');
        document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }));
    }""",
        list(stand_in.jpeg(stand_in.COLOURS["blue"])),
    )
    page.wait_for_selector(".card")
    assert set(names(page)[:2]) == {"scenes/blue.webm", "long/all.mp4"} and page.locator("#drop").is_hidden()


def test_files_that_are_refused(open_page, tmp_path):
    page = open_page(expected=["415"])
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no video"})
    until(page, "document.querySelector('#status').textContent.includes('no clip or picture')")
    assert not names(page)
    large = tmp_path / "large.mp4"
    with open(large, "wb") as file:
        file.truncate(5_000_001)
    page.set_input_files("#file", large)
    until(page, "document.querySelector('#status').textContent.includes('too large')")
    assert status(page) == "large.mp4 is too large: this server takes up to 5 MB."


def test_an_upload_can_be_cancelled(open_page, tmp_path):
    page = open_page()
    page.route("**/api/search/example*", lambda route: None)  # it never gets there
    page.set_input_files("#file", stand_in.film(tmp_path / "mine.mp4", ["red"]))
    page.wait_for_selector("#upload:not([hidden]) progress")
    page.click("#cancel-upload")
    until(page, "document.querySelector('#status').textContent.includes('cancelled')")
    assert page.locator("#upload").is_hidden()


def test_similar_moments(open_page):
    page = open_page("?q=red&path=scenes%2F*")
    page.wait_for_selector(".card")
    page.locator(".card[aria-label^='scenes/red.mp4'] + .similar").click()
    until(page, "document.querySelector('#example').textContent.includes('scenes/red.mp4')")
    assert "similar=" in page.url and names(page) == ["scenes/blue.webm"]  # the filter stays


def test_with_the_keyboard_alone(open_page):
    page = open_page()
    page.locator("body").press("Tab")
    page.keyboard.press("/")
    page.keyboard.type("green")
    page.keyboard.press("Enter")
    page.wait_for_selector(".card")
    page.keyboard.press("ArrowDown")
    focused = "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"
    assert page.evaluate(focused) == 0
    for key, place in (("ArrowRight", 1), ("ArrowDown", 5), ("ArrowLeft", 4), ("ArrowUp", 0), ("End", 23), ("Home", 0)):
        page.keyboard.press(key)
        assert page.evaluate(focused) == place, key
    page.keyboard.press("Enter")
    page.wait_for_selector("#player[open]")
    playing(page, 0.1)
    page.keyboard.press("Escape")
    page.wait_for_selector("#player:not([open])", state="attached")
    assert page.evaluate(focused) == 0
    page.keyboard.press("s")
    until(page, "document.querySelector('#example').textContent.match(/green|all/)")
    until(page, f"{focused} === 0")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "q"
    page.go_back()
    until(page, "document.querySelector('#q').value === 'green'")


def test_arrows_go_through_the_segments_of_the_player(open_page):
    page = open_page("?q=green&path=long%2F*")
    page.locator(".card").first.click()
    until(page, "document.querySelector('#player-time').textContent.startsWith('0:02')")
    for key, start in (("ArrowRight", "0:04"), ("ArrowRight", "0:06"), ("ArrowLeft", "0:04")):
        page.keyboard.press(key)
        until(page, f"document.querySelector('#player-time').textContent.startsWith('{start}')")
    page.keyboard.press("Escape")
    assert page.locator("#player").is_hidden() and page.url.endswith("path=long%2F*")


def test_the_player_in_a_low_window(open_page):
    """As at 200 % zoom: the head stays, all of it can be reached, and what is focused follows the segment."""
    page = open_page("?q=green&path=long%2F*", size={"width": 640, "height": 400})
    page.locator(".card").first.click()
    assert page.get_by_role("dialog", name="long/all.mp4").is_visible()  # named before its video is there
    page.wait_for_selector(".moment[aria-selected=true]")
    until(page, "player.scrollTop === 0 && player.scrollHeight === player.clientHeight")
    page.locator(".moment[aria-selected=true]").focus()
    page.keyboard.press("ArrowRight")
    until(page, "document.querySelector('#player-time').textContent.startsWith('0:04')")
    until(page, "document.activeElement.matches('.moment[aria-selected=true]')")
    assert page.locator("#player [role=status]#player-time").count() == 1  # a step is told to those who do not see it


def test_sentences_that_are_refused_and_notes(open_page):
    page = open_page(expected=["422"])
    page.locator("#q").press("Enter")
    assert status(page) == "Type what the video shows."
    search(page, "x" * 10_001)
    assert "10001 characters, and 10000 at most" in status(page)
    search(page, "一匹の犬")
    page.wait_for_selector("#note:not([hidden])")
    assert "Latin script" in page.inner_text("#note") and names(page)
    search(page, "red")
    page.wait_for_selector("#note", state="hidden")
    page.fill("#q", "\u200b \u00ad")  # nothing to be seen: the server says so
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#status').textContent.includes('empty')")


def test_a_name_is_text_and_nothing_else(open_page):
    page = open_page("?q=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E%20red&path=%22%3E%3Cscript%3E")
    until(page, "document.querySelector('#status').textContent.includes('filters')")
    assert page.locator("main img[src=x], main script").count() == 0


def test_a_server_that_is_gone(open_page):
    page = open_page(expected=["ERR_FAILED"])
    page.route("**/api/**", lambda route: route.abort())
    search(page, "red")
    assert status(page) == "The server does not answer. Is it still running?"


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (390, "dark")])
def test_on_a_phone(open_page, width, scheme):
    page = open_page(size={"width": width, "height": 740}, color_scheme=scheme, has_touch=True, reduced_motion="reduce")
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == width
    search(page, "grey")
    page.wait_for_selector(".card")
    page.click("#filters summary")
    assert page.evaluate(wide) == width
    assert page.evaluate("getComputedStyle(document.querySelector('.card')).transitionDuration") in ("0s", "")
    boxes = page.evaluate(
        "[...document.querySelectorAll('.card, .similar, #q, .box button, .fields input')].map((e) => e.getBoundingClientRect().right)"
    )
    assert max(boxes) <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 60) == (scheme == "dark")
    page.locator(".card").first.tap()
    page.wait_for_selector("#player[open]")
    playing(page, 0.1)
    assert page.evaluate("document.querySelector('#player').getBoundingClientRect().right") <= width
    assert page.evaluate(wide) == width


def test_text_can_be_read(open_page):
    """Contrast of at least 4.5 to 1 (WCAG 2.2, 1.4.3) in both schemes."""
    for scheme in ("light", "dark"):
        page = open_page("?q=red", color_scheme=scheme)
        page.wait_for_selector(".card")
        for name, ink, paper in inks(page):
            light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, name, ink, paper)


def test_the_page_of_the_api(open_page):
    page = open_page("docs")
    page.wait_for_selector(".route")
    assert page.locator(".route").count() >= 9 and "/api/search/example" in page.inner_text("#routes")
    page.locator(".route summary").nth(1).click()
    text = page.inner_text("#routes")
    assert "max_duration" in text and "`" not in text and "`" not in page.inner_text("#about")
    assert "note" in page.locator("#routes code").all_inner_texts()


def test_with_a_token(browser, server):
    page = browser.new_context().new_page()
    page.goto(f"http://127.0.0.1:{server.port}/?q=red")
    assert "needs a token" in page.inner_text("h1")
    page.fill("#token", TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("#size:not(:empty)", state="attached")  # the page's script runs
    assert "token" not in page.url
    search(page, "red")
    until(page, "document.querySelector('.card img')?.naturalWidth > 0")
    page.context.close()
