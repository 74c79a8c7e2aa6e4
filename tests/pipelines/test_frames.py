"""The pictures that `python -m c4c.shard frames` writes are those that the loader decodes, of every kind of split."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from c4c.shard import main
from pipelines.frame_sampling import choose
from pipelines.frames import pictures, write_frames
from shards.annotations import Caption, Item
from shards.packing.pack import pack
from shards.split import Split
from shards.video.profiles import Profile
from tests.pipelines.test_remote import store  # noqa: F401 a fixture
from tests.videos import encode, number_in

pytestmark = pytest.mark.slow  # imports DALI


def test_they_are_named_after_frame_and_second(numbered, tmp_path: Path) -> None:
    for split in (numbered.copy, numbered.intra):
        written = write_frames(split, "long_25", tmp_path / split.info["profile"]["name"], rule="segment", num_frames=6)
        video = split.find("long_25")
        assert [w.position for w in written] == choose(video, "segment", 6).tolist()
        for one in written:
            assert number_in(np.asarray(Image.open(one.file))) == one.number
            assert one.file.name == f"{one.number:06d}_{one.number / 25:.3f}.png"


@pytest.mark.parametrize("name", ["h264", "hevc", "av1"])
def test_re_encoded_profiles(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.mp4").write_bytes(encode(60, 25))
    items = [Item("a", tmp_path / "a.mp4", (Caption("x"),))]
    pack(items, tmp_path / "out", dataset="d", split="s", profile=Profile(name=name, short_side=64), workers=1)
    written = write_frames(Split(tmp_path / "out"), "a", tmp_path / "png", positions=[0, 3, 6])
    assert [number_in(np.asarray(Image.open(w.file))) for w in written] == [w.number for w in written] == [0, 25, 50]


@pytest.fixture(scope="module")
def url(store, numbered) -> dict[str, str]:  # noqa: F811
    """The numbered videos on a server, in a bucket of their own."""
    _, files = store
    files.mkdir("shown")
    for profile in ("intra", "copy"):
        files.put(f"{getattr(numbered, profile).path}/", f"shown/{profile}/", recursive=True)
    return {profile: f"s3://shown/{profile}" for profile in ("intra", "copy")}


@pytest.mark.parametrize("profile", ["copy", "intra"])
def test_a_remote_split(url, numbered, tmp_path: Path, profile: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["frames", url[profile], "--key", "ntsc_portrait", "--positions", "0,3", "--out", str(tmp_path)]) == 0
    local = getattr(numbered, profile)
    expected = pictures(local, local.find("ntsc_portrait"), np.array([0, 3]))
    found = [np.asarray(Image.open(file)) for file in sorted(tmp_path.glob("*.png"))]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    said = capsys.readouterr().out
    assert "source frame" in said.replace("\n", " ") and all(file.name in said for file in tmp_path.glob("*.png"))


def test_mistakes_are_one_sentence(numbered, tmp_path: Path, capsys) -> None:
    path = str(numbered.intra.path)
    for words, message in (
        (["--key", "long_52"], "holds no video called 'long_52'. Did you mean 'long_25'"),
        (["--key", "short", "--positions", "0,99"], "short has the stored frames 0 to"),
        (["--key", "short", "--rule", "middle"], "--rule must be one of uniform, head"),
        (["--key", "short", "--rule", "head", "--positions", "0"], "--rule and --positions: give a rule that chooses"),
    ):
        assert main(["frames", path, *words, "--out", str(tmp_path / "none")]) == 1
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
    assert not (tmp_path / "none").exists()


def test_a_full_disk_names_the_picture(numbered, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("c4c.files._ROOM", 0)  # or it would be known before
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        code = main(["frames", str(numbered.intra.path), "--key", "short", "--positions", "0", "--out", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = " ".join(capsys.readouterr().err.split())
    assert code == 1 and re.search(
        rf"error: {tmp_path}/\d+_0\.\d+\.png cannot be read or written \(File too large\)", said
    )
