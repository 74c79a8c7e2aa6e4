"""What the search server sends of videos: bytes in ranges, clips that a browser can play, and nothing that was not indexed."""

import io
import os
import shutil
from dataclasses import replace
from email.utils import formatdate, parsedate_to_datetime

import av
import pytest

from c4c.retrieval.index.plan import state_of, text_of
from c4c.retrieval.index.store import Store
from c4c.retrieval.serve import transcode
from c4c.retrieval.serve.media import CHANGED, REMOVED, Splits
from c4c.retrieval.serve.ranges import parse_range
from shards.annotations import Caption, Item
from shards.split import Split
from tests.c4c.retrieval import stand_in
from tests.c4c.retrieval.serving import Served, colour, played
from tests.shards.sets import COPY, INTRA, packed

pytestmark = pytest.mark.slow


# ---- the file itself ----


def test_a_file_that_browsers_play_is_sent_as_it_is(served):
    for video, kind in (("scenes/red.mp4", "video/mp4"), ("scenes/blue.webm", "video/webm")):
        result, path = served.named(video), served.index.parent / "videos" / video
        answer = served.get("/" + result["media"])
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        assert answer.content == path.read_bytes()
        assert answer.headers["accept-ranges"] == "bytes" and str(path.parent) not in str(answer.headers)
        play = served.get(f"/api/play/{result['id']}").json()
        assert (play["kind"], play["offset"], play["url"]) == ("file", 0.0, result["media"])


def test_ranges(served):
    address = "/" + served.named("scenes/red.mp4")["media"]
    whole = served.get(address).content
    for text, part in (
        ("bytes=0-0", whole[:1]), ("bytes=5-", whole[5:]), ("bytes=-7", whole[-7:]), ("bytes=10-19", whole[10:20]),
        (f"bytes=0-{10**15}", whole), (f"bytes=-{10**15}", whole), ("bytes= 20 - 39 ", whole[20:40]),
    ):  # fmt: skip
        answer = served.get(address, headers={"range": text})
        assert (answer.status_code, answer.content) == (206, part), text
        start = whole.find(part) if text != "bytes=-7" else len(whole) - 7
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(part) - 1}/{len(whole)}"
        head = served.client.head(address, headers={"range": text})
        assert (head.status_code, head.content, head.headers["content-length"]) == (206, b"", str(len(part)))
    for text in (f"bytes={len(whole)}-", "bytes=-0", "bytes=999999999999-"):
        answer = served.get(address, headers={"range": text})
        assert (answer.status_code, answer.headers["content-range"], answer.content) == (
            416,
            f"bytes */{len(whole)}",
            b"",
        )
    for text in (
        "bytes=0-1,5-6",
        "items=0-1",
        "bytes=5-1",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=1-2-3",
        "bytes=²-3",
    ):
        answer = served.get(address, headers={"range": text.encode()})
        assert (answer.status_code, answer.content) == (200, whole), text


def test_parse_range():
    assert parse_range("bytes=0-", 0) == (0, 0)
    assert parse_range("bytes=0-9", 5) == (0, 5)


def test_conditions(served):
    address = "/" + served.named("scenes/red.mp4")["media"]
    first = served.get(address)
    tag, date = first.headers["etag"], first.headers["last-modified"]
    for headers in (
        {"if-none-match": tag},
        {"if-none-match": f'"x", W/{tag}'},
        {"if-none-match": "*"},
        {"if-modified-since": date},
    ):
        answer = served.get(address, headers=headers)
        assert (answer.status_code, answer.content) == (304, b"") and answer.headers["etag"] == tag
    older = formatdate(parsedate_to_datetime(date).timestamp() - 5, usegmt=True)
    for headers in (
        {"if-none-match": '"x"'},
        {"if-modified-since": older},
        {"if-modified-since": "nonsense"},
        {"if-none-match": '"x"', "if-modified-since": date},
    ):
        assert served.get(address, headers=headers).status_code == 200
    for condition, status in (
        (tag, 206),
        (date, 206),
        ('"x"', 200),
        (f"W/{tag}", 200),
        (older, 200),
        ("nonsense", 200),
    ):
        answer = served.get(address, headers={"range": "bytes=0-3", "if-range": condition})
        assert answer.status_code == status, condition


# ---- packed videos ----


@pytest.fixture(scope="module")
def split_served(tmp_path_factory):
    """An index of two splits: one of copies, one of JPEGs at 3 frames a second."""
    folder = tmp_path_factory.mktemp("splits")
    films = {name: stand_in.film(folder / "source" / f"{name}.mp4", [name, "grey"]) for name in ("red", "blue")}
    items = [Item(f"{name}/../{name}", path, (Caption("x"),), {}) for name, path in films.items()]
    index = stand_in.make(folder, {})
    rows = []
    for profile in (COPY, INTRA):
        out = folder / profile.name
        packed(items, out, profile, workers=1)
        for place, name in enumerate(films):
            video = Split(out).video(place)
            row = stand_in.indexed(folder / "source", films[name], [name, "grey"])
            rows.append(replace(
                row, video=f"{profile.name}/{video.key}", path=f"{out}::{video.key}", source="shard", size=video.size,
                mtime_ns=state_of(video) if place else video.crc32c,  # which an index of before has
            ))  # fmt: skip
    Store.open(index).append(rows)
    it = Served(index)
    with it:
        yield it


def test_packed_videos(split_served):
    it = split_served
    results = {result["video"]: result for result in it.results("red", k=50)}
    assert len(results) == 4
    for name, result in results.items():
        play = it.get(f"/api/play/{result['id']}").json()
        assert play["kind"] == ("file" if name.startswith("copy") else "clip")
        data = it.get("/" + play["url"]).content
        frames = played(data) if play["kind"] == "clip" else _decoded(data)
        wanted = "red" if "red" in name else "blue"
        assert {colour(picture) for _, picture in frames} == {wanted, "grey"}
        if play["kind"] == "file":
            assert data == (it.index.parent / "source" / f"{wanted}.mp4").read_bytes()
            part = it.get("/" + play["url"], headers={"range": "bytes=50-99"})
            assert (part.status_code, part.content) == (206, data[50:100])
        else:  # 3 frames a second, at the times of the source
            assert [round(time, 2) for time, _ in frames[:4]] == [0.0, 0.33, 0.67, 1.0]


def _decoded(data):
    with av.open(io.BytesIO(data)) as file:
        return [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]


def test_a_split_that_is_gone_or_packed_anew(split_served):
    it = split_served
    copy = next(result for result in it.results("red", k=50) if result["video"].startswith("copy"))
    folder = it.index.parent / "copy"
    folder.rename(it.index.parent / "away")
    try:
        answer = it.get("/" + copy["media"])
        assert (answer.status_code, answer.json()["detail"]) == (410, REMOVED)
    finally:
        (it.index.parent / "away").rename(folder)
    assert it.get("/" + copy["media"]).status_code == 200
    it.engine.media._splits = Splits()  # one that is open keeps its shards open
    shards = sorted(folder.glob("*.tar"))  # now nothing but these is gone
    for shard in shards:
        shard.rename(it.index.parent / shard.name)
    try:
        assert refusals(it, copy) == {(410, REMOVED)}
    finally:
        for shard in shards:
            (it.index.parent / shard.name).rename(shard)
    assert it.get("/" + copy["media"]).status_code == 200


# ---- files that are not what was indexed ----


@pytest.fixture
def one(tmp_path):
    it = Served(stand_in.make(tmp_path, {"a.mp4": (["red"], {})}))
    with it:
        yield it, tmp_path / "videos" / "a.mp4", it.named("a.mp4")


def refusals(it, result) -> set[tuple[int, str]]:
    """What the three ways to a video say."""
    answers = [
        it.get("/" + result["media"]),
        it.get("/" + result["media"], params={"clip": True}),
        it.get(f"/api/play/{result['id']}"),
    ]
    return {(answer.status_code, answer.json()["detail"]) for answer in answers}


def test_a_video_that_was_removed(one):
    it, path, result = one
    assert it.get("/" + result["media"]).status_code == 200
    path.unlink()
    assert refusals(it, result) == {(410, REMOVED)}
    assert it.get("/" + result["thumbnail"]).status_code == 200  # it is in the index
    path.parent.rmdir()
    assert refusals(it, result) == {(410, REMOVED)}
    path.parent.write_text("no folder any more")
    assert refusals(it, result) == {(410, REMOVED)}


def test_an_index_that_cannot_be_read_any_more(one, monkeypatch):
    it, _, result = one
    shutil.move(it.index, it.index.with_name("away.index"))
    monkeypatch.setattr(it.searcher.store, "segment", Store.open(it.index.with_name("away.index")).segment)
    assert refusals(it, result) == {(503, "The index cannot be read now. The server's log says why.")}


def test_a_clip_is_no_longer_than_its_video(tmp_path):
    with Served(stand_in.make(tmp_path, {"green.avi": (["green"], {"codec": "mpeg4"})})) as it:
        play = it.get(f"/api/play/{it.named('green.avi')['id']}").json()
        assert (play["kind"], play["until"], play["duration"]) == ("clip", 2.0, 2.0)
        with av.open(io.BytesIO(it.get("/" + play["url"]).content)) as file:
            assert file.duration / av.time_base == pytest.approx(2.0, abs=0.01)
            assert sum(1 for _ in file.decode(video=0)) == 2 * stand_in.FPS


def test_a_name_that_is_no_utf8_and_one_that_is_a_whole_path(tmp_path):
    odd = os.fsdecode(b"caf\xe9.mp4")
    it = Served(stand_in.make(tmp_path, {}))
    film = stand_in.film(tmp_path / "videos" / "a.mp4", ["red"])
    row = stand_in.indexed(film.parent, film, ["red"])
    os.rename(film, film.parent / odd)
    other = stand_in.film(film, ["blue"])
    rows = [
        replace(row, video=text_of(odd), path=text_of(str(film.parent / odd))),
        replace(stand_in.indexed(film.parent, other, ["blue"]), video=str(other)),  # where every shorter name was taken
    ]
    it.searcher.store.append(rows)
    with it:
        first, second = it.results("red")
        assert (first["video"], second["video"]) == ("caf\\xe9.mp4", "a.mp4")
        assert it.get("/" + first["media"]).content == (film.parent / odd).read_bytes()
        assert it.get("/" + second["media"]).content == other.read_bytes()
        assert it.get(f"/api/segments/{second['video_id']}").json()["video"] == "a.mp4"


def test_a_video_that_was_changed(one):
    it, path, result = one
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert refusals(it, result) == {(410, CHANGED)}
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert it.get("/" + result["media"]).status_code == 200
    with open(path, "ab") as file:
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert refusals(it, result) == {(410, CHANGED)}


def test_something_else_in_the_place_of_a_video(one):
    it, path, result = one
    status = path.stat()
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert refusals(it, result) == {(410, CHANGED)}
    path.unlink()
    path.symlink_to(path.parent / "nothing")
    assert refusals(it, result) == {(410, REMOVED)}
    path.unlink()
    os.mkfifo(path)  # opening it would wait for somebody who writes
    assert refusals(it, result) == {(410, CHANGED)}
    path.unlink()
    path.mkdir()
    assert refusals(it, result) == {(410, CHANGED)}
    path.rmdir()
    path.write_bytes(bytes(status.st_size))  # as large and as old, and no video
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    ((code, words),) = refusals(it, result)
    assert code == 415 and words.startswith("This video cannot be played: ")
    path.unlink()
    path.symlink_to("/dev/zero")
    assert refusals(it, result) == {(410, CHANGED)}


@pytest.mark.parametrize(("name", "as_clip"), [("secret.txt", ""), ("secret.bin", "?clip=true"), ("passwd", "")])
def test_an_index_that_names_what_is_no_video(tmp_path, name, as_clip):
    """Somebody else's index may name any file of this machine, with its size and time: none but videos are sent."""
    index = stand_in.make(tmp_path, {"red.mp4": (["red"], {})})
    secret = tmp_path / name
    secret.write_text("root:x:0:0:" * 100)
    row = stand_in.indexed(tmp_path, stand_in.film(tmp_path / "videos" / "red2.mp4", ["red"]), ["red"])
    status = secret.stat()
    Store.open(index).append(
        [replace(row, video="secret", path=str(secret), size=status.st_size, mtime_ns=status.st_mtime_ns)]
    )
    with Served(index) as served:
        result = next(r for r in served.results("red") if r["video"] == "secret")
        answer = served.get("/" + result["media"] + as_clip)
        assert answer.status_code == 415 and "root:" not in answer.text and str(tmp_path) not in answer.text


@pytest.mark.parametrize("end", ["mp4", "webm"])
def test_a_file_whose_time_stamps_begin_late_is_sent_as_a_clip(tmp_path, end):
    """A browser's clock shows them, and would play seconds that are not those of the segment."""
    codec = "libvpx-vp9" if end == "webm" else "libx264"
    colours = ["red", "green", "blue", "yellow"]
    film = stand_in.film(tmp_path / f"plain.{end}", colours, codec=codec)
    late = tmp_path / "videos" / f"late.{end}"
    late.parent.mkdir()
    with av.open(film) as source, av.open(late, "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                shift = round(5 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                file.mux(packet)
    with av.open(late) as file:
        assert file.streams.video[0].start_time * file.streams.video[0].time_base == 5
    assert transcode.probe({"path": str(film)})["type"] == f"video/{end}"
    index = stand_in.make(tmp_path, {})
    Store.open(index).append([stand_in.indexed(late.parent, late, colours)])
    with Served(index) as it:
        first, second, _ = it.get(f"/api/segments/{it.named(late.name)['video_id']}").json()["segments"]
        assert it.get(f"/api/play/{first['id']}").json()["kind"] == "clip"
        play = it.get(f"/api/play/{second['id']}").json()
        assert (play["kind"], play["start"], play["offset"]) == ("clip", 2.0, pytest.approx(1.0, abs=1e-3))
        frames = played(it.get("/" + play["url"]).content)
        assert [colour(frames[i][1]) for i in (0, 13, 37, 61)] == ["red", "green", "blue", "yellow"]
