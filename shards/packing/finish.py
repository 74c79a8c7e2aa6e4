"""The files of a split beside its shards: dataset.json, captions.npy and rejects.jsonl, from the committed sample tables."""

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from shards import ShardError, memory, storage
from shards.digest import BYTES, ROWS, RULE_KEY, fingerprints
from shards.packing import scheduler
from shards.packing.plan import READERS
from shards.packing.rows import NO_CAPTION, is_loss
from shards.schema import CAPTION_COUNTS, FORMAT_VERSION, REJECTS
from shards.storage import Bucket, Folder


@dataclass(frozen=True)
class TableTotals:
    """What the tables of a split say together: part of dataset.json, rejects.jsonl as text and as entries, and the
    number of captions of each video."""

    info: dict
    rejects_text: bytes
    rejects: list[dict]
    counts: list[int]

    def caption_counts(self) -> bytes:
        """captions.npy"""
        with io.BytesIO() as file:
            np.save(file, np.array(self.counts, np.min_scalar_type(max(self.counts, default=0))))
            return file.getvalue()


def read_totals(out: Path, profile: dict, names: list[str], rule: int = ROWS) -> TableTotals:
    """The totals of the committed shards `names`. rule: by which the digest is made, see `shards.digest`."""
    target = storage.output(out)
    sizes = target.listing()
    shards: list[dict] = []
    rejects: list[dict] = []
    counts: list[int] = []
    digest = hashlib.sha256(json.dumps(profile, sort_keys=True).encode())
    with ThreadPoolExecutor(READERS if memory.limit() is None else 1) as pool:
        batches = (names[i : i + 64] for i in range(0, len(names), 64))  # or all tables would be held at once
        tables = (table for batch in batches for table in pool.map(lambda name: _read(target, name, rule), batch))
        for name, (table, crc, marks) in zip(names, tables, strict=True):
            rejects += json.loads(table.schema.metadata[REJECTS])
            rows = table.to_pylist()
            for row, mark in zip(rows, marks, strict=True):
                digest.update(json.dumps([row["key"], mark, row["captions"]], sort_keys=True).encode())
            per_video = [len(row["captions"]) for row in rows]
            counts += per_video
            shards.append(
                {
                    "name": name, "videos": len(rows), "captions": sum(per_video), "bytes": sizes[f"{name}.tar"],
                    "table_crc32c": crc,
                }
            )  # fmt: skip
    lines = "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in rejects)
    rejected_captions = sum("caption" in r for r in rejects)
    info = {
        "format": FORMAT_VERSION,
        "videos": sum(s["videos"] for s in shards),
        "captions": sum(s["captions"] for s in shards),
        "rejected_videos": len(rejects) - rejected_captions,
        "rejected_captions": rejected_captions,
        "digest": digest.hexdigest(),
        **({} if rule == BYTES else {RULE_KEY: rule}),
        "shards": shards,
    }
    return TableTotals(info, lines.encode(errors="backslashreplace"), rejects, counts)  # names need not be Unicode


def finish(out: Path, plan: dict, names: list[str], reconciliation: dict | None = None, rule: int = ROWS) -> dict:
    """Write rejects.jsonl and dataset.json from the committed shards `names`; returns what dataset.json says.

    rule: by which the digest is made, see `shards.digest`."""
    target = storage.output(out)
    totals = read_totals(out, plan["profile"], names, rule)
    storage.write(target, "rejects.jsonl", totals.rejects_text)
    if plan.get("input") is not None and any(map(is_loss, totals.rejects)):
        plan = {**plan, "input": None}  # what a repair had to leave out must not pass for packed
    named = {what: plan[what] for what in ("name", "split", "profile")}
    summary: dict = {"format": totals.info["format"]} | named | totals.info | {"plan": plan}
    if reconciliation:
        packed = {what: summary[what] for what in ("videos", "captions")}
        summary["reconciliation"] = _reconciled(reconciliation, packed, totals.rejects, plan)
    if not summary["videos"]:
        bad = [r for r in totals.rejects if "caption" not in r]
        first = bad[0]
        if all(r["reason"] == NO_CAPTION for r in bad):
            raise ShardError(
                "not one of the videos has a caption, so that none was packed. Name a csv or jsonl with --captions, or put "
                "captions beside the videos, and run the command again with --update"
            )
        raise ShardError(
            f"not one of the videos could be packed; {target}/rejects.jsonl says why for each. First: {first['id']}: "
            f"{first['reason']}. When that is fixed, run the command again with --retry-rejects."
        )
    storage.write(target, CAPTION_COUNTS, totals.caption_counts())
    storage.write(target, "dataset.json", json.dumps(summary, indent=2) + "\n")
    listing = target.listing()
    for name in ["packing.json", *map(scheduler.lost_name, names)]:
        if name in listing:
            target.delete(name)
    return summary


def _reconciled(counts: dict, packed: dict[str, int], rejects: list[dict], plan: dict) -> dict:
    """The counts of the annotations with those of what became of them, each counted where it is recorded.

    Raises ShardError if they do not add up. Where a repair left videos out, the rejects do not tell, and "rejected"
    stays None.
    """
    videos = [r for r in rejects if "caption" not in r]
    if plan.get("input") is None:
        return counts | {"packed": packed, "rejected": {"videos": None, "captions": None}}
    gone = [r for r in videos if r.get("missing")]
    bad = [r for r in videos if not r.get("missing")]
    ids = {r["id"] for r in videos}  # a rejected video's captions have been counted with it
    single = sum("caption" in r and r["id"] not in ids for r in rejects)
    missing = {"videos": len(gone), "captions": sum(r["captions"] for r in gone)}
    rejected = {"videos": len(bad), "captions": sum(r["captions"] for r in bad) + single}
    for what, n in counts["annotations"].items():
        if n != packed[what] + rejected[what] + missing[what]:
            raise ShardError(
                f"the annotations hold {n} {what}, but {packed[what]} packed, {rejected[what]} rejected and {missing[what]} "
                f"missing are {packed[what] + rejected[what] + missing[what]}"
            )
    return counts | {"missing": missing, "packed": packed, "rejected": rejected}


def _read(target: Folder | Bucket, name: str, rule: int) -> tuple[pa.Table, int, list[int] | list[str]]:
    """What `read_totals` needs of a shard's table, the file's crc32c, and what the digest takes of each row's video."""
    data = target.read(f"{name}.parquet")
    with pq.ParquetFile(io.BytesIO(data)) as file:
        table = file.read(["key", "crc32c", "captions"], use_threads=False)
        marks = table.column("crc32c").to_pylist() if rule == BYTES else [mark.hex() for mark in fingerprints(file)]
        return table, crc32c(data), marks
