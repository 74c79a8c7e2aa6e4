"""`python -m c4c.shard`: pack videos into shards, and look after what is packed."""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from shards import ShardError
from shards.dataset import find_splits
from shards.datasets import Item, demo, folder
from shards.info import count, describe, rejected, title
from shards.pack import pack
from shards.profiles import ENCODERS, PROFILES, Profile
from shards.verify import verify

console = Console(stderr=True)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ShardError, OSError) as error:
        console.print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; what is committed stays. Run the same command again to go on.")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m c4c.shard", description=__doc__.split(": ", 1)[1])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    packing = argparse.ArgumentParser(add_help=False)
    default = Profile()
    packing.add_argument(
        "--profile",
        choices=PROFILES,
        default=default.name,
        help="intra: each kept frame an independent JPEG, for training; copy: source bytes untouched; h264, hevc, av1: "
        "the frames of intra re-encoded in short GOPs, for small disks (%(default)s)",
    )
    packing.add_argument(
        "--fps", type=int, default=default.fps, help="frames kept a second; 240 keeps all; not for copy (%(default)s)"
    )
    packing.add_argument(
        "--short-side",
        type=int,
        default=None,
        metavar="PX",
        help=f"scale the short side to this; not for copy ({default.short_side}; demo: 64)",
    )
    packing.add_argument(
        "--quality",
        type=int,
        default=None,
        help="intra: JPEG quantiser, 1 best to 31 smallest (3); h264, hevc, av1: constant rate factor (23, 26, 32)",
    )
    packing.add_argument(
        "--chroma",
        type=int,
        default=default.chroma,
        help="intra: 420; 444 keeps full colour resolution and scales exactly, slower and larger (%(default)s)",
    )
    packing.add_argument(
        "--gop", type=int, default=None, help="h264, hevc, av1: frames a closed GOP (a second of them, at most 12)"
    )
    packing.add_argument(
        "--encoder",
        choices=ENCODERS,
        default=default.encoder,
        help="h264, hevc, av1: cpu gives the same bytes everywhere; nvenc is a GPU's; auto: nvenc where it opens "
        "(%(default)s)",
    )
    packing.add_argument("--workers", type=int, default=None, help="processes (one a core)")
    packing.add_argument(
        "--shard-videos", type=int, default=None, help="videos a shard (16 to 256 by the size of the set)"
    )

    one = commands.add_parser("demo", parents=[packing], help="generate a small data set of moving shapes and pack it")
    one.add_argument("--out", type=Path, required=True, help="writes OUT/source, OUT/train and OUT/test")
    one.add_argument("--train", type=int, default=1000, help="training videos (%(default)s)")
    one.add_argument("--test", type=int, default=200, help="test videos (%(default)s)")
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=_demo)

    one = commands.add_parser("folder", parents=[packing], help="pack your own videos, captioned in a csv")
    one.add_argument("--videos", type=Path, required=True, help="folder of video files")
    one.add_argument(
        "--captions", type=Path, required=True, help="csv with the header video,caption; one row a caption"
    )
    one.add_argument("--out", type=Path, required=True, help="the split to write")
    one.add_argument("--name", default=None, help="name of the data set (the output folder's name)")
    one.set_defaults(run=_folder)

    one = commands.add_parser("verify", help="re-read everything: crc, decode, index against tar; exit 1 if any is bad")
    one.add_argument("path", type=Path, help="a split, or a folder of splits")
    one.add_argument("--workers", type=int, default=None)
    one.set_defaults(run=_verify)

    one = commands.add_parser("info", help="counts, durations, sizes, codecs, captions")
    one.add_argument("path", type=Path, help="a split, or a folder of splits")
    one.set_defaults(run=_info)
    return parser


def _demo(args) -> int:
    with _bar() as progress:
        task = progress.add_task("videos", total=args.train + args.test, note="")
        items = demo.generate(
            args.out / "source", seed=args.seed, train=args.train, test=args.test, workers=args.workers,
            progress=partial(_show, progress, task),
        )  # fmt: skip
    for split in ("train", "test"):
        _pack(args, items[split], args.out / split, "demo", split, short_side=64)
    return 0


def _folder(args) -> int:
    items = folder.read(args.videos, args.captions)
    name = args.name or args.out.resolve().name
    return _pack(args, items, args.out, name, args.out.resolve().name)


def _pack(args, items: list[Item], out: Path, dataset: str, split: str, short_side: int = Profile.short_side) -> int:
    for name in ("workers", "shard_videos"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ShardError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    profile = Profile(
        name=args.profile, fps=args.fps, short_side=short_side if args.short_side is None else args.short_side,
        quality=args.quality, chroma=args.chroma, gop=args.gop, encoder=args.encoder,
    ).resolved()  # fmt: skip
    started, read, rejects = time.monotonic(), 0, 0
    with _bar() as progress:
        task = progress.add_task(title(dataset, split), total=len(items), note="")

        def on_progress(event) -> None:
            nonlocal read, rejects
            read += event.bytes
            if event.rejected:
                rejects += 1
                progress.console.print(f"[yellow]rejected[/] {_plain(event.rejected)}", highlight=False, soft_wrap=True)
            seconds = max(1e-9, time.monotonic() - started)
            done = progress.tasks[0].completed + 1 - resumed
            note = f"{_rate(done / seconds)} videos/s {_rate(read / 1e6 / seconds)} MB/s {rejects} rejects"
            progress.update(task, advance=1, note=note)

        resumed = 0

        def on_start(done: int, total: int) -> None:
            nonlocal resumed
            resumed = done
            progress.reset(task, completed=done, total=total)  # or what was there already would flatter the ETA

        info = pack(
            items, out, dataset=dataset, split=split, profile=profile, shard_videos=args.shard_videos,
            workers=args.workers, on_start=on_start, on_progress=on_progress,
        )  # fmt: skip
    before = (
        "; all of it was there already" if resumed == len(items) else f"; {resumed} were done before" if resumed else ""
    )
    console.print(
        f"{out}: {info['videos']} videos, {info['captions']} captions in {len(info['shards'])} shards{before}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if (lost := rejected(info)) != "nothing":
        console.print(f"[yellow]{lost} rejected:[/] see {out / 'rejects.jsonl'}", highlight=False, soft_wrap=True)
    return 0


def _verify(args) -> int:
    bad = 0
    for path in find_splits(args.path):
        with _bar() as progress:
            task = progress.add_task(f"verify {path.name}", total=None, note="shards")
            problems = verify(path, args.workers, partial(_show, progress, task))
        for problem in problems:
            print(f"{path}/{problem}")
        print(f"{path}: {count(len(problems), 'problem') if problems else 'all good'}")
        bad += len(problems)
    return 1 if bad else 0


def _info(args) -> int:
    for path in find_splits(args.path):
        table = Table(title=str(path), show_header=False)
        for name, value in describe(path).items():
            table.add_row(name, value)
        Console().print(table)
    return 0


def _bar() -> Progress:
    """All that there is to say in one line of 80 columns; the bar takes what the words leave."""
    name = Column(max_width=16, no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", table_column=name), BarColumn(None, table_column=Column(ratio=1, max_width=40)),
        MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TextColumn("ETA"), TimeRemainingColumn(compact=True),
        console=console, expand=True,
    )  # fmt: skip


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _plain(text: object) -> str:
    return str(text).replace("[", r"\[")


if __name__ == "__main__":
    sys.exit(main())
