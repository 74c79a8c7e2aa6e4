"""Seconds are those of a player's clock, whatever the time stamps in the file do; or the file is refused with a reason."""

from __future__ import annotations

import io
import itertools

import av
import numpy as np
import pytest

from shards.video.profiles import Profile, store
from tests.shards.video.stored import GOP, Counted, shown, stored, with_sound
from tests.videos import encode_pictures, picture

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
