"""A dataset.json that no packing wrote is said in one sentence, whatever is in it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from c4c.shard import main
from shards import ShardError
from shards.split import Split
from shards.summary import checked
from tests.edits import changed, several

EDITS = 3000


@pytest.mark.slow
def test_random_edits_end_in_a_sentence_or_work(copied: Path, tmp_path: Path) -> None:
    split = Path(shutil.copytree(copied, tmp_path / "split"))
    whole, rng, refused = json.loads((split / "dataset.json").read_text()), random.Random(11), 0
    for _ in range(EDITS):
        info = several(changed, whole, rng)
        try:
            checked(info, split)
            (split / "dataset.json").write_text(json.dumps(info))
            opened = Split(split)
            assert all(opened.video(i).size and opened.captions(i) for i in range(len(opened)))
            assert opened.caption_counts.sum() == opened.info["captions"] and opened.digest is not None
        except ShardError as error:
            assert len(str(error)) < 1000 and "\n" not in str(error), error
            refused += 1
    assert EDITS // 2 < refused < EDITS


DAMAGE: dict[str, tuple[Callable[[dict], object], str]] = {
    "a list": (lambda i: "[]", "it holds a list, not an object"),
    "a number": (lambda i: "7", "it holds 7, not an object"),
    "nested": (lambda i: '{"a":' * 100_000, "is not JSON"),
    "no shards": (lambda i: i.pop("shards"), "it lacks 'shards'"),
    "no videos in a shard": (lambda i: i["shards"][1].pop("videos"), "shard 000001: it lacks 'videos'"),
    "huge": (lambda i: i.update(videos=10**100), "'videos' is a huge number"),
    "outside": (lambda i: i["shards"][0].update(name="../x"), "the name of shard 0 is '../x'"),
    "twice": (lambda i: i["shards"].append(i["shards"][0]), "shard 000000 is listed twice"),
    "does not add up": (lambda i: i.update(videos=6), "its shards hold 5 videos, and it says 6"),
    "no format": (lambda i: i.pop("format"), "has format None; this version reads 2"),
    "earlier": (lambda i: i.update(format=1), "has format 1; this version reads 2. Pack it again, into another folder"),
    "no profile": (lambda i: i.update(profile="intra"), "'profile' is 'intra'"),
}


@pytest.mark.parametrize("command", ["info", "verify", "preview", "dedup"])
@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_every_command_says_what_is_wrong(
    copied: Path, tmp_path: Path, capsys, command: str, damage, said: str
) -> None:
    split = Path(shutil.copytree(copied, tmp_path / "split"))
    info = json.loads((split / "dataset.json").read_text())
    text = damage(info)
    (split / "dataset.json").write_text(text if isinstance(text, str) else json.dumps(info))
    assert main([command, str(split)]) == 1
    told = capsys.readouterr().err
    assert said in " ".join(told.split()) and "Traceback" not in told
    if "format" not in said:
        assert f"repair {split}" in " ".join(told.split())


@pytest.mark.parametrize(
    "data",
    [b"", b"PK\3\4" + bytes(30), b"\x93NUMPY\1\0\x10\0{'descr': 'x'}  ", np.lib.format.magic(1, 0) + b"\xff\xff" + b"(" * 70000],
)  # fmt: skip
def test_caption_counts_that_cannot_be_read_or_do_not_fit(copied: Path, tmp_path: Path, data: bytes) -> None:
    split = Path(shutil.copytree(copied, tmp_path / "split"))
    (split / "captions.npy").write_bytes(data)
    with pytest.raises(ShardError, match=r"captions\.npy cannot be read .*delete it: it only saves time"):
        _ = Split(split).caption_counts
    for odd in (np.ones(4, np.uint8), np.ones(5, np.float64), np.ones((5, 1), np.uint8), np.array(3, np.uint8)):
        np.save(split / "captions.npy", odd)
        with pytest.raises(ShardError, match=r"captions\.npy (does not fit|holds)"):
            _ = Split(split).caption_counts
