from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.frame_sampling import shown_between
from pipelines.narration import clip_of


def said(*times, words=None) -> list[dict]:
    return [{"text": f"c{i}", "start": a, "end": b} for i, (a, b) in enumerate(times)]


TRACK = said((0, 2), (2, 4), (5, 6), (6.5, 8), (14, 15))


def test_a_clip_is_its_captions_time():
    clip = clip_of(TRACK, 1, 20)
    assert (clip.start, clip.end, clip.texts) == (2, 4, ("c1",))


@pytest.mark.parametrize("index, expected", [(2, (3.5, 7.5)), (0, (0, 4)), (4, (12.5, 16.5))])
def test_a_short_clip_is_widened_to_both_sides_inside_the_video(index, expected):
    clip = clip_of(TRACK, index, 20, min_s=4)
    assert (clip.start, clip.end) == expected


def test_the_last_clip_is_widened_backwards_and_never_beyond_the_video():
    clip = clip_of(TRACK, 4, 15, min_s=4)
    assert (clip.start, clip.end) == (11, 15)
    whole = clip_of(TRACK, 4, 15, min_s=40)
    assert (whole.start, whole.end) == (0, 15)


def test_merging_joins_what_is_said_next():
    clip = clip_of(TRACK, 1, 20, min_s=3.5, merge=True)
    assert (clip.start, clip.end, clip.texts) == (2, 6, ("c1 c2",))
    last = clip_of(TRACK, 4, 20, min_s=3, merge=True)  # nothing follows: widened
    assert (last.start, last.end, last.texts) == (13, 16, ("c4",))


@pytest.mark.parametrize(
    "index, bag, expected",
    [
        (2, 3, ("c2", "c3", "c1")),  # 2 s more with c3, 3 s with c1
        (0, 3, ("c0", "c1", "c2")),  # nothing before it
        (3, 4, ("c3", "c2", "c1", "c0")),  # c4 is 7 s away
        (1, 9, ("c1", "c0", "c2", "c3", "c4")),  # a video that says less gives a smaller bag
    ],
)
def test_a_bag_grows_to_the_nearer_side(index, bag, expected):
    assert clip_of(TRACK, index, 20, bag=bag).texts == expected


def test_a_bag_around_a_merged_clip_has_no_caption_twice():
    clip = clip_of(TRACK, 1, 20, min_s=3.5, merge=True, bag=3)
    assert clip.texts == ("c1 c2", "c0", "c3")


def test_captions_without_times_mark_no_clip():
    with pytest.raises(ValueError, match="'hello' has no times"):
        clip_of([{"text": "hello", "start": None, "end": None}], 0, 9)


def test_stored_frames_of_a_clip():
    video = SimpleNamespace(frames=SimpleNamespace(time=np.arange(10) / 2), inside=(0, 10))
    assert shown_between(video, 1.0, 2.0, "uniform") == (2, 4)  # 1.0 and 1.5; 2.0 is the next clip's
    assert shown_between(video, 1.1, 1.2, "uniform") == (2, 3)  # none begins there: what is shown
    assert shown_between(video, 40, 50, "uniform") == (9, 10)
    assert shown_between(video, 0, 99, "uniform") == (0, 10)
    video.inside = (2, 8)  # frames around a cut, which others refer to, are never shown
    assert shown_between(video, 0, 99, "uniform") == (2, 8)
    assert shown_between(video, 40, 50, "uniform") == (7, 8)
    assert shown_between(video, 0, 0.5, "uniform") == (2, 3)  # the picture begins later


@pytest.mark.parametrize("rule", ["uniform", "head", "tail", "random"])
def test_a_clip_shows_the_slide_that_stands_in_its_seconds_and_not_the_next(rule):
    video = SimpleNamespace(frames=SimpleNamespace(time=np.array([0.0, 10, 20, 30, 40, 41])), inside=(0, 6))
    assert shown_between(video, 4, 9.9, rule) == (0, 1)
    assert shown_between(video, 31, 39, rule) == (3, 4)
    assert shown_between(video, 17, 22, rule) == (1, 3)  # the second for its first 3 s, then the third
    assert shown_between(video, 19.5, 25, rule) == (2, 3)  # half a second counts for nothing


def test_a_rule_of_equal_spans_of_time_has_no_frame_from_before_the_clip_beside_others():
    video = SimpleNamespace(frames=SimpleNamespace(time=np.array([0.0, 10, 20, 30, 40, 41])), inside=(0, 6))
    assert shown_between(video, 17, 22, "segment") == (2, 3)
    assert shown_between(video, 12, 19, "segment") == (1, 2)
