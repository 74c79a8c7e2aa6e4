"""The loader alone: how fast it makes batches, and where the time goes.

    python -m pipelines.bench --data data/msrvtt/train [--lane intra] [--device cpu] [--cache DIR] [--batch-size 32]
        [--batches 20] [--json out.json] [key=value ...]

Beside it stands a ceiling without loading: the same batch handed over again and again by the same thread and queue.
"""

import argparse
import difflib
import json
import sys
import time
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from rich.console import Console
from rich.table import Table

from pipelines.bounds import WRONG_KIND, convert, kind_name
from pipelines.chain import Stream
from pipelines.config import LANES, CacheConfig, DataConfig
from pipelines.lanes import lane_name
from pipelines.loader import Loader
from pipelines.stats import STAGES, Stats
from shards import ShardError
from shards.split import Split


def main(words: list[str] | None = None) -> int:
    """Run the command line; its exit code."""
    args = _arguments(words)
    try:
        device = _device(args.device)
        config = _config(args)
        split = Split(args.data, config.local)
        cache = CacheConfig(dir=str(args.cache or ""), max_gb=args.cache_gb, frames=args.cache_frames)
        size = min(args.batch_size, len(split))
        result = measure(split, config, device=device, batch_size=size, batches=args.batches, cache=cache, raw=args.raw)
        result |= {"data": str(args.data), "ceiling_clips_per_s": ceiling(split, config, device, size, cache, args.raw)}
    except (ShardError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(
    split: Split,
    config: DataConfig,
    *,
    device: str = "cpu",
    batch_size: int = 32,
    batches: int = 20,
    warm_up: int = 2,
    cache: CacheConfig | None = None,
    raw: bool = False,
    seed: int = 0,
) -> dict:
    """Make `warm_up` + `batches` training batches and measure the latter, nothing else using them.

    Rates are of valid clips. With a cache, the warm-up is a pass over the whole split, so that what is measured is warm
    (a cold pass is what the lane does without a cache, and the copying). Returns a JSON object.
    """
    total, wait_s, clips = Stats(), 0.0, 0
    with Loader(split, config, batch_size=batch_size, seed=seed, device=device, cache=cache, raw=raw) as loader:
        warm_up = max(warm_up, loader.steps_per_epoch) if cache and cache.dir else warm_up
        for i, batch in enumerate(loader.batches(count=warm_up + batches)):
            _synchronise(device)
            if i + 1 == warm_up:
                started = time.perf_counter()
            if i >= warm_up:
                total.add(batch.stats)
                wait_s += batch.wait_s
                clips += len(batch.keys)
        seconds = time.perf_counter() - started
        threads = loader.threads
    used = max(1, total.frames_used)
    return {
        "lane": lane_name(split, config),
        "device": device,
        "pixels": "uint8" if raw else config.pixels,
        "cache": bool(cache and cache.dir),
        "threads": threads,
        "batch_size": batch_size,
        "batches": batches,
        "seconds": seconds,
        "clips_per_s": clips / seconds,
        "frames_per_s": total.frames_used / seconds,
        "frames_decoded_per_frame_used": total.frames_decoded / used,
        "frames_cached_per_frame_used": total.frames_cached / used,
        "bytes_read_per_clip": total.bytes_read / max(1, clips),
        "bad": total.bad,
        "wait_s": wait_s,
        "stage_seconds": {name.removesuffix("_s"): getattr(total, name) for name in STAGES},
        "stats": asdict(total),
    }


def ceiling(
    split: Split,
    config: DataConfig,
    device: str,
    batch_size: int,
    cache: CacheConfig | None = None,
    raw: bool = False,
    batches: int = 200,
) -> float:
    """Clips a second if a batch cost nothing but its way through the queue."""
    with _Repeating(split, config, batch_size=batch_size, seed=0, device=device, cache=cache, raw=raw) as loader:
        clips, started = 0, 0.0
        for i, batch in enumerate(loader.batches(count=batches + 1)):
            if i == 0:
                started = time.perf_counter()
            else:
                clips += len(batch.keys)
        _synchronise(device)
        return clips / (time.perf_counter() - started)


class _Repeating(Loader):
    """A loader that makes one batch and hands it over for ever."""

    def _stream(self, place: int, count: int | None) -> Stream:
        made = list(super()._stream(place, 1))
        return Stream(islice(cycle(made), count), None, "order_s", Stats())


def show(result: dict) -> None:
    """Print a result of `measure`, with a table of the stages."""
    console = Console()
    console.print(
        f"{result['lane']} lane on {result['device']}, {result['pixels']}, {result['threads']} threads, "
        f"{result['batches']} batches of {result['batch_size']}{', cache warm' if result['cache'] else ''}"
    )
    table = Table("stage", "seconds", "share", "ms a clip")
    clips = max(1, result["stats"]["clips"])
    for name, seconds in result["stage_seconds"].items():
        share = 100 * seconds / result["seconds"]
        table.add_row(name, f"{seconds:.3f}", f"{share:.0f} %", f"{1000 * seconds / clips:.2f}")
    console.print(table)
    summary = Table("", "", show_header=False)
    for name, label, form in _SUMMARY:
        if name in result:
            summary.add_row(label, form.format(result[name]))
    console.print(summary)


_SUMMARY = (
    ("clips_per_s", "clips a second", "{:.1f}"),
    ("ceiling_clips_per_s", "without loading (ceiling)", "{:.0f}"),
    ("frames_decoded_per_frame_used", "frames decoded per frame used", "{:.3f}"),
    ("frames_cached_per_frame_used", "share of frames from the cache", "{:.3f}"),
    ("bytes_read_per_clip", "bytes read a clip", "{:.0f}"),
    ("wait_s", "seconds waited for batches", "{:.2f}"),
    ("bad", "samples replaced", "{}"),
)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _device(name: str | None) -> str:
    there_is_one = torch.cuda.is_available()
    if name is None:
        return "cuda" if there_is_one else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"--device {name}: must be cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there {'is no such' if there_is_one else 'is no'} GPU that torch can use")
    return name


def _config(args: argparse.Namespace) -> DataConfig:
    values: dict[str, Any] = {"lane": args.lane}
    kinds = get_type_hints(DataConfig)
    for word in args.settings:
        key, equals, text = word.removeprefix("data.").partition("=")
        if not equals:
            raise ValueError(f"{word}: write a setting as key=value")
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(kinds)}"
            raise ValueError(f"unknown setting data.{key}: {hint}")
        values[key] = convert(kinds[key], yaml.safe_load(text), yaml=True)
        if values[key] is WRONG_KIND:
            raise ValueError(f"data.{key}={text}: must be {kind_name(kinds[key])}")
    return DataConfig(**values)


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.bench",
        description="Run the loader alone and say how fast it is and where the time goes.",
    )
    parser.add_argument("--data", required=True, help="folder or URL of a packed split")
    parser.add_argument("--lane", choices=LANES, default="auto", help="as data.lane (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--cache", type=Path, help="folder of a cache of decoded frames; it is filled first")
    parser.add_argument("--cache-gb", type=float, default=CacheConfig.max_gb, help="as cache.max_gb (%(default)s)")
    parser.add_argument("--cache-frames", type=int, default=CacheConfig.frames, help="as cache.frames (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="clips a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=20, help="batches to measure (default: %(default)s)")
    parser.add_argument("--raw", action="store_true", help="uint8 frames, not normalised")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("settings", nargs="*", help="further settings of the data group, key=value: sampling=segment")
    args = parser.parse_intermixed_args(words)
    for name in ("batch_size", "batches"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
