"""Videos packed squashed, or by their long side: what is stored, what the split says of it, and what is not mixed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from c4c.shard import main
from shards import ShardError
from shards.annotations import Item
from shards.split import Split
from shards.tools.info import describe
from shards.tools.repair import repair
from shards.tools.reshard import merge
from shards.tools.verify import verify
from shards.video.geometry import Geometry, stored_geometry
from shards.video.profiles import Profile
from tests import videos
from tests.shards.sets import INTRA, files, packed
from tests.shards.video.stored import shown, stored

SQUASHED = replace(INTRA, squash=72)
FITTED = replace(INTRA, long_side=72)


@pytest.mark.parametrize("name", ["intra", "h264"])
@pytest.mark.parametrize(("size", "fitted"), [((160, 120), (96, 72)), ((120, 156), (74, 96)), ((64, 64), (96, 96))])
def test_pictures_are_stored_squashed_or_fitted(name, size, fitted) -> None:
    data = videos.encode(12, 12, size)
    for settings, wanted in (({"squash": 96}, (96, 96)), ({"long_side": 96}, fitted)):
        what = stored(data, name, fps=12, **settings)
        assert (what.width, what.height) == wanted
        assert shown(what) == {n: n for n in range(12)}, "the numbers in the pictures can be read"


def test_444_is_squashed_as_pil_does_it() -> None:
    what = stored(videos.encode(2, 2, (120, 160)), squash=64, chroma=444, quality=1)
    assert (what.width, what.height) == (64, 64) and shown(what) == {0: 0, 1: 1}


def test_one_size_is_recorded() -> None:
    assert Profile(squash=256).describe() == {"name": "intra", "fps": 3, "squash": 256, "quality": 3, "chroma": 420}
    assert Profile(name="h264", long_side=256).describe()["long_side"] == 256
    assert Profile(name="copy", squash=256).describe() == {"name": "copy"}
    geometries = {None: "short_side", "squash": "squash", "long_side": "long_side"}
    for setting, key in geometries.items():
        about = Profile(**({setting: 96} if setting else {"short_side": 96})).describe()
        assert stored_geometry(about) == Geometry({"short_side": "shortest", "long_side": "longest"}.get(key, key), 96)
        assert [name for name in about if name in geometries.values()] == [key]
    assert stored_geometry({"name": "copy"}) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"squash": 8}, "--squash 8: must be a whole number from 16 to 4096"),
        ({"squash": 64, "long_side": 64}, "--long-side 64 and --squash 64: give one of them"),
        ({"name": "h264", "squash": 65}, "--squash 65: h264 needs an even number of pixels"),
        ({"name": "av1", "long_side": 65}, "--long-side 65: av1 needs an even number of pixels"),
    ],
)
def test_sizes_that_make_no_sense(settings, words) -> None:
    with pytest.raises(ShardError, match=words):
        Profile(**settings)


def test_a_split_keeps_its_geometry(items: list[Item], intra: Path, tmp_path: Path) -> None:
    out = tmp_path / "train"
    packed(items, out, SQUASHED)
    whole = files(out)
    assert describe(out)["profile"] == "intra, fps 3, squash 72, quality 3, chroma 420"
    assert describe(out)["frame size"] == "72x72 (5)"
    assert verify(out, 1) == []
    with pytest.raises(ShardError, match=r"pictures are packed with --squash 72 there, --short-side 64 asked for"):
        packed(items, out, INTRA)
    with pytest.raises(ShardError, match=r"--squash 72 there, --long-side 72 asked for, so every video .* again"):
        packed(items, out, FITTED, update=True)
    with pytest.raises(ShardError, match=r"squash is 72 there, 64 asked for"):
        packed(items, out, replace(SQUASHED, squash=64), update=True)
    with pytest.raises(ShardError, match=r"differ in their profile \(short_side: 64 and None; squash: None and 72\)"):
        merge([intra, out], tmp_path / "both")
    packed(items, out, SQUASHED, update=True)
    assert files(out) == whole
    lost = Path(shutil.copytree(out, tmp_path / "lost" / "train"))
    for path in [p for p in lost.iterdir() if p.suffix != ".tar"]:
        path.unlink()
    repair(lost, name="set", workers=1)
    assert files(lost) == whole


def test_a_record_with_an_impossible_size_is_not_believed(items: list[Item], tmp_path: Path) -> None:
    packed(items[:1], tmp_path / "train", SQUASHED)
    record = tmp_path / "train/dataset.json"
    info = json.loads(record.read_text())
    for change, words in (
        ({"squash": 0}, "the profile's 'squash' is 0"),
        ({"short_side": 72}, "has short_side and squash"),
    ):
        record.write_text(json.dumps(info | {"profile": info["profile"] | change}))
        with pytest.raises(ShardError, match=words):
            Split(tmp_path / "train")


def test_the_command_takes_one_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(videos.encode(12, 12, (160, 120)))
    (tmp_path / "captions.csv").write_text("video,caption\na,one\n")
    command = [
        "folder",
        "--videos",
        str(folder),
        "--captions",
        str(tmp_path / "captions.csv"),
        "--workers",
        "1",
        "--out",
    ]
    assert main([*command, str(tmp_path / "square"), "--squash", "48"]) == 0
    assert main([*command, str(tmp_path / "long"), "--long-side", "48"]) == 0
    sizes = {
        name: (Split(tmp_path / name).video(0).width, Split(tmp_path / name).video(0).height)
        for name in ("square", "long")
    }
    assert sizes == {"square": (48, 48), "long": (48, 36)}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "x"), "--squash", "48", "--short-side", "48"])
    assert "argument --short-side: not allowed with argument --squash" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "copy"), "--profile", "copy", "--squash", "48"]) == 0
    assert "note --squash: --profile copy does not use it" in capsys.readouterr().err
