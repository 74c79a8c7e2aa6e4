"""Segments cover a video, whatever its length; each shows frames of its own seconds."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from pipelines.config import DataConfig
from pipelines.frame_sampling import choose
from pipelines.segments import Cutting, positions_of, segments_of, spans
from shards.schema import Video
from shards.video.source import unsliced


def video(times, fps=25, duration=None):
    times = np.asarray(times, float)
    return Video(
        index=0, shard="", key="", id="", ext="", offset=0, size=0, crc32c=0, codec="h264", width=64, height=48, rotation=0,
        fps=Fraction(fps), source_frames=len(times), duration=duration or float(times[-1]) + 1 / fps, extradata=b"",
        frames=unsliced(times),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("duration", "segment", "stride", "expected"),
    [
        (0.04, 8, 4, [(0, 0.04)]),
        (8, 8, 4, [(0, 8)]),
        (8.5, 8, 4, [(0, 8.5)]),
        (9.5, 8, 4, [(0, 8), (1.5, 9.5)]),
        (16, 8, 4, [(0, 8), (4, 12), (8, 16)]),
        (18, 8, 4, [(0, 8), (4, 12), (8, 16), (10, 18)]),
        (9, 3, 3, [(0, 3), (3, 6), (6, 9)]),
        (1000, 0, 4, [(0, 1000)]),
    ],
)
def test_spans(duration, segment, stride, expected):
    assert spans(duration, Cutting(segment, stride)) == expected


def test_no_part_of_a_video_is_left_out_and_none_is_long():
    for duration in np.random.default_rng(0).uniform(0.1, 100, 300):
        for segment, stride in ((8, 4), (5, 5), (3, 0.7)):
            parts = spans(duration, Cutting(segment, stride))
            assert parts[0][0] == 0 and parts[-1][1] == duration
            assert all(b[0] <= a[1] and b[0] > a[0] for a, b in pairwise(parts))
            assert max(end - start for start, end in parts) <= segment + 0.25 * stride + 1e-9


@pytest.mark.parametrize(("segment", "stride", "words"), [
    (8, 9, "--stride 9: must be at least 0.01 and at most --segment 8"), (8, 0, "--stride 0: must be at least 0.01"),
    (8, 1e-6, "--stride 1e-06: must be at least 0.01"),
    (-1, 4, "--segment -1: must be a number of seconds"), (float("nan"), 4, "--segment nan"), (float("inf"), 4, "--segment inf"),
])  # fmt: skip
def test_cuts_that_leave_something_out_are_refused(segment, stride, words):
    with pytest.raises(ValueError, match=words):
        Cutting(segment, stride)


def test_a_segment_shows_frames_of_its_seconds_as_a_video_of_that_length_would():
    config = DataConfig(num_frames=4)
    segments = segments_of(video(np.arange(500) / 25), config, Cutting(8, 4))  # 20 s
    assert [(s.start, s.end) for s in segments] == [(0, 8), (4, 12), (8, 16), (12, 20)]
    alone = choose(video(np.arange(200) / 25), "uniform", 4)
    for k, segment in enumerate(segments):
        assert segment.positions.tolist() == (alone + 100 * k).tolist()
        assert segment.middle == segment.positions[2]
    assert positions_of(segments).tolist() == sorted({p for s in segments for p in s.positions.tolist()})


def test_a_video_of_one_segment_shows_what_evaluation_shows():
    config = DataConfig(num_frames=5, sampling="segment", frame_order="reverse")
    for times in (np.arange(70) / 25, np.cumsum(np.random.default_rng(0).choice([0.04, 0.8], 40))):
        one = video(times)
        (segment,) = segments_of(one, config, Cutting(0, 0))
        assert segment.positions.tolist() == choose(one, "segment", 5)[::-1].tolist()
        assert (segment.start, segment.end) == (0, one.duration)


def test_a_still_in_a_recording_of_a_screen_shows_the_frame_before():
    times = [0, 0.1, 0.2, 30.0, 30.1]  # nothing moves for half a minute
    segments = segments_of(video(times, duration=32.0), DataConfig(num_frames=4), Cutting(8, 8))
    assert [s.positions.tolist() for s in segments][1:3] == [[2], [2]]
    assert segments[-1].positions.tolist() == [2, 3]  # it stands for the first 6 of its 8 seconds


def test_what_still_stands_when_a_segment_begins_is_of_it():
    times = [0, 0.1, 0.2, 11.9, 12.0, 30.0]  # the third stands for nearly all of the second segment
    config = DataConfig(num_frames=4)
    segments = segments_of(video(times, duration=32.0), config, Cutting(8, 4))
    (one,) = [s for s in segments if s.start == 4]
    assert one.positions.tolist() == [2, 3]
    (all_new,) = [s for s in segments_of(video(np.arange(500) / 25), config, Cutting(8, 4)) if s.start == 4]
    assert all_new.positions.min() == 100


def test_no_segment_is_over_before_the_picture_begins():
    late = video(20 + np.arange(250) / 25)  # 20 s of sound, then 10 s of pictures
    segments = segments_of(late, DataConfig(num_frames=4), Cutting(8, 4))
    assert [(s.start, s.end) for s in segments] == [(16, 24), (20, 28), (22.0, 30.0)]
    assert [int(s.positions[0]) for s in segments] == [0, 0, 50]
