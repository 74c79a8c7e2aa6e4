"""Shards packed for another geometry than the recipe's: refused where pictures would be wrong, said where they lose."""

import re
from dataclasses import replace

import pytest
import torch

from pipelines.config import DataConfig
from pipelines.eval_loader import EvalLoader
from pipelines.lanes import lane_name, require_decoder
from pipelines.loader import Loader
from pipelines.survey import notes
from shards.concat import open_splits
from shards.split import Split
from tests.pipelines.conftest import pack_videos
from tests.videos import encode

pytestmark = pytest.mark.slow  # imports DALI

PLAIN = DataConfig(image_size=64)


@pytest.fixture(scope="module")
def packed_in_three_ways(tmp_path_factory) -> dict[str, Split]:
    """160x120, 120x160 and 128x128 pixels, packed by each side; the order is that of data.resize_mode."""
    sizes = {"wide": (160, 120), "tall": (120, 160), "square": (128, 128)}
    files = {f"{name}.mp4": encode(4, 12, size) for name, size in sizes.items()}
    folder, ways = (
        tmp_path_factory.mktemp("ways"),
        {"shortest": "short_side", "longest": "long_side", "squash": "squash"},
    )
    return {
        mode: pack_videos(folder / mode, files, "intra", 1, **{setting: 64 + 16 * i})
        for i, (mode, setting) in enumerate(ways.items())
    }


@pytest.mark.parametrize(
    ("packed", "recipe", "said"),
    [
        ("shortest", {"resize_mode": "squash"}, None),
        ("shortest", {"resize_mode": "longest"}, None),
        ("longest", {"resize_mode": "longest", "image_size": 80}, None),
        ("squash", {"resize_mode": "squash", "image_size": 96}, None),
        ("squash", {"resize_mode": "squash", "image_size": 48}, None),
        ("shortest", {"resize_mode": "squash", "image_size": 96},
         "a short side of 64 pixels, and data.resize_mode=squash with data.image_size=96 scales it up 1.50 times at most: pack it "
         "with --squash 96"),
        ("shortest", {"resize_mode": "longest", "image_size": 96},
         "a short side of 64 pixels, and data.resize_mode=longest with data.image_size=96 scales it up 1.50 times at most: pack it "
         "with --long-side 96"),
        ("longest", {"resize_mode": "longest", "image_size": 120},
         "a long side of 80 pixels, and data.image_size=120 scales it up 1.50 times: pack it with --long-side 120"),
        ("longest", {"resize": 72},
         "a long side of 80 pixels, and data.resize_mode=shortest with data.resize=72 scales it up 1.20 times at most: pack it "
         "with --short-side 72"),
        ("squash", {"resize_mode": "squash", "image_size": 120},
         "96x96 pixels, squashed, and data.image_size=120 scales it up 1.25 times: pack it with --squash 120"),
    ],
)  # fmt: skip
def test_pictures_packed_for_another_geometry_are_said_where_they_lose(packed_in_three_ways, packed, recipe, said):
    split, config = packed_in_three_ways[packed], replace(PLAIN, **recipe)
    assert notes(split, None, config) == ([f"{split.path} was packed with {said}"] if said else [])
    assert lane_name(split, config.filled()) == "intra"


@pytest.mark.parametrize("mode", ["shortest", "longest"])
def test_squashed_pictures_are_refused_where_the_shape_counts(packed_in_three_ways, mode):
    split, config = packed_in_three_ways["squash"], replace(PLAIN, image_size=96, resize_mode=mode)
    side, option = {"shortest": ("short", "--short-side 96"), "longest": ("long", "--long-side 96")}[mode]
    said = re.escape(
        f"{split.path} was packed with --squash 96: its pictures are 96x96 pixels, squashed, and data.resize_mode={mode} wants "
        f"the videos' own shape, with a {side} side of 96 pixels. Pack the videos with {option}, or"
    )
    both = open_splits([packed_in_three_ways["shortest"].path, split.path])
    for found in (split, both):
        with pytest.raises(ValueError, match=said):
            require_decoder(found, config.filled(), torch.device("cpu"))
        with pytest.raises(ValueError, match=said):
            Loader(found, config, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=said):
        EvalLoader(split, config)
    with Loader(both, replace(config, resize_mode="squash"), batch_size=2, seed=0) as loader:
        assert next(loader.batches()).frames.shape[-2:] == (96, 96)
