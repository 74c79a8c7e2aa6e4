"""Re-read a whole split and name everything that is not as it was packed."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq
from crc32c import crc32c

from shards import VideoError, count, first_line
from shards.digest import BYTES, RULE_KEY
from shards.packing.finish import read_totals
from shards.schema import CAPTION_COUNTS, JSON_CRCS, SUFFIXES, Video
from shards.split import Split
from shards.summary import read_summary
from shards.table import Table, read_counts
from shards.tar import key_to_name, read_index, read_members
from shards.tools.hashes import tables
from shards.tools.rebuild import repair_command
from shards.video.picture import refuse_unknown_colours
from shards.video.probe import open_video
from shards.video.random_access import decode_stored
from shards.video.source import scan


@dataclass(frozen=True)
class Problem:
    """What is wrong, and where: `shard` is None if the trouble is the split's own, `key` is a video's key, or None if it is
    the shard's. `remedy` says what to do."""

    shard: str | None
    key: str | None
    what: str
    remedy: str = ""

    @property
    def id(self) -> str | None:
        """The video's name as the annotations write it."""
        return self.key and key_to_name(self.key)

    def __str__(self) -> str:
        where = "".join(f"{name}: " for name in (self.shard, self.id) if name)
        return f"{where}{self.what}{'. ' + self.remedy if self.remedy else ''}"


def verify(
    path: Path, workers: int | None = None, on_shard: Callable[[int, int], None] = lambda done, total: None
) -> list[Problem]:
    """Check every shard of a split: crc32c, full decode, index against tar, table against both. [] if all is well.

    `on_shard(done, total)` is called with shards. Raises ShardError if `path` is not a finished split.
    """
    problems, jobs, first = [], [], 0
    if not (path / "dataset.json").exists():
        Split(path)  # raises a ShardError that says what is there instead
    info = read_summary((path / "dataset.json").read_bytes(), path)
    for shard in info["shards"]:
        jobs.append((path, shard, first, info["profile"]))
        first += shard["videos"]
    workers = min(workers or os.cpu_count() or 1, max(1, len(jobs)))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:  # which starts nothing before it is used
        on_shard(0, len(jobs))
        each = map if workers == 1 else pool.map
        for done, of_shard in enumerate(each(_verify_shard, jobs), 1):
            problems += of_shard
            on_shard(done, len(jobs))
    return problems + _verify_split(path, info, readable=all(p.key for p in problems))


def _verify_split(path: Path, info: dict, readable: bool) -> list[Problem]:
    """The files of the split against each other; `readable`: all tables can be read and are the right ones."""
    remedy = f"Rebuild it from the tars: {repair_command(path)}"
    names, problems = {shard["name"] for shard in info["shards"]}, []
    for file in sorted(p for p in path.iterdir() if p.suffix[1:] in SUFFIXES):
        if file.stem not in names:
            problems.append(Problem(None, None, f"{file.name} is not a shard of this split", "Move it elsewhere"))
    if not readable:
        return problems
    names_in_order = [shard["name"] for shard in info["shards"]]
    totals = read_totals(path, info["profile"], names_in_order, info.get(RULE_KEY, BYTES))
    for what, value in totals.info.items():
        if info[what] != value:
            differs = f"{what} is {info[what]}" if isinstance(value, str | int) else f"{what} differ"
            expected = f", the tables say {value}" if isinstance(value, str | int) else " from the tables"
            problems.append(Problem(None, None, f"dataset.json: {differs}{expected}", remedy))
    counts, rejects = path / CAPTION_COUNTS, path / "rejects.jsonl"
    try:
        if read_counts(counts.read_bytes()).tolist() != totals.counts:
            raise ValueError("does not fit the tables")
    except FileNotFoundError:
        problems.append(Problem(None, None, f"{CAPTION_COUNTS} is missing", remedy))
    except (OSError, ValueError) as error:
        problems.append(Problem(None, None, f"{CAPTION_COUNTS} {error}", remedy))
    if not rejects.exists() or rejects.read_bytes() != totals.rejects_text:
        missing = "is missing" if not rejects.exists() else "does not say what the tables say"
        problems.append(Problem(None, None, f"rejects.jsonl {missing}", remedy))
    keys: dict[str, str] = {}
    for shard, table in zip(info["shards"], tables(Split(path), ["key"]), strict=True):
        for key in table.column("key").to_pylist():
            if keys.setdefault(key, shard["name"]) != shard["name"]:
                problems.append(Problem(shard["name"], key, f"shard {keys[key]} holds a video of that name, too"))
    return problems


def _verify_shard(job: tuple[Path, dict, int, dict]) -> list[Problem]:
    path, shard, first, profile = job
    name, problems = shard["name"], []
    tar_path = path / f"{name}.tar"
    missing = [s for s in SUFFIXES if not (path / f"{name}.{s}").exists()]
    copy = "Copy the tar again, or run the packing command again"
    rebuild = f"Rebuild it from the tar: {repair_command(path)}"
    if missing:
        return [Problem(name, None, f"{name}.{s} is missing", copy if s == "tar" else rebuild) for s in missing]
    try:
        table = Table(path / f"{name}.parquet", name, first, crc=shard["table_crc32c"])
        json_crcs = json.loads(pq.read_schema(path / f"{name}.parquet").metadata[JSON_CRCS])
        if len(json_crcs) != table.rows:
            raise ValueError(f"it has {table.rows} rows and {len(json_crcs)} checksums")
    except Exception as error:  # Arrow raises many kinds for a damaged file
        return [Problem(name, None, f"the sample table cannot be read ({first_line(error)})", rebuild)]
    size = tar_path.stat().st_size
    if size != shard["bytes"]:
        remedy = f"Copy the tar again, or keep the samples that are whole: {repair_command(path, '--truncate')}"
        problems.append(Problem(name, None, f"the tar has {size} bytes, {shard['bytes']} were packed", remedy))
    if table.rows != shard["videos"]:
        what = f"{count(table.rows, 'video')} in the table, {shard['videos']} in dataset.json"
        problems.append(Problem(name, None, what, rebuild))
    try:
        members = read_members(tar_path)
    except (tarfile.TarError, EOFError, ValueError) as error:
        members = None
        if not problems:
            problems.append(Problem(name, None, f"the tar is damaged ({error})", copy))
    try:
        index = read_index(path / f"{name}.idx")
        if members is not None and index != members:
            wrong = sorted(k for k in index.keys() | members.keys() if index.get(k) != members.get(k))
            problems += [Problem(name, k.split(".")[0], f"index and tar disagree about {k}", rebuild) for k in wrong]
    except ValueError as error:
        problems.append(Problem(name, None, f"the index cannot be read ({error})", rebuild))
    remedies = dict.fromkeys(_DAMAGED, f"Copy the tar again, or leave the sample out: {repair_command(path, '--drop')}")
    remedies[_UNCOUNTED] = f"Read the videos again: {repair_command(path, '--all')}"
    with open(tar_path, "rb") as file:
        for row in range(table.rows):
            video = table.video(row)
            if any(p.key == video.key for p in problems):
                continue
            if damage := _verify_members(video, file, members, json_crcs[row], profile):
                problems.append(Problem(name, video.key, damage, remedies.get(damage, rebuild)))
    return problems


_BYTES, _JSON = "crc32c differs: its bytes changed after packing", "crc32c differs: its json changed after packing"
_DAMAGED = (_BYTES, _JSON)
_UNCOUNTED = (
    "its time stamps are in another order than its pictures, and its frame table, of an earlier version, does not say so: for some "
    "frames the loader gives others"
)


def _verify_members(video: Video, file: BinaryIO, members: dict | None, json_crc: int, profile: dict) -> str | None:
    member = f"{video.key}.{video.ext}"
    if members is not None:
        if members.get(member) != (video.offset, video.size):
            return f"table and tar disagree about {member}"
        offset, size = members.get(f"{video.key}.json", (0, 0))
        file.seek(offset)
        described = file.read(size)
        if crc32c(described) != json_crc:
            return _JSON
        if (packed := json.loads(described).get("profile")) != profile:
            return f"its json says that it was packed with {packed}, dataset.json says {profile}"
    file.seek(video.offset)
    return _verify_video(video, file.read(video.size))


def _verify_video(video: Video, data: bytes) -> str | None:
    if len(data) != video.size:
        return f"the tar ends after {len(data)} of its {video.size} bytes"
    if crc32c(data) != video.crc32c:
        return _BYTES
    frames = video.frames
    if frames.sliceable:
        for i in range(len(frames)):
            start, size = int(frames.offset[i]), int(frames.size[i])
            if crc32c(data[start : start + size]) != frames.crc32c[i]:
                return f"the frame table is wrong about frame {i}"
    try:
        if frames.sliceable and (packets := _packets(data)) != len(frames):
            return f"{packets} frames are in the file, the table has {len(frames)}"
        low, high = video.inside
        read = lambda at, size: data[at:] if size < 0 else data[at : at + size]  # noqa: E731
        decoded = 0
        for _, frame in decode_stored(video, read, range(low, high)):
            if not decoded:
                refuse_unknown_colours(frame)
            decoded += 1
        uncounted = not (frames.sliceable or frames.counted) and scan(data).frames.counted
    except VideoError as error:
        return f"it does not decode: {error}"
    if decoded != high - low:
        return f"{decoded} frames decode, the table has {high - low}"
    return _UNCOUNTED if uncounted else None


def _packets(data: bytes) -> int:
    """Packets of the video from its first keyframe on, as the table lists them."""
    container, stream = open_video(io.BytesIO(data))
    with container:
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
    first = next((i for i, (_, key) in enumerate(packets) if key), 0)
    begin = packets[first][0] if packets else None
    return sum(first == 0 or pts is None or begin is None or pts >= begin for pts, _ in packets[first:])
