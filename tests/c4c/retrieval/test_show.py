"""Results on a terminal, as JSON and as a page: nothing that a name or a query holds gets out of its place."""

import io
import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from c4c.retrieval.index.store import Hit
from c4c.retrieval.search.query import Query, choose_queries
from c4c.retrieval.search.show import Out, as_json, clock, half_blocks, plain, times

ODD = "<script>alert('x')</script> & \x1b[31m\n\u202e“q”.mp4"


def jpeg(size=(64, 48), colour=(200, 30, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "JPEG", quality=95)
    return out.getvalue()


class Searcher:
    """As far as showing needs one."""

    class store:
        uri = "/somewhere/my <index>"

        def __len__(self):
            return 0

    store = store()  # type: ignore[assignment,misc]

    def thumbnail(self, id: str) -> bytes:
        return jpeg()


def result(video="a.mp4", path="/videos/a b.mp4", score=0.25) -> Hit:
    return Hit(f"{video}#000001", video, path, 4.0, 12.25, 3725.0, score)


def test_clock():
    assert [clock(seconds) for seconds in (0, 9.6, 59.6, 61, 3599, 3600, 36_061)] == [
        "0:00",
        "0:10",
        "1:00",
        "1:01",
        "59:59",
        "1:00:00",
        "10:01:01",
    ]


def test_plain():
    assert (
        plain("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"
        and plain("ü 🐕") == "ü 🐕"
        and "\ud800" not in plain("\ud800")
    )


def test_json_is_one_line_a_query():
    line = as_json(Query("a “dog”\u2028"), [result(ODD)])
    assert "\n" not in line
    assert json.loads(line) == {
        "query": "a “dog”\u2028",
        "results": [
            {"video": ODD, "start": 4.0, "end": 12.25, "score": 0.25, "path": "/videos/a b.mp4", "id": f"{ODD}#000001"}
        ],
    }


@pytest.mark.parametrize(
    ("size", "shape"), [((64, 48), (16, 6)), ((400, 40), (22, 1)), ((10, 300), (1, 6)), ((1, 1), (6, 6))]
)
def test_a_picture_in_half_blocks(size, shape):
    text = half_blocks(jpeg(size))
    lines = text.plain.split("\n")
    assert (max(map(len, lines)), len(lines)) == (shape if size != (1, 1) else (12, 6)) and set(text.plain) <= {
        "▀",
        "\n",
    }
    style = text.spans[0].style
    assert style.color.triplet.red > 150 > style.bgcolor.triplet.green


def test_plain_lines_where_there_are_no_colours(capsys):
    with Out(Searcher(), None, None) as out:
        out.show(Query("a dog"), [result(), result(ODD, score=-1.5)], "a note")
        out.show(Query("nothing"), [], "")
    shown = capsys.readouterr()
    assert shown.out.splitlines()[:3] == [
        "a dog",
        "  1   0.250        0:04-0:12  a.mp4",
        f"  2  -1.500        0:04-0:12  {plain(ODD)}",
    ]
    assert "the index is empty" in shown.out and "\x1b" not in shown.out and "▀" not in shown.out
    assert shown.err == "note: a dog: a note\n"


@pytest.mark.parametrize(
    ("colours", "pictures", "seen"),
    [("truecolor", True, True), ("256", True, True), ("standard", True, False), ("truecolor", False, False)],
)
def test_pictures_where_the_terminal_has_colours(colours, pictures, seen, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=colours, width=80, highlight=False, markup=False)
    monkeypatch.setattr("c4c.retrieval.search.show._console", lambda: console)
    with Out(Searcher(), None, None, pictures=pictures) as out:
        out.show(Query("[bold]a dog"), [result(ODD)], "")
    assert ("▀" in screen.getvalue()) == seen
    assert (
        "[bold]a dog" in screen.getvalue()
        and "script>alert" in screen.getvalue()
        and "\x1b[31m\n" not in screen.getvalue()
    )


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data


def test_the_page_holds_all_it_needs(tmp_path, capsys):
    file = tmp_path / "found.html"
    with Out(Searcher(), None, file) as out:
        out.show(Query(ODD), [result(ODD, path="/videos/it's #1.mp4"), result("x", path="/data/split::x")], ODD)
        out.show(Query("nothing"), [], "")
        assert not file.exists(), "it appears whole"
    page = Page(file.read_text())
    assert "script" not in page.tags and page.words.count("<script>alert('x')</script>") == 3
    links = [address for address in page.addresses if not address.startswith("data:image/jpeg;base64,")]
    assert page.tags.count("img") == 2 and len(page.addresses) == 3
    assert links == ["file:///videos/it%27s%20%231.mp4#t=4,12.25"], "what lies in a split has no address"
    assert "nothing was found" in page.words and "0:04-0:12" in page.words
    assert f"wrote {file}" in capsys.readouterr().err


def test_an_error_leaves_no_file(tmp_path):
    with (
        pytest.raises(ValueError, match="broken"),
        Out(Searcher(), str(tmp_path / "a.json"), tmp_path / "a.html") as out,
    ):
        out.show(Query("x"), [result()], "")
        raise ValueError("broken")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_error():
    """`| head` closes the pipe: the process ends without a word."""
    code = (
        "from tests.c4c.retrieval.test_show import *\n"
        "with Out(Searcher(), '-', None) as out:\n"
        "    for i in range(10_000):\n"
        "        out.show(Query('a dog'), [result()], '')\n"
        "    raise AssertionError('it went on')\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("to", [None, "-"])
def test_a_page_is_whole_though_the_reader_leaves(tmp_path, to):
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.c4c.retrieval.test_show import *\n"
        f"with Out(Searcher(), {to!r}, Path(sys.argv[1])) as out:\n"
        "    for i in range(100): out.show(Query(f'query {i}'), [result()], '')\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    page = tmp_path / "page.html"
    done = subprocess.run([sys.executable, "-c", code, page], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, f"wrote {page}\n")
    assert page.read_text().count("<h2>") == 100


@pytest.mark.parametrize("to", [None, "-"])
def test_a_full_disk_behind_standard_output(monkeypatch, to):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with (
            pytest.raises(OSError, match="the results cannot be printed: No space left"),
            Out(Searcher(), to, None) as out,
        ):
            out.show(Query("a dog"), [result()], "")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # or closing it would raise


def test_files_are_utf_8_wherever_they_are_written(tmp_path):
    code = "from c4c.files import *\nimport sys\nreplace_text({Path(sys.argv[1]): '\\u89c6'})"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.html"], env=env, check=True)
    assert (tmp_path / "a.html").read_bytes() == "视".encode()


# ---- what is asked for ----


def test_queries(tmp_path, monkeypatch):
    file = tmp_path / "queries.txt"
    file.write_bytes("\ufeffa dog\r\n\r\n  a cat  \nü\u2028v".encode())
    assert [query.text for query in choose_queries([], str(file))] == ["a dog", "a cat", "ü\u2028v"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert [query.text for query in choose_queries([], "-")] == ["one", "two"]
    assert (
        choose_queries([], None, file) == [Query(str(file), "video")]
        and choose_queries([], None, None, file)[0].kind == "image"
    )
    assert choose_queries(["a", "b"]) == [Query("a"), Query("b")]


def test_what_cannot_be_asked(tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes("süß".encode("latin-1"))
    for words, args in (
        ("nothing to search for", ([],)),
        ("sentences and --video", (["a"], None, empty)),
        ("the query '' is empty", ([""],)),
        ("query 2 of 2: the query ' ' is empty", (["a", " "],)),
        ("holds no sentence", ([], str(empty))),
        ("is not UTF-8", ([], str(latin))),
        ("cannot be read", ([], str(tmp_path))),
        ("there is no such file", ([], None, tmp_path / "none.mp4")),
        ("there is no such file", ([], None, None, tmp_path)),
    ):
        with pytest.raises(ValueError, match=words):
            choose_queries(*args)


def test_times_of_a_short_segment_have_tenths():
    assert clock(0.14, tenths=True) == "0:00.1" and clock(59.96, tenths=True) == "1:00.0"
    assert times(Hit("a", "a", "a", 0.0, 0.1, 0.1)) == "0:00.0-0:00.1"
    assert times(Hit("a", "a", "a", 3661.5, 3663.25, 4000.0)) == "1:01:01.5-1:01:03.2"
    assert times(Hit("a", "a", "a", 0.0, 2.0, 9.0)) == "0:00-0:02"
