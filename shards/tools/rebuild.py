"""One shard repaired: its index and its sample table rebuilt from its tar, and the tar cut where it is damaged."""

import json
import shlex
import tarfile
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from shards import ShardError, VideoError, first_line
from shards.packing.rows import frame_columns, is_loss, loss, write_table
from shards.schema import JSON_CRCS, SCHEMA, FrameTable
from shards.table import Table
from shards.tar import commit, draft_name, index_text, read_index, read_members, write_atomic
from shards.tarcopy import Members, TarCopier, link_or_copy
from shards.tools.tar_samples import TarSample, description, ends_well, member_crc, pread, refuse_odd, whole_samples
from shards.video.source import scan


@dataclass(frozen=True)
class Repaired:
    """What was done to one shard: "kept" (nothing was wrong), "rebuilt", or "cut" (its tar has been written anew)."""

    shard: str
    done: str
    videos: int
    lost: tuple[str, ...] = ()  # what was left out, and why


@dataclass(frozen=True)
class ShardRepair:
    """A shard to be repaired: `name` in the split at `path`; the other fields are the options of `repair`."""

    path: Path
    name: str
    everything: bool
    truncate: bool
    drop: bool


@dataclass(frozen=True)
class RepairedShard:
    """A shard whose files are all in order now, and the profile of its videos (None: it holds none)."""

    repaired: Repaired
    profile: dict | None


def repair_shard(job: ShardRepair, rejects: list[dict]) -> RepairedShard | ShardError:
    """Repair a shard, to whose table `rejects` belong. What cannot be repaired is returned as the error that says why."""
    try:
        return _rebuild(job, rejects)
    except ShardError as error:  # the other shards are still looked at
        return error


def _rebuild(job: ShardRepair, rejects: list[dict]) -> RepairedShard:
    if not job.everything and (intact := _intact(job)):
        return intact
    tar = job.path / f"{job.name}.tar"
    samples, damage = whole_samples(tar)
    if damage and not job.truncate:
        last = f"after sample {samples[-1].id!r}" if samples else "before the first sample"
        raise ShardError(
            f"{tar} is damaged {last}: {damage}. Whole samples before that: {len(samples)}. Copy the file again, or "
            f"cut it there: {repair_command(job.path, '--truncate')} (the damaged file is kept as {tar.name}.damaged)."
        )
    rows, crcs, good, lost = [], [], [], [damage] if damage else []
    losses = _cut_off(job, samples, damage, rejects)
    checksums, profile = _checksums(job), None
    with open(tar, "rb") as file:
        for sample in samples:
            try:
                _refuse_changed(sample, file, checksums)
                described = description(tar, sample, file)
                row, json_crc = _row(sample, described, file)
            except VideoError as error:
                if not job.drop:
                    raise ShardError(
                        f"{tar}: {sample.id}: {error}. Copy the file again, or leave the sample out: "
                        f"{repair_command(job.path, '--drop')} (the damaged file is kept as {tar.name}.damaged)."
                    ) from error
                lost.append(f"{sample.id}: {error}")
                losses.append(loss(sample.id, tar.name, str(error)))
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
    ids = {row["id"] for row in rows}  # of these a lost one is back, from another copy of the tar
    rejects = [*(r for r in rejects if not (is_loss(r) and r.get("id") in ids)), *losses]
    write_table(tar.with_suffix(".parquet"), pa.Table.from_pylist(rows, schema=SCHEMA), rejects, crcs)
    return RepairedShard(Repaired(job.name, "cut" if lost else "rebuilt", len(rows), tuple(lost)), profile)


def _aside(tar: Path) -> Path:
    """Where a tar is kept as it was before samples were left out."""
    return tar.with_name(f"{tar.name}.damaged")


def repair_command(path: Path, *options: str) -> str:
    """The command that repairs the split, to be pasted."""
    return " ".join(["python -m c4c.shard repair", shlex.quote(str(path)), *options])


def _cut_off(job: ShardRepair, samples: list[TarSample], damage: str | None, rejects: list[dict]) -> list[dict]:
    """Lines of rejects.jsonl about samples that the tar does not hold any more: those that its old table names, also where
    a repair was stopped after it had cut the tar. If that table tells nothing, one line stands for all that may be lost."""
    tar = job.path / f"{job.name}.tar"
    was_cut = damage is not None or _aside(tar).exists()
    reason = f"its end was cut off ({damage})" if damage else "an earlier repair left it out"
    keys = [sample.key for sample in samples]
    whole = set(keys)
    try:
        table = Table(tar.with_suffix(".parquet"), job.name, 0)
        named = dict(zip(table.column("key"), table.column("id"), strict=True))
    except (ShardError, ValueError, KeyError, TypeError):
        named = {}
    # a table of another shard names other samples; of a tar without samples it can be any table
    if named and [key for key in named if key in whole] == keys and (keys or was_cut):
        return [loss(id, tar.name, reason) for key, id in named.items() if key not in whole]
    if not was_cut or any(map(is_loss, rejects)):
        return []
    return [loss(tar.name, tar.name, f"{reason}; which videos that were is not known, since the table cannot be read")]


@dataclass(frozen=True)
class _Crcs:
    """What the old table says of a sample: the crc32c of its video and of its JSON."""

    video: int
    json: int


def _checksums(job: ShardRepair) -> dict[str, _Crcs]:
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


def _refuse_changed(sample: TarSample, file: BinaryIO, checksums: dict[str, _Crcs]) -> None:
    """Raises VideoError if the sample's bytes are not those that were packed."""
    for extension, place in sample.members.items():
        if extension != "json" and (crcs := checksums.get(f"{sample.key}.{extension}")):
            if member_crc(file, *place) != crcs.video:
                raise VideoError("its bytes changed after packing (crc32c differs from the table's)")
            if "json" in sample.members and member_crc(file, *sample.members["json"]) != crcs.json:
                raise VideoError("its .json member changed after packing (crc32c differs from the table's)")


def _intact(job: ShardRepair) -> RepairedShard | None:
    """The shard as it is, if index and table can be read and agree with the tar about every member; with `drop` its bytes
    must agree, too."""
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
        if not ends_well(base.with_suffix(".tar"), max((o + s for o, s in members.values()), default=0)):
            return None
        profile = None
        with open(base.with_suffix(".tar"), "rb") as file:
            if videos:
                profile = json.loads(pread(file, *members[f"{videos[0].key}.json"]))["profile"]
            if job.drop:
                checksums = _checksums(job)
                for v in videos:
                    both = {extension: members[f"{v.key}.{extension}"] for extension in (v.ext, "json")}
                    _refuse_changed(TarSample(v.key, both), file, checksums)
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
    return RepairedShard(Repaired(job.name, "kept", table.rows), profile)


def _row(sample: TarSample, described: dict, file: BinaryIO) -> tuple[dict, int]:
    """A row of the sample table as the packer wrote it, and the crc32c of the JSON. Raises VideoError."""
    try:
        refuse_odd(described)
        row, crc = _row_of(sample, described, file)
        pa.Table.from_pylist([row], schema=SCHEMA)  # raises where a number does not fit its column
        return row, crc
    except VideoError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, pa.ArrowException) as error:
        raise VideoError(f"its .json member has values that the packer never writes ({first_line(error)})") from error


def _row_of(sample: TarSample, described: dict, file: BinaryIO) -> tuple[dict, int]:
    extension = next(e for e in sample.members if e != "json")
    offset, size = sample.members[extension]
    data = pread(file, offset, size)
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
    json_crc = crc32c(pread(file, *sample.members["json"]))
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


def _rewrite(tar: Path, file: BinaryIO, samples: list[TarSample], rows: list[dict]) -> None:
    """Write the tar anew with these samples, keep the old one aside, and correct the rows' offsets."""
    aside = _aside(tar)
    temporary, kept = draft_name(tar), draft_name(aside)
    copier = TarCopier(temporary, tar)
    try:
        for sample, row in zip(samples, rows, strict=True):
            places: Members = {ext: (file.fileno(), offset, size) for ext, (offset, size) in sample.members.items()}
            row["offset"] = copier.add(sample.key, places)[row["ext"]]
        copier.close()
        if aside.exists():
            raise ShardError(f"{aside} exists already, from an earlier repair: move it elsewhere first")
        link_or_copy(tar, kept)  # not renamed: at no moment is there no tar
        commit(kept, aside)
        commit(temporary, tar)
    except BaseException:
        copier.discard()
        kept.unlink(missing_ok=True)
        raise
    write_atomic(tar.with_suffix(".idx"), copier.index())
