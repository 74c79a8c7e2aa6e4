"""Every command says the same of the files of the matrix: packing, verify, preview, frames, repair and the loader."""

from __future__ import annotations

import io
import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.bench import measure
from pipelines.config import DataConfig
from pipelines.frames import write_frames
from shards.annotations import Caption, Item
from shards.packing.pack import pack
from shards.split import Split
from shards.tools.preview import preview
from shards.tools.repair import repair
from shards.tools.verify import verify
from shards.video.profiles import Profile
from tests.shards.video.matrix import FPS, PLAIN, made, plain, with_edit
from tests.videos import number_in

pytestmark = pytest.mark.slow  # imports DALI

STAMPS = np.cumsum([0, *([1, 1, 4, 1, 9, 1] * 6)[:35]]).tolist()
EXTENSIONS = {"matroska": "mkv", "mpegts": "ts", "mpeg": "mpg", "asf": "wmv", "ogg": "ogv"}


def files() -> dict[str, bytes]:
    out = {}
    for container, codec in PLAIN:
        out[f"{codec}.{container}"] = lambda c=container, d=codec: made(c, d)
    for container, codec in (
        ("mp4", "h264"),
        ("matroska", "open"),
        ("webm", "vp8"),
        ("mpegts", "h264"),
        ("avi", "mpeg4"),
    ):
        out[f"{codec}_variable.{container}"] = lambda c=container, d=codec: made(c, d, times=STAMPS)
        out[f"{codec}_aspect.{container}"] = lambda c=container, d=codec: made(c, d, aspect=Fraction(16, 11))
    for skip, length in itertools.product((0.0, 0.4), (0.8, 1.04)):
        out[f"edit_{skip}_{length}.mp4"] = lambda s=skip, n=length: with_edit(made("mp4", "open"), s, n)
    for matrix, full in ((1, False), (1, True), (5, False), (9, False)):
        out[f"colour_{matrix}_{full}.mp4"] = lambda m=matrix, f=full: made("mp4", "h264", matrix=m, full=f)
    for degrees in (90, 180, 270):
        out[f"turned_{degrees}.mp4"] = lambda d=degrees: made("mp4", "h264", degrees=d)
    for container in ("mp4", "matroska", "mpegts"):
        out[f"late.{container}"] = lambda c=container: made(c, "h264", sound_first=30)
    made_files = {}
    for name, make in out.items():
        try:
            made_files[name] = make()
        except pytest.skip.Exception:  # this build cannot write it
            continue
    return made_files


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, Split]]:
    folder, splits = tmp_path_factory.mktemp("matrix"), {}
    sources = files()
    assert len(sources) >= 60
    items = []
    for name, data in sources.items():
        stem, container = name.rsplit(".", 1)
        path = folder / f"{stem}.{container}.{EXTENSIONS.get(container, container)}"
        path.write_bytes(data)
        items.append(Item(name, path, (Caption(f"caption of {name}"),)))
    for profile in (Profile(name="copy"), Profile(name="intra", fps=240, short_side=64)):
        info = pack(items, folder / profile.name, dataset="m", split="s", profile=profile, workers=2)
        assert info["rejected_videos"] == 0, (folder / profile.name / "rejects.jsonl").read_text()
        splits[profile.name] = Split(folder / profile.name)
    return sources, splits


@pytest.mark.parametrize("profile", ["copy", "intra"])
def test_all_commands_agree(matrix, tmp_path: Path, profile: str) -> None:
    sources, splits = matrix
    split = splits[profile]
    assert len(split) == len(sources)
    assert verify(split.path, 2) == []
    assert preview([split.path], tmp_path / "page.html", count=len(split), frames=2) == 0
    config = DataConfig(image_size=64, num_frames=4, sampling="segment", threads=1)
    result = measure(split, config, batch_size=8, batches=len(split) // 8, warm_up=1)
    assert result["bad"] == 0
    for name, data in sources.items():
        written = write_frames(split, name, tmp_path / name, num_frames=3, rule="segment")
        turned = {"turned_90.mp4": -1, "turned_180.mp4": 2, "turned_270.mp4": 1}.get(name, 0)
        shown, when = plain(data)
        zero = min([when[0], *sound_starts(data)])
        for one in written:
            if "gif" not in name and "av1" not in name:
                picture = Image.open(one.file)
                if "aspect" in name:  # the numbers are square where pixels are not
                    picture = picture.resize(shown[one.number].shape[1::-1])
                picture = np.rot90(np.asarray(picture), turned)
                assert number_in(picture) == number_in(shown[one.number]), (name, one)
            # these store no times, or few; see test_matrix.py
            if not name.endswith((".avi", "h264.h264", "hevc.hevc", "open.mpeg", "hevc.mpeg")):
                assert one.seconds == pytest.approx(when[one.number] - zero, abs=0.003), (name, one)
            elif "variable" not in name:
                assert one.seconds == pytest.approx(one.number / FPS, abs=1e-4), (name, one)


def sound_starts(data: bytes) -> list[float]:
    with av.open(io.BytesIO(data)) as file:
        return [float(s.start_time * s.time_base) for s in file.streams.audio if s.start_time is not None]


@pytest.mark.parametrize("profile", ["copy", "intra"])
def test_repair_finds_the_same(matrix, profile: str) -> None:
    path = matrix[1][profile].path
    before = {p.name: pq.read_table(p).to_pylist() for p in sorted(path.glob("*.parquet"))}
    repair(path, everything=True, workers=2)
    after = {p.name: pq.read_table(p).to_pylist() for p in sorted(path.glob("*.parquet"))}
    for name, rows in before.items():
        for old, new in zip(rows, after[name], strict=True):
            assert old == new, old["id"]
