"""The preview page stands alone, shows the frames and captions it says, and cannot be broken by what a caption says."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from c4c.shard import main
from shards import ShardError
from shards.annotations import Caption, Item
from shards.split import Split
from shards.tools.preview import preview
from tests import browsers
from tests.shards.sets import packed
from tests.videos import number_in


class Page(HTMLParser):
    """What a browser would make of the file."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = ["document"]
        self.addresses: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.setdefault(self.tags[-1], []).append(data)

    def pictures(self) -> list[np.ndarray]:
        head = "data:image/jpeg;base64,"
        assert all(a.startswith(head) for a in self.addresses)
        return [np.array(Image.open(io.BytesIO(base64.b64decode(a.removeprefix(head))))) for a in self.addresses]


@pytest.mark.parametrize("profile", ["copied", "intra"])
def test_the_pictures_are_the_videos(profile: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    split = request.getfixturevalue(profile)
    assert preview([split], tmp_path / "page.html", frames=2, width=120) == 0
    page, opened = Page(tmp_path / "page.html"), Split(split)
    want = []
    for i in range(5):
        number = opened.video(i).frames.number
        want += [int(number[len(number) // 4]), int(number[3 * len(number) // 4])]
    pictures = page.pictures()
    assert [number_in(p) for p in pictures] == want
    assert all(p.shape[1] <= 120 for p in pictures)
    assert [t.strip() for t in page.text["h3"]] == [opened.video(i).id for i in range(5)]
    assert [t.strip() for t in page.text["li"]] == [c["text"] for i in range(5) for c in opened.captions(i)]
    facts = [t for t in page.text["span"] if "fps" in t]
    assert opened.video(0).codec in facts[0] and "2.00 s, 25 fps, " in facts[0] and " kB, shard 000000" in facts[0]


def test_what_a_caption_says_stays_text(items: list[Item], tmp_path: Path) -> None:
    nasty = '</li><script>alert(1)</script><img src=http://x.example/a.png> & "q" {brace}'
    captions = (Caption(nasty), *(Caption(f"n{i}") for i in range(25)))
    packed([Item("<b>&'\"", items[0].path, captions)], tmp_path / "set", workers=1)
    preview([tmp_path / "set"], tmp_path / "page.html", frames=1)
    page = Page(tmp_path / "page.html")
    assert "script" not in page.tags and page.tags.count("img") == 1 and "b" not in page.tags
    assert "".join(page.text["h3"]).strip() == "<b>&'\""
    assert "".join(page.text["li"][:-1]).startswith(nasty)
    assert page.text["li"][-1] == "and 6 more"
    assert "default-src 'none'" in (tmp_path / "page.html").read_text()


def test_which_videos_are_shown(copied: Path, tmp_path: Path) -> None:
    def shown(**options) -> list[str]:
        preview([copied], tmp_path / "page.html", frames=1, **options)
        return [t.strip() for t in Page(tmp_path / "page.html").text["h3"]]

    ids = [Split(copied).video(i).id for i in range(5)]
    assert shown(count=2) == ids[:2] and shown(count=99) == ids
    drawn = [shown(count=2, seed=seed) for seed in range(4)]
    assert drawn[0] == shown(count=2, seed=0)
    assert len(set(map(tuple, drawn))) > 1 and all(len(set(d) & set(ids)) == 2 for d in drawn)


def test_what_cannot_be_shown_is_said(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("train", "test"):
        shutil.copytree(copied, tmp_path / "set" / name)
    video = Split(copied).video(0)
    with open(tmp_path / "set" / "train" / "000000.tar", "rb+") as file:
        file.seek(video.offset)
        file.write(bytes(video.size))
    out = tmp_path / "page.html"
    assert main(["preview", str(tmp_path / "set"), "--out", str(out), "--count", "2", "--frames", "1"]) == 1
    assert "1 video could not be shown" in capsys.readouterr().err
    page = Page(out)
    assert page.tags.count("article") == 4 and page.tags.count("img") == 3 and page.tags.count("h1") == 2
    assert any("the shard is damaged" in t for t in page.text["p"])
    assert main(["preview", str(tmp_path), "--out", str(out)]) == 1
    with pytest.raises(ShardError, match="--count 0: must be a whole number from 1 to 10000"):
        preview([copied], out, count=0)


# ---- numbers as JSON ----


def test_info_and_verify_as_json(items: list[Item], copied: Path, tmp_path: Path, capsys) -> None:
    assert main(["info", str(copied), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["videos"], told["shards"], told["codecs"]) == (5, 3, {"h264": 3, "vp9": 1, "hevc": 1})
    assert told["captions"]["words"] == {"min": 1, "median": 1, "max": 4, "sum": 14}
    assert [told["captions"][k] for k in ("count", "empty", "repeated", "repeated_in_a_video", "timed")] == [
        8,
        0,
        0,
        0,
        2,
    ]
    assert told["duration_s"]["sum"] == pytest.approx(sum(Split(copied).video(i).duration for i in range(5)))
    assert told["bytes"] == sum(p.stat().st_size for p in copied.glob("*.tar"))
    texts = ["A cat", "a  CAT ", "a dog", "a cat"]
    two = [
        Item("a", items[0].path, tuple(map(Caption, texts[:2]))),
        Item("b", items[0].path, tuple(map(Caption, texts[2:]))),
    ]
    packed(two, tmp_path / "set", workers=1)
    assert main(["info", str(tmp_path / "set")]) == 0
    assert "2 repeat another (1 within one video)" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "set" / "000000.idx").unlink()
    assert main(["verify", str(tmp_path / "set"), "--json", "--workers", "1"]) == 1
    (told,) = json.loads(capsys.readouterr().out)
    remedy = f"Rebuild it from the tar: python -m c4c.shard repair {tmp_path / 'set'}"
    assert told["problems"] == [
        {"shard": "000000", "key": None, "what": "000000.idx is missing", "remedy": remedy, "id": None}
    ]


@pytest.mark.skipif(browsers.CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_fits_a_telephone(copied: Path, tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    preview([copied], tmp_path / "page.html", frames=1, width=120)
    with browsers.chromium("--no-sandbox", "--disable-gpu") as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto((tmp_path / "page.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
