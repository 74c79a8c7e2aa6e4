from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.frame_sampling import candidates, choose, extractor_frames, nearest, segment_frames
from shards.video.decode import on_grid
from shards.video.picture import grid
from shards.video.probe import timeline

GOLDEN = Path(__file__).parents[1] / "golden"
RATES = [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30)]


def stored(numbers, source_frames: int, fps) -> SimpleNamespace:
    """What `choose` looks at of a row of the sample table."""
    number = np.asarray(numbers)
    frames = SimpleNamespace(number=number, time=number / float(fps))
    return SimpleNamespace(source_frames=source_frames, fps=fps, frames=frames, inside=(0, len(number)))


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
    with pytest.raises(ValueError, match="must be head, tail or uniform; got 'middle'"):
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


# ---- where the frame rate varies ----


def shown_at(times, source_frames=None, fps=None) -> SimpleNamespace:
    """A video whose frames are shown at these seconds, all of them stored."""
    times = np.asarray(times, float)
    count = len(times)
    frames = SimpleNamespace(number=np.arange(count), time=times)
    rate = fps or (count - 1) / (times[-1] - times[0])
    return SimpleNamespace(source_frames=source_frames or count, fps=rate, frames=frames, inside=(0, count))


SCREEN = shown_at([*np.arange(120) / 30, *range(4, 13)])  # a screen recording: 4 s of movement, 8 s of slides


def test_a_variable_frame_rate_is_sampled_by_time():
    seconds = SCREEN.frames.time[choose(SCREEN, "uniform", 12)]
    assert seconds.tolist() == list(range(12))
    assert SCREEN.frames.time[choose(SCREEN, "head", 3)].tolist() == [0, 1, 2]
    assert SCREEN.frames.time[choose(SCREEN, "tail", 3)].tolist() == [9, 10, 11]
    assert SCREEN.frames.time[choose(SCREEN, "uniform", 99, rate=2)].tolist() == pytest.approx(
        [*np.arange(9) / 2, *range(5, 12)], abs=0.02
    )
    middles = SCREEN.frames.time[choose(SCREEN, "segment", 4)]
    assert middles == pytest.approx([1.5, 4.5, 7.5, 10.5], abs=0.51)


def test_counting_frames_remains_an_option():
    """The official code counts: of 129 frames at 10.7 a second it takes every tenth, and few of the last 8 seconds."""
    wanted = extractor_frames(129, SCREEN.fps, 12, "uniform")
    assert choose(SCREEN, "uniform_by_frame", 12).tolist() == wanted.tolist()
    assert (SCREEN.frames.time[wanted] > 4).sum() <= 1
    assert choose(SCREEN, "segment_by_frame", 12).tolist() == segment_frames(129, 12).tolist()


def test_draws_from_segments_of_time_stay_in_them():
    random = np.random.default_rng(0)
    for _ in range(50):
        drawn = SCREEN.frames.time[choose(SCREEN, "segment", 4, random=random)]
        edges = 12 * np.arange(5) / 4
        assert ((drawn >= edges[:-1] - 0.51) & (drawn <= edges[1:] + 0.51)).all()


def test_a_dropped_frame_or_jitter_is_no_variable_rate():
    jitter = np.random.default_rng(1).uniform(-0.01, 0.01, 300)
    for times in (np.arange(300) / 25 + jitter, np.delete(np.arange(300) / 25, 150)):
        video = shown_at(times, fps=25)
        for rule in ("uniform", "head", "tail", "segment"):
            assert np.array_equal(choose(video, rule, 12), choose(video, f"{rule}_by_frame", 12))


def test_frames_around_a_cut_are_never_drawn():
    frames = SimpleNamespace(number=np.arange(-10, 30), time=np.arange(-10, 30) / 25)
    video = SimpleNamespace(source_frames=20, fps=25, frames=frames, inside=(10, 30))
    random = np.random.default_rng(0)
    for rule in ("uniform", "head", "tail", "segment", "random"):
        for draw in (None, random):
            assert all(10 <= p < 30 for _ in range(20) for p in choose(video, rule, 12, random=draw))
    assert candidates(video, 5).tolist() == [10, 15, 20, 24, 29]


@pytest.mark.slow
def test_what_intra_stores_of_a_variable_rate_is_what_the_rules_ask_for():
    """At 3 frames a second, the frames that are stored give the same clips as all of them."""
    random = np.random.default_rng(7)
    for _ in range(50):
        times = np.cumsum(np.where(random.random(200) < 0.8, 0.04, random.uniform(0.04, 1.5, 200)))
        whole = shown_at(times)
        keep = np.array([on_grid(timeline(times, (0, 0), None, 1e-3), 3)(n) for n in range(200)])
        kept = SimpleNamespace(number=np.flatnonzero(keep), time=times[keep])
        stored = SimpleNamespace(source_frames=200, fps=whole.fps, frames=kept, inside=(0, int(keep.sum())))
        for rule, rate in (("uniform", 1), ("head", 1), ("tail", 1), ("uniform", 3)):
            assert kept.number[choose(stored, rule, 12, rate)].tolist() == choose(whole, rule, 12, rate).tolist()
