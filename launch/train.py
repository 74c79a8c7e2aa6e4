"""Train:  deepspeed launch/train.py --cfg demo.yaml [key=value ...]

torchrun and srun start it as well, and python alone for one rank.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # without its environment too, c4c.launched says what to do

from c4c.helptext import PrintKeys, describe_recipes
from c4c.launched import Starting, missing_package, open_streams, own_rank, require_port

_RECIPES = Path(__file__).parent / "cfg"


def main() -> int:
    args = _parser().parse_intermixed_args()
    open_streams()
    try:
        with Starting("" if args.check or args.replay is not None else "before the first step"):
            return run(args)
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        from c4c.errors import end_with

        return end_with(error)


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
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS
    )  # launchers pass it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    return parser


def run(args: argparse.Namespace) -> int:
    """Imports come after what they would hold up: help needs none, and a mistake in the settings few."""
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
        from c4c.training.trainer import train

        train(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
