"""Seconds are those of a player's clock, whatever the time stamps in the file do; or the file is refused with a reason."""

from __future__ import annotations

import io

import numpy as np
import pytest

from shards.video.profiles import Profile, store
from tests.shards.video.stored import GOP, Counted, shown, stored
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
