"""`python -m c4c.shard`: pack videos into shards, and look after what is packed."""

import argparse
import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from c4c import shard_console, shard_tools
from c4c.files import require_folder
from c4c.launched import open_streams
from c4c.packing import PackingScreen, closing, refuse_place
from c4c.shard_console import bar, say, show, size
from shards import ShardError, count, first_few, memory
from shards.annotations import Item, readers
from shards.annotations.files import Files
from shards.demo import narrated, shapes
from shards.limits import POSITIVE, SEED, Limits
from shards.packing.pack import finish_parts, missing, pack
from shards.packing.update import refuse_update
from shards.storage import is_remote, place
from shards.tools.info import title
from shards.video.profiles import CHROMAS, ENCODERS, FPS, GOP, PROFILES, QUALITY, SIDE, Profile

_TIMEOUT = Limits(float, 0, 1e6)  # seconds


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 for an error, which is printed, 130 if it was stopped by Ctrl-C."""
    open_streams()
    args = argparse.Namespace(packs=False)
    try:
        args = _parser().parse_args(argv)
        if wrong := memory.prepare():
            raise ShardError(wrong)
        return args.run(args)
    except Exception as error:
        text = str(error)
        if memory.is_short(error):
            text = f"there is not enough memory{memory.limit_text()}"
            text += ". Committed shards are kept: with more, run it again" if args.packs else ""
        elif isinstance(error, OSError) and error.errno is not None:
            text = f"{error.filename or 'a file'} cannot be read or written ({error.strerror})"
        elif not isinstance(error, ValueError | OSError) and "Symlink loop" not in text:
            raise
        say(_shortened(text), "error:", "bold red")
        return 1
    except KeyboardInterrupt:
        kept = "stopped; committed shards are kept. Run the same command again to go on."
        say(kept if args.packs else "stopped.")
        return 130


def _shortened(text: str, most: int = 1500) -> str:
    """A name of thousands of characters, say, must not hide the rest of the message."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m c4c.shard", description="pack videos into shards, and look after what is packed."
    )
    parser.set_defaults(packs=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    options = argparse.ArgumentParser(add_help=False)
    options.set_defaults(packs=True)  # of the commands that pack: what they commit is kept
    _add_profile(options)
    _add_packing(options)
    _add_demos(commands, options)
    _add_data_sets(commands, options)
    one = commands.add_parser("finish", help="after --part: write dataset.json once all parts are packed")
    one.add_argument("path", type=_place, help="the split that was packed in parts")
    one.set_defaults(run=_finish)
    shard_tools.add_commands(commands)
    return parser


def _add_profile(options: argparse.ArgumentParser) -> None:
    default = Profile()
    options.add_argument(
        "--profile", choices=PROFILES, default=default.name,
        help="intra: each kept frame an independent JPEG, for training; copy: source bytes untouched; h264, hevc, av1: "
        "the frames of intra re-encoded in short GOPs, for small disks (%(default)s)",
    )  # fmt: skip
    options.add_argument(
        "--fps", type=FPS, default=default.fps, help="frames kept a second; 240 keeps all; not for copy (%(default)s)"
    )
    sides = options.add_mutually_exclusive_group()
    sides.add_argument(
        "--short-side", type=SIDE, default=None, metavar="PX",
        help=f"scale the short side to this; not for copy ({default.short_side}; demo: 64)",
    )  # fmt: skip
    sides.add_argument(
        "--squash", type=SIDE, default=None, metavar="PX",
        help="scale both sides to this, whatever the shape: for backbones with data.resize_mode=squash, and no others",
    )  # fmt: skip
    sides.add_argument(
        "--long-side", type=SIDE, default=None, metavar="PX",
        help="scale the long side to this: for backbones with data.resize_mode=longest",
    )  # fmt: skip
    options.add_argument(
        "--quality", type=QUALITY, default=None,
        help="intra: JPEG quantiser, 1 best to 31 smallest (3); h264, hevc, av1: constant rate factor (23, 26, 32)",
    )  # fmt: skip
    options.add_argument(
        "--chroma", type=int, choices=CHROMAS, default=default.chroma,
        help="intra: 420; 444 keeps full colour resolution and scales exactly, but is slower and larger (%(default)s)",
    )  # fmt: skip
    options.add_argument(
        "--gop", type=GOP, default=None, help="h264, hevc, av1: frames in a closed GOP (one second of them, at most 12)"
    )
    options.add_argument(
        "--encoder", choices=ENCODERS, default=default.encoder,
        help="h264, hevc, av1: cpu gives the same bytes on every machine; nvenc uses a GPU; auto: nvenc if it can be opened "
        "(%(default)s)",
    )  # fmt: skip


def _add_packing(options: argparse.ArgumentParser) -> None:
    options.add_argument("--workers", type=POSITIVE, default=None, help="processes (one a core)")
    options.add_argument(
        "--shard-videos", type=POSITIVE, default=None, help="videos in a shard (16 to 256, by the size of the set)"
    )
    options.add_argument(
        "--part", type=_part, default=None, metavar="I/N",
        help="job arrays: pack only every N-th shard, from the I-th (1 to N); the part that ends last finishes the split",
    )  # fmt: skip
    options.add_argument(
        "--scheduler", default=None, metavar="ADDRESS", help="pack on the Dask cluster at tcp://HOST:PORT"
    )
    options.add_argument(
        "--timeout", type=_TIMEOUT, default=600.0, metavar="SECONDS",
        help="reject a video that takes longer to decode; above 100 MB in proportion (%(default)g)",
    )  # fmt: skip
    options.add_argument("--retry-rejects", action="store_true", help="pack shards with rejected videos again")
    options.add_argument(
        "--update", action="store_true",
        help="bring a split that was packed from another list of videos, captions or meta up to date. Only new videos and "
        "those whose source file changed are decoded; rejected ones are tried again; a video whose source file is gone is "
        "kept as long as the list names it. Needs disk space for the changed shards twice; do not use it on a split that "
        "a run is reading",
    )  # fmt: skip


def _add_demos(commands, options: argparse.ArgumentParser) -> None:
    one = commands.add_parser("demo", parents=[options], help="generate a small data set of moving shapes and pack it")
    one.add_argument("--out", type=_place, required=True, help="a folder; writes OUT/source, OUT/train and OUT/test")
    one.add_argument("--train", type=POSITIVE, default=1000, help="training videos (%(default)s)")
    one.add_argument("--test", type=POSITIVE, default=200, help="test videos (%(default)s)")
    one.add_argument("--seed", type=SEED, default=0)
    one.set_defaults(run=_demo)

    one = commands.add_parser(
        "demo-narrated", parents=[options],
        help="generate a large set of longer videos with inexact narration and a small clean set, and pack them",
    )  # fmt: skip
    one.add_argument("--out", type=_place, required=True, help="a folder; writes OUT/source, narrated, train and test")
    one.add_argument("--narrated", type=POSITIVE, default=600, help="narrated videos of five events each (%(default)s)")
    one.add_argument("--train", type=POSITIVE, default=200, help="videos of the small training set (%(default)s)")
    one.add_argument("--test", type=POSITIVE, default=200, help="test videos (%(default)s)")
    one.add_argument("--seed", type=SEED, default=0)
    one.set_defaults(run=_demo_narrated)


def _add_data_sets(commands, options: argparse.ArgumentParser) -> None:
    for name, module in readers().items():
        about = (module.__doc__ or "").strip().split("\n\n")
        one = commands.add_parser(
            name, parents=[options], help=f"pack: {about[0].split(':')[0]}", description=" ".join(about[0].split()),
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


def _demo(args) -> int:
    _check_demo(args)
    with bar() as progress:
        task = progress.add_task("videos", total=args.train + args.test, note="")
        items = shapes.generate(
            args.out / "source", seed=args.seed, train=args.train, test=args.test, workers=args.workers,
            progress=partial(show, progress, task),
        )  # fmt: skip
    for split in ("train", "test"):
        _pack(args, items[split], args.out / split, "demo", split, short_side=64)
    return 0


def _demo_narrated(args) -> int:
    _check_demo(args)
    with bar() as progress:
        task = progress.add_task("videos", total=args.narrated, note="")
        clips = narrated.generate(
            args.out / "source/narrated", seed=args.seed, videos=args.narrated, small=(args.train, args.test),
            workers=args.workers, progress=partial(show, progress, task),
        )  # fmt: skip
        small = shapes.generate(
            args.out / "source/small", seed=args.seed, train=args.train, test=args.test, workers=args.workers
        )  # fmt: skip
    for split, items in ({"narrated": clips} | small).items():
        _pack(args, items, args.out / split, "demo", split, short_side=64)
    return 0


def _dataset(args) -> int:
    _check_options(args)
    for text in refuse_place(args.out, args.videos):
        say(text, "note")
    with shard_console.console.status("listing videos and reading annotations"):
        args.videos = Files(
            args.videos, follow_links=args.follow_links, beside=getattr(args.reader, "BESIDE", ())
        )  # fmt: skip
        reading = args.reader.read(args)
    for text in reading.warnings:
        say(text, "note")
    split = args.out.resolve().name if isinstance(args.out, Path) else args.out.name
    name = split if args.dataset == "folder" else args.dataset
    return _pack(
        args, reading.items, args.out, getattr(args, "name", None) or name, split,
        reconciliation=reading.reconciliation(),
    )  # fmt: skip


def _check_demo(args) -> None:
    _check_options(args)
    if is_remote(args.out):
        raise ShardError(f"--out {args.out}: the demo set needs a local folder")
    require_folder(f"--out {args.out}", args.out)


def _check_options(args) -> None:
    """Raises ShardError for what packing would refuse, before hours are spent on a list of videos."""
    _profile(args)
    if args.update:
        refuse_update(args.out, args.part)


def _profile(args, short_side: int = Profile.short_side) -> Profile:
    return Profile(
        name=args.profile, fps=args.fps, short_side=short_side if args.short_side is None else args.short_side,
        long_side=args.long_side or 0, squash=args.squash or 0, quality=args.quality, chroma=args.chroma, gop=args.gop, encoder=args.encoder,
    ).resolved()  # fmt: skip


def _unused(args, profile: Profile) -> list[str]:
    """The options that were given and have no effect, and why."""
    plain, used = Profile(name=profile.name), profile.describe()
    given = [n for n in asdict(plain) if n not in used and getattr(args, n, None) not in (None, getattr(Profile, n))]
    unused = [f"--{name.replace('_', '-')}: --profile {profile.name} does not use it" for name in given]
    return unused + ["--workers: the Dask cluster decides"] * bool(args.scheduler and args.workers)


def _pack(
    args, items: list[Item], out: Path, dataset: str, split: str, short_side: int = Profile.short_side,
    reconciliation: dict | None = None,
) -> int:  # fmt: skip
    profile = _profile(args, short_side)
    for text in _unused(args, profile):
        say(text, "note")
    with PackingScreen(title(dataset, split), len(items)) as screen:
        info = pack(
            items, out, dataset=dataset, split=split, profile=profile, shard_videos=args.shard_videos,
            workers=args.workers, part=args.part, cluster=args.scheduler, timeout=args.timeout,
            retry_rejects=args.retry_rejects, update=args.update, on_start=screen.start, on_progress=screen.advance,
            reconciliation=reconciliation,
        )  # fmt: skip
    screen.summarise(out / "rejects.jsonl" if info else None)
    if info is None:
        packed, lacking = f"{out}: part {args.part[0]}/{args.part[1]} is packed", missing(out)
        if not lacking:  # another part has ended since
            say(f"{packed}, and so are all others: the split is finished")
            return 0
        say(
            f"{packed}. {count(len(lacking), 'shard')} of other parts still "
            f"missing ({first_few(lacking, 5)}). The part that ends last finishes the split; or, when all are done, run: "
            f"python -m c4c.shard finish {shlex.quote(str(out))}"
        )
        return 0
    resumed = 0 if args.part else screen.resumed  # it counts videos of the part
    before = (
        "; all of it was packed already"
        if resumed == len(items)
        else f"; {resumed} were done before"
        if resumed
        else ""
    )
    stored = f"; {screen.stored} were taken from existing shards" if screen.stored else ""
    say(f"{out}: {size(info)} in {count(len(info['shards']), 'shard')}{before}{stored}")
    closing(info, out, items, reconciled=reconciliation is not None)
    return 0


def _finish(args) -> int:
    info = finish_parts(args.path)
    say(f"{args.path}: {size(info)} in {count(len(info['shards']), 'shard')}")
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


if __name__ == "__main__":
    sys.exit(main())
