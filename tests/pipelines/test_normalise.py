"""The compiled normalisation: where its library is kept, and what is left where it cannot be."""

import tempfile

import numpy as np
import pytest
import torch

from pipelines.config import DataConfig
from pipelines.stages import normalise
from pipelines.stages.normalise import Normalise


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """The folder for temporary files, while the library is loaded anew."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(normalise, "_library", normalise._library.__wrapped__)
    return folder


@pytest.mark.parametrize("writable", [True, False])
def test_nothing_but_the_library_in_the_cache_stays(temporary, tmp_path, monkeypatch, writable):
    cache = tmp_path / "cache"
    (cache.mkdir if writable else cache.touch)()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    one = Normalise(DataConfig().filled())
    assert one._kernel is not None and not list(temporary.iterdir())
    kept = list(cache.rglob("*.*")) if writable else []
    assert [p.suffix for p in kept] == [".so"] * writable
    frames, out = np.full((1, 2, 2, 3), 128, np.uint8), torch.empty(1, 3, 2, 2)
    one.into(out, frames)
    assert torch.allclose(out, one.on_device(torch.from_numpy(frames)))


@pytest.mark.parametrize("writable", [True, False])
def test_a_compiler_that_fails_leaves_nothing(temporary, tmp_path, monkeypatch, writable):
    cache = tmp_path / "cache"
    (cache.mkdir if writable else cache.touch)()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("CC", "false")
    with pytest.warns(UserWarning, match="does not compile, torch normalises"):
        assert Normalise(DataConfig().filled())._kernel is None
    assert not list(temporary.iterdir()) and not list(cache.rglob("*.*"))
