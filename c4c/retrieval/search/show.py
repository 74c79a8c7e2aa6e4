"""What was found, for people and programs: on a terminal, as JSON lines, as one page of HTML."""

import base64
import html
import io
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from c4c.files import replace_text
from c4c.launched import seen_enough

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from c4c.retrieval.index.store import Hit
    from c4c.retrieval.search.query import Query
    from c4c.retrieval.search.searcher import Searcher

_NAMED = 60  # characters of a query before a note on it
_COLUMNS, _ROWS = 22, 6  # of a picture on the terminal, characters; each is two pixels high
_COLOURS = ("256", "truecolor")  # of a terminal that can show pictures; rich says None where it is none
_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
li { border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
img { display: block; width: 100%; aspect-ratio: 16/9; object-fit: contain; background: #000; }
p { margin: 0; padding: .5rem .75rem; overflow-wrap: anywhere; } .more { opacity: .75; font-size: .9em; padding-top: 0; }
.note { border-left: 4px solid #c80; padding-left: .75rem; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="c4c search">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}</body></html>
"""


def as_json(query: "Query", results: "list[Hit]") -> str:
    """A query and what was found, as one line."""
    rows = [
        {
            "video": r.video, "start": round(r.start, 3), "end": round(r.end, 3), "score": round(r.score, 6), "path": r.path, "id": r.id,
        }
        for r in results
    ]  # fmt: skip
    return json.dumps({"query": query.text, "results": rows}, ensure_ascii=False)


def clock(seconds: float, tenths: bool = False) -> str:
    """m:ss, from an hour on h:mm:ss; with tenths of a second m:ss.t."""
    count = round(seconds * 10) if tenths else round(seconds) * 10
    whole, part = divmod(count, 10)
    minutes = f"{whole // 60 % 60:02}" if whole >= 3600 else str(whole // 60)
    return f"{f'{whole // 3600}:' if whole >= 3600 else ''}{minutes}:{whole % 60:02}{f'.{part}' if tenths else ''}"


def times(result: "Hit") -> str:
    """A segment's seconds, as a player shows them; of less than two seconds, with tenths."""
    tenths = result.end - result.start < 2
    return f"{clock(result.start, tenths)}-{clock(result.end, tenths)}"


def plain(text: str) -> str:
    """Text that a terminal shows and does not obey."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "replace").decode() for char in text)


class Out:
    """Takes queries and their results, and shows them.

    json_to: a file, `-` for standard output, or None; with either, the terminal shows notes only. html_to: a page to write.
    pictures: thumbnails on a terminal that has colours. Files are written when the block ends without an error.
    """

    def __init__(self, searcher: "Searcher", json_to: str | None, html_to: Path | None, pictures: bool = True):
        self._searcher, self._json_to, self._html_to = searcher, json_to, html_to
        self._lines: list[str] = []
        self._parts: list[str] = []
        self._console = _console() if json_to is None else None
        self._pictures = pictures and self._console is not None and self._console.color_system in _COLOURS

    def __enter__(self) -> "Out":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            with seen_enough():
                raise error
            return True
        if kind is None:
            self._write()
        return False

    def show(self, query: "Query", results: "list[Hit]", note: str) -> None:
        """Show a query's results, or keep them for the file. note: on the query."""
        if note:
            named = query.text if len(query.text) <= _NAMED else f"{query.text[:_NAMED]}…"
            print(f"note: {plain(named)}: {note}", file=sys.stderr, flush=True)
        if self._html_to:
            self._parts.append(_section(query, results, note, self._searcher))
        if self._json_to == "-":
            self._say(as_json(query, results) + "\n")
        elif self._json_to:
            self._lines.append(as_json(query, results) + "\n")
        if self._console:
            with self._console.capture() as shown:  # rich would end the process by itself where nobody reads any more
                self._table(self._console, query, results)
            self._say(shown.get())

    def _say(self, text: str) -> None:
        """Print. Raises BrokenPipeError where nobody reads any more, unless a page is to be written, and OSError."""
        try:
            with seen_enough() if self._html_to else nullcontext():
                print(end=text, file=self._console.file if self._console else None, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(f"the results cannot be printed: {error.strerror}") from error

    def _write(self) -> None:
        files: dict[Path, str] = {}
        if self._json_to not in (None, "-"):
            files[Path(str(self._json_to))] = "".join(self._lines)
        if self._html_to:
            title = html.escape(f"Search in {plain(self._searcher.store.uri)}")
            files[self._html_to] = _PAGE.format(title=title, style=_STYLE, body="".join(self._parts))
        if files:
            replace_text(files)
        for path in files:
            print(f"wrote {path}", file=sys.stderr)

    def _table(self, console: "Console", query: "Query", results: "list[Hit]") -> None:
        from rich.table import Table
        from rich.text import Text

        console.print(Text(plain(query.text), "bold"))
        if not results:
            empty = not len(self._searcher.store)
            console.print(
                f"  nothing was found: {'the index is empty' if empty else 'no video of the index passes the filters'}"
            )
        if not self._pictures:
            for rank, result in enumerate(results, 1):
                console.print(f"{rank:3}  {result.score:6.3f}  {times(result):>15}  {plain(result.video)}")
            console.print()
            return
        grid = Table.grid(padding=(0, 2))
        for rank, result in enumerate(results, 1):
            about = Text.assemble(
                (f"{plain(result.video)}\n", "bold"), f"{times(result)}\n", f"score {result.score:.3f}\n", (plain(result.path), "dim"),
                overflow="fold",
            )  # fmt: skip
            grid.add_row(f"{rank:3}", half_blocks(self._searcher.thumbnail(result.id)).append("\n"), about)
        console.print(grid)


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())


def half_blocks(jpeg: bytes) -> "Text":
    """A picture as coloured half blocks, at most 22 characters wide and 6 high."""
    from PIL import Image
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    with Image.open(io.BytesIO(jpeg)) as image:
        scale = min(_COLUMNS / image.width, 2 * _ROWS / image.height)
        width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale / 2)) * 2
        pixels: Any = image.convert("RGB").resize((width, height), Image.Resampling.BOX).load()
    text = Text(no_wrap=True)
    for y in range(0, height, 2):
        for x in range(width):
            text.append("▀", Style(color=Color.from_rgb(*pixels[x, y]), bgcolor=Color.from_rgb(*pixels[x, y + 1])))
        if y + 2 < height:
            text.append("\n")
    return text


def _section(query: "Query", results: "list[Hit]", note: str, searcher: "Searcher") -> str:
    cards = []
    for rank, result in enumerate(results, 1):
        picture = base64.b64encode(searcher.thumbnail(result.id)).decode()
        name, path = html.escape(plain(result.video)), Path(result.path)
        if path.is_absolute() and "::" not in result.path:
            address = html.escape(f"{path.as_uri()}#t={result.start:g},{result.end:g}")
            name = f'<a href="{address}">{name}</a>'
        cards.append(
            f'<li><img alt="" src="data:image/jpeg;base64,{picture}"><p>{rank}. {name}</p>'
            f'<p class="more">{times(result)} &middot; score {result.score:.3f}</p></li>\n'
        )
    told = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
    return f"<h2>{html.escape(plain(query.text))}</h2>\n{told}<ol>\n{''.join(cards) or '<li><p>nothing was found</p></li>'}</ol>\n"
