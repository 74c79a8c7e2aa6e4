"""Packing: from a list of videos to committed shards, on all cores, resumable after a kill at any moment.

A shard is a fixed run of the input list, so what goes where does not depend on the number of workers or on what was
rejected. Its parquet is renamed into place last; a shard with a parquet is never touched again.
"""

import ctypes
import fcntl
import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from shards import ShardError, video
from shards.datasets import Item
from shards.profiles import Profile, store
from shards.schema import CAPTION_COUNTS, FORMAT_VERSION, JSON_CRCS, REJECTS, SCHEMA, FrameTable
from shards.tar import UNSUPPORTED, TarWriter, commit, safe_key, sync_and_close, write_atomic


@dataclass(frozen=True)
class Progress:
    """One input dealt with: `bytes` read of it, and why it was rejected, if it was."""

    bytes: int
    rejected: str | None


@dataclass(frozen=True)
class _Job:
    items: tuple[Item, ...]
    out: Path
    name: str
    profile: Profile


def pack(
    items: list[Item],
    out: Path,
    *,
    dataset: str,
    split: str,
    profile: Profile,
    shard_videos: int | None = None,
    workers: int | None = None,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict:
    """Pack `items` into `out` and return the contents of its `dataset.json`.

    `on_start(done, total)` says how many videos earlier runs have dealt with. Raises ShardError if `out` holds
    something else, if two items share a name, or if nothing at all could be packed.
    """
    if not items:
        raise ShardError("there is nothing to pack: the annotations name no video")
    _refuse_duplicates(items)
    shard_videos = shard_videos or min(256, max(16, -(-len(items) // 32)))
    slices = [tuple(items[i : i + shard_videos]) for i in range(0, len(items), shard_videos)]
    names = [f"{i:06d}" for i in range(len(slices))]
    plan = {
        "format": FORMAT_VERSION,
        "name": dataset,
        "split": split,
        "profile": profile.describe(),
        "input": _input_digest(items),
        "shards": len(slices),
        "shard_videos": shard_videos,
    }
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        finished = _refuse_other(out, plan)
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        packed = {shard["name"]: shard["bytes"] for shard in finished["shards"]} if finished else {}
        jobs = [
            _Job(part, out, name, profile)
            for part, name in zip(slices, names, strict=True)
            if not _is_committed(out, name, packed.get(name))
        ]
        on_start(len(items) - sum(len(job.items) for job in jobs), len(items))
        if finished and not jobs:
            (out / "packing.json").unlink(missing_ok=True)  # left by a kill between the last two steps
            return finished
        write_atomic(out / "packing.json", json.dumps(plan, indent=2) + "\n")
        for job in jobs:
            (out / f"{job.name}.parquet").unlink(missing_ok=True)
        (out / "dataset.json").unlink(missing_ok=True)
        _run(jobs, workers or os.cpu_count() or 1, on_progress)
        return _finish(out, plan, names)


def _refuse_duplicates(items: list[Item]) -> None:
    seen: dict[str, Item] = {}
    for item in items:
        other = seen.setdefault(safe_key(item.id), item)
        if other is not item:
            raise ShardError(
                f"two videos share the name {item.id!r}: {other.path} and {item.path}. Names must differ; rename one."
            )


def _input_digest(items: list[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        captions = [(c.text, c.start, c.end) for c in item.captions]
        cut = [item.start, item.end] if (item.start, item.end) != (None, None) else []
        digest.update(json.dumps([item.id, item.path.name, captions, item.meta, *cut], sort_keys=True).encode())
    return digest.hexdigest()


@contextmanager
def _locked(out: Path):
    """One packer a folder: the kernel drops the lock with the process, however that ends."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(
                f"{out} is being packed by another process: wait for it, or choose another --out"
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        yield


def _refuse_other(out: Path, plan: dict) -> dict | None:
    """Raises ShardError if `out` holds something else than `plan`. Returns its `dataset.json`, if it has been finished."""
    for name in ("dataset.json", "packing.json"):
        if (out / name).exists():
            try:
                record = json.loads((out / name).read_text())
            except ValueError as error:
                raise ShardError(
                    f"{out / name} is not JSON ({error}). Choose another --out, or delete {out}."
                ) from error
            there = record.get("plan", {}) if name == "dataset.json" else record
            differing = sorted(k for k in plan if there.get(k) != plan[k])
            if differing:
                details = "; ".join(f"{k}: {there.get(k)} there, {plan[k]} asked for" for k in differing)
                raise ShardError(
                    f"{out} holds a different packing ({details}). Choose another --out, or delete it first."
                )
            return record if name == "dataset.json" else None
    foreign = sorted(p.name for p in out.iterdir() if p.suffix in (".tar", ".parquet"))
    if foreign:
        raise ShardError(f"{out} already holds {foreign[0]} and no record of how it was made. Choose another --out.")
    return None


def _is_committed(out: Path, name: str, size: int | None) -> bool:
    """Whether a shard's files are all there, and its tar has `size` bytes where that is known."""
    if not all((out / f"{name}.{suffix}").exists() for suffix in ("tar", "idx", "parquet")):
        return False
    return size is None or (out / f"{name}.tar").stat().st_size == size


def _run(jobs: list[_Job], workers: int, on_progress: Callable[[Progress], None]) -> None:
    if not jobs:
        return
    # spawn: a fork of a process with threads (rich, Arrow) can deadlock
    context = get_context("spawn")
    reports = context.SimpleQueue()
    workers = min(workers, len(jobs))
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(reports, os.getpid())) as pool:
        futures = {pool.submit(_pack_shard, job): job for job in jobs}
        try:
            waiting = set(futures)
            while waiting:
                for future in [f for f in waiting if f.done()]:
                    waiting.discard(future)
                    future.result()
                _drain(reports, on_progress)
                _wait_a_little(waiting)
            _drain(reports, on_progress)
        except BrokenProcessPool as error:
            raise ShardError(
                "a packing process was killed (out of memory, or a crash in a decoder). What is committed stays: "
                "run the same command again to go on, with --workers 1 to see which video it is."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


def _wait_a_little(futures: set) -> None:
    with suppress(TimeoutError):
        next(as_completed(futures, timeout=0.1), None)


def _drain(reports, on_progress: Callable[[Progress], None]) -> None:
    while not reports.empty():
        on_progress(reports.get())


def _start_worker(reports, parent: int) -> None:
    global _reports
    _reports = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker outlives a killed packer
        if os.getppid() != parent:
            os._exit(1)


def _pack_shard(job: _Job) -> None:
    paths = {suffix: job.out / f"{job.name}.{suffix}" for suffix in ("tar", "idx", "parquet")}
    temporary = {s: p.with_name(f".{p.name}.{os.getpid()}.tmp") for s, p in paths.items()}
    rows, rejects, json_crcs = [], [], []
    writer = TarWriter(temporary["tar"])
    for item in job.items:
        size = 0
        try:
            captions = [c for c in item.captions if c.text.strip()]
            rejects += [{"id": item.id, "caption": c.text, "reason": "the caption is empty"}
                        for c in item.captions if not c.text.strip()]  # fmt: skip
            if not captions:
                raise video.VideoError("it has no caption")
            data = _read(item.path)
            size = len(data)
            row, json_crc = _pack_video(item, captions, data, job.profile, writer)
            rows.append(row)
            json_crcs.append(json_crc)
            reason = None
        except video.VideoError as error:
            reason = str(error)
            rejects.append({"id": item.id, "path": str(item.path), "reason": reason})
        _reports.put(Progress(size, reason and f"{item.id}: {reason}"))
    writer.close()
    commit(temporary["tar"], paths["tar"])
    write_atomic(paths["idx"], writer.index())
    metadata = {REJECTS: json.dumps(rejects, sort_keys=True).encode(), JSON_CRCS: json.dumps(json_crcs).encode()}
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))
    file = open(temporary["parquet"], "wb")  # noqa: SIM115 closed in sync_and_close()
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    sync_and_close(file)
    commit(temporary["parquet"], paths["parquet"])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise video.VideoError("the file is missing") from error
    except OSError as error:
        raise video.VideoError(f"the file cannot be read ({error.strerror})") from error


def _pack_video(item: Item, captions: list, data: bytes, profile: Profile, writer: TarWriter) -> tuple[dict, int]:
    """Write one video into the tar; returns its row and its json's crc32c. Writes nothing unless all of it decoded."""
    stored = store(io.BytesIO(data), item.path.name, profile, item.start, item.end)
    key = safe_key(item.id)
    row = {
        "key": key,
        "id": item.id,
        "ext": stored.extension,
        "size": stored.size,
        "crc32c": stored.crc32c,
        "codec": stored.codec,
        "width": stored.width,
        "height": stored.height,
        "rotation": stored.rotation,
        "fps_num": stored.source.fps.numerator,
        "fps_den": stored.source.fps.denominator,
        "source_frames": len(stored.source.frames),
        "duration": stored.source.duration,
        "extradata": stored.extradata,
        "captions": [asdict(c) for c in captions],
    }
    source = stored.source
    described = {k: row[k] for k in ("id", "captions", "codec", "width", "height", "duration", "source_frames")}
    described |= {
        "fps": f"{source.fps.numerator}/{source.fps.denominator}",
        "source": {"file": item.path.name, "codec": source.codec, "width": source.width, "height": source.height},
        "frame_number": stored.frames.number.tolist() if profile.name == "intra" else None,
        "profile": profile.describe(),
        "meta": item.meta,
    }
    text = json.dumps(described, ensure_ascii=False, sort_keys=True).encode()
    row["offset"] = writer.add(key, {stored.extension: stored.file, "json": text})[stored.extension]
    return row | frame_columns(stored.frames), crc32c(text)


def frame_columns(frames: FrameTable) -> dict:
    """The frame table as columns of the sample table."""
    return {f"frame_{name}": getattr(frames, name) for name in ("number", "time", "offset", "size", "key", "crc32c")}


def _finish(out: Path, plan: dict, names: list[str]) -> dict:
    """Write rejects.jsonl and dataset.json from the committed shards."""
    shards, rejects, counts = [], [], []
    digest = hashlib.sha256(json.dumps(plan["profile"], sort_keys=True).encode())
    for name in names:
        table = pq.read_table(out / f"{name}.parquet", columns=["key", "crc32c", "captions", "size"])
        rejects += json.loads(table.schema.metadata[REJECTS])
        rows = table.to_pylist()
        counts += [len(row["captions"]) for row in rows]
        for row in rows:
            digest.update(json.dumps([row["key"], row["crc32c"], row["captions"]], sort_keys=True).encode())
        shards.append(
            {
                "name": name,
                "videos": len(rows),
                "captions": sum(len(row["captions"]) for row in rows),
                "bytes": (out / f"{name}.tar").stat().st_size,
            }
        )
    rejected_captions = sum("caption" in r for r in rejects)
    write_atomic(
        out / "rejects.jsonl", "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in rejects)
    )
    summary = {
        "format": FORMAT_VERSION,
        "name": plan["name"],
        "split": plan["split"],
        "profile": plan["profile"],
        "videos": sum(s["videos"] for s in shards),
        "captions": sum(s["captions"] for s in shards),
        "rejected_videos": len(rejects) - rejected_captions,
        "rejected_captions": rejected_captions,
        "digest": digest.hexdigest(),
        "shards": shards,
        "plan": plan,
    }
    if not summary["videos"]:
        first = next(r for r in rejects if "caption" not in r)
        raise ShardError(
            f"not one of the videos could be packed; {out / 'rejects.jsonl'} says why for each. "
            f"First: {first['id']}: {first['reason']}. When that is mended, delete {out} and run the command again."
        )
    with io.BytesIO() as file:
        np.save(file, np.array(counts, np.min_scalar_type(max(counts))))
        write_atomic(out / CAPTION_COUNTS, file.getvalue())
    write_atomic(out / "dataset.json", json.dumps(summary, indent=2) + "\n")
    (out / "packing.json").unlink(missing_ok=True)
    return summary
