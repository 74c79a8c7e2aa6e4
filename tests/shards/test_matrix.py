"""Containers, codecs and what people's files do with them, each compared picture by picture with libav's plain decoding.

A case is a file: frames 0, 1, 2, … under a container, a codec and one feature. What a player shows of it is known
without c4c: `av.open(...).decode()` honours edit lists, and turning, mirroring and stretching is done here by hand.
"""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from shards import VideoError
from shards.video.profiles import Profile, store
from shards.video.random_access import decode_stored, pick_frames
from shards.video.writer import usual_priority
from tests.videos import number_in, picture

COUNT, FPS, SIZE = 36, 25, (96, 64)
CODECS = {
    "h264": ("libx264", "yuv420p", {"preset": "veryfast", "bf": "2", "g": "12"}),
    "open": ("libx264", "yuv420p", {"preset": "veryfast", "bf": "3", "g": "12", "x264-params": "open-gop=1"}),
    "hevc": ("libx265", "yuv420p", {"preset": "ultrafast", "bf": "2", "g": "12", "x265-params": "log-level=none"}),
    "mpeg4": ("mpeg4", "yuv420p", {"g": "12", "bf": "2"}),
    "mpeg2": ("mpeg2video", "yuv420p", {"g": "12", "bf": "2"}),
    "vp8": ("libvpx", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "g": "12"}),
    "vp9": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "g": "12"}),
    "av1": ("libsvtav1", "yuv420p", {"preset": "12", "g": "12"}),
    "mjpeg": ("mjpeg", "yuvj420p", {}),
    "ffv1": ("ffv1", "yuv420p", {}),
    "huffyuv": ("huffyuv", "yuv422p", {}),
    "png": ("png", "rgb24", {}),
    "prores": ("prores_ks", "yuv422p10le", {}),
    "flv1": ("flv", "yuv420p", {"g": "12"}),
    "wmv2": ("wmv2", "yuv420p", {"g": "12"}),
    "msmpeg4v2": ("msmpeg4v2", "yuv420p", {"g": "12"}),
    "raw": ("rawvideo", "yuv420p", {}),
    "theora": ("libtheora", "yuv420p", {"g": "12"}),
    "gif": ("gif", "rgb8", {}),
}
PLAIN = [
    ("mp4", "h264"), ("mp4", "open"), ("mp4", "hevc"), ("mp4", "mpeg4"), ("mp4", "vp9"), ("mp4", "av1"), ("mp4", "mjpeg"),
    ("mov", "prores"), ("mov", "png"), ("mov", "h264"), ("matroska", "h264"), ("matroska", "open"),
    ("matroska", "ffv1"), ("matroska", "mpeg2"), ("matroska", "huffyuv"), ("webm", "vp8"), ("webm", "vp9"),
    ("avi", "h264"), ("avi", "mpeg4"), ("avi", "mjpeg"), ("avi", "huffyuv"), ("avi", "png"), ("avi", "raw"),
    ("avi", "msmpeg4v2"), ("avi", "ffv1"), ("mpegts", "h264"), ("mpegts", "open"), ("mpegts", "mpeg2"), ("mpegts", "hevc"),
    ("mpeg", "mpeg2"), ("flv", "h264"), ("flv", "flv1"), ("asf", "wmv2"), ("asf", "mpeg4"), ("ogg", "theora"), ("gif", "gif"),
    ("h264", "h264"), ("hevc", "hevc"), ("nut", "mpeg4"),
]  # fmt: skip
STEPS = [1, 1, 1, 2, 1, 4, 1, 1, 9, 1, 1, 1]  # of a variable rate, in frames of 25 a second


def made(
    container: str, codec: str, *, times: list[int] | None = None, aspect: Fraction | None = None, matrix: int | None = None,
    full: bool = False, degrees: int | None = None, sound_first: int = 0,
) -> bytes:  # fmt: skip
    name, pix_fmt, options = CODECS[codec]
    target = io.BytesIO()
    try:
        with usual_priority(), av.open(target, "w", format=container) as file:
            stream = file.add_stream(name, rate=FPS, options={"threads": "1"} | options)
            stream.width, stream.height, stream.pix_fmt = *SIZE, pix_fmt
            stream.codec_context.thread_count = 1
            sound = file.add_stream("aac" if container != "webm" else "libopus", rate=48000) if sound_first else None
            if aspect:
                stream.codec_context.sample_aspect_ratio = aspect
            if matrix is not None:
                stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
            if degrees:
                stream.set_display_rotation(degrees)
            if sound:
                for i in range(60):
                    audio = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                    audio.sample_rate, audio.pts = 48000, i * 1024
                    file.mux(sound.encode(audio))
                file.mux(sound.encode(None))
            for i in range(COUNT):
                frame = av.VideoFrame.from_ndarray(picture(i, SIZE), format="rgb24")
                frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=2 if full else None)
                frame.pts = (times[i] if times else i) + sound_first
                frame.time_base = Fraction(1, FPS)
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"this build of PyAV cannot write it: {error}")
    return target.getvalue()


def plain(data: bytes) -> tuple[list[np.ndarray], list[float]]:
    """Pictures and times as libav gives them with no help."""
    with av.open(io.BytesIO(data)) as file:
        frames = list(file.decode(file.streams.best("video")))
    return [f.to_ndarray(format="rgb24") for f in frames], [f.time for f in frames]


def compare(
    data: bytes, container: str, times: list[float], look=lambda picture: picture, seen: list[np.ndarray] | None = None,
    tolerance: int = 0, coarse: bool = False,
) -> None:  # fmt: skip
    """`copy` and `intra` hold these pictures, `look`ing like that, at these seconds."""
    exact = plain(data)[0] if seen is None else seen
    expected = [look(p) for p in exact]
    for name, settings in (("copy", {}), ("intra", {"fps": 240, "short_side": 64, "quality": 1})):
        what = store(io.BytesIO(data), f"a.{container}", Profile(name=name, **settings))
        stored = what.file.read()
        read = lambda at, size, d=stored: d[at:] if size < 0 else d[at : at + size]  # noqa: E731
        low, high = np.searchsorted(what.frames.number, [0, len(what.source.times)])
        assert high - low == len(expected), name
        assert what.frames.time[low:high] == pytest.approx(times, abs=2e-3), name
        assert (np.diff(what.frames.time) > 0).all()
        found = pick_frames(what, read, range(low, high))
        height, width = expected[0].shape[:2]
        if name == "copy":
            assert (what.width, what.height) == (width, height)
            for position, picture in zip(range(low, high), expected, strict=True):
                assert np.abs(found[position].astype(int) - picture).max() <= tolerance, (name, position)
            some = [high - 1, low, (low + high) // 2]  # and each alone, as a loader asks for them
            assert sorted(p for p, _ in decode_stored(what, read, some)) == sorted(some)
            for position in some:
                alone = pick_frames(what, read, [position])[position]
                assert np.array_equal(alone, found[position]), position
        else:
            for position, picture in zip(range(low, high), expected, strict=True):
                small = np.asarray(
                    Image.fromarray(picture).resize(found[position].shape[1::-1], Image.Resampling.BICUBIC)
                )
                assert np.abs(found[position].astype(int) - small).mean() < (20 if coarse else 4), position


@pytest.mark.parametrize(("container", "codec"), PLAIN)
def test_constant_rate(container: str, codec: str) -> None:
    data = made(container, codec)
    pictures, _ = plain(data)
    if codec not in ("gif", "av1"):  # a coarse palette, and a coarse preset
        assert [number_in(p) for p in pictures] == list(range(COUNT))
    compare(data, container, [i / FPS for i in range(COUNT)], coarse=codec == "gif")


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "h264"), ("mp4", "vp9"), ("matroska", "h264"), ("matroska", "open"), ("webm", "vp8"), ("mpegts", "h264"),
     ("flv", "h264"), ("avi", "mpeg4"), ("avi", "h264"), ("mov", "mjpeg")],
)  # fmt: skip
def test_variable_rate(container: str, codec: str) -> None:
    stamps = np.cumsum([0, *(STEPS * 3)[: COUNT - 1]]).tolist()
    data = made(container, codec, times=stamps)
    seen, when = plain(data)
    if container == "avi":  # the writer fills gaps with empty chunks; each frame is where its chunk is
        assert len(seen) == COUNT
        with av.open(io.BytesIO(data)) as file:
            base = float(file.streams.video[0].time_base)
            chunks = [p.dts * base for p in file.demux(video=0) if p.size]
        when = [c - chunks[0] for c in chunks]
    else:
        assert np.array(when) - when[0] == pytest.approx(np.array(stamps) / FPS, abs=2e-3)
        when = [w - when[0] for w in when]
    compare(data, container, when)


def boxes(data: bytes | bytearray, start: int, end: int):
    while start + 8 <= end:
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        yield kind, start, size
        start += size


def box(data: bytes | bytearray, *path: bytes) -> int:
    start, end = 0, len(data)
    for kind in path:
        at, size = next((at, size) for k, at, size in boxes(data, start, end) if k == kind)
        start, end = at + 8, at + size
    return at


def with_edit(data: bytes, skip: float, length: float) -> bytes:
    """The mp4 with an edit list that shows `length` seconds from `skip` on (ISO 14496-12, 8.6.6)."""
    out = bytearray(data)
    movie = struct.unpack(">I", out[box(out, b"moov", b"mvhd") + 20 :][:4])[0]
    media = struct.unpack(">I", out[box(out, b"moov", b"trak", b"mdia", b"mdhd") + 20 :][:4])[0]
    at = box(out, b"moov", b"trak", b"edts", b"elst") + 16
    begin = struct.unpack(">i", out[at + 4 : at + 8])[0]
    out[at : at + 8] = struct.pack(">Ii", round(length * movie), begin + round(skip * media))
    return bytes(out)


@pytest.mark.parametrize("codec", ["h264", "open", "hevc", "mpeg4"])
@pytest.mark.parametrize(("skip", "length"), [(0.0, 0.8), (0.4, 1.04), (0.6, 0.48)])
def test_edit_list(codec: str, skip: float, length: float) -> None:
    data = with_edit(made("mp4", codec), skip, length)
    seen, when = plain(data)
    first = round(skip * FPS)
    assert [number_in(p) for p in seen] == list(range(first, first + len(seen)))
    assert len(seen) == pytest.approx(length * FPS, abs=1)
    compare(data, "mp4", [w - when[0] for w in when])


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "h264"), ("matroska", "h264"), ("mpegts", "h264"), ("mpegts", "mpeg2")]
)
@pytest.mark.parametrize("late", [20, 50])
def test_picture_that_starts_after_the_sound(container: str, codec: str, late: int) -> None:
    data = made(container, codec, sound_first=late)
    # AAC begins with a packet that only starts its decoder; MPEG-TS cannot say that it is not to be played
    before = 1024 / 48000 if container == "mpegts" else 0
    compare(data, container, [before + (late + i) / FPS for i in range(COUNT)])


# how the picture is to be turned (a b c d of the track header's matrix), and the same by hand
MATRICES = {
    "90": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "180": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "270": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: np.swapaxes(p, 0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: np.swapaxes(p, 0, 1)[::-1, ::-1]),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("container", "codec"), [("mp4", "h264"), ("mov", "mjpeg")])
def test_display_matrix(container: str, codec: str, name: str) -> None:
    (a, b, c, d), look = MATRICES[name]
    data = bytearray(made(container, codec))
    at = box(data, b"moov", b"trak", b"tkhd") + 8 + 40
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    compare(bytes(data), container, [i / FPS for i in range(COUNT)], look)


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "h264"), ("matroska", "h264"), ("mpegts", "mpeg2"), ("avi", "mpeg4")]
)
@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(8, 9)])
def test_pixel_aspect(container: str, codec: str, aspect: Fraction) -> None:
    data = made(container, codec, aspect=aspect)
    with av.open(io.BytesIO(data)) as file:
        told = file.streams.video[0].sample_aspect_ratio
    if told in (None, 0, 1):
        pytest.skip("this container did not keep it")
    width, height = SIZE
    size = (round(width * told), height) if told > 1 else (width, round(height / told))
    look = lambda p: np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC))  # noqa: E731
    compare(data, container, [i / FPS for i in range(COUNT)], look, tolerance=70)  # edges: another bicubic filter


@pytest.mark.parametrize(("matrix", "full"), [(1, False), (1, True), (5, False), (5, True), (6, False), (9, False)])
@pytest.mark.parametrize(("container", "codec"), [("mp4", "h264"), ("matroska", "vp9"), ("mp4", "hevc")])
def test_colour_matrix_and_range(container: str, codec: str, matrix: int, full: bool) -> None:
    data = made(container, codec, matrix=matrix, full=full)
    with av.open(io.BytesIO(data)) as file:
        frame = next(file.decode(video=0))
    if (frame.colorspace, frame.color_range == 2) != (matrix, full):
        pytest.skip("this build did not write the tag")
    compare(data, container, [i / FPS for i in range(COUNT)])


def test_a_jump_of_the_time_stamps_is_no_gap() -> None:
    """Two broadcasts one after the other: a player goes on with the second one's frames."""
    one = made("mpegts", "h264")
    both = one + one
    what = store(io.BytesIO(both), "a.ts", Profile(name="copy"))
    seen, _ = plain(both)
    assert len(what.frames) == len(seen)
    assert (np.diff(what.frames.time) > 0).all()
    assert what.frames.time[-1] == pytest.approx((len(seen) - 1) / FPS, abs=0.2)
    found = pick_frames(what, lambda at, size: both[at:] if size < 0 else both[at : at + size], range(len(seen)))
    assert [number_in(found[i]) for i in range(len(seen))] == [number_in(p) for p in seen]


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


def test_stamps_of_decoding_in_place_of_those_of_showing() -> None:
    """An mp4 made of an AVI with B-frames without new time stamps."""
    place = iter(range(10**6))

    def in_order(packet: av.Packet) -> None:
        packet.pts = packet.dts = next(place)
        packet.time_base = Fraction(1, FPS)

    data = remuxed(made("mp4", "mpeg4"), "mp4", in_order)
    whole_and_cuts(data, "a.mp4", CUTS)
    what = store(io.BytesIO(data), "a.mp4", Profile(name="copy"))
    assert what.frames.time == pytest.approx(np.arange(COUNT) / FPS, abs=1e-6)


def with_edits(data: bytes, parts: list[tuple[float, float]]) -> bytes:
    """The mp4 with an edit list of several parts, each so many seconds from a moment on."""
    out = bytearray(data)
    movie = struct.unpack(">I", out[box(out, b"moov", b"mvhd") + 20 :][:4])[0]
    media = struct.unpack(">I", out[box(out, b"moov", b"trak", b"mdia", b"mdhd") + 20 :][:4])[0]
    at = box(out, b"moov", b"trak", b"edts", b"elst")
    begin, old = struct.unpack(">i", out[at + 20 : at + 24])[0], struct.unpack(">I", out[at : at + 4])[0]
    entries = b"".join(struct.pack(">IiI", round(n * movie), begin + round(s * media), 1 << 16) for s, n in parts)
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
