"""Augmentation: what may be drawn, and that a pair draws the same however a run comes to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.config import DataConfig
from pipelines.eval_loader import EvalLoader
from pipelines.frame_sampling import candidates, choose, generator, ordered
from pipelines.loader import Loader
from pipelines.stages.augment import view
from tests.pipelines.conftest import SIDE
from tests.pipelines.test_lanes import number_shown, pixels
from tests.pipelines.test_loader import run, same

pytestmark = pytest.mark.slow  # imports DALI

CLIP = DataConfig(num_frames=4, image_size=SIDE, max_words=12)
ALL = replace(CLIP, random_crop=0.4, flip=0.5, colour=0.3, sampling="random", frame_order="random")


def test_random_crops_lie_in_the_picture_and_have_the_area_and_shape_asked_for():
    config = replace(CLIP, random_crop=0.25)
    seen = [view((160, 120), config, generator(0, 0, 0, i, view=True)) for i in range(500)]
    areas = np.array([v.width * v.height / (160 * 120) for v in seen])
    ratios = np.array([v.width / v.height for v in seen])
    assert all(v.x >= 0 and v.y >= 0 and v.x + v.width <= 160 and v.y + v.height <= 120 for v in seen)
    assert 0.24 < areas.min() < 0.3 and areas.max() > 0.85
    assert ratios.min() > 0.72 and ratios.max() < 1.37 and ratios.std() > 0.1
    assert len({(v.x, v.y) for v in seen}) > 300
    assert not any(v.flip for v in seen) and {v.brightness for v in seen} == {1.0}


def test_flips_and_colours_are_drawn_within_their_bounds():
    config = replace(CLIP, flip=0.25, colour=0.2)
    seen = [view((160, 120), config, generator(0, 0, i, 0, view=True)) for i in range(600)]
    assert 0.2 < np.mean([v.flip for v in seen]) < 0.3
    for name in ("brightness", "contrast", "saturation"):
        values = np.array([getattr(v, name) for v in seen])
        assert 0.8 <= values.min() < 0.82 and 1.18 < values.max() <= 1.2
    assert len({(v.x, v.y, v.width, v.height) for v in seen}) == 1


@pytest.mark.parametrize("profile", ["copy", "intra"])
def test_a_resumed_run_and_any_number_of_ranks_draw_the_same(numbered, profile):
    split = getattr(numbered, profile)
    unbroken = run(split, 9, config=ALL)
    assert all(map(same, run(split, 5, start=(0, 4), config=ALL), unbroken[4:]))
    halves = [run(split, 3, config=ALL, rank=rank, world=2) for rank in range(2)]
    for step in range(3):
        assert torch.equal(torch.cat([half[step].frames for half in halves]), unbroken[step].frames)
    plain = run(split, 1, config=replace(ALL, random_crop=0.0, flip=0.0, colour=0.0))[0]
    assert np.array_equal(plain.frame_numbers, unbroken[0].frame_numbers), "views do not change which frames are drawn"
    assert not torch.equal(plain.frames, unbroken[0].frames)


def test_all_frames_of_a_clip_get_the_same_view(numbered):
    config = replace(ALL, sampling="segment", num_frames=12)
    with Loader(numbered.intra, config, batch_size=12, seed=1) as loader:
        (batch,) = loader.batches(count=1)
    row = batch.keys.index("one_frame")  # one picture, twelve times
    assert batch.frame_mask[row].all()
    assert (batch.frames[row] == batch.frames[row, :1]).all()


@pytest.mark.parametrize("profile", ["copy", "intra"])
def test_a_flip_mirrors_and_evaluation_is_never_augmented(numbered, profile):
    split = getattr(numbered, profile)
    plain, flipped = (run(split, 1, config=replace(CLIP, flip=f))[0] for f in (0.0, 1.0))
    difference = (plain.frames - flipped.frames.flip(-1)).abs().max()
    assert difference < 0.02 and not torch.equal(plain.frames, flipped.frames)
    readers = [EvalLoader(split, config) for config in (CLIP, replace(ALL, sampling="uniform"))]
    for (_, a, _), (_, b, _) in zip(*readers, strict=True):
        assert torch.equal(a, b)
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("profile", ["copy", "intra"])
def test_the_order_of_frames(numbered, profile):
    split = getattr(numbered, profile)
    for order in ("forward", "reverse", "random"):
        for batch in run(split, 3, config=replace(CLIP, frame_order=order)):
            for row, numbers in enumerate(batch.frame_numbers):
                used = batch.frame_mask[row].numpy()
                shown = [number_shown(p) for p in pixels(batch.frames[row][batch.frame_mask[row]])]
                assert shown == numbers[used].tolist() and (np.flatnonzero(used) == np.arange(used.sum())).all()
                if order != "random":
                    step = 1 if order == "forward" else -1
                    assert (np.diff(numbers[used]) * step > 0).all()
    with Loader(split, replace(CLIP, frame_order="random"), batch_size=12, seed=0) as loader:
        assert any((np.diff(b.frame_numbers, axis=1) < 0).any() for b in loader.batches(count=1))


def test_random_sampling_takes_each_frame_once_and_any(numbered):
    video = next(v for v in map(numbered.copy.video, range(12)) if v.key == "long_25")
    drawn = np.array([choose(video, "random", 12, random=generator(0, e, 0, 0)) for e in range(200)])
    assert (np.diff(drawn, axis=1) > 0).all() and drawn.min() < 10 and drawn.max() > 410
    pool = candidates(video, 20)
    assert len(pool) == 20 and pool[0] == 0 and pool[-1] == 420
    assert set(choose(video, "random", 12, random=generator(0, 0, 0, 0), among=pool)) <= set(pool.tolist())
    assert set(choose(video, "segment", 12, random=generator(0, 0, 0, 0), among=pool)) <= set(pool.tolist())
    assert choose(video, "random", 12).tolist() == choose(video, "uniform", 12).tolist(), "testing draws nothing"
    assert ordered(np.arange(3), "reverse").tolist() == [2, 1, 0]
    assert ordered(np.arange(3), "random").tolist() == [0, 1, 2], "testing shuffles nothing"
