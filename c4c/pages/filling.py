"""A page in one file that needs nothing else, and that nothing in it can turn into a program."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jinja2
from markupsafe import Markup

from c4c import __version__
from shards import count

_SHARED = Path(__file__).parent
_THOUSANDS = "\N{NARROW NO-BREAK SPACE}"


def fill(folder: Path, context: dict, data: object = None, filters: dict[str, Callable] | None = None) -> bytes:
    """The page of FOLDER/template.html, which extends base.html, with FOLDER/page.css and page.js behind those of all pages.

    context: what the template shows, `title` among it; every string is escaped. data: what the script reads, as JSON.
    filters: of this template, beside `thousands` and `count`. A browser runs only the script, uses only the style and
    asks for nothing: the policy in the page names both by their hashes.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _SHARED]), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"thousands": _thousands, "count": count} | (filters or {})
    style, script = _both(folder, "css"), _both(folder, "js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    page = environment.get_template("template.html").render(
        **context, version=__version__, policy=policy, style=Markup(style), script=Markup(script),
        data=Markup(_json(data)),
    )  # fmt: skip
    return page.encode(errors="replace")


def _both(folder: Path, kind: str) -> str:
    return (_SHARED / f"base.{kind}").read_text() + (folder / f"page.{kind}").read_text()


def _thousands(n: int) -> str:
    return f"{n:,}".replace(",", _THOUSANDS)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: object) -> str:
    """JSON that may stand in a <script> element: nothing in it ends the element or starts a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
