"""Reading a packed split, and what is said of a folder that is none."""

from __future__ import annotations

import json
import random
import shutil
import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import ShardError, open_files
from shards import split as dataset
from shards.annotations import Item
from shards.split import Split, find_splits
from shards.table import Table
from shards.video.source import scan
from tests.shards.sets import COPY, files, packed


@pytest.fixture
def copy(copied: Path, tmp_path: Path) -> Path:
    """A packed split to damage."""
    return Path(shutil.copytree(copied, tmp_path / "copy"))


def test_rows_are_what_was_packed(items: list[Item], copied: Path) -> None:
    split = Split(copied)
    assert len(split) == 5 and split.shards == ["000000", "000001", "000002"]
    for i, item in enumerate(items):
        video, source = split.video(i), scan(item.path.read_bytes())
        assert (video.index, video.shard, video.id) == (i, f"00000{i // 2}", item.id)
        for name in ("codec", "width", "height", "rotation", "fps", "duration", "extradata"):
            assert getattr(video, name) == getattr(source, name), name
        for name in ("number", "time", "offset", "size", "key", "crc32c"):
            stored, scanned = getattr(video.frames, name), getattr(source.frames, name)
            assert np.array_equal(stored, scanned) and stored.dtype == scanned.dtype, name
        assert video.source_frames == len(video.frames) == len(source.frames)
        assert split.json(video)["id"] == item.id
    assert split.video(1).fps == Fraction(30000, 1001)
    for index in (-1, 5):
        with pytest.raises(IndexError, match="of 5"):
            split.video(index)


def test_captions_carry_their_times(items: list[Item], copied: Path) -> None:
    split = Split(copied)
    expected = [[{"text": c.text, "start": c.start, "end": c.end} for c in item.captions] for item in items]
    assert [split.captions(i) for i in range(5)] == expected
    assert expected[0][0] == {"text": "one, with a comma", "start": 0.0, "end": 1.5}
    assert split.caption_counts.tolist() == [2, 1, 3, 1, 1] and split.caption_counts.dtype == np.uint8


def test_captions_are_counted_without_reading_a_table(
    copied: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(dataset, "Table", lambda *args, **more: read.append(1) or Table(*args, **more))
    counts = Split(copied).caption_counts
    assert counts.tolist() == [2, 1, 3, 1, 1] and not read
    assert Split(copied).shard_starts.tolist() == [0, 2, 4, 5]
    info = json.loads((copied / "dataset.json").read_text())
    ones = {"captions": 5, "shards": [shard | {"captions": shard["videos"]} for shard in info["shards"]]}
    (copy / "dataset.json").write_text(json.dumps(info | ones))
    assert Split(copy).caption_counts.tolist() == [1] * 5 and not read, "no video is without, so each has one"
    (copy / "dataset.json").write_text(json.dumps(info))
    (copy / "captions.npy").unlink()
    again = Split(copy).caption_counts
    assert again.tolist() == counts.tolist() and again.dtype == counts.dtype and len(read) == 3
    for wrong in ([2, 1, 3, 2, 1], [2, 1, 3, 1]):
        np.save(copy / "captions.npy", np.array(wrong, np.uint8))
        with pytest.raises(ShardError, match=r"captions\.npy does not fit dataset\.json.*delete it"):
            _ = Split(copy).caption_counts
    (copy / "captions.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(ShardError, match=r"captions\.npy cannot be read.*delete it"):
        _ = Split(copy).caption_counts


def test_of_many_shards_no_size_is_looked_at_on_opening(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_SIZES_CHECKED", 2)
    with open(copy / "000001.tar", "rb+") as file:
        file.truncate(1000)
    split = Split(copy)
    assert split.read(split.video(0))
    with pytest.raises(ShardError, match=r"000001\.tar ends inside .web.*cut short"):
        split.read(split.video(2))
    (copy / "000002.parquet").unlink()
    with pytest.raises(ShardError, match=r"000002\.parquet is missing"):
        Split(copy)


def test_reads_any_part(items: list[Item], copied: Path) -> None:
    split, data = Split(copied), items[3].path.read_bytes()
    video = split.video(3)
    assert split.read(video) == data
    assert split.read(video, 100, 50) == data[100:150]
    assert split.read(video, 100) == data[100:]
    split.close()
    assert split.read(video, 7, 1) == data[7:8]  # opens again


def test_a_file_that_outlives_the_interpreters_modules_is_closed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a").write_bytes(b"a")
    file, before = open_files.OpenFile(str(tmp_path / "a")), len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(open_files, "os", None)  # as at the interpreter's end
    del file
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 1


def test_threads_share_a_split_and_few_open_files(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_MOST", 1)
    monkeypatch.setattr(dataset, "_TABLES_IN_MEMORY", 1)
    split, wrong = Split(copied), []
    expected = [(split.video(i).id, split.read(split.video(i)), split.captions(i)) for i in range(5)]

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 5, 100).tolist():
            video = split.video(i)
            if (video.id, split.read(video), split.captions(i)) != expected[i]:
                wrong.append(i)

    before = len(list(Path("/proc/self/fd").iterdir()))
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_a_video_that_is_named_without_its_folder_is_suggested(items: list[Item], tmp_path: Path) -> None:
    named = [replace(item, id=id) for item, id in zip(items, ("kitchen/egg", "k/cup", "sea", "sky"), strict=False)]
    packed(named, tmp_path / "train", COPY)
    # of the first of two shards; once, if it is much alike, too
    for name, id in (("egg", "kitchen/egg"), ("cup", "k/cup")):
        with pytest.raises(ShardError, match=rf"no video called '{name}'\. Did you mean '{id}'\?"):
            Split(tmp_path / "train").find(name)


def test_a_folder_that_is_no_split(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copytree(copied, tmp_path / "sets" / "train")
    for path, words in (
        (tmp_path / "missing", "there is no folder .*missing.*python -m c4c.shard"),
        (tmp_path / "other", "holds no dataset.json"),
        (tmp_path / "sets", "did you mean .*sets/train"),
    ):
        with pytest.raises(ShardError, match=words):
            Split(path)
    assert find_splits(tmp_path / "sets") == [tmp_path / "sets" / "train"]
    shutil.copytree(copied, tmp_path / "two" / "test")
    shutil.copytree(copied, tmp_path / "two" / "train")
    with pytest.raises(ShardError, match=r"did you mean .*two/test or .*two/train"):
        Split(tmp_path / "two")
    assert find_splits(copied) == [copied]
    for path in (tmp_path / "missing", tmp_path / "other"):
        with pytest.raises(ShardError, match=path.name):
            find_splits(path)


def test_an_incomplete_packing(copy: Path) -> None:
    plan = json.loads((copy / "dataset.json").read_text())["plan"]
    (copy / "dataset.json").rename(copy / "packing.json")
    (copy / "packing.json").write_text(json.dumps(plan))
    (copy / "000001.parquet").unlink()
    with pytest.raises(ShardError, match=r"is incomplete: 2 of 3 shards are packed. Run the packing command again"):
        Split(copy)
    assert find_splits(copy.parent) == [copy]


@pytest.mark.parametrize("name", ["000001.tar", "000002.parquet"])
def test_a_missing_file_is_named_and_the_advice_works(items: list[Item], copied: Path, copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ShardError, match=f"{name} is missing \\(3 shards are listed\\).*run the packing command again"):
        Split(copy)
    packed(items, copy)
    assert files(copy) == files(copied)


def test_a_truncated_tar_is_named(items: list[Item], copied: Path, copy: Path) -> None:
    opened = Split(copy)
    size = (copy / "000001.tar").stat().st_size
    with open(copy / "000001.tar", "rb+") as file:
        file.truncate(1000)
    with pytest.raises(ShardError, match=rf"000001\.tar has 1000 bytes, {size} were packed"):
        Split(copy)
    with pytest.raises(ShardError, match=r"000001\.tar ends inside .web.*c4c\.shard verify"):  # cut while in use
        opened.read(opened.video(2))
    packed(items, copy)
    assert files(copy) == files(copied)


@pytest.mark.slow
def test_a_damaged_table_never_gives_other_rows(copied: Path, tmp_path: Path) -> None:
    def rows(path: Path) -> list[str]:
        table = Table(path, "000000", 0)
        return [repr((vars(v) | {"frames": None, **vars(v.frames)}, table.captions(v.index)))
                for v in map(table.video, range(table.rows))]  # fmt: skip

    data, path, refused = (copied / "000000.parquet").read_bytes(), tmp_path / "damaged.parquet", 0
    good = rows(copied / "000000.parquet")
    pages = len(data) - 8 - int.from_bytes(data[-8:-4], "little")  # behind them, the footer
    for at in range(4, pages, 11):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            assert rows(path) == good  # a bit that says nothing
        except ShardError:
            refused += 1
    assert refused > pages // 11 // 2


def test_files_that_cannot_be_read_are_named(copy: Path) -> None:
    data = bytearray((copy / "000000.parquet").read_bytes())
    data[len(data) // 3] ^= 1
    (copy / "000000.parquet").write_bytes(data)
    split = Split(copy)
    with pytest.raises(ShardError, match=r"000000\.parquet cannot be read"):
        split.video(0)
    assert split.video(2).id == "web"
    info = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(info | {"format": 99}))
    with pytest.raises(ShardError, match="has format 99; this version reads 2"):
        Split(copy)
    (copy / "dataset.json").write_text('{"format": ')
    with pytest.raises(ShardError, match=r"dataset\.json is not JSON"):
        Split(copy)


def footer(path: Path) -> slice:
    data = path.read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    return slice(len(data) - 8 - size, len(data))


@pytest.mark.slow
def test_a_bit_in_the_footer_is_noticed(copy: Path) -> None:
    path, rng, refused = copy / "000000.parquet", random.Random(20), 0
    whole, good = path.read_bytes(), [everything(Split(copy), i) for i in range(2)]
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(footer(path).start, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            split = Split(copy)
            assert [everything(split, i) for i in range(2)] == good
        except ShardError as error:
            assert "000000.parquet" in str(error) and "\n" not in str(error)
            refused += 1
        path.write_bytes(whole)
    assert refused == 300


def everything(split: Split, i: int) -> tuple:
    video = split.video(i)
    plain = {k: v for k, v in vars(video).items() if k != "frames"}
    return plain, {k: v.tolist() for k, v in vars(video.frames).items()}, split.captions(i)


def test_a_renamed_column_is_no_sample_table(copy: Path) -> None:
    table = pq.read_table(copy / "000000.parquet")
    for names, said in (
        (["name", *table.schema.names[1:]], "a column 'name'"),
        ([n if n != "crc32c" else "crc32d" for n in table.schema.names], "a column 'crc32d'"),
    ):
        path = copy / "other.parquet"
        pq.write_table(table.rename_columns(names), path)
        with pytest.raises(ShardError, match=f"other.parquet cannot be read .*{said}"):
            Table(path, "other", 0)
    place = table.schema.get_field_index("key")
    pq.write_table(table.set_column(place, "key", table["key"].cast(pa.binary())), path)
    with pytest.raises(ShardError, match="'key' holds binary, not string"):
        Table(path, "other", 0)


def test_a_table_of_another_shard_is_refused(copy: Path) -> None:
    shutil.copy(copy / "000000.parquet", copy / "000001.parquet")
    with pytest.raises(ShardError, match=r"000001\.parquet cannot be read \(its crc32c"):
        Split(copy).video(2)
    info = json.loads((copy / "dataset.json").read_text())
    shutil.copy(copy / "000002.parquet", copy / "000001.parquet")
    info["shards"][1]["table_crc32c"] = info["shards"][2]["table_crc32c"]
    (copy / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(ShardError, match=r"000001\.parquet holds 1 video and 1 caption, dataset.json says 2 and 4"):
        Split(copy).video(2)
