"""What `launch/train.py --check` looks at."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from c4c.training.check import Part
from shards.remote import Local
from shards.split import Split
from tests.shards import sets

pytestmark = pytest.mark.slow  # imports DALI


def test_a_remote_test_split_is_read_with_the_settings_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets.packed(sets.source(tmp_path / "videos"), tmp_path / "set")
    files = fsspec.filesystem("memory")
    files.put(f"{tmp_path / 'set'}/", "/checked/set/", recursive=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    part, whole = Part("memory://checked/set", 2, Local(tmp_path / "local", 0.05, 5.0)), Split(tmp_path / "set")
    assert len(part) == 2 and len(whole) == 5
    assert [part.read(part.video(i)) for i in range(2)] == [whole.read(whole.video(i)) for i in range(2)]
    assert list((tmp_path / "local").glob("*/*.tar")) and not (tmp_path / "home").exists()
    files.rm("/checked", recursive=True)
