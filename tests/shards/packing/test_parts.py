"""Parts of one packing that end at the same time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from upath import UPath

from c4c import shard
from shards import storage
from shards.packing import pack as packing
from shards.packing.finish import finish
from shards.packing.plan import read_plan, shard_name
from shards.storage import Folder
from tests.shards.sets import files, packed


@pytest.fixture
def almost(copied: Path, tmp_path: Path) -> Path:
    """All shards are committed, and the last part is about to write dataset.json."""
    out = Path(shutil.copytree(copied, tmp_path / "train"))
    plan = json.loads((out / "dataset.json").read_text())["plan"]
    (out / "packing.json").write_text(json.dumps(plan))
    for name in ("dataset.json", "captions.npy", "rejects.jsonl"):
        (out / name).unlink()
    return out


def end(out: Path) -> None:
    """What the part does that ends last."""
    plan = json.loads((out / "packing.json").read_text())
    finish(out, plan, list(map(shard_name, range(plan["shards"]))))


def test_a_part_deletes_no_dataset_json_of_another(items, copied: Path, almost: Path, monkeypatch) -> None:
    read, delete, deleted = packing.read_plan_and_summary, Folder.delete, []

    def read_and_wait(*args):
        known = read(*args)
        end(almost)
        return known

    def deleting(self: Folder, name: str) -> None:
        deleted.append(name)
        delete(self, name)

    monkeypatch.setattr(packing, "read_plan_and_summary", read_and_wait)
    monkeypatch.setattr(Folder, "delete", deleting)
    info = packed(items, almost, part=(1, 2), workers=1)
    assert info == json.loads((copied / "dataset.json").read_text()) and "dataset.json" not in deleted
    assert {n: d for n, d in files(almost).items() if not n.startswith(".lock")} == files(copied)


def test_the_plan_of_a_split_that_is_finished_meanwhile(copied: Path, almost: Path) -> None:
    target = storage.output(almost)
    listing = target.listing()
    end(almost)
    assert read_plan(target, listing) == json.loads((copied / "dataset.json").read_text())["plan"]


@pytest.mark.network
def test_the_same_in_an_object_store(copied: Path, bucket: str) -> None:
    fs = UPath(bucket).fs
    fs.put_file(str(copied / "dataset.json"), "bucket/train/dataset.json")
    target = storage.output(storage.place(f"{bucket}/train"))
    listing = target.listing() | {"packing.json": 9}
    assert read_plan(target, listing) == json.loads((copied / "dataset.json").read_text())["plan"]
    with pytest.raises(FileNotFoundError, match=r"train/packing\.json"):
        target.read("packing.json")


def test_a_part_says_when_nothing_is_lacking_any_more(items, almost: Path, monkeypatch, capsys) -> None:
    captions = almost.parent / "captions.csv"
    captions.write_text("video,caption\nplain.mp4,one\n")
    monkeypatch.setattr(shard, "pack", lambda *_, **__: None)  # shards were lacking when this part ended
    command = ["folder", "--videos", str(items[0].path.parent), "--captions", str(captions), "--out", str(almost)]
    assert shard.main([*command, "--part", "1/2"]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "part 1/2 is packed, and so are all others: the split is finished" in said and "missing (" not in said
