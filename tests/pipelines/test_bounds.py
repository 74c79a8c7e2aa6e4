"""Settings that are made in a program, not read from YAML, are checked alike."""

import pytest

from pipelines.bounds import WRONG_KIND, convert, kind_name
from pipelines.config import CacheConfig, DataConfig


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_size": "abc"}, r"data\.image_size='abc': must be a whole number"),
        ({"num_frames": 4.5}, r"data\.num_frames=4\.5: must be a whole number"),
        ({"num_frames": True}, r"data\.num_frames=True: must be a whole number"),
        ({"sampling": ["uniform"]}, r"data\.sampling=\['uniform'\]: must be text"),
        ({"mean": 0.5}, r"data\.mean=0\.5: must be a list"),
        ({"flip": "0.5"}, r"data\.flip='0\.5': must be a number"),
        ({"flip": float("nan")}, r"data\.flip=nan: must be a finite number"),
        ({"num_frames": 0}, r"data\.num_frames=0: must be at least 1"),
        ({"paragraph": 1}, r"data\.paragraph=1: must be true or false"),
    ],
)
def test_a_wrong_value_is_named(values, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(**values)


def test_right_values_pass():
    assert DataConfig(train=("a", "b"), weights=[1, 2.5], flip=1).flip == 1
    assert CacheConfig(max_gb=3).max_gb == 3


def test_kinds():
    assert convert(float, "1e-4", yaml=True) == 1e-4
    assert convert(float, "1e-4") is WRONG_KIND
    assert convert(float, 10**400) is WRONG_KIND
    assert convert(int | None, None) is None
    assert convert(int | None, "x") is WRONG_KIND
    assert convert(tuple[float, ...], [1, "2"], yaml=True) == (1.0, 2.0)
    assert kind_name(int | None) == "a whole number or null"
