"""Where what may be deleted is kept."""

import os
from pathlib import Path

import pytest

from shards.user_cache import user_cache


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """A user whom a container knows by number alone."""

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_home_has_the_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "c4c"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert user_cache() == tmp_path / "other" / "c4c"


def test_without_a_home_it_is_a_folder_of_this_user(homeless):
    assert user_cache() == user_cache() == homeless / f"c4c-cache-{os.getuid()}"
    assert user_cache().stat().st_mode & 0o777 == 0o700


def test_without_a_home_a_folder_that_somebody_else_made_is_not_used(homeless, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: homeless.stat().st_uid + 1)
    (homeless / f"c4c-cache-{os.getuid()}").mkdir()  # by the user of before
    assert user_cache().name.startswith(f"c4c-cache-{os.getuid()}-")


def test_no_folder_is_asked_of_the_home_elsewhere():
    root = Path(__file__).parents[2]
    files = [path for room in ("c4c", "pipelines", "shards") for path in (root / room).rglob("*.py")]
    assert [p.name for p in files if "Path.home()" in p.read_text()] == ["user_cache.py"]
