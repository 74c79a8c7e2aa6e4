"""A page in Debian's chromium, for tests: it is opened as a user does, and must do nothing that a page in one file may not."""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium(*words: str) -> Iterator:
    """The browser, with such options. Needs the package playwright, and CHROMIUM."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(words))
        yield browser
        browser.close()


@contextmanager
def harmless(browser, address: str) -> Iterator[Callable]:
    """Gives open(options of the window) -> the page at `address`. At the end: nothing went wrong on any, none asked for anything but
    itself, and no text of its data ran as a program (which would set window.hacked)."""
    contexts, problems = [], []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("data:", address)) else problems.append(request.url),
        )
        page.goto(address)
        return page

    yield open_page
    hacked = [context.pages[0].evaluate("window.hacked") for context in contexts]
    for context in contexts:
        context.close()
    assert problems == []
    assert hacked == [None] * len(contexts)


def pixels(locator) -> np.ndarray:
    """What a locator or page shows, [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(locator.screenshot(animations="disabled"))).convert("RGB")).astype(int)
