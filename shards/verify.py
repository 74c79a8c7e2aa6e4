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

from shards import ShardError
from shards.dataset import Split, Table
from shards.schema import JSON_CRCS, Video
from shards.tar import read_index, read_members
from shards.video import VideoError, decode_stored, open_video


@dataclass(frozen=True)
class Problem:
    """What is wrong, and where: `key` is a video's key, or None if the trouble is the shard's own."""

    shard: str
    key: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key + ': ' if self.key else ''}{self.what}"


def verify(
    path: Path, workers: int | None = None, on_shard: Callable[[int, int], None] = lambda done, total: None
) -> list[Problem]:
    """Check every shard of a split: crc32c, full decode, index against tar, table against both. [] if all is well.

    `on_shard(done, total)` is called with shards. Raises ShardError if `path` is not a finished split.
    """
    problems, jobs, first = [], [], 0
    info = json.loads((path / "dataset.json").read_text()) if (path / "dataset.json").exists() else None
    if info is None:
        Split(path)  # raises with the right words
        raise ShardError(f"{path} is not a finished split")
    for shard in info["shards"]:
        jobs.append((path, shard, first))
        first += shard["videos"]
    with ProcessPoolExecutor(min(workers or os.cpu_count() or 1, max(1, len(jobs))), get_context("spawn")) as pool:
        on_shard(0, len(jobs))
        for done, found in enumerate(pool.map(_verify_shard, jobs), 1):
            problems += found
            on_shard(done, len(jobs))
    return problems


def _verify_shard(job: tuple[Path, dict, int]) -> list[Problem]:
    path, shard, first = job
    name, problems = shard["name"], []
    tar_path = path / f"{name}.tar"
    missing = [s for s in ("tar", "idx", "parquet") if not (path / f"{name}.{s}").exists()]
    if missing:
        return [Problem(name, None, f"{name}.{s} is missing") for s in missing]
    try:
        table = Table(path / f"{name}.parquet", name, first)
        json_crcs = json.loads(pq.read_schema(path / f"{name}.parquet").metadata[JSON_CRCS])
    except Exception as error:  # Arrow raises many kinds for a damaged file
        return [Problem(name, None, f"the sample table cannot be read ({str(error).splitlines()[0]})")]
    size = tar_path.stat().st_size
    if size != shard["bytes"]:
        problems.append(Problem(name, None, f"the tar has {size} bytes, {shard['bytes']} were packed"))
    if table.rows != shard["videos"]:
        problems.append(Problem(name, None, f"{table.rows} videos in the table, {shard['videos']} in dataset.json"))
    try:
        members = read_members(tar_path)
    except (tarfile.TarError, EOFError, ValueError) as error:
        members = None
        if not problems:
            problems.append(Problem(name, None, f"the tar is damaged ({error})"))
    try:
        index = read_index(path / f"{name}.idx")
        if members is not None and index != members:
            wrong = sorted(k for k in index.keys() | members.keys() if index.get(k) != members.get(k))
            problems += [Problem(name, k.split(".")[0], f"index and tar disagree about {k}") for k in wrong]
    except ValueError as error:
        problems.append(Problem(name, None, f"the index cannot be read ({error})"))
    with open(tar_path, "rb") as file:
        for row in range(table.rows):
            video = table.video(row)
            if any(p.key == video.key for p in problems):
                continue
            what = _verify_members(video, file, members, json_crcs[row])
            problems += [Problem(name, video.key, what)] if what else []
    return problems


def _verify_members(video: Video, file: BinaryIO, members: dict | None, json_crc: int) -> str | None:
    member = f"{video.key}.{video.ext}"
    if members is not None:
        if members.get(member) != (video.offset, video.size):
            return f"table and tar disagree about {member}"
        offset, size = members.get(f"{video.key}.json", (0, 0))
        file.seek(offset)
        if crc32c(file.read(size)) != json_crc:
            return "crc32c differs: its json changed after packing"
    file.seek(video.offset)
    return _verify_video(video, file.read(video.size))


def _verify_video(video: Video, data: bytes) -> str | None:
    if len(data) != video.size:
        return f"the tar ends after {len(data)} of its {video.size} bytes"
    if crc32c(data) != video.crc32c:
        return "crc32c differs: its bytes changed after packing"
    frames = video.frames
    if frames.sliceable:
        for i in range(len(frames)):
            start, size = int(frames.offset[i]), int(frames.size[i])
            if crc32c(data[start : start + size]) != frames.crc32c[i]:
                return f"the frame table is wrong about frame {i}"
    try:
        if frames.sliceable and (there := _packets(data)) != len(frames):
            return f"{there} frames are in the file, the table has {len(frames)}"
        low, high = video.inside
        read = lambda at, size: data[at:] if size < 0 else data[at : at + size]  # noqa: E731
        decoded = sum(1 for _ in decode_stored(video, read, range(low, high)))
    except VideoError as error:
        return f"it does not decode: {error}"
    if decoded != high - low:
        return f"{decoded} frames decode, the table has {high - low}"
    return None


def _packets(data: bytes) -> int:
    """Packets of the video from its first keyframe on, as the table lists them."""
    container, stream = open_video(io.BytesIO(data))
    with container:
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
    first = next((i for i, (_, key) in enumerate(packets) if key), 0)
    return sum(first == 0 or pts is None or pts >= packets[first][0] for pts, _ in packets[first:])
