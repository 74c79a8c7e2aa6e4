"""Train:  deepspeed launch/train.py --cfg demo.yaml [key=value ...]

torchrun and srun start it as well, and python alone for one rank.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # outside its environment too: then an error says what to do

from c4c.errors import exit_code
from c4c.helptext import PrintKeys, describe_recipes
from c4c.launched import Starting, let_threads_sleep, open_streams, own_rank, quick_imports, require_port

_RECIPES = Path(__file__).parent / "cfg"


def main() -> int:
    """The command; returns its exit code."""
    let_threads_sleep()
    open_streams()  # for --help, too
    args = _parser().parse_intermixed_args()

    def command() -> int:
        with Starting("" if args.check or args.replay is not None else "before the first step"):
            return run(args)

    return exit_code(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a text-to-video retrieval model.", epilog=describe_recipes(_RECIPES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--cfg", required=True, help="a yaml file: a path, or the name of one in launch/cfg")
    parser.add_argument("--keys", action=PrintKeys, nargs=0, help="print every key with its default, and exit")
    parser.add_argument("--seed", type=int, help="the same as run.seed=N")
    parser.add_argument(
        "--deterministic", action="store_true", help="the same as run.deterministic=true: equal losses, bit for bit"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--check", action="store_true", help="take two steps, say what a run would be, and leave its folder alone"
    )
    what.add_argument(
        "--replay",
        type=int,
        metavar="STEP",
        help="run one step of the run in run.dir again, from a checkpoint before it",
    )
    # launchers pass it
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, check or replay. What takes long to import comes last: help needs none of it, and a mistake in the settings little."""
    from c4c.config import load, require, require_data

    words = [f"run.seed={args.seed}"] if args.seed is not None else []
    words += ["run.deterministic=true"] if args.deterministic else []
    config = load(args.cfg, args.overrides + words, [_RECIPES])
    require(config)
    require_data(config.data)
    require_port()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of a lost rank are pages of addresses
    if args.check:
        from c4c.training.check import check

        check(config)
    elif args.replay is not None:
        from c4c.training.replay import replay

        return 0 if replay(config, args.replay) else 1
    else:
        from c4c.training.run_folder import require_place

        if own_rank() == 0:
            require_place(Path(config.run.dir))
        with quick_imports():
            from c4c.training.trainer import train

        train(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
