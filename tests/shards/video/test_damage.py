"""Files of full size of which a part was overwritten or never came."""

from __future__ import annotations

import io
import threading

import av
import numpy as np
import pytest

from shards import VideoError
from tests.shards.video.stored import stored

COUNT, RATE = 50, 25
HOLE = 100_000  # bytes; libav looks 64 KB ahead for the next packet of an MPEG-TS
CONCEALED = {"matroska ffv1": "ffv1", "avi mjpeg": "mjpeg"}  # their decoders give a picture all the same
KINDS = {
    "avi": ("mjpeg", {}),
    "matroska": ("mpeg4", {}),
    "webm": ("libvpx", {}),
    "live matroska": ("mpeg4", {"live": "1"}),
    "flv": ("flv", {}),
    "asf": ("wmv2", {}),
    "mpegts": ("mpeg2video", {}),
    "ogg": ("libvpx", {}),
    "ivf": ("libvpx", {}),
    "mp4": ("mpeg4", {"movflags": "frag_every_frame+empty_moov"}),
}


def noise(kind: str) -> tuple[bytes, list[int]]:
    """A video of keyframes of 5 KB and more, and the places of its packets."""
    codec, options = KINDS[kind] if kind in KINDS else (CONCEALED[kind], {})
    random, target = np.random.default_rng(0), io.BytesIO()
    container = kind.split()[-1 if kind in KINDS else 0]
    with av.open(target, "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=RATE, options={"g": "1", "b": "3000000", "deadline": "realtime"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(COUNT):
            frame = av.VideoFrame.from_ndarray(random.integers(0, 256, (64, 96, 3), np.uint8), format="rgb24")
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    with av.open(io.BytesIO(target.getvalue())) as file:
        return target.getvalue(), [packet.pos for packet in file.demux(video=0) if packet.size]


def frames_of(data: bytes, *cut: float | None) -> int:
    return len(stored(data, "intra", *cut, fps=240, short_side=16).frames)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_in_place_of_a_part_are_noticed(kind: str) -> None:
    data, places = noise(kind)
    assert frames_of(data) == COUNT and frames_of(data, 0.2, 1.8) == 40
    words = "file is damaged|decod|frame .* is damaged"
    for place in (places[15], places[30]):
        if kind == "mp4":
            place = data.rindex(b"moof", 0, place) - 4
        place -= 8 if kind == "avi" else 0  # where its chunk begins
        ends = [data[:place] + bytes(len(data) - place)]
        if place == places[15]:
            ends.append(data[:place] + bytes(HOLE) + data[place + HOLE :])
        for damaged in ends:
            assert len(damaged) == len(data)
            with pytest.raises(VideoError, match=words):
                frames_of(damaged)
            with pytest.raises(VideoError, match=words):
                stored(damaged, "copy")
            with pytest.raises(VideoError, match=words):
                frames_of(damaged, 0.2, 1.8)


@pytest.mark.parametrize("kind", CONCEALED)
def test_a_picture_that_a_decoder_says_is_damaged(kind: str) -> None:
    data, places = noise(kind)
    assert frames_of(data) == COUNT
    at = (places[15] + places[16]) // 2
    for waste in (b"\xff\xd9" * 20, b"\x7f" * 400):  # a JPEG that ends early, and one that goes on wrongly
        damaged = data[:at] + waste + data[at + len(waste) :]
        for profile in ("copy", "intra"):
            with pytest.raises(VideoError, match="damaged"):
                stored(damaged, profile, fps=240, short_side=16)


def test_a_damaged_file_does_not_spoil_those_of_other_threads() -> None:
    """What libav says of one file is not held against another."""
    data, places = noise("webm")
    damaged = data[: places[15]] + bytes(len(data) - places[15])
    wrong: list[object] = []

    def read(what: bytes, whole: bool) -> None:
        for _ in range(5):
            try:
                count = frames_of(what)
            except VideoError:
                count = 0
            if count != (COUNT if whole else 0):
                wrong.append((whole, count))

    threads = [threading.Thread(target=read, args=(data if n % 2 else damaged, bool(n % 2))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_matroska_that_ends_a_little_early_is_noted() -> None:
    """Half a second may be sound alone, so it is no reason to refuse it."""
    data, places = noise("webm")
    for end, missing in ((len(data), None), (places[-1] - 8, "0.04"), (places[-5] - 8, "0.20")):
        for name in ("copy", "intra"):
            notes = [
                note for note in stored(data[:end], name, fps=240, short_side=16).source.notes if "ends before" in note
            ]
            assert len(notes) == bool(missing) and all(f"last {missing} s" in note for note in notes)


def test_what_stands_behind_a_whole_video_is_no_damage() -> None:
    for kind in ("matroska", "webm", "avi", "asf"):
        data, _ = noise(kind)
        assert frames_of(data + bytes(HOLE)) == COUNT, kind


def test_an_ogg_that_ends_inside_a_page() -> None:
    data, places = noise("ogg")
    for end in (places[30] + 20, places[30] + 500, len(data) - 1):
        with pytest.raises(VideoError, match="cut short"):
            frames_of(data[:end])


def test_what_holds_nothing_but_frames_ends_with_one() -> None:
    plain = b"YUV4MPEG2 W32 H32 F25:1 C420jpeg\n" + (b"FRAME\n" + bytes(range(256)) * 6) * 20
    frames, _ = noise("ivf")
    for data in (plain, frames):
        count = frames_of(data)
        assert count == (20 if data is plain else COUNT)
        middle = len(data) // 2 + 100
        for damaged in (data[:-1000], data[:middle], data[:middle] + bytes(len(data) - middle)):
            with pytest.raises(VideoError, match=r"no whole frame|decod|damaged"):
                frames_of(damaged)
