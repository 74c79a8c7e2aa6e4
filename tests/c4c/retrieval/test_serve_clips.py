"""Clips that the search server makes of what browsers cannot play."""

import errno
import io
from collections import OrderedDict
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from c4c.retrieval.serve import transcode, worker
from shards import VideoError
from tests.c4c.retrieval import stand_in
from tests.c4c.retrieval.serving import Served, colour, played
from tests.shards.video.stored import with_sound
from tests.videos import encode, number_in

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("video", "shows"), [("old/green.avi", "green"), ("old/yellow.mp4", "yellow")])
def test_what_browsers_cannot_play_is_sent_as_a_clip(served, video, shows):
    result = served.named(video)
    play = served.get(f"/api/play/{result['id']}").json()
    assert (play["kind"], play["type"], play["offset"]) == ("clip", "video/mp4", 0.0)
    answer = served.get("/" + play["url"])
    frames = played(answer.content)
    assert {colour(picture) for _, picture in frames} == {shows} and len(frames) >= 2 * stand_in.FPS
    assert served.get("/" + result["media"]).content == answer.content  # without being asked for a clip, too
    part = served.get("/" + play["url"], headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, answer.content[100:200])


def test_a_clip_begins_a_second_before_its_segment(served):
    found = served.get(f"/api/segments/{served.named('long/all.mp4')['video_id']}").json()["segments"]
    play = served.get(f"/api/play/{found[2]['id']}", params={"clip": True}).json()  # seconds 4 to 8: blue, yellow
    assert (play["start"], play["end"], play["offset"]) == (4.0, 8.0, pytest.approx(3.0, abs=1e-3))
    frames = played(served.get("/" + play["url"]).content)
    shown = [colour(picture) for _, picture in frames]
    assert [shown[i] for i in (0, 13, 35, 37, 59, 61)] == ["green", "blue", "blue", "yellow", "yellow", "grey"]
    assert frames[-1][0] == pytest.approx(6 - 1 / stand_in.FPS, abs=0.02)


def test_a_clip_has_the_sound(served):
    play = served.get(f"/api/play/{served.named('scenes/red.mp4')['id']}", params={"clip": True}).json()
    with av.open(io.BytesIO(served.get("/" + play["url"]).content)) as file:
        samples = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1)
    assert samples.shape[1] / 48_000 == pytest.approx(2.0, abs=0.1) and 0.5 < np.abs(samples).max() < 1.1


def test_clips_are_made_once_and_kept_within_bounds(served, tmp_path):
    it = Served(stand_in.make(tmp_path, {f"{i}.avi": (["red"], {"codec": "mpeg4"}) for i in range(4)}))
    it.engine.media._clips._most_bytes = 10_000
    with it:
        addresses = ["/" + result["media"] for result in it.results("red")]
        sizes = [len(it.get(address).content) for address in addresses]
        kept = list(it.engine._folder.path.glob("*.mp4"))
        assert sum(path.stat().st_size for path in kept) <= 10_000 < sum(sizes)
        for _ in range(3):
            it.get(addresses[-1])
        assert 'c4c_jobs_total{kind="clip",outcome="done"} 4' in it.get("/metrics").text
        folder = it.engine._folder.path
    assert not folder.exists()  # the server cleans up


@pytest.mark.parametrize(
    ("name", "angle", "at"), [("turned", 90, "top"), ("upside", 180, "right"), ("mirrored", None, "right")]
)
def test_rotated_and_mirrored_videos_are_shown_as_players_do(tmp_path, name, angle, at):
    """A white half at the left of what is stored."""
    plain = tmp_path / "plain.mp4"
    with av.open(plain, "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:, :32] = 255
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    data = bytearray(plain.read_bytes())
    place = data.find(b"tkhd") + 4 + 4 + 20 + 16  # version 0: the display matrix follows (ISO 14496-12, 8.3.2)
    one = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), None: (-1, 0, 0, 1)}[angle]
    a, b, c, d = (np.array([n * 65536]).astype(">i4").tobytes() for n in one)
    data[place : place + 8], data[place + 12 : place + 20] = a + b, c + d
    turned = tmp_path / f"{name}.mp4"
    turned.write_bytes(data)
    out = tmp_path / "out.mp4"
    transcode.clip({"path": str(turned), "start": 0.0, "end": 0.5, "out": str(out)})
    (_, shown), *rest = played(out.read_bytes())
    assert len(rest) == 4
    halves = {"top": shown[: len(shown) // 2], "right": shown[:, shown.shape[1] // 2 :]}
    assert halves[at].mean() > 200 and shown.mean() < 160
    assert shown.shape[:2] == ((64, 32) if angle == 90 else (32, 64))
    # players differ on mirrors
    assert transcode.probe({"path": str(turned)}) == {"type": None if angle is None else "video/mp4"}


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "mjpeg"])
def test_clips_hold_the_very_frames(tmp_path, codec):
    path, out = tmp_path / "numbers.mp4", tmp_path / "out.mp4"
    path.write_bytes(
        encode(100, 25, (320, 240), codec, options={} if codec in ("mpeg4", "mjpeg") else {"bf": "3", "g": "40"})
    )
    made = transcode.clip({"path": str(path), "start": 1.0, "end": 2.0, "out": str(out)})
    assert made["start"] == pytest.approx(1.0)
    assert [number_in(picture) for _, picture in played(out.read_bytes())] == list(range(25, 50))


@pytest.mark.parametrize(("space", "full"), [("ITU709", False), ("ITU601", False), ("ITU601", True), ("", False)])
def test_clips_have_the_colours_of_their_video(tmp_path, space, full):
    path, out, side = tmp_path / "colours.mp4", tmp_path / "out.mp4", 40
    picture = np.repeat(np.array([list(stand_in.COLOURS.values())], np.uint8), side, axis=1).repeat(64, axis=0)
    kinds = {"dst_color_range": ColorRange.JPEG if full else ColorRange.MPEG}
    # what players take for granted, too
    kinds["dst_colorspace"] = Colorspace.ITU709 if space == "ITU709" else Colorspace.ITU601
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"crf": "1", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = picture.shape[1], 64, "yuv420p"
        if space:
            stream.codec_context.colorspace = Colorspace[space]
        stream.codec_context.color_range = kinds["dst_color_range"]
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p", **kinds)
            frame.pts, frame.time_base = i, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    transcode.clip({"path": str(path), "start": 0.0, "end": 0.5, "out": str(out)})
    shown = played(out.read_bytes())[0][1].astype(int)
    for place, rgb in enumerate(stand_in.COLOURS.values()):
        middle = np.median(shown[20:44, place * side + 10 : place * side + 30], axis=(0, 1))
        assert np.abs(middle - rgb).max() <= 8, (rgb, middle)


def test_a_clip_has_no_sound_of_another_moment():
    """Of recordings that were joined, whose time stamps start anew."""
    data = with_sound("mpegts", list(range(40)), 1.6) * 2
    frames = list(transcode.sound(io.BytesIO(data), 1.0, 2.4))
    assert sum(frame.samples for frame in frames) / 48_000 == pytest.approx(0.6, abs=0.1)


def test_a_clip_of_nothing(tmp_path):
    path = tmp_path / "short.mp4"
    path.write_bytes(encode(10, 25))
    with pytest.raises(VideoError):
        transcode.clip({"path": str(path), "start": 5.0, "end": 6.0, "out": str(tmp_path / "out.mp4")})
    assert not (tmp_path / "out.mp4").exists() and not (tmp_path / "out.mp4.part").exists()


def test_which_files_browsers_play(tmp_path):
    def kind(name, *words, **more):
        path = tmp_path / name
        path.write_bytes(encode(5, 25, (64, 48), *words, **more))
        return transcode.probe({"path": str(path)})["type"]

    vp9 = {"deadline": "realtime", "cpu-used": "8"}
    assert kind("a.mp4") == "video/mp4"
    assert kind("a.mov", format="mov") == "video/mp4"
    assert kind("a.webm", "libvpx-vp9", "webm", options=vp9) == "video/webm"
    assert kind("a.mkv", "libvpx-vp9", "matroska", options=vp9) is None
    assert kind("b.mkv", format="matroska") is None
    assert kind("b.mp4", "libx265") is None
    assert kind("a.avi", "mpeg4", "avi", options={}) is None
    assert kind("a.ts", format="mpegts") is None
    with pytest.raises(VideoError):
        transcode.probe({"path": __file__})


@pytest.mark.parametrize(
    "name, text",
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "ffconcat version 1.0\nfile other/private.mp4\n"),
    ],
)
def test_a_list_of_files_opens_none_of_them(tmp_path, name, text):
    """Players follow such lists; an index holds only what lies in the file itself."""
    other = stand_in.film(tmp_path / "other" / "private.mp4", ["red"])
    path = tmp_path / name
    path.write_text(text.format(other))
    with pytest.raises(VideoError):
        transcode.probe({"path": str(path)})
    with pytest.raises(VideoError):
        transcode.clip({"path": str(path), "start": 0.0, "end": 1.0, "out": str(tmp_path / "out.mp4")})


def test_a_full_disk(served, monkeypatch):
    """It is no fault of the video, and is told as what it is, without the name of the file."""

    def full(job: dict) -> dict:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/somewhere")

    async def answer(job: dict) -> dict:
        return worker._answer(full, job)

    monkeypatch.setattr(served.engine._videos, "_run", answer)
    monkeypatch.setattr(served.engine.media._clips, "_clips", OrderedDict())  # what was made before is not used
    result = served.named("old/green.avi")
    reply = served.get(f"/api/play/{result['id']}?clip=true")
    assert (reply.status_code, reply.json()["detail"]) == (507, "The server has no room for its temporary files.")
