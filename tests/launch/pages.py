"""What tests of the search page ask of it, through Playwright."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tests.c4c.retrieval import stand_in
from tests.launch.servers import ServerProcess

TOKEN = "a-token-of-good-length"
WORDS = ("--no-sandbox", "--disable-gpu", "--process-per-site")  # of the browser


def make_films(folder: Path) -> Path:
    """Films and their index, `my.index`, in a folder."""
    films = stand_in.FILMS | {f"more/{i:02}.mp4": (["grey"], {}) for i in range(30)}
    return stand_in.make(folder, films).parent


@contextmanager
def visits(browser, server: ServerProcess) -> Iterator[Callable]:
    """Gives open(address, size, expected=…, options of the window) -> the page. At the end: nothing went wrong on any but what was
    `expected`, pieces of messages, and none asked for anything of another server."""
    contexts, problems = [], []
    home = f"http://127.0.0.1:{server.port}/"

    def hear(text: str, is_problem: bool) -> None:
        problems.extend([text] * is_problem)

    def open_it(address: str = "", size: dict | None = None, expected: tuple = (), **words):
        context = browser.new_context(viewport=size or {"width": 1280, "height": 800}, **words)
        contexts.append(context)
        context.request.get(f"{home}?token={TOKEN}")  # gives the cookie
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on(
            "console", lambda m: hear(m.text, m.type in ("error", "warning") and not any(e in m.text for e in expected))
        )
        page.on("pageerror", lambda error: hear(str(error), True))
        page.on("request", lambda r: hear(r.url, not r.url.startswith((home, "blob:"))))
        page.goto(f"{home}{address}")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []


def until(page, expression: str) -> None:
    """Wait for it to be true. (Playwright's own wait_for_function evaluates in the page, which its policy forbids.)"""
    deadline = time.monotonic() + 20
    while not page.evaluate(f"!!({expression})"):
        assert time.monotonic() < deadline, f"{expression} did not become true; the page says: {status(page)}"
        page.wait_for_timeout(30)


def search(page, sentence: str) -> None:
    page.fill("#q", sentence)
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#status').textContent.match(/result|found|server|empty|long/i)")


def names(page) -> list[str]:
    return page.locator(".card .name").all_inner_texts()


def status(page) -> str:
    return page.inner_text("#status")


def playing(page, seconds: float) -> float:
    """Wait until the video plays on after `seconds`; returns where it is."""
    until(page, f"video.readyState >= 2 && video.currentTime > {seconds}")
    return page.evaluate("video.currentTime")


def shown_colour(page) -> str:
    """Which colour the video shows, read from its pixels."""
    rgb = page.evaluate("""() => {
        const canvas = document.createElement('canvas');
        [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
        const context = canvas.getContext('2d');
        context.drawImage(video, 0, 0);
        const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
        const mean = [0, 0, 0];
        for (let i = 0; i < data.length; i += 4) for (let c = 0; c < 3; c++) mean[c] += data[i + c];
        return mean.map((one) => one / (data.length / 4));
    }""")
    return min(stand_in.COLOURS, key=lambda name: np.abs(np.array(stand_in.COLOURS[name]) - rgb).sum())


def luminance(rgb) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def inks(page) -> list[tuple[str, list[int], list[int]]]:
    """Of some texts: (selector, RGBA of the letters, RGBA of what is behind them)."""
    return page.evaluate("""() => ['.name', '.score', '.similar', '#status', '.folder', '#filters summary', '.primary', '.foot'].map((one) => {
            const element = document.querySelector(one);
            let ground = element;
            const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
            const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
            while (ground && rgb(getComputedStyle(ground).backgroundColor)[3] < 255) ground = ground.parentElement;
            return [one, rgb(getComputedStyle(element).color), rgb(getComputedStyle(ground ?? document.body).backgroundColor)];
        })""")


def as_file(route) -> None:
    """Pass an answer of /api/play on as if the server had taken the file for one that browsers play."""
    answer = route.fetch()
    body = answer.json() | {"kind": "file", "url": "page/style.css"}
    route.fulfill(response=answer, json=body)
