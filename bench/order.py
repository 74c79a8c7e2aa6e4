"""What it costs to open ten million videos and to draw any step's pairs, beside a permutation that is stored.

    python bench/order.py [--videos 10000000] [--batch-size 1024] [--draws 200] [--json bench/results/order.json]

The split is made for the purpose: its dataset.json and captions.npy are as packing writes them; its sample tables are
one real Parquet file of 256 videos with 30 frames each, its tars one empty file of the right length, each hard-linked
once a shard. Only the bytes of videos are missing. Every case runs in a process of its own, whose largest resident
memory and wall times are reported; "pairs of any step" are drawn at random (epoch, step), with nothing kept from the
draw before. "stored" is what a DistributedSampler does: torch.randperm of all pairs, as a list.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness
from shards.schema import CAPTION_COUNTS, FORMAT_VERSION, JSON_CRCS, REJECTS, SCHEMA

SHARD = 256  # videos of a shard
FRAMES = 30
LINKS = 30000  # hard links that a file gets before the next copy of it: file systems allow few more
CASES = {"one caption": [1], "1 to 5 captions": [1, 2, 3, 4, 5]}


def main() -> int:
    parser = harness.parser(__doc__, "order")
    parser.add_argument("--videos", type=int, default=10_000_000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where to make the split; default: a temporary folder")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one case, in a process of its own
    args = parser.parse_args()
    if args.measure:
        measured = measure_stored if args.measure == "stored" else measure
        print(json.dumps(measured(Path(args.measure), args)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="order-") as folder:
        for name, cycle in CASES.items():
            split = Path(folder) / name.replace(" ", "_")
            make_split(split, args.videos, cycle)
            rows.append({"case": name} | run(str(split), args))
            stored = run("stored", args, pairs=rows[-1]["pairs"])
            rows.append({"case": f"{name}, stored"} | stored)
    show(rows)
    harness.save(args.json, {"machine": harness.machine() | harness.versions("numpy", "pyarrow"), "results": rows})
    return 0


def run(what: str, args: argparse.Namespace, pairs: int = 0) -> dict:
    videos = pairs or args.videos
    words = ["--measure", what, "--videos", videos, "--batch-size", args.batch_size, "--draws", args.draws]
    return harness.answer(__file__, *words)


def measure(path: Path, args: argparse.Namespace) -> dict:
    from pipelines.config import DataConfig
    from pipelines.mixture import order_of
    from shards.split import Split

    before = resident()
    start = time.perf_counter()
    split = Split(path)
    opened = time.perf_counter()
    order = order_of(split, DataConfig(), args.batch_size, 0, False)
    pairs = order.batch(0, 0)
    drawn = time.perf_counter()
    for video, caption in pairs.tolist():
        split.video(video), split.captions(video)[caption]
    read = time.perf_counter()
    peak = resident()
    draw = np.random.default_rng(0)
    cold, cpu, first = [], [], drawn - start
    for epoch, step in zip(
        draw.integers(1, 100, args.draws).tolist(),
        draw.integers(0, order.steps_per_epoch, args.draws).tolist(),
        strict=True,
    ):
        order._line.cache_clear()
        order._block.cache_clear()
        used, started = time.process_time(), time.perf_counter()
        order.batch(epoch, step)
        cold.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    started = time.perf_counter()
    for step in range(args.draws):
        order.batch(1, step)
    return {
        "videos": len(split),
        "pairs": order.pairs,
        "shards": len(split.shards),
        "batch_size": args.batch_size,
        "open_s": opened - start,
        "open_and_first_pairs_s": first,
        "first_pairs_rows_and_captions_s": read - start,
        "shards_of_first_batch": len({split.video(v).shard for v in pairs[:, 0].tolist()}),
        "peak_mib": peak / 2**20,
        "peak_over_imports_mib": (peak - before) / 2**20,
        "any_step_median_ms": 1e3 * statistics.median(cold),
        "any_step_p95_ms": 1e3 * float(np.quantile(cold, 0.95)),
        "any_step_max_ms": 1e3 * max(cold),
        "any_step_cpu_median_ms": 1e3 * statistics.median(cpu),
        "next_step_mean_ms": 1e3 * (time.perf_counter() - started) / args.draws,
    }


def measure_stored(_: Path, args: argparse.Namespace) -> dict:
    """`args.videos` pairs."""
    import torch

    before = resident()
    start = time.perf_counter()
    pairs = torch.randperm(args.videos, generator=torch.Generator().manual_seed(0)).tolist()
    pairs[: args.batch_size]
    first = time.perf_counter() - start
    peak = resident()
    return {
        "pairs": args.videos,
        "open_and_first_pairs_s": first,
        "peak_mib": peak / 2**20,
        "peak_over_imports_mib": (peak - before) / 2**20,
        "any_step_median_ms": 1e3 * first,  # of another epoch: all of it is drawn anew
    }


def resident() -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_split(path: Path, videos: int, cycle: list[int]) -> None:
    """Captions of the videos of a shard go round in `cycle`, beginning anew in each shard."""
    path.mkdir()
    sizes = [SHARD] * (videos // SHARD) + [videos % SHARD] * (videos % SHARD > 0)
    per_shard = {size: np.resize(cycle, size).astype(np.uint8) for size in set(sizes)}
    sources, crcs = {}, {}
    shards = []
    for number, size in enumerate(sizes):
        key, name = (size, number // LINKS), f"{number:06d}"
        if key not in sources:
            write_table(path / f"{name}.parquet", per_shard[size])
            with open(path / f"{name}.tar", "wb") as file:
                file.truncate(size * FRAMES * 10_000)
            sources[key] = name
            crcs[key] = crc32c((path / f"{name}.parquet").read_bytes())
        else:
            for suffix in ("tar", "parquet"):
                os.link(path / f"{sources[key]}.{suffix}", path / f"{name}.{suffix}")
        captions = int(per_shard[size].sum())
        shards.append({"name": name, "videos": size, "captions": captions, "bytes": size * FRAMES * 10_000,
                       "table_crc32c": crcs[key]})  # fmt: skip
    np.save(path / CAPTION_COUNTS, np.concatenate([per_shard[size] for size in sizes]))
    info = {
        "format": FORMAT_VERSION, "name": path.name, "split": "train", "profile": {"name": "intra", "short_side": 224},
        "videos": videos, "captions": sum(s["captions"] for s in shards), "rejected_videos": 0, "rejected_captions": 0,
        "digest": "0" * 64, "shards": shards, "plan": {},
    }  # fmt: skip
    (path / "dataset.json").write_text(json.dumps(info, indent=2) + "\n")


def write_table(path: Path, captions: np.ndarray) -> None:
    draw, rows = np.random.default_rng(0), []
    for i, count in enumerate(captions.tolist()):
        size = draw.integers(5_000, 10_000, FRAMES)
        rows.append({
            "key": f"video{i:05d}", "id": f"video{i:05d}", "ext": "mp4", "offset": 512 + i * FRAMES * 10_000,
            "size": int(size.sum()), "crc32c": int(draw.integers(2**32)), "codec": "mjpeg", "width": 398, "height": 224,
            "rotation": 0, "fps_num": 30, "fps_den": 1, "source_frames": 300, "duration": 10.0, "extradata": b"",
            "captions": [{"text": f"caption {c} of video {i}", "start": None, "end": None} for c in range(count)],
            "frame_number": np.arange(0, 300, 10), "frame_time": np.arange(FRAMES) / 3, "frame_offset": np.cumsum(size),
            "frame_size": size, "frame_key": [True] * FRAMES, "frame_crc32c": draw.integers(0, 2**32, FRAMES),
        })  # fmt: skip
    table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata(
        {REJECTS: "[]", JSON_CRCS: json.dumps([0] * len(rows))}
    )
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def show(rows: list[dict]) -> None:
    figures = {"pairs": ",", "open_and_first_pairs_s": ".2f", "first_pairs_rows_and_captions_s": ".2f", "peak_mib": ".0f",
               "any_step_median_ms": ".2f", "any_step_p95_ms": ".2f"}  # fmt: skip
    told = [[row["case"], *(harness.number(row.get(key), form) for key, form in figures.items())] for row in rows]
    heads = ["", "pairs", "open + first pairs, s", "with rows, s", "peak MiB", "any step, median ms", "p95 ms"]
    harness.show(heads, told)


if __name__ == "__main__":
    sys.exit(main())
