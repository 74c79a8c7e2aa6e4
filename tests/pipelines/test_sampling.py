from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.sampling import choose, extractor_frames, nearest, segment_frames
from shards.video import grid

GOLDEN = Path(__file__).parents[1] / "golden"
RATES = [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30)]


def stored(numbers, source_frames: int, fps) -> SimpleNamespace:
    """What `choose` looks at of a row of the sample table."""
    return SimpleNamespace(source_frames=source_frames, fps=fps, frames=SimpleNamespace(number=np.asarray(numbers)))


def test_the_extractor_rule_gives_every_row_of_the_reference():
    golden = np.load(GOLDEN / "frame_sampling.npz")
    columns = ("frame_count", "fps", "max_frames", "slice_framepos", "frame_index", "mask_len")
    rows = list(zip(*(golden[name] for name in columns), strict=True))
    assert len(rows) == 4473
    for count, fps, most, position, expected, length in rows:
        found = extractor_frames(int(count), float(fps), int(most), ("head", "tail", "uniform")[position])
        assert len(found) == length
        assert np.array_equal(found, expected[:length]), (count, fps, most, position)


def test_the_extractor_rule_within_a_segment_gives_every_row_of_the_reference():
    golden = np.load(GOLDEN / "frame_sampling.npz")
    names = ("frame_count", "fps", "max_frames", "slice_framepos", "start", "end", "frame_index", "mask_len")
    rows = list(zip(*(golden[f"seg_{name}"] for name in names), strict=True))
    assert len(rows) == 864
    empty = 0
    for count, fps, most, position, start, end, expected, length in rows:
        rule = ("head", "tail", "uniform")[position]
        found = extractor_frames(int(count), float(fps), int(most), rule, start=int(start), end=int(end))
        assert np.array_equal(found, expected[:length]), (count, fps, most, rule, start, end)
        assert len(found) == length
        empty += length == 0
    assert 0 < empty < len(rows)


@pytest.mark.parametrize("clip_len", [8, 12])
def test_the_segment_rule_gives_every_row_of_the_reference(clip_len):
    golden = np.load(GOLDEN / "uniform_sample.npz")
    assert len(golden["num_frames"]) == 412
    for count, expected in zip(golden["num_frames"], golden[f"clip_len_{clip_len}"], strict=True):
        assert np.array_equal(segment_frames(int(count), clip_len), expected), count


def test_several_frames_a_second():
    # 29.97 counts as 29 frames a second, in thirds of 9; the last two frames of each second fall away
    assert extractor_frames(60, 29.97, 99, "head", rate=3).tolist() == [0, 9, 18, 29, 38, 47, 58]
    assert extractor_frames(60, 29.97, 4, "tail", rate=3).tolist() == [29, 38, 47, 58]
    assert extractor_frames(60, 29.97, 4, "uniform", rate=3).tolist() == [0, 18, 38, 58]
    assert extractor_frames(6, 2, 99, "head", rate=5).tolist() == [0, 1, 2, 3, 4, 5], "no frame comes twice"


def test_a_frame_rate_below_one_counts_as_one():
    assert extractor_frames(4, 0.5, 12, "uniform").tolist() == [0, 1, 2, 3]
    assert extractor_frames(4, Fraction(1, 3), 2, "tail").tolist() == [2, 3]


def test_an_unknown_position_is_refused():
    with pytest.raises(ValueError, match="'middle': there are head, tail and uniform"):
        extractor_frames(500, 25, 12, "middle")


def test_nearest():
    table = np.array([0, 8, 16, 25])
    assert nearest(table, np.array([0, 3, 4, 5, 16, 20, 21, 25, 99])).tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3]
    assert nearest(np.array([7]), np.array([0, 7, 9])).tolist() == [0, 0, 0]


def test_random_segments_draw_from_their_own_segment():
    draws = np.array([segment_frames(101, 10, np.random.default_rng(seed)) for seed in range(400)])
    low = np.arange(10) * 10
    assert (draws >= low).all() and (draws <= low + 10).all()
    assert (draws.min(axis=0) == low).all() and (draws.max(axis=0) == low + 10).all(), "both ends can come"
    assert (np.abs(draws.mean(axis=0) - low - 5) < 1).all(), "and all between alike"


def test_random_segments_repeat_frames_of_short_videos():
    for count in (1, 2, 5):
        for seed in range(20):
            draw = segment_frames(count, 12, np.random.default_rng(seed))
            assert len(draw) == 12 and draw.dtype == np.int32
            assert draw.min() >= 0 and draw.max() < count
            assert (np.diff(draw) >= -1).all() and (count == 1 or len(set(draw.tolist())) > 1)


def test_choose_takes_the_very_frames_where_all_are_stored():
    video = stored(range(250), 250, Fraction(25))
    assert choose(video, "uniform", 12).tolist() == list(range(0, 250, 25))
    assert choose(video, "uniform", 4).tolist() == [0, 75, 150, 225]
    assert choose(video, "head", 4).tolist() == [0, 25, 50, 75]
    assert choose(video, "tail", 4).tolist() == [150, 175, 200, 225]
    assert choose(video, "head", 4, rate=5).tolist() == [0, 5, 10, 15]
    assert choose(video, "segment", 12).tolist() == [10, 31, 52, 72, 93, 114, 134, 155, 176, 197, 218, 238]
    drawn = choose(video, "segment", 12, random=np.random.default_rng(3))
    assert drawn.tolist() == segment_frames(250, 12, np.random.default_rng(3)).tolist()


@pytest.mark.parametrize("fps", RATES, ids=float)
@pytest.mark.parametrize("rate", [1, 3])
def test_choose_finds_the_rules_own_frames_in_an_intra_shard(fps, rate):
    for count in (1, 24, 29, 30, 61, 290, 719):
        table = [n for n in range(count) if grid(n, fps, 3)]
        video = stored(table, count, fps)
        for rule in ("uniform", "head", "tail"):
            found = np.array(table)[choose(video, rule, 12, rate)]
            assert np.array_equal(found, extractor_frames(count, fps, 12, rule, rate))


def test_choose_takes_the_nearest_stored_frame_for_other_rules():
    table = np.array([n for n in range(250) if grid(n, Fraction(25), 3)])
    found = table[choose(stored(table, 250, Fraction(25)), "segment", 12)]
    wanted = segment_frames(250, 12)
    assert (np.abs(found - wanted) == np.abs(table[:, None] - wanted).min(axis=0)).all()
    assert found.tolist() == [8, 33, 50, 75, 91, 116, 133, 158, 175, 200, 216, 241]
