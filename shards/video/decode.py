"""The frames of a video file, or of a cut of it, decoding no more than what is wanted needs.

When each frame is shown is known before the first is decoded. There are four ways to know it, from the cheapest on; each
gives up with `Unpredictable` where it meets what it did not expect, and the next one decides.

    stamps    by the packets' time stamps. A cut begins at the keyframe before it; packets that nobody wants and no other
              frame refers to are not decoded
    all       the same, and every packet is decoded (interlaced video)
    order     of containers without time stamps: what the decoder gives are the packets' places in the file, in order
    decoding  the whole file is decoded once to see what comes out, and a second time for the pictures
"""

from collections.abc import Callable

import numpy as np

from shards.video.by_decoding import DecodingPass, OrderPass
from shards.video.by_stamps import AllStampPass, StampPass
from shards.video.frame_pass import Pass
from shards.video.picture import grid
from shards.video.probe import Timeline, nearest

WAYS: dict[str, type[Pass]] = {
    "stamps": StampPass,
    "all": AllStampPass,
    "order": OrderPass,
    "decoding": DecodingPass,
}


def on_grid(when: Timeline, rate: int) -> Callable[[int], bool]:
    """Which frames are stored at `rate` frames a second: those of the official extractor's grid; where frames are not all
    shown for as long, the nearest to each of `rate` moments of a second, so that no part of the video goes without."""
    if when.steady:
        second = [grid(number, when.fps, rate) for number in range(max(1, int(when.fps)))]
        return lambda number: second[number % len(second)]
    first, last = float(when.times[0]), float(when.times[-1])
    moments = first + np.arange(int((last - first) * rate + 1e-6) + 1) / rate
    chosen = np.zeros(len(when.times), bool)
    chosen[nearest(when.times, moments)] = True
    chosen[-1] = True  # by which the sampling rules know where the video ends
    return lambda number: bool(chosen[number])
