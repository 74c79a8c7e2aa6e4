"""Seconds are those of a player's clock, whatever the time stamps in the file do; or the file is refused with a reason."""

from __future__ import annotations

import io
import itertools
import math
from fractions import Fraction

import av
import numpy as np
import pytest

from shards import VideoError
from shards.annotations import Caption, Item
from shards.packing.rows import row_of
from shards.packing.worker import Event, Job, pack_shard
from shards.video.profiles import Profile, store
from tests.shards.video.matrix import made
from tests.shards.video.stored import GOP, Counted, shown, stored, with_sound
from tests.videos import encode, encode_pictures, picture

FPS, COUNT = 25, 40


def numbered(first: int, container: str, count: int = COUNT, **options: str) -> bytes:
    """A video that shows the numbers from `first` on."""
    pictures = (picture(i) for i in range(first, first + count))
    return encode_pictures(pictures, FPS, (160, 120), "libx264", container, GOP | options)


# ---- stamps that start anew ----


def joined(container: str) -> bytes:
    """Two recordings one after the other, whose stamps both begin at 0."""
    one, two = numbered(0, container, 60), numbered(60, container, 40)
    return one + (two[13:] if container == "flv" else two)  # without the second header of an FLV


@pytest.mark.parametrize("container", ["flv", "matroska"])
@pytest.mark.parametrize(("start", "end"), [(0.52, 1.0), (2.0, 2.6), (2.6, 3.0), (3.0, None)])
def test_cuts_of_joined_recordings_count_on(container: str, start: float, end: float | None) -> None:
    data = joined(container)
    whole = stored(data, "intra", fps=240)
    assert list(shown(whole).values()) == list(range(100))
    assert whole.source.times == pytest.approx(np.arange(100) / FPS, abs=2e-3)
    expected = list(range(round(start * FPS), round((end or 4) * FPS)))
    assert list(shown(stored(data, "intra", start, end, fps=240)).values()) == expected


def test_a_cut_of_one_recording_does_not_read_what_is_before_it() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    rough = GOP | {"qp": "8"}
    data = encode_pictures((noise[i % 40] for i in range(500)), FPS, (64, 64), "libx264", "matroska", rough)
    file = Counted(data)
    store(file, "a.mkv", Profile(short_side=32), 15.0, 16.0)
    assert file.total < len(data) / 3


# ---- sound ----


def crc32_mpeg(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 1 << 31 else 0)) & 0xFFFFFFFF
    return crc


def two_programs() -> bytes:
    """A broadcast of a film whose clock begins at 1000 s, and of a radio station whose clock begins at 10 s."""
    film = with_sound("mpegts", list(range(COUNT)), 1.6, later=1000.0)
    places = {"mpegts_service_id": "2", "mpegts_pmt_start_pid": "4200", "mpegts_start_pid": "600"}
    radio = with_sound("mpegts", [], 1.6, places, later=10.0)
    section = bytes.fromhex("00 b011 0001 c1 00 00") + bytes.fromhex("0001 f000") + bytes.fromhex("0002 f068")
    section += crc32_mpeg(section).to_bytes(4, "big")
    table = (bytes.fromhex("474000 10 00") + section).ljust(188, b"\xff")

    def packets(data: bytes) -> list[bytes]:
        parts = [data[i : i + 188] for i in range(0, len(data), 188)]
        return [part for part in parts if int.from_bytes(part[1:3], "big") & 0x1FFF not in (0, 17)]  # tables of all

    mixed = itertools.zip_longest(packets(film), packets(radio), fillvalue=b"")
    return table + b"".join(itertools.chain.from_iterable(mixed))


def test_the_clock_of_another_program_does_not_count() -> None:
    data = two_programs()
    with av.open(io.BytesIO(data)) as file:
        starts = sorted(float(s.start_time * s.time_base) for s in file.streams.audio)
        assert len(starts) == 2 and starts[1] - starts[0] > 900
    whole = stored(data, "intra", fps=240)
    assert list(shown(whole).values()) == list(range(COUNT))
    assert whole.source.times == pytest.approx(np.arange(COUNT) / FPS, abs=0.1)
    assert list(shown(stored(data, "intra", 0.5, 1.0, fps=240)).values()) == list(range(13, 25))


def test_a_broadcast_whose_picture_stands_still_keeps_its_clock() -> None:
    still = [*range(10), *range(310, 326)]
    when = stored(with_sound("mpegts", still, 13.5), "intra").source
    assert when.times - when.times[0] == pytest.approx(np.array(still) / FPS, abs=2e-3)
    assert when.duration == pytest.approx(when.times[0] + 13.04, abs=2e-3)
    alone = stored(with_sound("mpegts", still, 0.5), "intra").source  # its sound does not go on: a jump
    assert alone.times - alone.times[0] == pytest.approx(np.arange(26) / FPS, abs=2e-3)


def test_recordings_a_minute_apart_are_shown_one_after_the_other() -> None:
    first, second = (with_sound("mpegts", list(range(20)), 0.8, later=start) for start in (0.0, 60.0))
    when = stored(first + second, "intra").source
    assert when.times - when.times[0] == pytest.approx(np.arange(40) / FPS, abs=2e-3)


def test_a_broadcast_with_a_lost_stretch_is_right_or_refused() -> None:
    """A picture that comes out late, since what it refers to is lost, starts no new count."""
    data, refused = numbered(0, "mpegts", 100, bf="2"), 0
    for place in range(10 * 188 + 77, len(data) - 30 * 188, 9 * 188):
        try:
            cut = stored(data[:place] + data[place + 16 * 188 :], "intra", fps=240)
        except VideoError as error:
            refused += "should be shown" in str(error)
            continue
        assert cut.source.times[-1] == pytest.approx(99 / FPS, abs=0.021)
    assert refused


# ---- pictures that stay ----


def lasting(container: str, count: int, seconds: float) -> bytes:
    """So many frames of 25 a second, the last of which is shown for `seconds`."""
    target = io.BytesIO()
    with (
        av.open(io.BytesIO(encode(count, FPS, options=GOP | {"bf": "0"}))) as file,
        av.open(target, "w", format=container) as out,
    ):
        stream = out.add_stream_from_template(file.streams.video[0])
        packets = [packet for packet in file.demux(video=0) if packet.size]
        packets[-1].duration = round(seconds / packets[-1].time_base)
        for packet in packets:
            packet.stream = stream
            out.mux(packet)
    return target.getvalue()


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize(("count", "seconds"), [(50, 10.0), (2, 3.0), (50, 1 / FPS)])
def test_the_last_picture_is_shown_for_as_long_as_it_says(container: str, count: int, seconds: float) -> None:
    source = stored(lasting(container, count, seconds)).source
    assert source.duration == pytest.approx((count - 1) / FPS + seconds, abs=2e-3)
    assert source.times == pytest.approx(np.arange(count) / FPS, abs=2e-3)


# frames 0 to 9 at a constant rate, the last of which is shown until 16 s, when the others come
HELD = [*range(10), *range(400, 426)]


@pytest.mark.parametrize(("container", "codec"), [("mp4", "h264"), ("matroska", "open"), ("flv", "h264")])
@pytest.mark.parametrize(
    ("start", "end", "numbers", "times", "duration"),
    [
        (5.0, 10.0, [9], [0.0], 5.0),
        (0.2, 5.0, [5, 6, 7, 8, 9], [0.0, 0.04, 0.08, 0.12, 0.16], 4.8),
        (12.0, 16.08, [9, 10, 11], [0.0, 4.0, 4.04], 4.08),
        (15.52, 16.08, [10, 11], [0.48, 0.52], 0.56),  # what stands for less than a second is no frame of the cut
        (0.2, 0.31, [5, 6, 7], [0.0, 0.04, 0.08], 0.12),  # frames are counted, as ever
        (17.0, None, [35], [0.0], 0.04),
    ],
)
def test_a_cut_shows_the_picture_that_stands(container, codec, start, end, numbers, times, duration) -> None:
    data = made(container, codec, times=HELD)
    for name, settings in (("intra", {"fps": 240}), ("copy", {"short_side": 224})):
        cut = stored(data, name, start, end, **settings)
        seen = {number: shown_ for number, shown_ in shown(cut).items() if 0 <= number < len(numbers)}
        assert list(seen.values()) == numbers, name
        assert cut.source.times == pytest.approx(times, abs=2e-3)
        assert cut.source.duration == pytest.approx(duration, abs=2e-3)
        inside = (cut.frames.number >= 0) & (cut.frames.number < len(numbers))
        assert cut.frames.time[inside] == pytest.approx(times, abs=2e-3)
        assert (np.diff(cut.frames.time) > 0).all()


def test_a_cut_of_an_avi_shows_the_picture_that_stands() -> None:
    data = made("avi", "mpeg4", times=HELD)  # its writer puts frame 10 in the first of the empty chunks
    cut = stored(data, "intra", 5.0, 10.0, fps=240)
    assert (list(shown(cut).values()), cut.source.times.tolist(), cut.source.duration) == ([10], [0.0], 5.0)


def test_a_copied_cut_of_one_packet_shows_it() -> None:
    """Packets of such an FLV have no duration, and an edit list of none would hide it."""
    target = io.BytesIO()
    with av.open(target, "w", format="flv") as file:
        stream = file.add_stream("libx264", rate=FPS, options=GOP | {"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90_000)
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = i * 20, Fraction(1)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    cut = stored(target.getvalue(), "copy", 0.0, 0.5)
    assert (shown(cut), cut.source.times.tolist(), cut.source.duration) == ({0: 0}, [0.0], 0.5)


def from_the_second_keyframe(container: str) -> bytes:
    """Pictures 10, 11, … of a video of open GOPs. Of the first two, which are shown before the keyframe, the references are lost."""
    target, begun = io.BytesIO(), False
    options = {"use_editlist": "0"} if container == "mp4" else {}
    with av.open(io.BytesIO(made("mp4", "open"))) as file, av.open(target, "w", container, options=options) as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            begun = begun or (packet.is_keyframe and packet.pts is not None and packet.pts > 0)
            if begun and packet.size:
                packet.stream = stream
                out.mux(packet)
    return target.getvalue()


@pytest.mark.parametrize("container", ["mp4", "matroska", "flv"])
def test_a_cut_counts_from_the_first_picture_that_decodes(container: str) -> None:
    data = from_the_second_keyframe(container)
    assert list(shown(stored(data, fps=240)).values()) == list(range(12, 36))
    for start, end in ((0.4, 0.6), (0.02, 0.2), (0.6, math.inf)):
        cut = stored(data, "intra", start, end, fps=240)
        first, last = math.ceil(start * FPS), min(24, math.ceil(end * FPS) if end < math.inf else 24)
        assert list(shown(cut).values()) == list(range(12 + first, 12 + last))
        assert cut.source.times == pytest.approx(np.arange(first, last) / FPS - start, abs=2e-3)


def test_a_cut_behind_the_last_picture_is_refused() -> None:
    data = lasting("mp4", 10, 3.0)
    assert stored(data, start=2.0, end=3.0).source.duration == pytest.approx(1.0)
    for start in (3.3, 3.35):  # less than a second of it is left
        for end in (start + 0.01, start + 2, math.inf):
            cut = stored(data, start=start, end=end)
            assert list(shown(cut).values()) == [9]
            assert cut.source.duration == pytest.approx(min(end, 3.36) - start)
    with pytest.raises(VideoError, match="no frame between 10 and 12 s"):
        stored(data, start=10.0, end=12.0)
    with pytest.raises(VideoError, match=r"no frame from 3\.4 s on"):
        stored(data, start=3.4, end=math.inf)


def test_no_cut_begins_after_the_last_picture_says_that_it_is_over() -> None:
    """It says 0.04 s, however long the picture before it stood. Where decoding decides, a cut lasted less than 0 s."""
    target = io.BytesIO()
    with av.open(target, "w", format="mpegts") as file:
        stream = file.add_stream(
            "libx264", rate=FPS, options={"g": "1"}
        )  # which frames are keyframes is then not certain
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for i, at in enumerate((0, 1, 76, 101)):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, FPS)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    cut = stored(target.getvalue(), start=4.05, end=5.0)  # 101 / 25 is 4.04
    assert list(shown(cut).values()) == [3] and cut.source.duration == pytest.approx(0.03, abs=2e-3)
    for end in (4.5, math.inf):
        with pytest.raises(VideoError, match=r"no frame (between|from) 4\.1 "):
            stored(target.getvalue(), start=4.1, end=end)


def test_captions_of_a_cut_reach_over_the_picture_that_stays(tmp_path) -> None:
    caption = Caption("a slide", 1.0, 9.0)
    item = Item(id="a", path=tmp_path / "a.mp4", captions=[caption], start=0.5, end=8.0)
    cut = stored(made("mp4", "h264", times=HELD), "intra", item.start, item.end)
    kept = row_of(item, "a", [caption], cut)["captions"][0]
    assert (kept["start"], kept["end"]) == (0.5, 7.5)


def test_a_frame_rate_that_cannot_be_is_noted(tmp_path) -> None:
    """As where the unit of the time stamps is wrong."""
    path, events = tmp_path / "a.mp4", list[Event]()
    path.write_bytes(encode(20, 2000))
    items = (Item("a", path, (Caption("x"),)),)
    pack_shard(Job("000000", items, tmp_path, Profile()), events.append)
    (note,) = (event.progress.note for event in events if event.progress)
    assert note is not None and "a: its time stamps say 2000 frames a second, so all of it lasts 0.01 s" in note
