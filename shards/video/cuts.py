"""Which frames a cut of a video begins and ends with, and for how long they are shown in it."""

from dataclasses import replace

import numpy as np

from shards.video.probe import Timeline

_STANDS = 1.0  # seconds without a new frame
_ROUND = 0.5  # seconds by which counting frames may be off from where a cut ends


def within(when: Timeline, length: float, goes_on: bool) -> Timeline:
    """The times in a cut of `length` seconds. A frame that begins before 0 is shown at 0. The last frame is shown until the cut
    ends if another one follows (`goes_on`), and else no longer than that; but at a constant rate for as long as the others.
    """
    last, usual = float(when.times[-1]), float(1 / when.fps)
    end = length if goes_on else min(when.duration, length)
    if when.steady and last >= 0:
        counted = (c for c in (when.duration, last + usual) if abs(end - c) <= min(usual, _ROUND))
        end = next(counted, end)
    times = np.maximum(when.times, 0.0)  # what is rounded must not fall before it, either
    return replace(when, times=times, duration=end)


def stands(start: float, end: float, until: float) -> bool:
    """Whether a cut begins with the frame that is shown before `start`, and `until` then: where the cut's first second, or
    all of it, shows nothing else. `end` is no later than the video's, which may be over before `start`."""
    return end - start > 1e-6 and min(until, end) - start >= min(_STANDS, end - start) - 1e-6
