"""The commands of `python -m c4c.shard` that look after what is packed."""

import argparse
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import TaskID
from rich.table import Column, Table

from c4c.files import require_folder, require_writable
from c4c.shard_console import bar, plain, say, size, task
from pipelines.lengths import CONTEXT, TOKENIZER, USUAL, Lengths
from shards import ShardError, count
from shards.annotations.text import read_lines
from shards.limits import POSITIVE, SEED
from shards.remote import Local
from shards.split import Split, find_splits
from shards.tools.dedup import DuplicateGroup, DuplicateReport, dedup
from shards.tools.hashes import tables
from shards.tools.info import describe, measure
from shards.tools.preview import COUNT, WIDTH, preview
from shards.tools.regroup import Made
from shards.tools.repair import repair
from shards.tools.reshard import SplitPart, merge, split
from shards.tools.verify import verify

_PATIENCE_S = 20.0  # with a server, while somebody waits at the screen
_SPLITS = "a split, or a folder of splits"
_COPY = "copy every tar: without, source and result may be the same file on disk (a hard link)"


def add_commands(commands) -> None:
    """Add the commands that look at splits, repair and regroup them to an argparse group of commands."""
    add = partial(_add, commands)
    _add_verify_and_info(add)
    _add_pictures(add)
    _add_repair(add)
    _add_regrouping(add)
    _add_dedup(add)


def _add(commands, name: str, run: Callable[[argparse.Namespace], int], help: str, path: str | None = None):
    command = commands.add_parser(name, help=help, description=help)
    command.set_defaults(run=run)
    if path:
        command.add_argument("path", type=_local, help=path)
    return command


def _add_verify_and_info(add: Callable) -> None:
    one = add(
        "verify", _verify,
        "read everything again: checksums, decoding, index and table against the tar; exit status 1 if anything is wrong",
        _SPLITS,
    )  # fmt: skip
    one.add_argument("--workers", type=POSITIVE, default=None, help="processes (one a core)")
    one.add_argument("--json", action="store_true", help="print JSON instead")

    one = add("info", _info, "show counts, durations, sizes, codecs and captions", _SPLITS)
    one.add_argument("--json", action="store_true", help="print JSON instead, with all numbers")


def _add_pictures(add: Callable) -> None:
    one = add("preview", _preview, "write one HTML page of frames and captions that needs no other file", _SPLITS)
    one.add_argument("--out", type=Path, default=Path("preview.html"), help="the page to write (%(default)s)")
    one.add_argument("--count", type=COUNT, default=24, help="videos of each split (%(default)s)")
    one.add_argument("--seed", type=SEED, default=None, help="choose them at random (default: the first ones)")
    one.add_argument("--frames", type=COUNT, default=4, help="pictures of each video (%(default)s)")
    one.add_argument("--width", type=WIDTH, default=240, metavar="PX", help="largest width of a picture (%(default)s)")

    one = add("frames", _frames, "write frames of one video as PNGs, as the loader decodes them, before any resize")
    one.add_argument("path", type=str, help="a split: a folder or a URL")
    one.add_argument("--key", required=True, help="the video: its id, or its key in the tar")
    one.add_argument("--rule", help="the frames that data.sampling=RULE shows a model in evaluation (uniform)")
    one.add_argument("--num-frames", type=POSITIVE, help="largest number of frames, as data.num_frames (12)")
    one.add_argument("--fps", type=POSITIVE, help="frames a second to choose from, as data.fps (1)")
    one.add_argument("--positions", type=_positions, metavar="0,5,9", help="these rows of the frame table instead")
    one.add_argument("--out", type=Path, required=True, help="the folder to write NUMBER_SECONDS.png into")


def _add_repair(add: Callable) -> None:
    one = add("repair", _repair, "rebuild index, sample table and dataset.json from the tars", "a split")
    one.add_argument("--all", action="store_true", help="also rebuild shards that look intact (decodes every video)")
    one.add_argument("--truncate", action="store_true", help="cut a tar with a damaged end after its last whole sample")
    one.add_argument(
        "--drop", action="store_true", help="leave out samples that do not decode, or whose checksum differs"
    )
    one.add_argument("--name", default=None, help="name of the data set, if dataset.json is lost (the parent folder's)")
    one.add_argument("--split", default=None, help="name of the split, if dataset.json is lost (the folder's)")
    one.add_argument("--workers", type=POSITIVE, default=None, help="processes (one a core)")


def _add_regrouping(add: Callable) -> None:
    one = add("merge", _merge, "join several splits of one profile, without copying their tars")
    one.add_argument("paths", type=_local, nargs="+", metavar="SPLIT")
    one.add_argument("--out", type=Path, required=True, help="the split to write; must not exist")
    one.add_argument("--name", default=None, help="name of the data set (that of the first)")
    one.add_argument(
        "--prefix", action="store_true", help="rename a video to FOLDER/NAME if an earlier split has its name"
    )
    one.add_argument("--copy", action="store_true", help=_COPY)

    one = add("split", _split, "divide a split at random, or by lists of ids", "a split")
    one.add_argument(
        "--parts", nargs="+", required=True, metavar="NAME=SIZE",
        help="SIZE is a fraction (0.9), a number of videos (1000), a file with an id on each line, or: rest",
    )  # fmt: skip
    one.add_argument("--out", type=Path, required=True, help="writes OUT/NAME for each part")
    one.add_argument("--seed", type=SEED, default=0, help="seed of the random choice (%(default)s)")
    one.add_argument(
        "--whole-shards", action="store_true", help="keep shards together: no video is copied, sizes are approximate"
    )
    one.add_argument("--copy", action="store_true", help=_COPY)


def _add_dedup(add: Callable) -> None:
    one = add("dedup", _dedup, "report duplicates within and across splits; exit status 1 if a video has any")
    one.add_argument("paths", type=_local, nargs="+", metavar="SPLIT", help="splits, or folders of splits")
    one.add_argument(
        "--no-sources", action="store_true", help="do not compare what the samples' JSON says of their source"
    )
    one.add_argument("--json", action="store_true", help="print JSON instead, with every group")


def _local(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: this command reads folders only; copy the split to a disk")
    return Path(text)


def _verify(args) -> int:
    bad, reports = 0, []
    for path in find_splits(args.path):
        with task(f"verify {path.name}", "shards") as on_shard:
            problems = verify(path, args.workers, on_shard)
        bad += len(problems)
        if args.json:
            reports.append({"path": str(path), "problems": [vars(p) | {"id": p.id} for p in problems]})
            continue
        for problem in problems:
            print(f"{path}/{problem}")
        print(f"{path}: {count(len(problems), 'problem') if problems else 'all good'}")
    if args.json:
        print(json.dumps(reports, ensure_ascii=False, indent=2))
    return 1 if bad else 0


def _info(args) -> int:
    if args.json:
        measured = []
        for path in find_splits(args.path):
            numbers, lengths = measure(path), token_lengths(path)
            beyond = {str(limit): of_limit.cut for limit, of_limit in lengths.items()}
            longest = max(of_limit.longest for of_limit in lengths.values())
            numbers["captions"]["tokens"] = {"tokenizer": TOKENIZER, "longest": longest, "beyond": beyond}
            measured.append(numbers)
        print(json.dumps(measured, ensure_ascii=False, indent=2))
        return 0
    for path in find_splits(args.path):
        table = Table(title=plain(path), show_header=False)
        for name, value in describe(path).items():
            table.add_row(name, plain(value))
        for limit, of_limit in token_lengths(path).items():
            table.add_row(f"beyond {limit} tokens", f"{of_limit.cut} of {of_limit.captions} captions, by {TOKENIZER}")
        Console().print(table)
    return 0


def token_lengths(path: Path) -> dict[int, Lengths]:
    """Which captions are longer than CLIP4Clip's recipe takes, and than the context of CLIP's text tower."""
    lengths = {limit: Lengths(limit) for limit in (USUAL, CONTEXT)}
    for table in tables(Split(path), ["captions"]):
        for row in table.column("captions").to_pylist():
            for of_limit in lengths.values():
                of_limit.add(caption["text"] for caption in row)
    return lengths


def _preview(args) -> int:
    require_writable(f"--out {args.out}", args.out, lambda start: start.lstrip().startswith(b"<"))
    with task("preview", "videos") as on_video:
        bad = preview(
            find_splits(args.path), args.out, count=args.count, seed=args.seed, frames=args.frames, width=args.width,
            on_video=on_video,
        )  # fmt: skip
    trouble = f", {count(bad, 'video')} could not be shown" if bad else ""
    say(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB{trouble}")
    return 1 if bad else 0


def _positions(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: must be numbers with commas between, such as 0,5,9") from error


def _frames(args) -> int:
    from pipelines.frames import write_frames  # here: it loads torch and DALI, which no other command needs

    rule = {name: value for name in ("rule", "num_frames", "fps") if (value := getattr(args, name)) is not None}
    if rule and args.positions is not None:
        flag = next(iter(rule)).replace("_", "-")
        raise ShardError(f"--{flag} and --positions: give a rule that chooses frames, or the frames themselves")
    require_folder(f"--out {args.out}", args.out)
    split = Split(args.path, Local(patience_s=_PATIENCE_S))
    written = write_frames(split, args.key, args.out, positions=args.positions, **rule)
    video = split.find(args.key)
    table = Table(
        *(Column(name, justify="right") for name in ("position", "source frame", "seconds", "offset", "bytes", "key")),
        Column("file", no_wrap=True, min_width=max(len(one.file.name) for one in written)), title=plain(f"{video.id}: {video.codec}, {video.width}x{video.height}, {len(video.frames)} stored frames"),
    )  # fmt: skip
    for one in written:
        at = one.position
        where = (video.frames.offset[at], video.frames.size[at]) if video.frames.sliceable else ("whole file", "")
        cells = (at, one.number, f"{one.seconds:.3f}", *where, "yes" if video.frames.key[at] else "")
        table.add_row(*map(str, cells), one.file.name)
    Console().print(table)
    say(f"{count(len(written), 'picture')} in {args.out}")
    return 0


def _repair(args) -> int:
    with task(f"repair {args.path.name}", "shards") as on_shard:
        done = repair(
            args.path, name=args.name, split=args.split, everything=args.all, truncate=args.truncate, drop=args.drop,
            workers=args.workers, on_shard=on_shard,
        )  # fmt: skip
    info = Split(args.path).info
    for option, value in (("name", args.name), ("split", args.split)):
        if value not in (None, info[option]):
            say(f"--{option} {value} was not used: {args.path}/dataset.json says {info[option]}")
    for one in done:
        for lost in one.lost:
            say(f"{one.shard}: left out: {lost}")
    how_many = ", ".join(f"{sum(d.done == how for d in done)} {how}" for how in ("kept", "rebuilt", "cut"))
    say(f"{args.path}: {count(sum(d.videos for d in done), 'video')}; shards: {how_many}")
    return 0


def _merge(args) -> int:
    require_folder(f"--out {args.out}", args.out)
    with task("merge", "shards") as on_shard:
        made = merge(args.paths, args.out, name=args.name, prefix=args.prefix, copy=args.copy, on_shard=on_shard)
    _say_made(made)
    return 0


def _split(args) -> int:
    require_folder(f"--out {args.out}", args.out)
    parts = [_part(text) for text in args.parts]
    names = [p.name for p in parts]
    if len(set(names)) < len(names) or sum(p.size is None and p.ids is None for p in parts) > 1:
        raise ShardError("--parts: give each name once, and the size rest at most once")
    if sum(p.size for p in parts if isinstance(p.size, float)) > 1 + 1e-9:
        raise ShardError("--parts: the fractions add up to more than 1")
    with task("split", "shards") as on_shard:
        made = split(
            args.path, args.out, parts, seed=args.seed, whole_shards=args.whole_shards, copy=args.copy, on_shard=on_shard
        )  # fmt: skip
    for one in made:
        _say_made(one)
    if left := len(Split(args.path)) - sum(one.info["videos"] for one in made):
        say(f"{count(left, 'video')} of {args.path} in no part: NAME=rest takes those that are left", "note")
    return 0


def _part(text: str) -> SplitPart:
    name, equals, size = text.partition("=")
    if not equals or not re.fullmatch(r"\w[\w-]*", name):
        raise ShardError(f"--parts {text}: must be NAME=SIZE with a plain name, like train=0.9")
    if size == "rest":
        return SplitPart(name)
    if re.fullmatch(r"[0-9]+", size):
        return SplitPart(name, int(size))
    if re.fullmatch(r"[0-9]*\.[0-9]+", size):
        if not 0 < float(size) <= 1:
            raise ShardError(f"--parts {text}: a fraction must be above 0 and at most 1")
        return SplitPart(name, float(size))
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?%", size) and 0 < float(size[:-1]) <= 100:
        whole, part = f"{float(size[:-1]) / 100:.9f}".split(".")
        raise ShardError(f"--parts {text}: write a share as a fraction, {name}={whole}.{part.rstrip('0') or '0'}")
    if not os.path.isfile(size):
        raise ShardError(
            f"--parts {text}: {size!r} is not a number, not the word rest, and not an existing file of ids"
        )
    return SplitPart(name, ids=frozenset(read_lines(Path(size))))


def _say_made(made: Made) -> None:
    words = {
        "reflink": "sharing blocks",
        "link": "hard links",
        "copy": "copied",
        "rewritten": "written from single samples",
    }
    how = ", ".join(f"{number} {words[way]}" for way, number in sorted(made.how.items()))
    say(f"{made.path}: {size(made.info)}; tars: {how}")


def _dedup(args) -> int:
    paths = list(dict.fromkeys(split for path in args.paths for split in find_splits(path)))
    with bar() as progress:
        tasks: dict[str, TaskID] = {}

        def on_step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(f"compare {what}", total=total, note="")
            progress.update(tasks[what], completed=done)

        report = dedup(paths, sources=not args.no_sources, on_step=on_step)
    if args.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=2))
    else:
        _say_report(report, len(paths))
    return 0 if report.clean else 1


def _say_report(report: DuplicateReport, splits: int) -> None:
    for words, groups in (
        ("the same bytes", report.content), ("probably the same source file", report.source),
        ("the same name in several splits", report.names),
    ):  # fmt: skip
        for group in groups:
            print(f"{words}{' (LEAK between splits)' if group.leak else ''}: {_members(group)}")
    for caption in report.caption_examples:
        where = " in several splits" if len(caption.splits) > 1 else ""
        print(f"caption with {count(caption.videos, 'video')}{where}: {caption.text}")
    print(
        f"{count(report.videos, 'video')} in {count(splits, 'split')}: {count(len(report.content), 'group')} of the same bytes, "
        f"{len(report.source)} of the same source, {len(report.names)} of the same name; {count(report.captions, 'caption')} "
        f"with several videos, {report.caption_leaks} of them in several splits"
    )


def _members(group: DuplicateGroup, most: int = 8) -> str:
    more = f" and {len(group.members) - most} more" if len(group.members) > most else ""
    return ", ".join(f"{id} ({path})" for path, id in group.members[:most]) + more
