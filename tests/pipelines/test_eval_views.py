"""Several clips and crops of a video, and blocks of videos, as evaluation asks for them."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipelines.config import DataConfig
from pipelines.eval_loader import EvalLoader
from pipelines.frame_sampling import choose
from pipelines.requests import EvalRequests
from shards.split import Split
from tests.pipelines.conftest import pack_videos
from tests.pipelines.test_geometry import decoded
from tests.pipelines.test_lanes import pixels, psnr, textured
from tests.videos import encode_pictures

pytestmark = pytest.mark.slow  # imports DALI and open_clip

SIZES = {"wide": (322, 182), "tall": (146, 234), "square": (130, 130)}


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> dict[str, Split]:
    files = {f"{n}.mkv": encode_pictures(textured(13, s), 12, s, "ffv1", "matroska", {}) for n, s in SIZES.items()}
    folder = tmp_path_factory.mktemp("views")
    return {
        "video": pack_videos(folder / "copy", files, "copy", captions=1),
        "intra": pack_videos(folder / "intra", files, "intra", captions=1, short_side=112),
    }


def by_pil(picture: Image.Image, config: DataConfig) -> np.ndarray:
    """The recipe by hand: the short side scaled, and the crop along the long side; the middle of the short one."""
    width, height = config.geometry.size(*picture.size)
    picture, side = picture.resize((width, height), Image.Resampling.BICUBIC), config.image_size
    left, top = round((width - side) / 2), round((height - side) / 2)
    if width > height:
        left = {"start": 0, "centre": left, "end": width - side}[config.crop]
    elif height > width:
        top = {"start": 0, "centre": top, "end": height - side}[config.crop]
    return np.asarray(picture.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("crop", ["start", "centre", "end"])
@pytest.mark.parametrize("lane", ["video", "intra"])
@pytest.mark.parametrize("size", [(0, 112), (112, 96), (0, 90)], ids=["stored", "resize", "scaled"])
def test_crops_are_cut_along_the_long_side(splits, lane, crop, size):
    config = DataConfig(num_frames=2, resize=size[0], image_size=size[1], crop=crop, sampling="segment").filled()
    with closing(EvalLoader(splits[lane], config)) as reader:
        ((indices, frames, _),) = reader
    for index, clip in zip(indices.tolist(), frames, strict=True):
        positions = choose(splits[lane].video(index), "segment", 2)
        wanted = np.stack([by_pil(picture, config) for picture in decoded(splits[lane], index, positions)])
        assert psnr(pixels(clip, config), wanted) > 40


def test_only_crops_have_a_place():
    with pytest.raises(ValueError, match=r"data\.crop=end: data\.resize_mode=squash .* crops nothing"):
        DataConfig(crop="end", resize_mode="squash")
    with pytest.raises(ValueError, match=r"data\.crop must be one of start, centre, end"):
        DataConfig(crop="left")


@pytest.mark.parametrize("rule", ["uniform", "head", "tail", "segment"])
def test_clips_are_evenly_shifted(numbered, rule):
    config = DataConfig(num_frames=4, image_size=32, sampling=rule)

    def clips(n: int) -> list[list[np.ndarray]]:
        """[clip][video] positions."""
        made = [EvalRequests(numbered.copy, config, 0, 1, clip=(i, n)).samples() for i in range(n)]
        return [[sample.request.positions for sample in samples] for samples in made]

    (once,), thrice = clips(1), clips(3)
    for v in range(len(numbered.copy)):
        video = numbered.copy.video(v)
        assert np.array_equal(once[v], choose(video, rule, 4, 1))
        parts = [clip[v] for clip in thrice]
        assert all(1 <= len(part) <= 4 for part in parts)
        if len(choose(video, rule, 12, 3)) >= 3:
            whole = np.empty(sum(map(len, parts)), np.int64)
            for i, part in enumerate(parts):
                whole[i::3] = part
            assert np.array_equal(whole, choose(video, rule, 12, 3))
    assert any(not np.array_equal(thrice[0][v], thrice[1][v]) for v in range(len(numbered.copy)))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_take_whole_blocks(numbered, world):
    """12 videos in blocks of 5."""
    config, seen = replace(DataConfig(num_frames=1, image_size=32), eval_batch_size=4), []
    turns = set()
    for rank in range(world):
        requests = EvalRequests(numbered.copy, config, rank, world, block=5)
        turns.add(requests.batches)
        own = [sample.request.video.index for sample in requests.samples() if not sample.empty]
        assert {i // 5 % world for i in own} <= {rank} and own == sorted(own)
        seen += own
    assert sorted(seen) == list(range(12)) and len(turns) == 1
