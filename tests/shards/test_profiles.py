"""What is stored under each profile: the right frames, of the whole video or of a cut, at the cost of what is asked for."""

from __future__ import annotations

import io
import os
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from pipelines.sampling import choose
from shards import ShardError, VideoError
from shards.video import decode, encode, profiles, writer
from shards.video.picture import grid
from shards.video.profiles import PROFILES, Profile, Stored, store
from shards.video.random_access import pick_frames
from tests import videos
from tests.videos import number_in

GOLDEN = Path(__file__).parents[1] / "golden"
GOP = {"bf": "3", "g": "12", "sc_threshold": "0"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "12"}
SOURCES = {
    "h264 mp4": {"options": GOP},
    "h264 open gop": {"options": GOP | {"x264-params": "open-gop=1"}},
    "h264 intra refresh": {"options": {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}},
    "h264 mkv": {"options": GOP, "format": "matroska"},
    "h264 ts": {"options": GOP, "format": "mpegts"},
    "hevc mp4": {"options": {"bf": "3", "g": "12"}, "codec": "libx265"},
    "vp9 webm": {"options": VP9, "codec": "libvpx-vp9", "format": "webm"},
    "av1 mp4": {"options": {"preset": "12", "g": "12"}, "codec": "libsvtav1"},
    "mpeg4 avi": {"options": {"g": "12", "bf": "2"}, "codec": "mpeg4", "format": "avi"},
    "mjpeg avi": {"options": {}, "codec": "mjpeg", "format": "avi"},
}
FRAMES = 60


@pytest.fixture(scope="module")
def made() -> dict[str, bytes]:
    return {name: videos.encode(FRAMES, **how) for name, how in SOURCES.items()}


def stored(data: bytes, name: str = "intra", start=None, end=None, **settings) -> Stored:
    settings = {"short_side": 64, **settings}
    return store(io.BytesIO(data), "a.mp4", Profile(name=name, **settings), start, end)


def shown(what: Stored) -> dict[int, int]:
    """{frame number of the table: number in the picture}"""
    data = what.file.read()
    assert len(data) == what.size
    read = lambda offset, size: data[offset:] if size < 0 else data[offset : offset + size]  # noqa: E731
    found = pick_frames(what, read, range(len(what.frames)))
    return {int(n): number_in(found[i]) for i, n in enumerate(what.frames.number)}


# ---- cuts ----


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    ("start", "end", "first", "last"), [(1.0, 1.8, 25, 44), (1.21, None, 31, 59), (None, 0.5, 0, 12)]
)
def test_a_cut_is_a_video_of_its_own(made, name, start, end, first, last) -> None:
    whole = last - first + 1
    intra = stored(made[name], "intra", start, end)
    begin = first / 25 - (start or 0.0)  # when its first frame is shown: times count from the start of the cut
    expected = [n for n in range(whole) if grid(n, Fraction(25), 3)]
    assert shown(intra) == {n: first + n for n in expected}
    assert intra.frames.time == pytest.approx([begin + n / 25 for n in expected], abs=2e-3)
    assert len(intra.source.times) == whole and intra.source.duration == pytest.approx(begin + whole / 25, abs=2e-3)
    try:
        copied = stored(made[name], "copy", start, end)
    except VideoError as error:  # a decoder that starts in the middle of these shows nothing
        assert name in ("h264 intra refresh", "mpeg4 avi") and "another profile than copy" in str(error)
        return
    inside = {n: seen for n, seen in shown(copied).items() if 0 <= n < whole}
    assert inside == {n: first + n for n in range(whole)}
    assert copied.frames.number[0] >= -24 and len(copied.frames) <= whole + 24 + 4
    assert np.interp(0, copied.frames.number, copied.frames.time) == pytest.approx(begin, abs=1e-6)
    assert (copied.codec, copied.source.codec) == (intra.source.codec,) * 2 and len(copied.source.times) == whole


def test_a_cut_that_holds_nothing_is_refused(made) -> None:
    for name in ("intra", "copy", "h264"):
        for start, end, words in (
            (2.0, 2.0, "the cut is empty"),
            (9.0, 1.0, "the cut is empty"),
            (30, 40, "between 30 and 40"),
        ):
            with pytest.raises(VideoError, match=words):
                stored(made["h264 mp4"], name, start, end)


def test_a_copied_cut_keeps_its_rotation_and_its_last_frame() -> None:
    turned = rotated(videos.encode(FRAMES, options=GOP), 90)
    for start, end in ((1.0, 1.5), (2.0, None)):
        what = stored(turned, "copy", start, end)
        assert (what.rotation % 360, what.width, what.height) == (90, 120, 160)
        assert what.frames.number[-1] >= len(what.source.times) - 1


class Counted(io.BytesIO):
    """A file that knows how much was read of it, and the most at once."""

    total = most = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.total, self.most = self.total + len(data), max(self.most, len(data))
        return data


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of frames that each call of the decoder gave."""
    counts, original = [], decode.decode

    def counting(context, packet):
        frames = original(context, packet)
        counts.append(len(frames))
        return frames

    monkeypatch.setattr(decode, "decode", counting)
    return counts


@pytest.mark.parametrize("name", ["intra", "copy", "h264"])
def test_a_cut_costs_what_it_holds_and_not_the_file(name, monkeypatch) -> None:
    rough = {"bf": "3", "g": "25", "sc_threshold": "0", "qp": "8"}
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    data = videos.encode_pictures((noise[i % 40] for i in range(1000)), 25, (64, 64), "libx264", "mp4", rough)
    file, counts = Counted(data), count_decoded(monkeypatch)
    store(file, "a.mp4", Profile(name=name, short_side=32), 33.0, 34.0)
    assert 0 < sum(counts) <= (25 + 25 + 4) * (2 if name == "copy" else 1) + (3 if name == "h264" else 0)
    assert file.total < len(data) / 4


# ---- nothing is decoded that nobody needs, and nothing else comes out ----


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_left_out_changes_no_byte(made, name, monkeypatch) -> None:
    counts = count_decoded(monkeypatch)
    quick, fewer = stored(made[name]), sum(counts)
    counts.clear()
    monkeypatch.setattr(encode, "WAYS", ("decoding",))
    plain = stored(made[name])
    assert quick.file.read() == plain.file.read()
    assert quick.frames.time == pytest.approx(plain.frames.time, abs=1e-9)
    assert sum(counts) == 2 * FRAMES
    if name in ("h264 mp4", "h264 mkv", "hevc mp4"):
        assert fewer <= 0.75 * FRAMES
    if name == "mjpeg avi":
        assert fewer == len(quick.frames)


def test_damage_in_a_frame_that_others_need_is_refused() -> None:
    data = bytearray(videos.encode(50, options={"bf": "0", "g": "250", "sc_threshold": "0"}))
    table = stored(bytes(data), "copy").frames
    data[table.offset[20] : table.offset[20] + table.size[20]] = bytes(int(table.size[20]))
    for name in ("intra", "copy", "h264"):
        with pytest.raises(VideoError, match=r"damaged|decoding fails"):
            stored(bytes(data), name)


@pytest.mark.parametrize(("count", "fps"), [(100, 25.0), (91, 29.97002997002997), (75, 24.0), (61, 30.0)])
def test_the_official_sampling_finds_its_own_frames_in_an_intra_video(count, fps) -> None:
    golden = np.load(GOLDEN / "frame_sampling.npz")
    rate = Fraction(fps).limit_denominator(1001)
    rates = golden["fps"][np.isclose(golden["fps"], fps, atol=1e-3)]
    assert len(rates)
    counts = golden["frame_count"][np.isin(golden["fps"], rates) & (golden["frame_count"] > 30)]
    count = int(counts[np.abs(counts - count).argmin()])
    what = stored(videos.encode(count, rate, (64, 48)), short_side=48)
    pictures = shown(what)
    row = SimpleNamespace(
        source_frames=len(what.source.times), fps=what.source.fps, frames=what.frames, inside=(0, len(what.frames))
    )
    chosen = np.flatnonzero(np.isin(golden["fps"], rates) & (golden["frame_count"] == count))
    assert len(chosen) > 3
    for i in chosen:
        rule = ("head", "tail", "uniform")[golden["slice_framepos"][i]]
        expected = golden["frame_index"][i][: golden["mask_len"][i]].tolist()
        found = what.frames.number[choose(row, rule, int(golden["max_frames"][i]))]
        assert found.tolist() == expected == [pictures[n] for n in expected]


# ---- h264, hevc, av1 ----


@pytest.mark.parametrize("name", ["h264", "hevc", "av1"])
def test_re_encoded_frames_are_those_of_the_grid_in_short_closed_gops(name) -> None:
    data = videos.encode(70, 30, (170, 120))
    what, again = (stored(data, name, short_side=80, gop=2) for _ in range(2))
    numbers = [n for n in range(70) if grid(n, Fraction(30), 3)]
    bytes_of = what.file.read()
    assert bytes_of == again.file.read() and b"Lavf" not in bytes_of
    what.file.seek(0)
    assert shown(what) == {n: n for n in numbers}
    assert what.frames.time.tolist() == pytest.approx([n / 30 for n in numbers])
    assert np.flatnonzero(what.frames.key).tolist() == list(range(0, len(numbers), 2))
    decode_order = np.argsort(what.frames.offset)
    assert [p // 2 for p in decode_order] == sorted(p // 2 for p in decode_order)  # GOPs do not mingle: they are closed
    assert (what.codec, what.width, what.height, what.extension) == (name, 112, 80, "mp4")
    with av.open(io.BytesIO(bytes_of)) as file:
        assert file.streams.video[0].average_rate == 3
    assert stored(data, name, short_side=80, quality=50).size < what.size


def test_every_frame_is_kept_at_240_frames_a_second() -> None:
    what = stored(videos.encode(30, Fraction(30000, 1001)), "h264", fps=240, gop=10)
    assert shown(what) == {n: n for n in range(30)}
    what.file.seek(0)
    with av.open(what.file, "r") as file:
        assert file.streams.video[0].average_rate == Fraction(30000, 1001)


@pytest.mark.parametrize("name", ["h264", "intra"])
def test_a_turned_video_is_stored_upright(name) -> None:
    what = stored(rotated(videos.encode(20), 90), name)
    assert (what.width, what.height, what.rotation) == (64, 84 if name == "h264" else 85, 0)
    data = what.file.read()
    frames = pick_frames(what, lambda o, s: data[o : o + s], [1])
    assert number_in(np.rot90(frames[1], -1)) == 8


def test_sizes_that_an_encoder_does_not_take_are_named() -> None:
    with pytest.raises(VideoError, match=r"libsvtav1 does not take .* pixels"):
        stored(videos.encode(3, size=(4000, 32)), "av1", short_side=1024)


# ---- sources as they come ----


def encoded(frames: list[av.VideoFrame], codec: str, pix_fmt: str, options: dict, rate=25, format="mp4") -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format=format) as file:
        stream = file.add_stream(
            codec,
            rate=rate,
            options={"threads": "1", "x265-params": "log-level=none:pools=none:frame-threads=1"} | options,
        )
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pix_fmt
        stream.codec_context.thread_count = 1
        for name in ("color_trc", "color_primaries", "colorspace"):
            setattr(stream.codec_context, name, getattr(frames[0], name))
        for i, frame in enumerate(frames):
            if frame.pts is None:
                frame.pts, frame.time_base = i, 1 / Fraction(rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()


def numbered(count: int, size=(160, 120)) -> list[av.VideoFrame]:
    return [av.VideoFrame.from_ndarray(videos.picture(i, size), format="rgb24") for i in range(count)]


def rotated(data: bytes, degrees: int) -> bytes:
    target = io.BytesIO()
    with av.open(io.BytesIO(data)) as file, av.open(target, "w", format="mp4") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        stream.set_display_rotation(degrees)
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return target.getvalue()


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "options"),
    [
        ("libx264", "yuv422p10le", {"preset": "veryfast"}),
        ("libx264", "yuv444p", {"preset": "veryfast"}),
        ("libx265", "yuv420p10le", {"preset": "veryfast"}),
        ("libx264", "yuv420p", {"preset": "veryfast", "x264-params": "tff=1"}),  # interlaced
        ("prores_ks", "yuv422p10le", {}),
    ],
)
def test_other_pixel_formats_and_interlaced_video(codec, pix_fmt, options) -> None:
    data = encoded(numbered(20), codec, pix_fmt, options, format="mov")
    for name in ("intra", "h264"):
        assert shown(stored(data, name)) == {n: n for n in (0, 8, 16)}
    assert shown(stored(data, "copy")) == {n: n for n in range(20)}


@pytest.mark.parametrize("size", [(161, 121), (97, 33)])
def test_odd_sizes(size) -> None:
    data = encoded(numbered(9, size), "libx264", "yuv444p", {"preset": "veryfast"})
    for name, even in (("intra", False), ("h264", True), ("hevc", True)):
        what = stored(data, name, short_side=32)
        long = int(32 * size[0] / size[1])
        assert (what.width, what.height) == (long - long % 2 if even else long, 32)
        assert shown(what) == {0: 0, 8: 8}


@pytest.mark.parametrize("side", [16, 224])
@pytest.mark.parametrize("frames", [1, 9, 17])  # 1, 2 and 3 of the grid
def test_short_and_small_videos(frames, side) -> None:
    data = videos.encode(frames, size=(64, 64))
    for name in ("h264", "hevc", "av1") if side > 16 else ("h264",):
        assert shown(stored(data, name, short_side=side)) == {n: n for n in range(0, frames, 8)}


def test_an_encoder_leaves_priorities_as_they_are() -> None:
    """SVT-AV1 makes threads of root real-time ones, and children inherit that."""
    stored(videos.encode(9), "av1")
    assert {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")} == {os.SCHED_OTHER}


def test_variable_frame_rate_keeps_the_times_of_the_stamps() -> None:
    stamps, frames = [0, 1, 2, 7, 8, 20, 21, 22, 23, 30, 45, 46, 50, 51, 52, 53, 54, 55, 70, 71], numbered(20)
    for frame, stamp in zip(frames, stamps, strict=True):
        frame.pts, frame.time_base = stamp, Fraction(1, 25)
    data = encoded(frames, "libx264", "yuv420p", {"preset": "veryfast", "bf": "2"}, format="matroska")
    copied = stored(data, "copy")
    assert copied.frames.time == pytest.approx([s / 25 for s in stamps], abs=1e-3)
    intra = stored(data, "intra", fps=240)
    assert shown(intra) == {n: n for n in intra.frames.number.tolist()}
    assert intra.frames.time == pytest.approx([stamps[n] / 25 for n in intra.frames.number], abs=1e-3)
    cut = stored(data, "intra", 0.28, 0.9, fps=240)
    assert shown(cut)[0] == 3 and len(cut.source.frames) == 5
    assert cut.source.frames.time == pytest.approx([(s - 7) / 25 for s in stamps[3:8]], abs=1e-3)


@pytest.mark.parametrize(("trc", "white"), [(16, 0.5807), (18, 0.7500)], ids=["PQ", "HLG"])
def test_hdr_is_brought_to_the_range_of_a_jpeg(trc, white) -> None:
    """Reference white (203 cd/m², ITU-R BT.2408) must come out near white, and black as black; untouched it is grey."""
    frames = []
    for level in (0.0, white):
        frame = av.VideoFrame(64, 48, "yuv420p10le")
        for plane, value in zip(frame.planes, (round(64 + 876 * level), 512, 512), strict=True):
            plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
        frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = trc, 9, 9, 1
        frames.append(frame)
    what = stored(encoded(frames, "libx264", "yuv420p10le", {"preset": "ultrafast"}), short_side=48, fps=240)
    data = what.file.read()
    pictures = pick_frames(what, lambda o, s: data[o : o + s], [0, 1])
    assert pictures[0].max() < 12
    assert pictures[1].min() > 240


def test_the_first_real_video_stream_is_taken() -> None:
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as file:
        sound = file.add_stream("aac", rate=16000)
        first, second = (file.add_stream("libx264", rate=25, options={"preset": "veryfast"}) for _ in range(2))
        for stream in (first, second):
            stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for i in range(20):
            audio = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            audio.sample_rate, audio.pts = 16000, i * 1024
            file.mux(sound.encode(audio))
            for stream, number in ((first, i), (second, i + 100)):
                frame = av.VideoFrame.from_ndarray(videos.picture(number), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 25)
                file.mux(stream.encode(frame))
        for stream in (sound, first, second):
            file.mux(stream.encode(None))
    data = target.getvalue()
    assert shown(stored(data, "intra")) == {n: n for n in (0, 8, 16)}
    assert shown(stored(data, "copy")) == {n: n for n in range(20)}
    assert {n: v for n, v in shown(stored(data, "copy", 0.4, 0.6)).items() if 0 <= n < 5} == {
        n: n + 10 for n in range(5)
    }


def test_a_cover_picture_is_no_video(tmp_path) -> None:
    cover, both = videos.encode(1, codec="mjpeg", format="avi", options={}), tmp_path / "cover.mp4"
    with (
        av.open(io.BytesIO(cover)) as art,
        av.open(io.BytesIO(videos.encode(20))) as clip,
        av.open(str(both), "w") as out,
    ):
        picture = out.add_stream_from_template(art.streams.video[0])
        picture.disposition = av.stream.Disposition.attached_pic
        film = out.add_stream_from_template(clip.streams.video[0])
        for source, stream in ((art, picture), (clip, film)):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    with av.open(str(both)) as file:
        assert len(file.streams.video) == 2
    assert shown(stored(both.read_bytes(), "intra")) == {n: n for n in (0, 8, 16)}


# ---- memory ----


def test_memory_does_not_grow_with_the_video(monkeypatch) -> None:
    noise = [
        av.VideoFrame.from_ndarray(p, format="rgb24")
        for p in np.random.default_rng(0).integers(0, 256, (8, 480, 640, 3), np.uint8)
    ]
    with av.open(io.BytesIO(encoded(noise, "mjpeg", "yuvj444p", {"qmin": "1", "qmax": "1"}, format="avi"))) as file:
        packets = [bytes(p) for p in file.demux(video=0) if p.size]
        target = io.BytesIO()
        with av.open(target, "w", format="matroska") as out:
            stream = out.add_stream_from_template(file.streams.video[0])
            for i in range(120):
                packet = av.Packet(packets[i % 8])
                packet.pts = packet.dts = i
                packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
                out.mux(packet)
    source = Counted(target.getvalue())
    assert len(source.getvalue()) > 40e6
    monkeypatch.setattr(writer, "_IN_MEMORY", 1 << 20)
    tracemalloc.start()
    for name in ("copy", "intra"):
        what = store(source, "a.mkv", Profile(name=name, short_side=480, fps=25, quality=1))
        assert what.size > 10e6 and source.most < 2e6
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    assert what.file._rolled  # it went to a temporary file


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "h265"}, "there are intra, copy, h264, hevc, av1"),
        ({"name": "intra", "quality": 32}, "--quality 32: must be between 1 and 31 for intra"),
        ({"name": "h264", "quality": 52}, "--quality 52: must be between 0 and 51 for h264"),
        ({"name": "hevc", "gop": 0}, "--gop 0: must be between 1 and 600"),
        ({"name": "av1", "short_side": 225}, "--short-side 225: av1 needs an even number"),
        ({"name": "h264", "encoder": "gpu"}, "--encoder gpu: there are cpu, nvenc, auto"),
        ({"fps": 0}, "--fps 0: must be between 1 and 240"),
        ({"chroma": 422}, "--chroma 422: there are 420 and 444"),
    ],
)
def test_settings_that_make_no_sense(settings, words) -> None:
    with pytest.raises(ShardError, match=words):
        Profile(**settings)


def test_a_profile_records_what_its_bytes_depend_on() -> None:
    assert Profile().describe() == {"name": "intra", "fps": 3, "short_side": 224, "quality": 3, "chroma": 420}
    assert Profile(name="copy", fps=5, gop=7, quality=9).describe() == {"name": "copy"}
    common = {"fps": 3, "short_side": 224, "gop": 3, "encoder": "cpu"}
    assert {n: Profile(name=n).describe() for n in ("h264", "hevc", "av1")} == {
        n: {"name": n, "quality": q, **common} for n, q in (("h264", 23), ("hevc", 26), ("av1", 32))
    }
    assert Profile(name="h264", fps=240).gop == 12 and Profile(name="h264", fps=1).gop == 1
    assert set(PROFILES) == {"intra", "copy", "h264", "hevc", "av1"}


def test_auto_becomes_the_encoder_that_there_is(monkeypatch) -> None:
    wish = Profile(name="h264", encoder="auto")
    for opens, expected in ((True, "nvenc"), (False, "cpu")):
        monkeypatch.setattr(profiles, "nvenc_opens", lambda codec, opens=opens: opens)
        assert wish.resolved() == replace(wish, encoder=expected)
    with pytest.raises(ShardError, match="--encoder nvenc: h264_nvenc does not open here"):
        replace(wish, encoder="nvenc").resolved()
    assert Profile().resolved() == Profile()


def test_nvenc_where_there_is_one() -> None:
    if not encode.nvenc_opens("h264"):
        pytest.skip("h264_nvenc does not open on this machine")
    what = stored(videos.encode(70, 30, (320, 240)), "h264", short_side=224, encoder="nvenc", gop=3)
    assert shown(what) == {n: n for n in range(0, 70, 10)}
    assert np.flatnonzero(what.frames.key).tolist() == [0, 3, 6]
