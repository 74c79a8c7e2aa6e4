"""The tar, its index and the names in it, as the `webdataset` library and DALI read them."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from pathlib import Path

import pytest

from shards import tar
from shards.split import Split
from shards.tar import TarWriter, key_to_name, read_index, read_members, safe_extension, safe_key

NAMES = [
    "video7010",
    "-leading_dash",
    "__init__",
    "a/b/c.d.mp4",
    "../../etc/passwd",
    "/etc/passwd",
    ".hidden",
    "..",
    "new\nline\ttab",
    "space and 'quotes\" \\ % %2E",
    "ünïcödé 視頻 🎬",
    "n" * 99,
    "n" * 130,
    "視" * 100,  # 900 bytes when escaped
    "UPPER.lower",
    "~tilde*?[x]{a,b}",
]


def written(folder: Path, names: list[str] = NAMES) -> tuple[Path, list[dict[str, bytes]], list[dict[str, int]]]:
    """A tar with its index: the samples in it and the offsets the writer told."""
    path = folder / "000000.tar"
    writer = TarWriter(path)
    samples = [{"mp4": os.urandom(1 + 700 * i), "json": json.dumps({"name": n}).encode()} for i, n in enumerate(names)]
    offsets = [writer.add(safe_key(name), sample) for name, sample in zip(names, samples, strict=True)]
    writer.close()
    path.with_suffix(".idx").write_text(writer.index())
    return path, samples, offsets


def dali_reads(tars: list[Path], extensions: list[str]) -> list[list[bytes]]:
    """Every sample of the tars, in order, through DALI's own reader and the index files."""

    import nvidia.dali as dali

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        return tuple(
            dali.fn.readers.webdataset(
                paths=[str(t) for t in tars],
                index_paths=[str(t.with_suffix(".idx")) for t in tars],
                ext=extensions,
                missing_component_behavior="error",
                name="reader",
            )
        )

    pipe = graph()
    pipe.build()
    count = pipe.epoch_size("reader")
    return [[output.at(0).tobytes() for output in pipe.run()] for _ in range(count)]


def test_names_stay_one_key_and_come_back() -> None:
    keys = [safe_key(name) for name in NAMES]
    assert [key_to_name(key) for key in keys] == NAMES
    assert len(set(keys)) == len(NAMES)
    for key in keys:
        assert key.isascii() and not set(key) & set("./\\\n\t ~'\"*?[]{}")
    assert safe_key("video7010") == "video7010" and safe_key("a.b/c") == "a%2Eb%2Fc"
    with pytest.raises(ValueError, match="name"):
        safe_key("")


def test_extensions() -> None:
    assert [safe_extension(n) for n in ("a.mp4", "a.WEBM", "a.b.mkv")] == ["mp4", "webm", "mkv"]
    assert [safe_extension(n) for n in ("a", "a.json", "a.", "a.mp 4", "a.verylongone", ".mp4")] == ["mp4"] * 6


def test_offsets_and_index_are_where_the_bytes_are(tmp_path: Path) -> None:
    path, samples, offsets = written(tmp_path)
    data = path.read_bytes()
    for sample, at in zip(samples, offsets, strict=True):
        assert {e: data[at[e] : at[e] + len(sample[e])] for e in sample} == sample
    members = read_members(path)
    assert members == read_index(path.with_suffix(".idx"))
    assert list(members) == [f"{safe_key(name)}.{e}" for name in NAMES for e in ("mp4", "json")]
    with tarfile.open(path) as file:
        assert [m.name for m in file] == list(members)
        assert {(m.mtime, m.uid, m.mode, m.isfile()) for m in file.getmembers()} == {(0, 0, 0o644, True)}


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        writer = TarWriter(tmp_path / name)
        writer.add("key", {"mp4": b"x" * 1000, "json": b"{}"})
        writer.close()
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_an_index_that_is_none_is_refused(tmp_path: Path) -> None:
    path, _, _ = written(tmp_path, NAMES[:2])
    index = path.with_suffix(".idx")
    text = index.read_text()
    for bad in ("", "v9 2\n", text.replace("v1.2 2", "v1.2 3"), text.rsplit(" ", 1)[0], text.replace("mp4 ", "mp4 x")):
        index.write_text(bad)
        with pytest.raises(ValueError):
            read_index(index)


def test_a_damaged_tar_loses_only_what_is_damaged(tmp_path: Path) -> None:
    path, _, offsets = written(tmp_path)
    whole, data = read_members(path), bytearray(path.read_bytes())
    data[offsets[1]["mp4"] - 400] ^= 1  # in the header before it
    path.write_bytes(data)
    assert read_members(path) == {k: v for k, v in whole.items() if k != f"{safe_key(NAMES[1])}.mp4"}
    path.write_bytes(data[: offsets[5]["mp4"] + 100])
    with pytest.raises(tarfile.TarError):
        read_members(path)


@pytest.mark.slow
def test_the_webdataset_library_reads_any_name(tmp_path: Path) -> None:
    path, samples, _ = written(tmp_path)
    import webdataset

    read = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [key_to_name(sample["__key__"]) for sample in read] == NAMES
    assert [{"mp4": sample["mp4"], "json": sample["json"]} for sample in read] == samples


@pytest.mark.slow
def test_dali_reads_any_name(tmp_path: Path) -> None:
    path, samples, _ = written(tmp_path)
    assert dali_reads([path], ["mp4", "json"]) == [[sample["mp4"], sample["json"]] for sample in samples]


@pytest.mark.slow
def test_the_webdataset_library_reads_packed_shards(copied: Path) -> None:
    split = Split(copied)
    import webdataset

    read = [s for t in sorted(copied.glob("*.tar")) for s in webdataset.WebDataset(str(t), shardshuffle=False)]
    assert len(read) == len(split) == 5
    for i, sample in enumerate(read):
        video = split.video(i)
        assert (sample["__key__"], key_to_name(sample["__key__"])) == (video.key, video.id)
        assert sample[video.ext] == split.read(video)
        described = json.loads(sample["json"])
        assert described == split.json(video)
        assert described["captions"] == split.captions(i)
        assert described["meta"] == {"nth": i}


@pytest.mark.slow
def test_dali_reads_packed_shards(copied: Path, intra: Path) -> None:
    for folder in (copied, intra):
        split = Split(folder)
        videos = [split.video(i) for i in range(len(split))]
        read = dali_reads(sorted(folder.glob("*.tar")), [";".join(sorted({v.ext for v in videos})), "json"])
        assert [video for video, _ in read] == [split.read(v) for v in videos]
        assert [json.loads(described) for _, described in read] == [split.json(v) for v in videos]


def test_a_write_is_seen_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    tar.write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        tar.write_atomic(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    tar.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_file_systems_without_sync_are_put_up_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_with(number: int):
        def fsync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", fails_with(errno.EINVAL))
    tar.write_atomic(tmp_path / "file", "text")
    path, samples, _ = written(tmp_path, NAMES[:2])
    assert len(read_members(path)) == 2 * len(samples)
    monkeypatch.setattr(os, "fsync", fails_with(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):  # but not with a disk that fails
        tar.write_atomic(tmp_path / "file", "text")
