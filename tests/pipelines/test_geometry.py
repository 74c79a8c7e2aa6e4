"""Every resize mode and interpolation, in every lane, beside open_clip's own preprocessing of the same decoded frames."""

import io
from contextlib import closing
from dataclasses import replace
from itertools import product

import av
import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from pipelines.config import CacheConfig, DataConfig
from pipelines.frame_sampling import generator
from pipelines.lanes import Lane
from pipelines.loader import Loader
from pipelines.requests import ClipRequest
from pipelines.stages.augment import view
from pipelines.stages.resize import resized
from shards.split import Split
from tests.pipelines.conftest import pack_videos
from tests.pipelines.test_lanes import pixels, psnr, textured
from tests.videos import encode_pictures

pytestmark = pytest.mark.slow  # imports DALI and open_clip

LEAST_DB = 45
SIZES = {"wide": (322, 182), "tall": (146, 234), "square": (130, 130)}
MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")
RECIPES = [
    DataConfig(num_frames=2, image_size=side, resize_mode=mode, interpolation=interpolation, fill=37).filled()
    # smaller, and larger than what is stored
    for mode, interpolation, side in product(MODES, INTERPOLATIONS, (97, 256))
]
NAMES = [f"{c.resize_mode} {c.interpolation} {c.image_size}" for c in RECIPES]


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> dict[str, Split]:
    """Three textured clips, their sides odd or even, as `copy` and as `intra` with a short side of 112."""
    options = {"crf": "12", "bf": "2", "g": "12"}
    files = {f"{n}.mkv": encode_pictures(textured(13, s), 12, s, "ffv1", "matroska", {}) for n, s in SIZES.items()}
    files["wide.mkv"] = encode_pictures(textured(13, SIZES["wide"]), 12, SIZES["wide"], "libx264", "matroska", options)
    folder = tmp_path_factory.mktemp("geometry")
    return {
        "video": pack_videos(folder / "copy", files, "copy", captions=1),
        "intra": pack_videos(folder / "intra", files, "intra", captions=1, short_side=112),
    }


def decoded(split: Split, index: int, positions: np.ndarray) -> list[Image.Image]:
    """The stored frames, by libav or PIL alone."""
    video = split.video(index)
    if split.info["profile"]["name"] == "copy":
        with av.open(io.BytesIO(split.read(video))) as file:
            frames = [frame.to_image() for frame in file.decode(video=0)]
        return [frames[p] for p in positions]
    table = video.frames
    return [Image.open(io.BytesIO(split.read(video, int(table.offset[p]), int(table.size[p])))) for p in positions]


def by_open_clip(pictures: list[Image.Image], config: DataConfig) -> torch.Tensor:
    """[n, 3, H, W] normalised."""
    about = PreprocessCfg(
        size=config.image_size, mean=config.mean, std=config.std, interpolation=config.interpolation,
        resize_mode=config.resize_mode, fill_color=config.fill,
    )  # fmt: skip
    transform = image_transform_v2(about, is_train=False)
    return torch.stack([transform(picture) for picture in pictures])


def worst(split: Split, config: DataConfig, cache: CacheConfig | None = None, training: bool = False) -> float:
    """The lowest PSNR of any clip against open_clip, in dB."""
    found = []
    for _ in range(2 if cache else 1):  # the second time out of the cache
        with closing(Lane(split, config, torch.device("cpu"), 3, cache=cache, training=training)) as lane:
            requests = [ClipRequest(split.video(i), np.array([0, 3]), draw=(0, 0, i, 0)) for i in range(len(split))]
            plan = lane.batch(requests)
            assert not any(sample.error for sample in plan.clips)
            for i, frames in enumerate(plan.frames):
                wanted = by_open_clip(decoded(split, i, np.array([0, 3])), config)
                found.append(psnr(pixels(frames, config), pixels(wanted, config)))
    return min(found)


@pytest.mark.parametrize("config", RECIPES, ids=NAMES)
@pytest.mark.parametrize("lane", ["video", "intra"])
def test_frames_are_open_clips(splits, lane, config):
    found = worst(splits[lane], config)
    print(f"\n{lane} lane, {config.resize_mode}, {config.interpolation}, {config.image_size}: {found:.1f} dB")
    assert found >= LEAST_DB


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lane", ["video", "intra"])
def test_cached_frames_are_open_clips(splits, lane, mode, tmp_path):
    config = replace(RECIPES[0], resize_mode=mode)
    cache = CacheConfig(dir=str(tmp_path), max_gb=0.01, frames=13)
    assert worst(splits[lane], config, cache, training=True) >= LEAST_DB
    # and of all frames of a video, uncropped until a view is drawn: this one changes nothing
    flipped = replace(config, sampling="random", flip=1e-9)
    assert worst(splits[lane], flipped, cache, training=True) >= LEAST_DB


def test_a_cache_of_another_geometry_is_another_cache(splits, tmp_path):
    base = RECIPES[0]
    configs = [replace(base, resize_mode=mode, interpolation=how) for mode, how in product(MODES, INTERPOLATIONS)]
    configs += [replace(base, resize_mode="longest", fill=0), replace(base, image_size=96)]
    for count, config in enumerate(configs, 1):
        with closing(Lane(splits["intra"], config, torch.device("cpu"), 1, cache=CacheConfig(dir=str(tmp_path)))):
            names = {path.stem for path in tmp_path.glob("frames-*.json")}
        assert len(names) == count


@pytest.mark.parametrize(
    ("settings", "size"),
    [({"squash": 97}, (97, 97)), ({"long_side": 97}, None), ({"short_side": 97}, None)],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_pictures_stored_as_the_recipe_scales_them_are_not_resized(tmp_path, monkeypatch, settings, size):
    files = {f"{n}.mkv": encode_pictures(textured(7, s), 12, s, "ffv1", "matroska", {}) for n, s in SIZES.items()}
    split = pack_videos(tmp_path / "set", files, "intra", captions=1, **settings)
    mode = {"squash": "squash", "long_side": "longest", "short_side": "shortest"}[next(iter(settings))]
    config = DataConfig(num_frames=2, image_size=97, resize_mode=mode, fill=200).filled()

    def refuse(*args, **options):
        raise AssertionError("a resize in the graph")

    monkeypatch.setattr("pipelines.stages.graph.fn.resize", refuse)
    with closing(Lane(split, config, torch.device("cpu"), 3)) as lane:
        plan = lane.batch([ClipRequest(split.video(i), np.array([0, 1])) for i in range(len(split))])
        for i, frames in enumerate(plan.frames):
            wanted = by_open_clip(decoded(split, i, np.array([0, 1])), config)
            assert np.abs(pixels(frames, config) - pixels(wanted, config)).max() < 1.01
    with (
        pytest.raises(AssertionError, match="a resize"),
        closing(Lane(split, replace(config, image_size=96), torch.device("cpu"), 3)) as lane,
    ):
        lane.batch([ClipRequest(split.video(0), np.array([0, 1]))])


@pytest.mark.parametrize("augmented", [False, True])
def test_squashed_videos_are_not_resized_either(tmp_path, monkeypatch, augmented):
    def refuse(*args, **options):
        raise AssertionError("a resize in the graph")

    monkeypatch.setattr("pipelines.stages.graph.fn.resize", refuse)
    monkeypatch.setattr("pipelines.stages.resize.interpolate", refuse)
    split = pack_videos(
        tmp_path / "set",
        {"a.mkv": encode_pictures(textured(7, SIZES["tall"]), 12, SIZES["tall"], "ffv1", "matroska", {})},
        "h264",
        1,
        squash=96,
    )
    config = DataConfig(num_frames=1, image_size=96, resize_mode="squash", flip=1e-9 if augmented else 0.0).filled()
    with closing(Lane(split, config, torch.device("cpu"), 1, training=True)) as lane:
        (frames,) = lane.batch([ClipRequest(split.video(0), np.array([0]), draw=(0, 0, 0, 0))]).frames
    with av.open(io.BytesIO(split.read(split.video(0)))) as file:
        first = next(file.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(pixels(frames[0], config) - first).max() < 1.01


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lane", ["video", "intra"])
def test_a_random_crop_is_a_window_of_the_whole_picture(splits, lane, mode):
    config = replace(RECIPES[0], resize_mode=mode, random_crop=0.3)
    split = splits[lane]
    with closing(Lane(split, config, torch.device("cpu"), 3, training=True)) as one:
        requests = [ClipRequest(split.video(i), np.array([0]), draw=(0, 0, i, 0)) for i in range(len(split))]
        frames = one.batch(requests).frames
    for i, request in enumerate(requests):
        (picture,) = decoded(split, i, np.array([0]))
        seen = view(picture.size, config, generator(*request.draw, view=True))
        assert seen.scaled is None, "it fills the frame"
        box = (seen.x, seen.y, seen.x + seen.width, seen.y + seen.height)
        wanted = picture.resize((config.image_size,) * 2, Image.Resampling.BICUBIC, box)
        assert psnr(pixels(frames[i, 0], config), np.asarray(wanted)) >= LEAST_DB


@pytest.mark.parametrize("mode", MODES)
def test_a_random_crop_of_what_is_cached_is_the_same_part(splits, mode, tmp_path):
    split, config = splits["video"], replace(RECIPES[0], resize_mode=mode, random_crop=0.3, sampling="random")
    requests = [ClipRequest(split.video(i), np.array([4]), draw=(0, 0, i, 0)) for i in range(len(split))]
    found = []
    for cache in (None, CacheConfig(dir=str(tmp_path), max_gb=0.1, frames=13)):
        with closing(Lane(split, config, torch.device("cpu"), 3, training=True, cache=cache)) as lane:
            found.append(pixels(lane.batch(requests).frames, config))
    coarse = [frames[:, 0, :96, :96].reshape(3, 8, 12, 8, 12, 3).mean((2, 4)) for frames in found]
    for direct, cached, other in zip(*coarse, np.roll(coarse[1], 1, axis=2), strict=True):
        print(f"{mode}: {psnr(direct, cached):.1f} dB, shifted by an eighth {psnr(direct, other):.1f} dB")
        assert psnr(direct, cached) >= 30 > 25 > psnr(direct, other)


def test_changed_colours_leave_the_margin_alone(splits):
    config = replace(RECIPES[0], resize_mode="longest", colour=0.9, flip=0.5, fill=37)
    split = splits["intra"]
    with closing(Lane(split, config, torch.device("cpu"), 3, training=True)) as lane:
        requests = [ClipRequest(split.video(i), np.array([0]), draw=(0, 0, i, 0)) for i in range(len(split))]
        frames = pixels(lane.batch(requests).frames, config)[:, 0]
    for request, frame in zip(requests, frames, strict=True):
        width, height = config.geometry.size(request.video.width, request.video.height)
        left, top = (config.image_size - width) // 2, (config.image_size - height) // 2
        inside = np.zeros(frame.shape[:2], bool)
        inside[top : top + height, left : left + width] = True
        assert np.allclose(frame[~inside], 37, atol=0.01) and not np.allclose(frame[inside], 37, atol=20)


@pytest.mark.parametrize("mode", MODES)
def test_every_shape_gets_open_clips_size_and_place(mode):
    config = DataConfig(image_size=32, resize_mode=mode, fill=9).filled()
    draw = np.random.default_rng(0)
    for width, height in [(9, 200), (200, 9), (31, 32), (33, 32), (64, 63), *draw.integers(8, 99, (60, 2)).tolist()]:
        picture = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        wanted = pixels(by_open_clip([Image.fromarray(picture)], config), config)[0]
        (made,) = resized([picture], config, False)
        assert psnr(made, wanted) >= LEAST_DB, (width, height)
        assert mode != "longest" or np.array_equal((made == 9).all(2), (wanted.round() == 9).all(2))


def test_the_loader_takes_the_recipe(splits):
    config = DataConfig(num_frames=2, image_size=64, max_words=8, resize_mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    with Loader(splits["intra"], config, batch_size=3, seed=0) as loader:
        (batch,) = loader.batches(count=1)
    assert batch.frames.shape == (3, 2, 3, 64, 64)
    keys = [splits["intra"].video(i).id for i in range(3)]
    for row, key in enumerate(batch.keys):
        video = splits["intra"].video(keys.index(key))
        positions = np.searchsorted(video.frames.number, batch.frame_numbers[row])
        wanted = by_open_clip(decoded(splits["intra"], keys.index(key), positions), config.filled())
        assert psnr(pixels(batch.frames[row], config), pixels(wanted, config)) >= LEAST_DB
