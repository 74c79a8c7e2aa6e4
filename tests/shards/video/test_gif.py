"""GIFs: for how long browsers show their pictures, and holes in them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from shards import VideoError
from tests.shards.video.stored import shown, stored
from tests.videos import picture

EXACT = {"fps": 240, "quality": 1}


def animation(*hundredths: int) -> bytes:
    """A GIF of pictures that are shown for so long."""
    target = io.BytesIO()
    pictures = [Image.fromarray(picture(i)) for i in range(len(hundredths))]
    pictures[0].save(
        target, "gif", save_all=True, append_images=pictures[1:], duration=[10 * n for n in hundredths], disposal=2
    )
    return target.getvalue()


def test_a_delay_that_browsers_do_not_believe() -> None:
    """They show a picture of a hundredth of a second for a tenth."""
    data = animation(1, 1, 5, 1, 2, 3)
    times = np.cumsum([0, 10, 10, 5, 10, 2]) / 100
    for profile in ({"name": "copy"}, EXACT):
        what = stored(data, **profile)
        assert what.source.times == pytest.approx(times)
        assert shown(what) == {i: i for i in range(6)}
    assert list(shown(stored(data, start=0.2, end=0.36, **EXACT)).values()) == [2, 3, 4]


def test_a_gif_with_a_hole() -> None:
    data = animation(*[4] * 20)
    assert shown(stored(data, **EXACT)) == {i: i for i in range(20)}
    middle = len(data) // 2
    hole = data[:middle] + bytes(2000) + data[middle + 2000 :]
    for profile in ({"name": "copy"}, EXACT):
        with pytest.raises(VideoError, match="no block of a GIF begins at byte"):
            stored(hole, **profile)
