"""`python -m c4c.index --ckpt runs/x --videos FOLDER --out my.index`: the videos of a folder, or of packed splits, made searchable.

Only new and changed videos are worked on; an indexing that was stopped goes on with the same command. Started by torchrun or
deepspeed (`torchrun --nproc_per_node 4 -m c4c.index ...`), ranks share the videos, a GPU each.
"""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from c4c.errors import Stopped, exit_code
from c4c.helptext import add_checkpoint_options
from c4c.launched import let_threads_sleep, own_rank, quick_imports
from c4c.option_checks import require_checkpoint, require_device, require_not_empty

if TYPE_CHECKING:  # imports come after what they would hold up: --help and mistakes in the arguments
    from c4c.retrieval.index.plan import ListedVideo

RUNTIMES = ("auto", "torch", "torch-bf16", "onnx", "onnx-int8")


def main() -> int:
    """The command; returns its exit code."""
    let_threads_sleep()
    return exit_code(lambda: run(_parser().parse_args()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m c4c.index", description="Make videos searchable: encode them, in segments, into an index.",
        epilog=(__doc__ or "").partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_checkpoint_options(parser)
    add = parser.add_argument
    add("--videos", required=True, nargs="+", metavar="PATH", help="folders of video files, files, or packed splits")
    add("--out", required=True, metavar="INDEX", help="the index: a folder, or a URL (s3://bucket/my.index)")
    add("--segment", type=float, default=8.0, metavar="S", help="seconds of a segment (default 8); 0: whole videos")
    add(
        "--stride",
        type=float,
        default=None,
        metavar="S",
        help="seconds from one segment's start to the next (default: half a segment)",
    )
    add("--device", help="cuda or cpu (default: cuda where there is one)")
    add("--runtime", choices=RUNTIMES, default="auto",
        help="what runs the image tower; auto: that of the index, or the fastest by measurement that agrees with torch")  # fmt: skip
    add(
        "--ann",
        action="store_true",
        help="make an index for approximate search, too; worth it from 100 000 segments on",
    )
    add("--refresh", action="store_true", help="index unchanged videos again, too")
    add("--retry", action="store_true", help="try again what could not be read before")
    add("--prune", action="store_true", help="remove videos from the index that are not there any more")
    add("--threads", type=int, default=0, help="videos that are decoded at once (default: the machine's cores)")
    add("--commit", type=int, default=64, metavar="N", help="videos that are written at once (default 64)")
    add("--json", type=Path, metavar="FILE", help="write a summary here, too")
    add("--verbose", action="store_true", help="name the files that were skipped as no videos, too")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers pass it
    return parser


def run(args: argparse.Namespace) -> int:
    """Index. Mistakes are found first; what takes long to import comes after that."""
    from c4c.files import require_folder, require_writable
    from pipelines.segments import Cutting
    from shards import count

    require_not_empty((name, getattr(args, name)) for name in ("ckpt", "out", "backbone", "tag"))
    require_device(args.device)
    for option, least in (("threads", 0), ("commit", 1)):
        if getattr(args, option) < least:
            raise ValueError(f"--{option} {getattr(args, option)}: must be at least {least}")
    require_checkpoint(args.ckpt)
    cutting = Cutting(args.segment, _stride(args))
    if args.json:
        require_writable(f"--json {args.json}", args.json, lambda start: b'"unreadable"' in start)
        if args.json.resolve().is_relative_to(Path(args.out).resolve()):
            raise ValueError(f"--json {args.json}: that is --out, or lies in it; name a file elsewhere")
    sources, listed = _videos(args)
    from c4c.retrieval.index.store import Store

    known = Store.about_of(args.out)
    if known and (known.segment_s, known.stride_s) != (cutting.segment_s, cutting.stride_s):
        raise ValueError(f"{args.out} is an index of {known.cut}, not of {cutting}: use those, or another --out")
    if "://" not in args.out:
        require_folder(f"--out {args.out}", Path(args.out))
    if own_rank() == 0:  # the imports take seconds, and weights may have to be fetched
        print(f"{count(len(listed), 'video')} found; loading {args.ckpt}", file=sys.stderr, flush=True)
    with quick_imports():
        from c4c.retrieval.index.command import index

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
    return index(args, cutting, sources, listed)


def _stop(number: int, _frame: object) -> None:
    """What is done is committed on the way out. A second signal ends that, too, unless it is a launcher's, which passes each on."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN if "RANK" in os.environ else signal.SIG_DFL)
    raise Stopped(signal.Signals(number), ": what is indexed stays, and the same command goes on")


def _stride(args: argparse.Namespace) -> float:
    """Half a segment, if it is not given."""
    if args.stride is None:
        return args.segment / 2
    if not args.segment:
        raise ValueError(f"--stride {args.stride:g} is for segments, and --segment 0 asks for whole videos")
    return args.stride


def _videos(args: argparse.Namespace):
    """Where the videos are, and on the first rank a list of them. Raises ValueError if there are none."""
    from c4c.retrieval.index.plan import VideoSources

    sources = VideoSources(args.videos, os.path.abspath(args.out))
    listed: list[ListedVideo] = sources.list() if own_rank() == 0 else []
    return sources, listed


if __name__ == "__main__":
    sys.exit(main())
