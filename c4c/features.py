"""`python -m c4c.features --ckpt TEACHER --data data/msrvtt/train --out teacher.safetensors`: what a model makes of each video and caption of
a split, in a file that `train.teacher` learns from.

The model runs once, and no step of a training waits for it; its backbone, tokenizer, frames and picture size may be others than those of the
model that is trained. Started by torchrun or deepspeed (`torchrun --nproc_per_node 4 -m c4c.features ...`), ranks share the work.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from c4c.errors import exit_code
from c4c.helptext import add_checkpoint_options
from c4c.launched import let_threads_sleep, quick_imports
from c4c.option_checks import require_device, require_not_empty

if TYPE_CHECKING:  # imports come after what they would hold up: --help and mistakes in the arguments
    from c4c.retrieval.request import Request


def main() -> int:
    """The command; returns its exit code."""
    let_threads_sleep()
    return exit_code(lambda: run(_parser().parse_intermixed_args()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m c4c.features", description="Write a model's features of videos and captions, for train.teacher.",
        epilog=(__doc__ or "").partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_checkpoint_options(parser)
    add = parser.add_argument
    add("--data", nargs="+", action="append", metavar="SPLIT", help="packed splits (default: the run's own data.train)")
    add("--out", required=True, type=Path, metavar="FILE.safetensors", help="the file to write")
    add("--float16", action="store_true", help="half the size; cosines change by less than 0.001")
    add("--device", help="cuda or cpu (default: cuda where there is one)")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers pass it
    add("overrides", nargs="*", metavar="data.key=value", help="data settings other than the checkpoint's")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the file. Mistakes are found first; what takes long to import comes after that."""
    request = _checked(args)
    with quick_imports():
        from c4c.retrieval.store_features import store_features

    store_features(request, args.out, args.float16)
    return 0


def _checked(args: argparse.Namespace) -> "Request":
    """What the command line asks for. Raises ValueError, or OSError, for what cannot be done."""
    from c4c.files import require_writable
    from c4c.retrieval.request import SETTING, Request, data_of
    from shards.split import Split
    from shards.storage import place

    named = [word for words in args.data or [] for word in words]
    words = [*args.overrides, *filter(SETTING.match, named)]  # an option takes all words after it
    places = [word for word in named if not SETTING.match(word)]
    words_of_options = [(name, getattr(args, name)) for name in ("ckpt", "tag", "backbone")]
    require_not_empty([*words_of_options, *(("data", path) for path in places)])
    require_device(args.device)
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out}: the name must end with .safetensors")
    require_writable(f"--out {args.out}", args.out, lambda start: b'"c4c.features.' in start)
    asked = data_of(args.ckpt, args.tag, not args.no_ema, words)
    own = [asked.train] if isinstance(asked.train, str) else list(asked.train)
    splits = places or [split for split in own if split]
    if not splits:
        raise ValueError("--data is not given: name the folder of a packed split")
    if len({str(place(split)) for split in splits}) < len(splits):
        raise ValueError(f"--data names a split twice: {', '.join(splits)}")
    return Request(
        ckpt=args.ckpt, splits=[Split(split, asked.local) for split in splits], tag=args.tag, ema=not args.no_ema, backbone=args.backbone,
        words=tuple(words), device=args.device,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
