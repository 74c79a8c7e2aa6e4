"""The pictures of docs/images that show a page:  python docs/pictures.py report report.html

They are taken with Playwright in Debian's chromium (`apt install chromium`), one function a picture:

report   the report that launch/eval.py --report wrote: docs/images/report.png, its top, and report-gallery.png, its gallery
study    the page that python -m c4c.study wrote: study.png, its first table
search   the page of a running launch/serve.py on an index of the demo's videos, http://127.0.0.1:8000/ say: search.png
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"
WIDTH = 1280  # pixels of the window
SENTENCE = "a big green moon becomes a heart"


@contextmanager
def opened(address: str, height: int) -> Iterator:
    """A page in a window of WIDTH x `height` pixels, in light colours and with nothing moving."""
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium")
    if browser_path is None:
        raise OSError("there is no chromium: install one (apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        size = {"width": WIDTH, "height": height}
        page = browser.new_page(viewport=size, color_scheme="light", reduced_motion="reduce")
        try:
            page.goto(address)
            yield page
        finally:
            browser.close()


def save(page, path: Path) -> None:
    """Write what the window shows."""
    Image.open(BytesIO(page.screenshot())).convert("RGB").save(path, optimize=True)
    print(f"wrote {path}")


def address_of(source: str, made_by: str) -> str:
    """Of a page in a file. Raises OSError where there is none; made_by: the command that writes one."""
    path = Path(source)
    if not path.is_file():
        raise OSError(f"there is no file {source}: write one with {made_by}")
    return path.resolve().as_uri()


def report(source: str, images: Path) -> None:
    """report.png and report-gallery.png, from a report's file."""
    with opened(address_of(source, "launch/eval.py --report FILE"), 880) as page:
        page.wait_for_selector(".card img")
        save(page, images / "report.png")
        page.evaluate("document.querySelector('#gallery').scrollIntoView()")
        page.wait_for_function("[...document.querySelectorAll('.card img')].slice(0, 12).every(one => one.complete)")
        save(page, images / "report-gallery.png")


def study(source: str, images: Path) -> None:
    """study.png, from the page of a finished study."""
    with opened(address_of(source, "python -m c4c.study --cfg FILE"), 880) as page:
        page.wait_for_selector(".sorting button")  # the script has run
        page.evaluate("document.querySelector('#summary').nextElementSibling.scrollIntoView()")
        save(page, images / "study.png")


def search(source: str, images: Path) -> None:
    """search.png, from the address of a server."""
    from urllib.parse import urlencode

    from playwright.sync_api import Error

    address = f"{source.rstrip('/')}/?{urlencode({'q': SENTENCE})}"
    try:
        with opened(address, 740) as page:
            page.wait_for_selector(".card")
            page.wait_for_load_state("networkidle")  # the pictures of the results
            save(page, images / "search.png")
    except Error as error:
        raise OSError(
            f"{source} does not show results: start launch/serve.py first ({str(error).splitlines()[0]})"
        ) from error


PICTURES: dict[str, Callable[[str, Path], None]] = {"report": report, "study": study, "search": search}


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Take a picture for docs/images.")
    parser.add_argument("picture", choices=PICTURES)
    parser.add_argument("source", help="the file or the address of the page")
    parser.add_argument("--out", type=Path, default=IMAGES, help="another folder than docs/images")
    args = parser.parse_args()
    try:
        PICTURES[args.picture](args.source, args.out)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
