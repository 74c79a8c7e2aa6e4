"""Rebuild what stands beside the tars of a split (index, sample table, dataset.json) from the tars alone."""

import json
import os
import re
import shlex
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from shards import ShardError, VideoError
from shards.annotations import Caption, Item
from shards.packing.finish import finish
from shards.packing.plan import input_digest
from shards.packing.rows import frame_columns, write_table
from shards.schema import FORMAT_VERSION, JSON_CRCS, REJECTS, SCHEMA, FrameTable
from shards.split import Table
from shards.summary import checked
from shards.tar import commit, index_text, key_to_name, read_index, read_members, write_atomic
from shards.tarcopy import TarCopier, link_or_copy
from shards.video.profiles import Profile
from shards.video.source import scan

_AT_ONCE = 16 << 20  # bytes in memory while a crc is computed
_NEEDED = {
    "id", "captions", "meta", "codec", "width", "height", "rotation", "mirrored", "duration", "source_frames", "fps",
    "profile", "source", "cut", "frame_number", "frame_time",
}  # fmt: skip


@dataclass(frozen=True)
class Repaired:
    """What was done to one shard: "kept" (nothing was wrong), "rebuilt", or "cut" (its tar has been written anew)."""

    shard: str
    done: str
    videos: int
    lost: tuple[str, ...] = ()  # what was left out, and why


@dataclass(frozen=True)
class _Sample:
    key: str
    members: dict[str, tuple[int, int]]  # {extension: (offset, size)}

    @property
    def id(self) -> str:
        return key_to_name(self.key)


@dataclass(frozen=True)
class _Job:
    path: Path
    name: str
    everything: bool
    truncate: bool
    drop: bool


@dataclass(frozen=True)
class _Found:
    """A shard whose files are all in order now, and the profile of its videos (None: it holds none)."""

    repaired: Repaired
    profile: dict | None


def repair(
    path: Path,
    *,
    name: str | None = None,
    split: str | None = None,
    everything: bool = False,
    truncate: bool = False,
    drop: bool = False,
    workers: int | None = None,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> list[Repaired]:
    """Rebuild the index and the table of every shard that lacks one or disagrees with its tar, then dataset.json.

    `everything` rebuilds the shards that look well too. A tar with a damaged end is cut after its last whole sample
    only if `truncate`; samples that do not decode, or whose bytes are not those of the old table's crc32c, are left out
    only if `drop`, which reads every shard for that. Either way the tar as it was stays beside it as NAME.tar.damaged.
    `name` and `split` are used where no dataset.json is left to tell them. Rejects are in no tar: they are taken from what
    is left of the tables and of rejects.jsonl.

    `on_shard(done, total)` is called with shards. Raises ShardError, before dataset.json is touched, if a shard cannot
    be repaired; shards repaired until then stay repaired.
    """
    names, old = _names(path)
    rejects = _rejects(path, names)
    jobs = [_Job(path, shard, everything, truncate, drop) for shard in names]
    found: list[_Found] = []
    failures: list[str] = []
    on_shard(0, len(jobs))
    for done, one in enumerate(_each(jobs, rejects, workers or os.cpu_count() or 1), 1):
        if isinstance(one, ShardError):
            failures.append(str(one))
        else:
            found.append(one)
        on_shard(done, len(jobs))
    if failures:
        more = f" ({len(failures) - 1} more shards have troubles of their own)" if len(failures) > 1 else ""
        raise ShardError(failures[0] + more)
    profiles = [p for i, f in enumerate(found) if (p := f.profile) and p not in [g.profile for g in found[:i]]]
    if len(profiles) != 1:
        told = "; ".join(json.dumps(p) for p in profiles) or "none holds a video"
        raise ShardError(f"{path}: the shards must be of one profile to be a split ({told})")
    repaired = [f.repaired for f in found]
    order = [f.name for f in fields(Profile)]  # in the tar's json the keys are sorted
    profile = dict(
        sorted(profiles[0].items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    )
    plan = old.get("plan") or _plan(path, name or old.get("name"), split or old.get("split"), profile, repaired)
    if any(r.lost for r in repaired):
        plan = {**plan, "input": None}  # what is missing now must not pass for packed
    finish(path, plan, names, old.get("reconciliation"))
    return repaired


def _each(jobs: list[_Job], rejects: dict[str, list[dict]], workers: int) -> Iterator[_Found | ShardError]:
    if workers == 1 or len(jobs) == 1:
        yield from (_repair_shard(job, rejects[job.name]) for job in jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        yield from pool.map(_repair_shard, jobs, [rejects[job.name] for job in jobs])


def _names(path: Path) -> tuple[list[str], dict]:
    """Names of the shards, and what is left of dataset.json ({} if it is lost)."""
    if not path.is_dir():
        raise ShardError(f"there is no folder {path}")
    names = sorted(p.stem for p in path.glob("*.tar"))
    if not names:
        raise ShardError(f"{path} holds no tar, and there is nothing else to repair a split from")
    if (path / "packing.json").exists():
        raise ShardError(
            f"{path} has not been packed to its end. Run the packing command again: it goes on where it stopped. "
            "(To make a split of what is there, delete its packing.json and repair again.)"
        )
    old: dict = {}
    with suppress(OSError, ValueError, RecursionError):
        old = json.loads((path / "dataset.json").read_text())
    try:
        checked(old, path)
    except ShardError:
        told = old.items() if isinstance(old, dict) else ()
        old = {k: v for k, v in told if k in ("name", "split") and isinstance(v, str)}
    listed = [s["name"] for s in old["shards"]] if "shards" in old else [f"{i:06d}" for i in range(len(names))]
    if missing := sorted(set(listed) - set(names)):
        raise ShardError(
            f"{path / missing[0]}.tar is missing: nothing else holds its videos. Copy it again, or run the packing command "
            "again with the original videos; it packs what is missing."
        )
    if odd := sorted(set(names) - set(listed)):
        raise ShardError(f"{path / odd[0]}.tar is no shard of this split: move it elsewhere")
    return listed, old


def _rejects(path: Path, names: list[str]) -> dict[str, list[dict]]:
    """The rejects of each shard: from its table, or the part of rejects.jsonl that no other table accounts for."""
    known: dict[str, list[dict]] = {}
    for name in names:
        with suppress(OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            known[name] = json.loads(pq.read_schema(path / f"{name}.parquet").metadata[REJECTS])
    left: list[dict] = []
    with suppress(OSError, ValueError, RecursionError):
        left = [json.loads(line) for line in (path / "rejects.jsonl").read_text().split("\n") if line]
    out: dict[str, list[dict]] = {}
    for place, name in enumerate(names):
        if name in known:
            out[name] = known[name]
            left = left[len(known[name]) :]
        else:  # all that stands before the rejects of the next known shard; of several in a row the first gets them
            following = next((known[n] for n in names[place + 1 :] if known.get(n)), [])
            at = next((i for i in range(len(left)) if left[i : i + len(following)] == following), len(left))
            out[name], left = left[: at if following else len(left)], left[at if following else len(left) :]
    return out


def _plan(path: Path, name: str | None, split: str | None, profile: dict, repaired: list[Repaired]) -> dict:
    """The plan as the packer wrote it, as far as the tars tell."""
    folder = path.resolve()
    rejects = (path / "rejects.jsonl").exists() and (path / "rejects.jsonl").stat().st_size
    items = None if rejects else _items(path, [r.shard for r in repaired])
    return {
        "format": FORMAT_VERSION,
        "name": name or folder.parent.name,
        "split": split or folder.name,
        "profile": profile,
        "input": _input(items),
        "shards": len(repaired),
        "shard_videos": max(r.videos for r in repaired),
    }


def _input(items: Iterator[Item] | None) -> str | None:
    """The digest of the packing's input, or None where the tars do not tell all of it."""
    try:
        return items and input_digest(items)
    except _Unknown:
        return None


class _Unknown(Exception):
    """Captions of a cut video were moved with it, and those outside the cut are gone; or the source's name is."""


def _items(path: Path, names: list[str]) -> Iterator[Item]:
    for name in names:
        with open(path / f"{name}.tar", "rb") as file:
            for sample, (offset, size) in read_index(path / f"{name}.idx").items():
                if sample.endswith(".json"):
                    described = json.loads(_pread(file, offset, size))
                    if described["cut"]:
                        raise _Unknown
                    captions = tuple(Caption(**c) for c in described["captions"])
                    try:
                        file_name = Path(described["source"]["file"])
                    except (KeyError, TypeError) as error:
                        raise _Unknown from error
                    yield Item(described["id"], file_name, captions, described["meta"])


def _repair_shard(job: _Job, rejects: list[dict]) -> _Found | ShardError:
    try:
        return _rebuild(job, rejects)
    except ShardError as error:  # the other shards are still looked at
        return error


def _rebuild(job: _Job, rejects: list[dict]) -> _Found:
    if not job.everything and (found := _well(job)):
        return found
    tar = job.path / f"{job.name}.tar"
    samples, damage = _walk(tar)
    if damage and not job.truncate:
        last = f"after sample {samples[-1].id!r}" if samples else "before the first sample"
        raise ShardError(
            f"{tar} is damaged {last}: {damage}. Whole samples before that: {len(samples)}. Copy the file again, or "
            f"cut it there: {command(job.path, '--truncate')} (the file as it is stays as {tar.name}.damaged)."
        )
    rows, crcs, good, lost = [], [], [], [damage] if damage else []
    packed, profile = _packed(job), None
    with open(tar, "rb") as file:
        for sample in samples:
            try:
                _refuse_changed(sample, file, packed)
                described = _described(tar, sample, file)
                row, json_crc = _row(sample, described, file)
            except VideoError as error:
                if not job.drop:
                    raise ShardError(
                        f"{tar}: {sample.id}: {error}. Copy the file again, or leave the sample out: "
                        f"{command(job.path, '--drop')} (the file as it is stays as {tar.name}.damaged)."
                    ) from error
                lost.append(f"{sample.id}: {error}")
                gone = {"id": sample.id, "path": tar.name, "reason": f"damaged in the tar: {error}"}
                rejects = [*rejects, gone]
                continue
            if profile not in (None, described["profile"]):
                raise ShardError(f"{tar} mixes profiles: {profile} and {described['profile']} ({sample.id})")
            profile = described["profile"]
            rows.append(row)
            crcs.append(json_crc)
            good.append(sample)
        if lost:
            _rewrite(tar, file, good, rows)
        else:
            lines = [
                " ".join(f"{ext} {offset} {size} {s.key}.{ext}" for ext, (offset, size) in s.members.items())
                for s in good
            ]
            write_atomic(tar.with_suffix(".idx"), index_text(lines))
    parquet = tar.with_suffix(".parquet")
    temporary = parquet.with_name(f".{parquet.name}.{os.getpid()}.tmp")
    write_table(parquet, temporary, pa.Table.from_pylist(rows, schema=SCHEMA), rejects, crcs)
    return _Found(Repaired(job.name, "cut" if lost else "rebuilt", len(rows), tuple(lost)), profile)


def command(path: Path, *options: str) -> str:
    """The command that repairs the split, to be pasted."""
    return " ".join(["python -m c4c.shard repair", shlex.quote(str(path)), *options])


@dataclass(frozen=True)
class _Crcs:
    """What the old table says of a sample: the crc32c of its video and of its JSON."""

    video: int
    json: int


def _packed(job: _Job) -> dict[str, _Crcs]:
    """{member's name: its sample's crc32c} as far as there is a table that can be read."""
    parquet = job.path / f"{job.name}.parquet"
    try:
        table = Table(parquet, job.name, 0)
        json_crcs = json.loads(pq.read_schema(parquet).metadata[JSON_CRCS])
        names = [f"{key}.{ext}" for key, ext in zip(table.column("key"), table.column("ext"), strict=True)]
        crcs = [_Crcs(*both) for both in zip(table.column("crc32c"), json_crcs, strict=True)]
        return dict(zip(names, crcs, strict=True))
    except (ShardError, ValueError, KeyError, TypeError, OSError, pa.ArrowException):
        return {}


def _refuse_changed(sample: _Sample, file: BinaryIO, packed: dict[str, _Crcs]) -> None:
    """Raises VideoError if the sample's bytes are not those that were packed."""
    for extension, place in sample.members.items():
        if extension != "json" and (crcs := packed.get(f"{sample.key}.{extension}")):
            if _crc(file, *place) != crcs.video:
                raise VideoError("its bytes changed after packing (crc32c differs from the table's)")
            if "json" in sample.members and _crc(file, *sample.members["json"]) != crcs.json:
                raise VideoError("its .json member changed after packing (crc32c differs from the table's)")


def _crc(file: BinaryIO, offset: int, size: int) -> int:
    crc = 0
    for at in range(offset, offset + size, _AT_ONCE):
        crc = crc32c(_pread(file, at, min(_AT_ONCE, offset + size - at)), crc)
    return crc


def _well(job: _Job) -> _Found | None:
    """The shard as it is, if index and table can be read and say of every member what the tar says; where samples are to
    be dropped, also of its bytes."""
    base = job.path / job.name
    try:
        members = read_members(base.with_suffix(".tar"))
        if read_index(base.with_suffix(".idx")) != members:
            return None
        table = Table(base.with_suffix(".parquet"), job.name, 0)
        metadata = pq.read_schema(base.with_suffix(".parquet")).metadata
        videos = [table.video(row) for row in range(table.rows)]
        agree = all(members.get(f"{v.key}.{v.ext}") == (v.offset, v.size) for v in videos)
        if not agree or len(members) != 2 * table.rows or len(json.loads(metadata[JSON_CRCS])) != table.rows:
            return None
        if not _ends_well(base.with_suffix(".tar"), max((o + s for o, s in members.values()), default=0)):
            return None
        profile = None
        with open(base.with_suffix(".tar"), "rb") as file:
            if videos:
                profile = json.loads(_pread(file, *members[f"{videos[0].key}.json"]))["profile"]
            if job.drop:
                packed = _packed(job)
                for v in videos:
                    both = {extension: members[f"{v.key}.{extension}"] for extension in (v.ext, "json")}
                    _refuse_changed(_Sample(v.key, both), file, packed)
    except (
        VideoError,
        ShardError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        OSError,
        EOFError,
        tarfile.TarError,
    ):
        return None
    return _Found(Repaired(job.name, "kept", table.rows), profile)


def _walk(tar: Path) -> tuple[list[_Sample], str | None]:
    """The whole samples before the first damage, in order, and what the damage is (None if there is none).

    Raises ShardError if the file is no tar at all.
    """
    size, end, damage = tar.stat().st_size, 0, None
    samples: list[_Sample] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            while (member := archive.next()) is not None:
                if member.offset_data + member.size > size:
                    damage = f"the file ends inside {member.name!r}"
                    break
                end = member.offset_data + member.size
                key, _, extension = member.name.partition(".")
                if not member.isreg() or not key or "/" in member.name:
                    raise ShardError(
                        f"{tar} holds {member.name!r}, which is no member of a sample that this packer writes. {_FOREIGN}"
                    )
                if not samples or samples[-1].key != key or extension in samples[-1].members:
                    samples.append(_Sample(key, {}))
                samples[-1].members[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        if not samples and not end:
            raise ShardError(f"{tar} is not a tar ({error})") from error
        damage = f"from byte {end} on it cannot be read ({error})"
    if damage is None and not _ends_well(tar, end):
        damage = f"what follows byte {end} is no header and no end of an archive"
    if damage and samples and (len(samples[-1].members) < 2 or "json" not in samples[-1].members):
        samples.pop()
    return samples, damage


def _ends_well(tar: Path, end: int) -> bool:
    """Whether nothing but zeros, and at least two blocks of them, follows the last member's last byte `end`."""
    with open(tar, "rb") as file:
        file.seek(end)
        rest = file.read(4 * tarfile.RECORDSIZE)
        return len(rest) - (-end % tarfile.BLOCKSIZE) >= 2 * tarfile.BLOCKSIZE and not rest.strip(b"\0")


_FOREIGN = (
    "Was it written by another program? Such tars are no split of c4c: unpack them and pack the videos with their captions "
    "by: python -m c4c.shard folder --help"
)


def _described(tar: Path, sample: _Sample, file: BinaryIO) -> dict:
    """The sample's JSON member. Raises ShardError if the packer did not write it."""
    where = f"{tar}: sample {sample.id!r}"
    if "json" not in sample.members:
        raise ShardError(f"{where} has no .json member (only {', '.join(sample.members)}). {_FOREIGN}")
    try:
        described = json.loads(_pread(file, *sample.members["json"]))
        missing = _NEEDED - described.keys()
    except (ValueError, AttributeError, RecursionError) as error:
        raise ShardError(f"{where}: its .json member cannot be read ({error}). Copy the tar again.") from error
    if missing:
        raise ShardError(f"{where}: its .json member lacks {', '.join(sorted(missing))}. {_FOREIGN}")
    if len(sample.members) != 2:
        raise ShardError(
            f"{where} has the members {', '.join(sample.members)}, not one video and its .json. {_FOREIGN}"
        )
    if sample.id != described["id"]:
        raise ShardError(
            f"{where} is called {str(described['id'])[:80]!r} in its .json member: the tar has been changed"
        )
    return described


def _row(sample: _Sample, described: dict, file: BinaryIO) -> tuple[dict, int]:
    """A row of the sample table as the packer wrote it, and the crc32c of the JSON. Raises VideoError."""
    try:
        _refuse_odd(described)
        row, crc = _row_of(sample, described, file)
        pa.Table.from_pylist([row], schema=SCHEMA)  # raises where a number does not fit its column
        return row, crc
    except VideoError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, pa.ArrowException) as error:
        what = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise VideoError(f"its .json member says what no packing writes ({what})") from error


def _refuse_odd(described: dict) -> None:
    """Raises ValueError for values of the JSON member that its column would take, and that are still none of the packer's."""
    if not re.fullmatch(r"[0-9]{1,10}/0*[1-9][0-9]{0,9}", str(described["fps"])):
        raise ValueError(f"fps {str(described['fps'])[:40]!r}")
    for name in ("duration", "width", "height", "source_frames"):
        value = described[name]
        if type(value) not in (int, float) or not 0 <= value < 2**31:
            raise ValueError(f"{name} {str(value)[:40]}")
    captions, profile = described["captions"], described["profile"]
    if not captions or not all(c.keys() == {"text", "start", "end"} and type(c["text"]) is str for c in captions):
        raise ValueError("captions")
    if type(profile) is not dict or type(profile.get("name")) is not str:
        raise ValueError("profile")


def _row_of(sample: _Sample, described: dict, file: BinaryIO) -> tuple[dict, int]:
    extension = next(e for e in sample.members if e != "json")
    offset, size = sample.members[extension]
    data = _pread(file, offset, size)
    source = scan(data)
    fps = Fraction(described["fps"])
    profile = described["profile"]["name"]
    row = {
        "key": sample.key,
        "ext": extension,
        "offset": offset,
        "size": size,
        "crc32c": crc32c(data),
        "rotation": described["rotation"],
        "mirrored": described["mirrored"],
        "fps_num": fps.numerator,
        "fps_den": fps.denominator,
        "extradata": b"" if profile == "intra" else source.extradata,
        "coding": None if profile == "intra" else asdict(source.coding),
    }
    row |= {k: described[k] for k in ("id", "captions", "codec", "width", "height", "duration", "source_frames")}
    json_crc = crc32c(_pread(file, *sample.members["json"]))
    return row | frame_columns(_frames(source.frames, described)), json_crc


def _frames(stored: FrameTable, described: dict) -> FrameTable:
    """The frame table with the numbers and times of the source video, which the stored file does not tell."""
    numbers = described["frame_number"]
    if numbers is None:
        return stored
    if len(numbers) != len(stored):
        raise VideoError(f"{len(stored)} frames decode, its json names {len(numbers)}")
    times = described["frame_time"]
    if len(times) != len(numbers):
        raise VideoError(f"its json names {len(numbers)} frames and the times of {len(times)}")
    return FrameTable(
        np.asarray(numbers, np.int32), np.asarray(times), stored.offset, stored.size, stored.key, stored.crc32c
    )


def _rewrite(tar: Path, file: BinaryIO, samples: list[_Sample], rows: list[dict]) -> None:
    """Write the tar anew with these samples, keep the old one aside, and correct the rows' offsets."""
    temporary = tar.with_name(f".{tar.name}.{os.getpid()}.tmp")
    copier = TarCopier(temporary, tar)
    for sample, row in zip(samples, rows, strict=True):
        places = {ext: (file.fileno(), offset, size) for ext, (offset, size) in sample.members.items()}
        row["offset"] = copier.add(sample.key, places)[row["ext"]]
    copier.close()
    aside = tar.with_name(f"{tar.name}.damaged")
    if aside.exists():
        temporary.unlink()
        raise ShardError(f"{aside} is there already, from an earlier repair: move it elsewhere first")
    link_or_copy(tar, aside)  # not renamed: at no moment is there no tar
    commit(temporary, tar)
    write_atomic(tar.with_suffix(".idx"), copier.index())


def _pread(file: BinaryIO, offset: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, offset)
