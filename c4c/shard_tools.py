"""The commands of `python -m c4c.shard` that look after what is packed."""

import argparse
import json
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from c4c.files import require_folder, require_writable
from pipelines.config import DataConfig
from pipelines.lengths import CONTEXT, TOKENIZER, Lengths
from shards import ShardError, count, number
from shards.annotations.text import read_lines
from shards.remote import Local
from shards.split import Split, find_splits
from shards.tools.dedup import Group, Report, dedup
from shards.tools.hashes import tables
from shards.tools.info import describe, measure
from shards.tools.preview import preview
from shards.tools.regroup import Made
from shards.tools.repair import repair
from shards.tools.reshard import Part, merge, split
from shards.tools.verify import verify

console = Console(stderr=True)
POSITIVE, SEED = number(int, "of at least 1"), number(int, "from 0 to 2**63 - 1")  # types of argparse
_PATIENCE_S = 20.0  # with a server, where somebody sits and waits


def add_commands(commands) -> None:
    """Add verify, info, preview, repair, merge, split and dedup to an argparse group of commands."""

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, path: str | None = None):
        one = commands.add_parser(name, help=help, description=help)
        one.set_defaults(run=run)
        if path:
            one.add_argument("path", type=_local, help=path)
        return one

    some = "a split, or a folder of splits"
    one = add("verify", _verify, "re-read everything: crc, decode, index against tar; exit 1 if any is bad", some)
    one.add_argument("--workers", type=POSITIVE, default=None, help="processes (one a core)")
    one.add_argument("--json", action="store_true", help="print JSON instead")

    one = add("info", _info, "counts, durations, sizes, codecs, captions", some)
    one.add_argument("--json", action="store_true", help="print JSON instead, with all numbers")

    one = add("preview", _preview, "one HTML page of frames and captions that needs no other file", some)
    one.add_argument("--out", type=Path, default=Path("preview.html"), help="the page to write (%(default)s)")
    one.add_argument(
        "--count", type=number(int, "from 1 to 10000"), default=24, help="videos of each split (%(default)s)"
    )
    one.add_argument("--seed", type=SEED, default=None, help="draw them at random (default: the first ones)")
    one.add_argument(
        "--frames", type=number(int, "from 1 to 10000"), default=4, help="pictures of each video (%(default)s)"
    )
    one.add_argument(
        "--width",
        type=number(int, "from 16 to 10000"),
        default=240,
        metavar="PX",
        help="of a picture at most (%(default)s)",
    )

    one = add("frames", _frames, "write frames of one video as PNGs, as the loader decodes them, before any resize")
    one.add_argument("path", type=str, help="a split: a folder or a URL")
    one.add_argument("--key", required=True, help="the video: its id, or its key in the tar")
    one.add_argument("--rule", help="the frames that data.sampling=RULE shows a model in testing (uniform)")
    one.add_argument("--num-frames", type=POSITIVE, help="at most so many, as data.num_frames (12)")
    one.add_argument("--fps", type=POSITIVE, help="frames a second to choose from, as data.fps (1)")
    one.add_argument("--positions", type=_positions, metavar="0,5,9", help="these rows of the frame table instead")
    one.add_argument("--out", type=Path, required=True, help="the folder to write NUMBER_SECONDS.png into")

    one = add("repair", _repair, "rebuild index, sample table and dataset.json from the tars", "a split")
    one.add_argument("--all", action="store_true", help="rebuild shards that look well, too (decodes every video)")
    one.add_argument("--truncate", action="store_true", help="cut a tar with a damaged end after its last whole sample")
    one.add_argument(
        "--drop", action="store_true", help="leave out samples that do not decode, or whose checksum differs"
    )
    one.add_argument("--name", default=None, help="name of the data set, if dataset.json is lost (the parent folder's)")
    one.add_argument("--split", default=None, help="name of the split, if dataset.json is lost (the folder's)")
    one.add_argument("--workers", type=POSITIVE, default=None, help="processes (one a core)")

    one = add("merge", _merge, "several splits of one profile as one, without copying their tars")
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
    one.add_argument("--seed", type=SEED, default=0, help="of the random choice (%(default)s)")
    one.add_argument(
        "--whole-shards", action="store_true", help="keep shards together: no video is copied, sizes are approximate"
    )
    one.add_argument("--copy", action="store_true", help=_COPY)

    one = add("dedup", _dedup, "what is there more than once, also across splits; exit 1 if a video is")
    one.add_argument("paths", type=_local, nargs="+", metavar="SPLIT", help="splits, or folders of splits")
    one.add_argument(
        "--no-sources", action="store_true", help="do not compare what the samples' JSON says of their source"
    )
    one.add_argument("--json", action="store_true", help="print JSON instead, with every group")


def _local(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: this command reads folders only; copy the split to a disk")
    return Path(text)


_COPY = "copy every tar: without, source and result may be the same file on disk (a hard link)"


def _verify(args) -> int:
    bad, told = 0, []
    for path in find_splits(args.path):
        with task(f"verify {path.name}", "shards") as on_shard:
            problems = verify(path, args.workers, on_shard)
        bad += len(problems)
        if args.json:
            told.append({"path": str(path), "problems": [vars(p) | {"id": p.id} for p in problems]})
            continue
        for problem in problems:
            print(f"{path}/{problem}")
        print(f"{path}: {count(len(problems), 'problem') if problems else 'all good'}")
    if args.json:
        print(json.dumps(told, ensure_ascii=False, indent=2))
    return 1 if bad else 0


def _info(args) -> int:
    if args.json:
        told = []
        for path in find_splits(args.path):
            numbers, found = measure(path), token_lengths(path)
            beyond = {str(limit): one.cut for limit, one in found.items()}
            longest = max(one.longest for one in found.values())
            numbers["captions"]["tokens"] = {"tokenizer": TOKENIZER, "longest": longest, "beyond": beyond}
            told.append(numbers)
        print(json.dumps(told, ensure_ascii=False, indent=2))
        return 0
    for path in find_splits(args.path):
        table = Table(title=plain(path), show_header=False)
        for name, value in describe(path).items():
            table.add_row(name, plain(value))
        for limit, found in token_lengths(path).items():
            table.add_row(f"beyond {limit} tokens", f"{found.cut} of {found.captions} captions, by {TOKENIZER}")
        Console().print(table)
    return 0


def token_lengths(path: Path) -> dict[int, Lengths]:
    """How many captions data.max_words of the defaults would cut, and CLIP's text tower."""
    found = {limit: Lengths(limit) for limit in (DataConfig.max_words, CONTEXT)}
    for table in tables(Split(path), ["captions"]):
        for row in table.column("captions").to_pylist():
            for one in found.values():
                one.add(caption["text"] for caption in row)
    return found


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
    for option, told in (("name", args.name), ("split", args.split)):
        if told not in (None, info[option]):
            say(f"--{option} {told} was not used: {args.path}/dataset.json says {info[option]}")
    for one in done:
        for lost in one.lost:
            say(f"{one.shard}: left out: {lost}")
    told = ", ".join(f"{sum(d.done == how for d in done)} {how}" for how in ("kept", "rebuilt", "cut"))
    say(f"{args.path}: {count(sum(d.videos for d in done), 'video')}; shards: {told}")
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
        raise ShardError("--parts: every name may be given once, and one part may be the rest")
    if sum(p.size for p in parts if isinstance(p.size, float)) > 1 + 1e-9:
        raise ShardError("--parts: the fractions add up to more than 1")
    with task("split", "shards") as on_shard:
        made = split(
            args.path, args.out, parts, seed=args.seed, whole_shards=args.whole_shards, copy=args.copy, on_shard=on_shard
        )  # fmt: skip
    for one in made:
        _say_made(one)
    return 0


def _part(text: str) -> Part:
    name, equals, size = text.partition("=")
    if not equals or not re.fullmatch(r"\w[\w-]*", name):
        raise ShardError(f"--parts {text}: must be NAME=SIZE with a plain name, like train=0.9")
    if size == "rest":
        return Part(name)
    if re.fullmatch(r"[0-9]+", size):
        return Part(name, int(size))
    if re.fullmatch(r"[0-9]*\.[0-9]+", size):
        if not 0 < float(size) <= 1:
            raise ShardError(f"--parts {text}: a fraction must be above 0 and at most 1")
        return Part(name, float(size))
    if not os.path.isfile(size):
        raise ShardError(f"--parts {text}: {size!r} is no number, not the word rest, and there is no such file of ids")
    return Part(name, ids=frozenset(read_lines(Path(size))))


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


def _say_report(report: Report, splits: int) -> None:
    for words, groups in (
        ("the same bytes", report.content), ("the same source file, most likely", report.source),
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


def _members(group: Group, most: int = 8) -> str:
    more = f" and {len(group.members) - most} more" if len(group.members) > most else ""
    return ", ".join(f"{id} ({path})" for path, id in group.members[:most]) + more


# ---- what the packing commands say things with, too ----


def size(info: dict) -> str:
    """Videos and captions of a split, as `dataset.json` has them."""
    return f"{count(info['videos'], 'video')}, {count(info['captions'], 'caption')}"


def say(text: str) -> None:
    console.print(plain(text), highlight=False, soft_wrap=True)


def bar() -> Progress:
    """All that there is to say in one line of 80 columns; the bar takes what the words leave."""
    name = Column(max_width=16, no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", table_column=name), BarColumn(None, table_column=Column(ratio=1, max_width=40)),
        MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TextColumn("ETA"), TimeRemainingColumn(compact=True),
        console=console, expand=True,
    )  # fmt: skip


@contextmanager
def task(name: str, unit: str):
    """A progress bar as a function of (done, total)."""
    with bar() as progress:
        yield partial(show, progress, progress.add_task(plain(name), total=None, note=unit))


def show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def plain(text: object) -> str:
    """`text` for rich, its brackets no markup."""
    return str(text).replace("[", r"\[")
