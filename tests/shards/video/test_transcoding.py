"""Videos of every kind re-encoded: the right frames, upright, in the right colours, with little memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from shards import VideoError
from shards.demo import shapes
from shards.demo.scenes import scenes
from shards.video import writer
from shards.video.picture import grid
from shards.video.profiles import Profile, store
from shards.video.random_access import pick_frames
from tests import videos
from tests.shards.video.stored import Counted, encoded, numbered, rotated, shown, stored
from tests.videos import number_in

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


@pytest.mark.parametrize("matrix", [8, 10])  # YCgCo, and BT.2020 with constant luminance
def test_colours_that_nobody_converts_are_refused(matrix: int) -> None:
    """Also where nothing is converted yet, or the loader could not read what was packed."""
    frames = [frame.reformat(format="yuv420p") for frame in numbered(5)]
    for frame in frames:
        frame.colorspace = matrix
    data = encoded(frames, "libx264", "yuv420p", {})
    for name in ("copy", "intra", "h264"):
        with pytest.raises(VideoError, match=f"its colours are not known: .* of matrix {matrix} "):
            stored(data, name)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_no_byte_is_that_of_memory_which_nobody_wrote(codec: str, tmp_path: Path) -> None:
    """x264 with B-frames took costs of macroblocks from there. The variable has the C library fill memory."""
    for scene in scenes(42, 0, 24)["test"][6:10]:
        (tmp_path / f"{scene.key}.mp4").write_bytes(shapes.encode(scene))
    code = (
        "import hashlib, io, sys; from pathlib import Path; from shards.video.profiles import Profile, store\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.mp4')):\n"
        "    made = store(io.BytesIO(path.read_bytes()), path.name, Profile(name=sys.argv[2]))\n"
        "    print(hashlib.sha256(made.file.read()).hexdigest())"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), codec], check=True, capture_output=True, text=True,
            env=os.environ | {"MALLOC_PERTURB_": filled},
        ).stdout
        for filled in ("0", "85", "170")
    }  # fmt: skip
    assert len(made) == 1
