"""Containers whose headers, stamps or keyframe marks are wrong."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from shards import VideoError
from shards.annotations import Caption, Item
from shards.split import Split
from shards.tools.repair import repair
from shards.tools.verify import _verify_video
from shards.video.profiles import Profile, store
from shards.video.random_access import pick_frames
from shards.video.writer import usual_priority
from tests.shards.sets import packed
from tests.shards.video.matrix import COUNT, FPS, box, made, plain
from tests.videos import number_in

pytestmark = pytest.mark.slow

# ---- containers that say what is not so ----


def whole_and_cuts(
    data: bytes, name: str, cuts: dict[tuple[float, float | None], list[int]], profiles=("copy", "intra")
) -> None:
    """Each picture asked for alone is the one of its number; cuts hold the numbers that they should."""
    for profile in profiles:
        settings = {} if profile == "copy" else {"fps": 240, "short_side": 64, "quality": 1}
        what = store(io.BytesIO(data), name, Profile(name=profile, **settings))
        stored = what.file.read()
        low, high = np.searchsorted(what.frames.number, [0, len(what.source.times)])
        read = lambda at, size, d=stored: d[at:] if size < 0 else d[at : at + size]  # noqa: E731
        expected = [number_in(p) for p in plain(data)[0]]
        assert [number_in(pick_frames(what, read, [p])[p]) for p in range(low, high)] == expected, profile
        for (start, end), numbers in cuts.items():
            try:
                cut = store(io.BytesIO(data), name, Profile(name=profile, **settings), start, end)
            except VideoError as error:
                assert profile == "copy" and "without re-encoding" in str(error)
                continue
            held = cut.file.read()
            low, high = np.searchsorted(cut.frames.number, [0, len(cut.source.times)])
            found = pick_frames(
                cut, lambda at, size, d=held: d[at:] if size < 0 else d[at : at + size], range(low, high)
            )
            assert [number_in(found[p]) for p in range(low, high)] == numbers, (profile, start, end)


CUTS = {(0.8, 1.2): list(range(20, 30)), (0.52, None): list(range(13, COUNT))}


@pytest.mark.parametrize("codec", ["msmpeg4v2", "wmv2", "mpeg4", "h264"])
def test_keyframes_that_are_none(codec: str) -> None:
    """An AVI whose index is lost, as after a crash: every packet passes for a keyframe."""
    data = made("avi", codec)
    assert data.count(b"idx1") == 1
    whole_and_cuts(data.replace(b"idx1", b"JUNK"), "a.avi", CUTS)


def remuxed(data: bytes, container: str, stamp=lambda packet: None, options: dict | None = None) -> bytes:
    target = io.BytesIO()
    with av.open(io.BytesIO(data)) as file, av.open(target, "w", format=container, options=options or {}) as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.size:
                stamp(packet)
                packet.stream = stream
                out.mux(packet)
    return target.getvalue()


@pytest.mark.parametrize(("codec", "later"), [("mpeg4", 0), ("h264", 0), ("h264", 2)])
def test_stamps_of_decoding_in_place_of_those_of_showing(codec: str, later: int) -> None:
    """An mp4 made of an AVI with B-frames without new time stamps, or, `later`, of frames all moved to be no earlier than they
    are decoded, as ffmpeg's WMV of H.264."""
    place = iter(range(10**6))

    def in_order(packet: av.Packet) -> None:
        packet.dts = next(place)
        packet.pts = packet.dts + later
        packet.time_base = Fraction(1, FPS)

    data = remuxed(made("mp4", codec), "mp4", in_order)
    whole_and_cuts(data, "a.mp4", CUTS)
    what = store(io.BytesIO(data), "a.mp4", Profile(name="copy"))
    assert what.frames.time == pytest.approx(np.arange(COUNT) / FPS, abs=1e-6)


def joined(codec: str) -> bytes:
    """Recordings joined without regard to their pictures' order: by their stamps, one behind the gap is shown before one in front of it."""
    place = iter(range(10**6))

    def behind_a_gap(packet: av.Packet) -> None:
        if next(place) >= 14:
            gap = round(3 / packet.time_base)
            packet.pts, packet.dts = packet.pts + gap, packet.dts + gap

    return remuxed(made("mp4", codec), "mp4", behind_a_gap)


@pytest.mark.parametrize("codec", ["hevc", "open"])
def test_a_gap_of_the_stamps_between_pictures_that_are_reordered(codec: str) -> None:
    whole_and_cuts(joined(codec), "a.mp4", {})


def test_verify_names_such_a_video_of_an_earlier_version_and_repair_mends_it(tmp_path: Path) -> None:
    """Its table did not say that frames are to be counted."""
    (tmp_path / "a.mp4").write_bytes(joined("hevc"))
    packed([Item("a", tmp_path / "a.mp4", (Caption("a"),))], tmp_path / "set")
    video = Split(tmp_path / "set").video(0)
    data = Split(tmp_path / "set").read(video)
    before = replace(video, frames=replace(video.frames, offset=np.full(len(video.frames), -1)))
    assert video.frames.counted and _verify_video(video, data) is None
    assert "in another order than its pictures" in _verify_video(before, data)
    repair(tmp_path / "set", everything=True)
    assert Split(tmp_path / "set").video(0).frames.counted


def with_edits(data: bytes, parts: list[tuple[float, float]]) -> bytes:
    """The mp4 with an edit list of several parts, each so many seconds from a moment on; before 0: of nothing."""
    out = bytearray(data)
    movie = struct.unpack(">I", out[box(out, b"moov", b"mvhd") + 20 :][:4])[0]
    media = struct.unpack(">I", out[box(out, b"moov", b"trak", b"mdia", b"mdhd") + 20 :][:4])[0]
    at = box(out, b"moov", b"trak", b"edts", b"elst")
    begin, old = struct.unpack(">i", out[at + 20 : at + 24])[0], struct.unpack(">I", out[at : at + 4])[0]
    starts = [-1 if s < 0 else begin + round(s * media) for s, _ in parts]
    entries = b"".join(
        struct.pack(">IiI", round(n * movie), s, 1 << 16) for s, (_, n) in zip(starts, parts, strict=True)
    )
    new = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(parts)) + entries
    assert box(out, b"moov") > box(out, b"mdat")  # nothing that the table of chunks points at moves
    for path in ((b"moov",), (b"moov", b"trak"), (b"moov", b"trak", b"edts")):
        where = box(out, *path)
        out[where : where + 4] = struct.pack(">I", struct.unpack(">I", out[where : where + 4])[0] + len(new) - old)
    return bytes(out[:at] + new + out[at + old :])


@pytest.mark.parametrize("parts", [[(0.4, 0.4), (0.96, 0.48)], [(0.8, 0.4), (0.0, 0.4)], [(0.2, 0.4), (0.2, 0.4)]])
def test_an_edit_list_of_several_parts(parts: list[tuple[float, float]]) -> None:
    data = with_edits(made("mp4", "h264"), parts)
    seen = [number_in(p) for p in plain(data)[0]]
    assert len(seen) > 15
    for start, end in ((0.0, 0.6), (0.2, 0.7), (0.5, None)):
        what = store(io.BytesIO(data), "a.mp4", Profile(name="intra", fps=240, short_side=64, quality=1), start, end)
        whole = store(io.BytesIO(data), "a.mp4", Profile(name="copy"))
        inside = [
            n for n, t in zip(seen, whole.source.times, strict=True) if t >= start - 1e-6 and t < (end or 99) - 1e-6
        ]
        held = what.file.read()
        found = pick_frames(what, lambda at, size, d=held: d[at : at + size], range(len(what.frames)))
        assert [number_in(found[i]) for i in range(len(inside))] == inside and len(what.frames) == len(inside)


@pytest.mark.parametrize("parts", [[(0.2, 0.4), (0.8, 0.4)], [(0.2, 0.4), (0.6, 0.4)]])
def test_no_picture_of_an_edit_list_of_several_parts_is_lost(parts: list[tuple[float, float]]) -> None:
    """libav's HEVC decoder leaves out pictures that it has seen before."""
    data = with_edits(made("mp4", "hevc"), parts)
    expected = [round(start * FPS) + i for start, length in parts for i in range(round(length * FPS))]
    for profile in ("copy", "intra"):
        settings = {} if profile == "copy" else {"fps": 240, "short_side": 64, "quality": 1}
        what = store(io.BytesIO(data), "a.mp4", Profile(name=profile, **settings))
        held = what.file.read()
        read = lambda at, size, d=held: d[at:] if size < 0 else d[at : at + size]  # noqa: E731
        assert len(what.source.times) == len(what.frames) == len(expected), profile
        found = pick_frames(what, read, range(len(expected)))
        assert [number_in(found[i]) for i in range(len(expected))] == expected, profile
        for i in (3, 11, 19):
            assert number_in(pick_frames(what, read, [i])[i]) == expected[i], profile


@pytest.mark.parametrize(
    ("parts", "noted"),
    [([(0.2, 0.6)], False), ([(-1, 0.4), (0.2, 0.6)], False), ([(0.0, 0.4), (-1, 0.4), (0.4, 0.4)], True), ([(0.2, 0.6), (-1, 0.4)], True)],
)  # fmt: skip
def test_an_edit_list_that_shows_nothing_for_a_while_is_noted(parts: list[tuple[float, float]], noted: bool) -> None:
    """Not at the beginning, where a late start is respected."""
    data = with_edits(made("mp4", "h264"), parts)
    for name in ("copy", "intra"):
        notes = store(io.BytesIO(data), "a.mp4", Profile(name=name)).source.notes
        assert any("shows nothing for a while" in note for note in notes) is noted


def test_cuts_of_joined_broadcasts_count_on() -> None:
    both = made("mpegts", "h264") * 2
    numbers = list(range(COUNT)) * 2
    length = COUNT / FPS
    for start, end in ((1.0, 2.0), (length + 0.2, length + 0.6), (0.4, None)):
        what = store(io.BytesIO(both), "a.ts", Profile(name="intra", fps=240, short_side=64, quality=1), start, end)
        held = what.file.read()
        found = pick_frames(what, lambda at, size, d=held: d[at : at + size], range(len(what.frames)))
        seen = [number_in(found[i]) for i in range(len(what.frames))]
        whole = store(io.BytesIO(both), "a.ts", Profile(name="copy")).source.times
        assert seen == [n for n, t in zip(numbers, whole, strict=True) if start - 1e-6 <= t < (end or 99) - 1e-6]


def test_stamps_that_wrap() -> None:
    """A broadcast over midnight of its 33-bit clock, whose sound begins first."""
    made_at = made("mpegts", "h264", sound_first=20)
    target = io.BytesIO()
    with (
        av.open(io.BytesIO(made_at)) as file,
        av.open(target, "w", format="mpegts", options={"output_ts_offset": f"{2**33 / 90000 - 0.9:.3f}"}) as out,
    ):
        streams = {s.index: out.add_stream_from_template(s) for s in file.streams}
        for packet in file.demux():
            if packet.size:
                packet.stream = streams[packet.stream_index]
                out.mux(packet)
    what = store(io.BytesIO(target.getvalue()), "a.ts", Profile(name="copy"))
    expected = store(io.BytesIO(made_at), "a.ts", Profile(name="copy"))
    assert what.frames.time == pytest.approx(expected.frames.time, abs=1e-3)
    assert what.frames.time[0] > 0.8


def test_a_copied_cut_in_the_last_gop() -> None:
    for container in ("mpegts", "flv", "matroska", "mp4"):
        whole_and_cuts(made(container, "h264"), f"a.{container}", {(1.36, None): [34, 35], (1.4, 9.0): [35]})


def test_a_file_cut_short_where_its_container_proves_it() -> None:
    fragmented = remuxed(made("mp4", "h264"), "mp4", options={"movflags": "frag_keyframe+empty_moov"})
    last = fragmented.rindex(b"moof") - 4
    for data, end, name in (
        (fragmented, last + 40, "a.mp4"), (made("flv", "h264"), 0.6, "a.flv"), (made("asf", "wmv2"), 0.6, "a.wmv"),
        (made("gif", "gif"), 0.6, "a.gif"), (made("avi", "mpeg4"), 0.6, "a.avi"), (made("matroska", "h264"), 0.6, "a.mkv"),
    ):  # fmt: skip
        store(io.BytesIO(data), name, Profile(name="copy"))
        end = round(end * len(data)) if isinstance(end, float) else end
        for profile in ("copy", "intra"):
            with pytest.raises(VideoError, match=r"cut short|damaged|decod|not a readable"):
                store(io.BytesIO(data[:end]), name, Profile(name=profile))


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
@pytest.mark.parametrize("settings", [{"chroma": 420}, {"chroma": 444}])
@pytest.mark.parametrize("degrees", [0, 90])
def test_greys_are_exact(pix_fmt: str, settings: dict, degrees: int) -> None:
    for matrix in (1, 5):
        for grey in (16, 64, 128, 200, 240):
            target, deep = io.BytesIO(), 4 if pix_fmt.endswith("10le") else 1
            with usual_priority(), av.open(target, "w", format="mp4") as file:
                stream = file.add_stream("libx264", rate=5, options={"qp": "1", "threads": "1"})
                stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
                stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1
                if degrees:
                    stream.set_display_rotation(degrees)
                for i in range(5):
                    frame = av.VideoFrame(96, 64, pix_fmt)
                    level = round((16 + grey * 219 / 255) * deep)
                    for plane, value in zip(frame.planes, (level, 128 * deep, 128 * deep), strict=True):
                        kind = np.uint16 if deep > 1 else np.uint8
                        plane.update(np.full(plane.buffer_size // kind().itemsize, value, kind).tobytes())
                    frame.colorspace, frame.color_range, frame.pts = matrix, 1, i
                    file.mux(stream.encode(frame))
                file.mux(stream.encode(None))
            what = store(target, "a.mp4", Profile(name="intra", short_side=48, quality=1, **settings))
            data = what.file.read()
            picture = np.asarray(Image.open(io.BytesIO(data[what.frames.offset[0] :][: what.frames.size[0]])))
            assert abs(picture.mean() - grey) <= (1.7 if deep > 1 and degrees else 1.01), (matrix, grey, picture.mean())
