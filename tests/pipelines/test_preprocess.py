"""Settings that are left blank are the backbone's."""

from dataclasses import replace

import pytest

from pipelines.config import DataConfig
from pipelines.preprocess import CLIP, Preprocess

SIGLIP = Preprocess(
    image_size=256,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    interpolation="bilinear",
    resize_mode="squash",
    fill=9,
    max_words=64,
)


def test_what_is_blank_is_the_backbones_and_what_is_set_stays():
    for by in (CLIP, SIGLIP):
        filled = DataConfig().filled(by)
        assert {name: getattr(filled, name) for name in vars(by)} == vars(by)
        assert filled.filled(CLIP) is filled
    assert DataConfig().filled() == DataConfig().filled(CLIP)
    own = DataConfig(
        image_size=64,
        mean=(0.1,) * 3,
        std=(0.2,) * 3,
        interpolation="bicubic",
        resize_mode="longest",
        fill=0,
        max_words=8,
    )
    assert own.filled(SIGLIP) == own
    assert DataConfig(image_size=128, fps=2).filled(SIGLIP) == replace(DataConfig(fps=2).filled(SIGLIP), image_size=128)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"resize_mode": "crop"}, "data.resize_mode must be one of shortest, longest, squash; got 'crop'"),
        ({"interpolation": "nearest"}, "data.interpolation must be one of bicubic, bilinear; got 'nearest'"),
        ({"fill": 256}, "data.fill=256: must be at most 255"),
        ({"resize_mode": "squash", "resize": 256}, "data.resize=256 is the short side before a crop, and data.resize_mode=squash"),
        ({"std": (0.5, 0.5, 0.0)}, "data.mean and data.std: give one number for each"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**wrong)


def test_a_setting_that_does_not_go_with_the_backbone_is_refused_when_it_is_known():
    with pytest.raises(
        ValueError, match=r"data.resize=300 .* data.resize_mode=squash \(maybe the backbone's\) crops nothing"
    ):
        DataConfig(resize=300).filled(SIGLIP)
    with pytest.raises(ValueError, match=r"data\.resize=240 is smaller than data\.image_size=256"):
        DataConfig(resize=240).filled(replace(SIGLIP, resize_mode="shortest"))
