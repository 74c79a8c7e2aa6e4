"""`python -m c4c.shard`: pack videos into shards, and look after what is packed."""

import argparse
import shlex
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from c4c import shard_tools
from c4c.files import require_folder
from c4c.packing import closing, refuse_place
from c4c.shard_tools import POSITIVE, SEED, console, size
from c4c.shard_tools import bar as _bar
from c4c.shard_tools import plain as _plain
from c4c.shard_tools import show as _show
from shards import ShardError, count, memory, number
from shards.annotations import Item, readers
from shards.annotations.files import Files
from shards.demo import narrated, shapes
from shards.packing.pack import finish_parts, missing, pack
from shards.packing.plan import some
from shards.storage import is_remote, place
from shards.tools.info import title
from shards.video.profiles import ENCODERS, PROFILES, Profile

_LONGEST_S = 1e6  # of --timeout
_REJECTS_SHOWN, _NOTES_SHOWN = 5, 5  # lines on the screen; a list with missing files may have thousands


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if wrong := memory.prepare():
            raise ShardError(wrong)
        _check_numbers(args)
        return args.run(args)
    except Exception as error:
        if memory.is_short(error):
            error = f"there is not enough memory{memory.limit_text()}. What is committed stays: with more, run it again"
        elif isinstance(error, OSError) and error.errno is not None:
            error = f"{error.filename or 'a file'} cannot be read or written ({error.strerror})"
        elif not isinstance(error, ValueError | OSError) and "Symlink loop" not in str(error):
            raise
        console.print(f"[bold red]error:[/] {_plain(_shortened(str(error)))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; what is committed stays. Run the same command again to go on.")
        return 130


def _shortened(text: str, most: int = 1500) -> str:
    """A name of thousands of characters, say, must not hide what is said of it."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


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
        "--fps",
        type=number(int, "from 1 to 240"),
        default=default.fps,
        help="frames kept a second; 240 keeps all; not for copy (%(default)s)",
    )
    packing.add_argument(
        "--short-side",
        type=number(int, "from 16 to 4096"),
        default=None,
        metavar="PX",
        help=f"scale the short side to this; not for copy ({default.short_side}; demo: 64)",
    )
    packing.add_argument(
        "--quality",
        type=number(int, "from 0 to 63"),
        default=None,
        help="intra: JPEG quantiser, 1 best to 31 smallest (3); h264, hevc, av1: constant rate factor (23, 26, 32)",
    )
    packing.add_argument(
        "--chroma",
        type=number(int, "that is 420 or 444"),
        default=default.chroma,
        help="intra: 420; 444 keeps full colour resolution and scales exactly, slower and larger (%(default)s)",
    )
    packing.add_argument(
        "--gop",
        type=number(int, "from 1 to 600"),
        default=None,
        help="h264, hevc, av1: frames a closed GOP (a second of them, at most 12)",
    )
    packing.add_argument(
        "--encoder",
        choices=ENCODERS,
        default=default.encoder,
        help="h264, hevc, av1: cpu gives the same bytes everywhere; nvenc is a GPU's; auto: nvenc where it opens "
        "(%(default)s)",
    )
    packing.add_argument("--workers", type=POSITIVE, default=None, help="processes (one a core)")
    packing.add_argument(
        "--shard-videos", type=POSITIVE, default=None, help="videos a shard (16 to 256 by the size of the set)"
    )

    packing.add_argument(
        "--part",
        type=_part,
        default=None,
        metavar="I/N",
        help="job arrays: pack only every N-th shard, from the I-th (1 to N); whichever part is last finishes the split",
    )
    packing.add_argument(
        "--scheduler", default=None, metavar="ADDRESS", help="pack on the Dask cluster at tcp://HOST:PORT"
    )
    packing.add_argument(
        "--timeout",
        type=number(float, f"above 0 and below {_LONGEST_S:g}"),
        default=600.0,
        metavar="SECONDS",
        help="reject a video whose decoding takes longer; above 100 MB in proportion (%(default)g)",
    )
    packing.add_argument(
        "--retry-rejects", action="store_true", help="pack the shards again in which videos were rejected"
    )
    packing.add_argument(
        "--update",
        action="store_true",
        help="make --out, if it was packed from another list of videos, captions or meta, what this one says. Only new "
        "videos and those whose source file changed are decoded; rejected ones are tried again; one whose source file is "
        "gone stays while the list names it. Needs disk space for the changed shards twice; not for a split that a "
        "run is reading",
    )

    one = commands.add_parser("demo", parents=[packing], help="generate a small data set of moving shapes and pack it")
    one.add_argument("--out", type=_place, required=True, help="a folder; writes OUT/source, OUT/train and OUT/test")
    one.add_argument("--train", type=POSITIVE, default=1000, help="training videos (%(default)s)")
    one.add_argument("--test", type=POSITIVE, default=200, help="test videos (%(default)s)")
    one.add_argument("--seed", type=SEED, default=0)
    one.set_defaults(run=_demo)

    one = commands.add_parser(
        "demo-narrated", parents=[packing],
        help="generate a large set of longer, carelessly narrated videos and a small clean one, and pack them",
    )  # fmt: skip
    one.add_argument("--out", type=_place, required=True, help="a folder; writes OUT/source, narrated, train and test")
    one.add_argument("--narrated", type=POSITIVE, default=600, help="narrated videos of five events each (%(default)s)")
    one.add_argument("--train", type=POSITIVE, default=200, help="videos of the small training set (%(default)s)")
    one.add_argument("--test", type=POSITIVE, default=200, help="test videos (%(default)s)")
    one.add_argument("--seed", type=SEED, default=0)
    one.set_defaults(run=_demo_narrated)

    for name, module in readers().items():
        about = module.__doc__.strip().split("\n\n")
        one = commands.add_parser(
            name, parents=[packing], help=f"pack: {about[0].split(':')[0]}", description=" ".join(about[0].split()),
            epilog="\n\n".join(about[1:]), formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        one.add_argument(
            "--videos", required=True, help="folder of video files, at any depth, or a URL (s3://, hf://, …)"
        )
        one.add_argument(
            "--out", type=_place, required=True,
            help="the split to write: a folder, s3://, gs:// or hf://; its last folder names the split",
        )  # fmt: skip
        module.add_arguments(one)
        one.add_argument("--follow-links", action="store_true", help="also follow links that lead out of --videos")
        one.set_defaults(run=_dataset, reader=module, dataset=name)

    one = commands.add_parser("finish", help="after --part: write dataset.json once all parts are packed")
    one.add_argument("path", type=_place, help="the split that was packed in parts")
    one.set_defaults(run=_finish)

    shard_tools.add_commands(commands)
    return parser


def _demo(args) -> int:
    _check_demo(args)
    with _bar() as progress:
        task = progress.add_task("videos", total=args.train + args.test, note="")
        items = shapes.generate(
            args.out / "source", seed=args.seed, train=args.train, test=args.test, workers=args.workers,
            progress=partial(_show, progress, task),
        )  # fmt: skip
    for split in ("train", "test"):
        _pack(args, items[split], args.out / split, "demo", split, short_side=64)
    return 0


def _demo_narrated(args) -> int:
    _check_demo(args)
    with _bar() as progress:
        task = progress.add_task("videos", total=args.narrated, note="")
        told = narrated.generate(
            args.out / "source/narrated", seed=args.seed, videos=args.narrated, small=(args.train, args.test),
            workers=args.workers, progress=partial(_show, progress, task),
        )  # fmt: skip
        small = shapes.generate(
            args.out / "source/small", seed=args.seed, train=args.train, test=args.test, workers=args.workers
        )  # fmt: skip
    for split, items in ({"narrated": told} | small).items():
        _pack(args, items, args.out / split, "demo", split, short_side=64)
    return 0


def _dataset(args) -> int:
    for text in refuse_place(args.out, args.videos):
        _note(text)
    with console.status("listing videos and reading annotations"):
        args.videos = Files(
            args.videos, follow_links=args.follow_links, beside=getattr(args.reader, "BESIDE", ())
        )  # fmt: skip
        reading = args.reader.read(args)
    for text in reading.warnings:
        _note(text)
    split = args.out.resolve().name if isinstance(args.out, Path) else args.out.name
    name = split if args.dataset == "folder" else args.dataset
    return _pack(
        args, reading.items, args.out, getattr(args, "name", None) or name, split,
        reconciliation=reading.reconciliation(),
    )  # fmt: skip


def _check_demo(args) -> None:
    if is_remote(args.out):
        raise ShardError(f"--out {args.out}: the demo set is generated into a folder")
    require_folder(f"--out {args.out}", args.out)


def _check_numbers(args) -> None:
    """Of every command, before it begins. Raises ShardError."""
    for name in ("workers", "shard_videos", "train", "test", "narrated"):
        if isinstance(value := getattr(args, name, None), int) and value < 1:
            raise ShardError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 < getattr(args, "timeout", 1) < _LONGEST_S:
        raise ShardError(f"--timeout {args.timeout:g}: must be above 0 and below {_LONGEST_S:g} seconds")
    if not 0 <= (getattr(args, "seed", None) or 0) < 2**63:
        raise ShardError(f"--seed {args.seed}: must be from 0 to 2**63 - 1")


def _unused(args, profile: Profile) -> list[str]:
    """The options that were given and that nothing heeds, and why."""
    plain, heeded = Profile(name=profile.name), profile.describe()
    given = [n for n in asdict(plain) if n not in heeded and getattr(args, n, None) not in (None, getattr(Profile, n))]
    found = [f"--{name.replace('_', '-')}: --profile {profile.name} has no use for it" for name in given]
    return found + ["--workers: the Dask cluster decides"] * bool(args.scheduler and args.workers)


def _pack(
    args, items: list[Item], out: Path, dataset: str, split: str, short_side: int = Profile.short_side,
    reconciliation: dict | None = None,
) -> int:  # fmt: skip
    profile = Profile(
        name=args.profile, fps=args.fps, short_side=short_side if args.short_side is None else args.short_side,
        quality=args.quality, chroma=args.chroma, gop=args.gop, encoder=args.encoder,
    ).resolved()  # fmt: skip
    for text in _unused(args, profile):
        _note(text)
    started, read, stored, rejects, notes = time.monotonic(), 0, 0, 0, 0
    with _bar() as progress:
        task = progress.add_task(title(dataset, split), total=len(items), note="")

        def on_progress(event) -> None:
            nonlocal read, stored, rejects, notes
            read += event.bytes
            stored += event.stored
            if event.rejected:
                rejects += 1
                if rejects <= _REJECTS_SHOWN:
                    _told(progress, "missing" if event.missing else "rejected", event.rejected)
            if event.note:
                notes += 1
                if notes <= _NOTES_SHOWN:
                    _told(progress, "note", event.note)
            seconds = max(1e-9, time.monotonic() - started)
            done = progress.tasks[0].completed + 1 - resumed
            note = f"{_rate(done / seconds)} videos/s {_rate(read / 1e6 / seconds)} MB/s {count(rejects, 'reject')}"
            progress.update(task, advance=1, note=note)

        resumed = 0

        def on_start(done: int, total: int) -> None:
            nonlocal resumed
            resumed = done
            progress.reset(task, completed=done, total=total)  # or what was there already would flatter the ETA

        info = pack(
            items, out, dataset=dataset, split=split, profile=profile, shard_videos=args.shard_videos,
            workers=args.workers, part=args.part, cluster=args.scheduler, timeout=args.timeout,
            retry_rejects=args.retry_rejects, update=args.update, on_start=on_start, on_progress=on_progress,
            reconciliation=reconciliation,
        )  # fmt: skip
    if rejects > _REJECTS_SHOWN:
        where = f": see {out / 'rejects.jsonl'}" if info else ""
        console.print(f"[yellow]and[/] {rejects - _REJECTS_SHOWN} more{_plain(where)}", highlight=False, soft_wrap=True)
    if notes:
        console.print(
            f"[yellow]note[/] {count(notes, 'video')} of variable frame rate: frames are sampled by time, not by counting "
            "frames as the official code does (data.sampling=uniform_by_frame counts)",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if info is None:
        lacking = missing(out)
        console.print(
            f"{out}: part {args.part[0]}/{args.part[1]} is packed. {count(len(lacking), 'shard')} of other parts still "
            f"missing ({some(lacking)}). The part that is last finishes the split; or, when all are done, run: "
            f"python -m c4c.shard finish {shlex.quote(str(out))}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        return 0
    resumed = 0 if args.part else resumed  # it counts videos of the part
    before = (
        "; all of it was there already" if resumed == len(items) else f"; {resumed} were done before" if resumed else ""
    )
    console.print(
        f"{out}: {size(info)} in {count(len(info['shards']), 'shard')}{before}"
        + (f"; {stored} were taken from the shards there" if stored else ""),
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    closing(info, out, items, reconciled=reconciliation is not None)
    return 0


def _note(text: str) -> None:
    console.print(f"[yellow]note[/] {_plain(text)}", highlight=False, soft_wrap=True)


def _told(progress, kind: str, text: str) -> None:
    progress.console.print(f"[yellow]{kind}[/] {_plain(text)}", highlight=False, soft_wrap=True)


def _finish(args) -> int:
    info = finish_parts(args.path)
    console.print(f"{args.path}: {size(info)} in {count(len(info['shards']), 'shard')}")
    return 0


def _place(text: str):
    try:
        return place(text)
    except ShardError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _part(text: str) -> tuple[int, int]:
    try:
        index, parts = map(int, text.split("/"))
    except ValueError:
        index = parts = 0
    if not 1 <= index <= parts:
        raise argparse.ArgumentTypeError(f"{text}: must be I/N with I from 1 to N, such as 2/16")
    return index, parts


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
