"""Scanning a file, its frame table, and picking single frames: what comes out is what a plain decode shows."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from crc32c import crc32c
from PIL import Image

from shards import VideoError
from shards.video.decode import WAYS
from shards.video.geometry import scaled_size
from shards.video.picture import grid, upright
from shards.video.probe import open_video
from shards.video.random_access import pick_frames
from shards.video.source import SourceVideo, scan
from tests.videos import encode, number_in, picture

SHORT_GOP = {"bf": "3", "g": "12"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "12"}
NTSC = Fraction(30000, 1001)

# what encode() is asked for, and the codec's canonical name
SLICEABLE = {
    "h264 mp4": ({"options": SHORT_GOP}, "h264"),
    "h264 mkv": ({"options": SHORT_GOP, "format": "matroska", "fps": NTSC}, "h264"),
    "h264 open gop": ({"options": SHORT_GOP | {"x264-params": "open-gop=1"}, "fps": 24}, "h264"),
    "h264 one gop": ({"options": {"bf": "3", "g": "250", "sc_threshold": "0"}, "fps": Fraction(25, 2)}, "h264"),
    "h264 intra refresh": ({"options": {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}}, "h264"),
    "hevc mp4": ({"codec": "libx265", "options": SHORT_GOP, "fps": Fraction(24000, 1001)}, "hevc"),
    "hevc mov portrait": ({"codec": "libx265", "options": SHORT_GOP, "format": "mov", "size": (120, 160)}, "hevc"),
    "vp9 webm": ({"codec": "libvpx-vp9", "format": "webm", "options": VP9, "fps": 30}, "vp9"),
    "vp8 webm": ({"codec": "libvpx", "format": "webm", "options": VP9, "fps": 15}, "vp8"),
    "av1 mp4": ({"codec": "libsvtav1", "options": {"preset": "12", "g": "12"}}, "av1"),
    "mpeg4 avi": ({"codec": "mpeg4", "format": "avi", "options": {"g": "12"}}, "mpeg4"),
    "mpeg4 mp4": ({"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}, "mpeg4"),
    "mpeg2 mkv": ({"codec": "mpeg2video", "format": "matroska", "options": {"g": "12", "bf": "2"}}, "mpeg2video"),
    "mjpeg avi": ({"codec": "mjpeg", "format": "avi", "options": {}}, "mjpeg"),
}
WHOLE = {
    "h264 ts": ({"options": SHORT_GOP, "format": "mpegts"}, "h264"),
    "mpeg2 mpg": ({"codec": "mpeg2video", "format": "mpeg", "options": {"g": "12", "bf": "2"}}, "mpeg2video"),
}
FRAMES = 40


def made(how: dict) -> bytes:
    try:
        return encode(FRAMES, **how)
    except av.error.FFmpegError as error:
        pytest.skip(f"this build of PyAV cannot write it: {error}")


def plain(data: bytes) -> np.ndarray:
    """All pictures, decoded by libav with no help: uint8 [frames, H, W, 3]."""
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def pick(data: bytes, source: SourceVideo, wanted: list[int], reads: list[tuple[int, int]] | None = None) -> dict:
    def read(offset: int, size: int) -> bytes:
        size = len(data) - offset if size < 0 else size
        if reads is not None:
            reads.append((offset, size))
        return data[offset : offset + size]

    return pick_frames(source, read, wanted)


# ---- scan ----


@pytest.mark.parametrize("name", [*SLICEABLE, *WHOLE])
def test_scan_says_what_is_in_the_file(name: str) -> None:
    how, codec = (SLICEABLE | WHOLE)[name]
    source = scan(made(how))
    fps, size = Fraction(how.get("fps", 25)), how.get("size", (160, 120))
    assert (source.codec, source.width, source.height, source.rotation) == (codec, *size, 0)
    rounded = how.get("format") in ("matroska", "webm")
    assert source.fps == (pytest.approx(fps, rel=1e-3) if rounded else fps)
    assert source.duration == pytest.approx(FRAMES / fps, abs=1.1 / fps)
    frames = source.frames
    assert frames.number.tolist() == list(range(FRAMES))
    assert frames.time == pytest.approx([i / fps for i in range(FRAMES)], abs=2e-3)
    assert frames.sliceable == (name in SLICEABLE)
    assert [a.dtype for a in (frames.number, frames.time, frames.offset)] == [np.int32, np.float64, np.int64]


def test_scan_finds_keyframes_and_b_frames() -> None:
    closed = scan(encode(FRAMES, options=SHORT_GOP)).frames
    assert np.flatnonzero(closed.key).tolist() == [0, 12, 24, 36]
    assert (np.diff(closed.offset) < 0).any()  # a frame stored before one that is shown earlier
    ordered = scan(encode(FRAMES, options={"bf": "0", "g": "250", "sc_threshold": "0"})).frames
    assert np.flatnonzero(ordered.key).tolist() == [0]
    assert (np.diff(ordered.offset) > 0).all()


@pytest.mark.parametrize("way", ["stamps", "all", "decoding"])
def test_a_pass_hands_over_each_frame_once_and_in_order(way: str) -> None:
    data = encode(FRAMES, NTSC, options=SHORT_GOP)
    with WAYS[way](io.BytesIO(data)) as whole:
        seen = [(s.number, s.time, number_in(upright(s.frame))) for s in whole.frames()]
        assert whole.timeline.fps == NTSC and whole.timeline.steady
    assert [(i, n) for i, _, n in seen] == [(i, i) for i in range(FRAMES)]
    assert [t for _, t, _ in seen] == scan(data).frames.time.tolist()


@pytest.mark.parametrize("name", SLICEABLE)
def test_frame_table_points_at_the_packets(name: str) -> None:
    data = made(SLICEABLE[name][0])
    frames = scan(data).frames
    with av.open(io.BytesIO(data)) as file:
        packets = sorted((p.pts, bytes(p), p.is_keyframe) for p in file.demux(video=0) if p.size)
    assert len(frames) == len(packets) == FRAMES
    for i, (_, packet, key) in enumerate(packets):
        assert data[frames.offset[i] : frames.offset[i] + frames.size[i]] == packet
        assert frames.crc32c[i] == crc32c(packet) and frames.key[i] == key


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_sliced_says_so(name: str) -> None:
    frames = scan(made(WHOLE[name][0])).frames
    assert not frames.sliceable
    assert set(frames.offset) == set(frames.size) == {-1} and not frames.crc32c.any()


def audio_only() -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16000)
        for i in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, i * 1024
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()


def test_unusable_files_say_why() -> None:
    good = encode(20)
    early = good.index(b"mdat") + 2000  # the index of this mp4 is at its end
    broken = bytearray(encode(FRAMES, options={"bf": "0", "g": "250", "sc_threshold": "0", "b": "2M"}))
    middle = scan(bytes(broken)).frames
    broken[middle.offset[20] : middle.offset[20] + 100] = bytes(100)
    for data, words in (
        (b"", "empty"),
        (b"video,caption\n" * 100, "not a readable video"),
        (good[:early], "not a readable video"),
        (good[: good.index(b"mdat")], "not a readable video"),
        (encode(20, format="matroska")[:200], "not"),
        (bytes(broken), "damaged|decoding fails"),
        (audio_only(), r"no video stream in the file \(streams: audio\)"),
    ):
        with pytest.raises(VideoError, match=words):
            scan(data)


def test_what_is_called_an_mp4_and_is_none(tmp_path: Path) -> None:
    """libav goes by the name where the bytes say nothing, and misses an mp4's index."""
    path = tmp_path / "a.mp4"
    good, cut = encode(20), encode(60, format="nut")[:4000]
    for data, words in (
        (b"<!DOCTYPE html>\n<html><body>404</body></html>" * 50, "it is text. Did a server"),
        ('{"fehler": "nicht für dich"}'.encode() * 40, "it is text. Did a server"),
        (bytes(range(256)) * 20, "Invalid data"),
        (good[: good.index(b"moov") - 4], "its index .* is missing"),
        (cut, "not a readable video file"),
    ):
        path.write_bytes(data)
        with open(path, "rb") as file, pytest.raises(VideoError, match=words):
            open_video(file)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "any text " * 100, "it is text"),  # libav would draw it
        ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n", "not a readable video"),
        ("a.mp4", "ffconcat version 1.0\nfile other.mp4\n", "not a readable video"),
    ],
)
def test_text_and_lists_of_files_are_no_videos(name: str, text: str, words: str, tmp_path: Path) -> None:
    """Nobody meant the files that a list names to be read."""
    other = tmp_path / "other.mp4"
    other.write_bytes(encode(20))
    path = tmp_path / name
    path.write_text(text.format(other))
    with open(path, "rb") as file, pytest.raises(VideoError, match=words):
        open_video(file)


def test_a_file_cut_short_behind_its_header_is_refused(tmp_path: Path) -> None:
    source, front = io.BytesIO(encode(60, options=SHORT_GOP)), str(tmp_path / "front.mp4")
    with av.open(source) as file, av.open(front, "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    data = Path(front).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat") and len(scan(data).frames) == 60
    last = int(scan(data).frames.offset.max())
    for end, words in (
        (last, "cut short.* promises 60 frames, 59 are"),
        (last + 9, "damaged|decoding fails|cut short"),
    ):
        with pytest.raises(VideoError, match=words):
            scan(data[:end])


def test_pictures_that_the_decoder_had_to_guess_are_refused() -> None:
    data = encode(FRAMES, options={"bf": "0", "g": "250", "sc_threshold": "0"})
    frames, reasons = scan(data).frames, set()
    for at in range(6, int(frames.size[20]), 3):
        damaged = bytearray(data)
        damaged[frames.offset[20] + at] ^= 0x55
        try:
            scan(bytes(damaged))
        except VideoError as error:
            reasons.add(str(error))
    assert "frame 20 is damaged" in reasons


# ---- picking ----


@pytest.mark.parametrize("name", [*SLICEABLE, *WHOLE])
def test_picked_frames_are_those_asked_for(name: str) -> None:
    data = made((SLICEABLE | WHOLE)[name][0])
    source, shown = scan(data), plain(data)
    assert [number_in(p) for p in shown] == list(range(FRAMES))
    several = [30, 3, 3, 11, 12, 13, FRAMES - 1, 0]
    for wanted in ([i] for i in range(FRAMES)):
        got = pick(data, source, wanted)
        assert list(got) == wanted and np.array_equal(got[wanted[0]], shown[wanted[0]]), wanted
    got = pick(data, source, several)
    assert sorted(got) == sorted(set(several))
    assert all(np.array_equal(got[i], shown[i]) for i in several)


def test_picking_reads_only_the_gops_it_needs() -> None:
    data = encode(96, options=SHORT_GOP | {"x264-params": "scenecut=0"})
    source = scan(data)
    frames = source.frames
    for wanted in ([50], [0, 1], [13, 90]):
        reads: list[tuple[int, int]] = []
        pick(data, source, wanted, reads)
        gops = {i // 12 for i in wanted}
        assert len(reads) == len(gops)
        assert sum(size for _, size in reads) <= sum(int(frames.size[g * 12 : g * 12 + 12].sum()) for g in gops) * 1.01
    reads = []
    pick(data, source, [48], reads)
    assert reads == [(frames.offset[48], frames.size[48])]  # a keyframe needs nothing else


@pytest.mark.parametrize("name", ["h264 open gop", "hevc mp4"])
def test_frames_shown_before_their_keyframe_start_one_earlier(name: str) -> None:
    data = made(SLICEABLE[name][0])
    source = scan(data)
    keys, stored = np.flatnonzero(source.frames.key), source.frames.offset
    leading = [i for i in range(FRAMES) if any(k > i and stored[k] < stored[i] for k in keys)]
    assert leading  # open GOPs
    for i in leading:
        reads: list[tuple[int, int]] = []
        pick(data, source, [i], reads)
        before = max(k for k in keys if k <= i)
        assert [offset for offset, _ in reads] == [stored[before]]


def test_picking_notices_changed_bytes() -> None:
    data = encode(FRAMES, options=SHORT_GOP)
    source = scan(data)
    bad = bytearray(data)
    bad[source.frames.offset[14] + 3] ^= 1
    with pytest.raises(VideoError, match="crc32c of stored frame 14"):
        pick(bytes(bad), source, [14])
    assert number_in(pick(bytes(bad), source, [5])[5]) == 5  # another GOP is not concerned


def test_picking_frames_that_are_not_there() -> None:
    for how in ({"options": SHORT_GOP}, {"options": SHORT_GOP, "format": "mpegts"}):
        data = encode(FRAMES, **how)
        longer = scan(encode(FRAMES + 5, **how))
        with pytest.raises(VideoError):
            pick(data, longer, [FRAMES + 2])


def rotated(degrees: int) -> bytes:
    """A video with a red corner at the top left of the stored picture, and a display matrix."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=25, options={"bf": "3", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.set_display_rotation(degrees)
        for i in range(10):
            rgb = picture(i)
            rgb[:16, :16] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_video_comes_out_upright(degrees: int) -> None:
    data = rotated(degrees)
    # ISO 14496-12: the matrix of the track header is its last 44 bytes less width and height; x' = ax+cy, y' = bx+dy
    end = data.index(b"tkhd") - 4 + struct.unpack(">I", data[data.index(b"tkhd") - 4 :][:4])[0]
    a, b, _, c, d = np.array(struct.unpack(">9i", data[end - 44 : end - 8])[:5]) / 65536
    x, y = a * -1 + c * -1, b * -1 + d * -1  # where the top left corner goes, seen from the middle
    source = scan(data)
    portrait = degrees != 180
    assert (source.width, source.height) == ((120, 160) if portrait else (160, 120))
    shown = pick(data, source, [7])[7]
    assert shown.shape == (source.height, source.width, 3)
    corner = shown[5 if y < 0 else -5, 5 if x < 0 else -5].astype(int)
    assert corner[0] > 200 and corner[1] < 60
    assert number_in(np.rot90(shown, -source.rotation // 90)) == 7


# ---- arithmetic ----


@pytest.mark.parametrize("rate", [1, 2, 3, 8, 24, 30])
@pytest.mark.parametrize(
    "fps", [Fraction(30000, 1001), 25, Fraction(24000, 1001), Fraction(25, 2), 5, 1, Fraction(1, 2)]
)
def test_grid_is_the_extractors_loop(fps: Fraction, rate: int) -> None:
    """The loop of CLIP4Clip's `RawVideoExtractorCV2.video_to_tensor`, without its assertion that fps >= rate."""
    whole = max(1, int(fps))
    interval = whole // rate or 1
    inside = list(range(0, whole, interval))[:rate]
    expected = [second * whole + i for second in range(8) for i in inside]
    assert [n for n in range(8 * whole) if grid(n, Fraction(fps), rate)] == expected


@pytest.mark.slow
def test_scaled_size_is_torchvisions() -> None:
    resize = pytest.importorskip("torchvision.transforms").Resize(32)
    for width in range(50, 800, 37):
        for height in range(50, 800, 53):
            assert scaled_size(width, height, 32) == resize(Image.new("L", (width, height))).size
    assert scaled_size(320, 240, 224) == (298, 224)
    assert scaled_size(720, 1280, 224) == (224, 398)
