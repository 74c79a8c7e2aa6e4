"""Five hundred damaged videos: none crashes or hangs the packer, none that does not decode is committed, all are explained."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from shards.annotations import Caption, Item
from shards.split import Split
from shards.tools.verify import verify
from shards.video.profiles import Profile
from tests.shards.sets import COPY, INTRA, files, packed
from tests.videos import encode

pytestmark = pytest.mark.slow

COUNT = 500


def sources() -> dict[str, bytes]:
    vp9 = {"deadline": "realtime", "cpu-used": "8", "g": "6"}
    return {
        "mp4": encode(10, 10, (48, 32), options={"bf": "2", "g": "5"}),
        "webm": encode(8, 10, (48, 32), "libvpx-vp9", "webm", vp9),
        "avi": encode(10, 10, (48, 32), "mpeg4", "avi", {"g": "5"}),
        "mkv": encode(10, 10, (48, 32), format="matroska", options={"bf": "2", "g": "5"}),
    }


def damaged(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """`data` with one kind of damage."""
    out, kind = bytearray(data), rng.randrange(8)
    at = rng.randrange(len(out))
    span = slice(at, at + rng.choice([1, 4, 16, 64, 256]))
    if kind == 0:  # cut short
        return data[: rng.choice([0, 1, 8, at, at, at])]
    if kind <= 2:  # bits flipped; half of the time in the header
        for _ in range(rng.choice([1, 2, 8, 64])):
            i = rng.randrange(len(out) if kind == 1 else min(600, len(out)))
            out[i] ^= 1 << rng.randrange(8)
    elif kind == 3:  # another file's header
        other = rng.choice(others)
        length = rng.choice([4, 12, 48, 256, 600])
        out[:length] = other[:length]
    elif kind == 4:  # a hole
        out[span] = bytes(len(out[span]))
    elif kind == 5:
        out[span] = rng.randbytes(len(out[span]))
    elif kind == 6:  # bytes lost or doubled
        out[span] = b"" if rng.random() < 0.5 else out[span] * 2
    else:  # nothing but noise, behind the true beginning or not
        out = out[: rng.choice([0, 32])] + rng.randbytes(rng.choice([1, 100, 5000]))
    return bytes(out)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    folder, rng, good = tmp_path_factory.mktemp("damaged"), random.Random(20), sources()
    items = []
    for i in range(COUNT):
        extension = list(good)[i % len(good)]
        path = folder / f"{i}.{extension}"
        path.write_bytes(damaged(good[extension], list(good.values()), rng))
        items.append(Item(str(i), path, (Caption("damaged"),)))
    for extension, data in good.items():
        (folder / f"good.{extension}").write_bytes(data)
        items.append(Item(f"good {extension}", folder / f"good.{extension}", (Caption("whole"),)))
    return items


@pytest.mark.parametrize("profile", [COPY, INTRA], ids=["copy", "intra"])
def test_damaged_videos(broken: list[Item], tmp_path: Path, profile: Profile) -> None:
    events: list = []
    info = packed(broken, tmp_path, profile, shard_videos=126, timeout=20, on_progress=events.append)
    assert len(events) == len(broken) == info["videos"] + info["rejected_videos"]
    assert verify(tmp_path, 2) == []
    rejects = {r["id"]: r["reason"] for r in map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())}
    assert all(len(reason) > 10 and "\n" not in reason for reason in rejects.values())
    unforeseen = {i: r for i, r in rejects.items() if r.startswith(("it took", "it kills", "it cannot be decoded"))}
    assert unforeseen == {}
    split = Split(tmp_path)
    there = {split.video(i).id for i in range(len(split))}
    assert there.isdisjoint(rejects) and there | rejects.keys() == {item.id for item in broken}
    assert {f"good {extension}" for extension in ("mp4", "webm", "avi", "mkv")} <= there
    assert len(rejects) > COUNT // 3  # or the damage would be none
    assert all(name.split(".")[-1] in ("tar", "idx", "parquet", "json", "jsonl", "npy") for name in files(tmp_path))
