"""Train:  deepspeed launch/train.py --cfg demo.yaml [key=value ...]

torchrun and srun start it as well, and python alone for one rank.
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a text-to-video retrieval model.", epilog="key=value words override "
                                     "the configuration, for example train.lr=1e-4 run.dir=runs/mine")  # fmt: skip
    parser.add_argument("--cfg", required=True, help="a yaml file: a path, or the name of one in launch/cfg")
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
    args = parser.parse_intermixed_args()
    try:
        return run(args)
    except (ValueError, OSError, RuntimeError) as error:
        from c4c.errors import lost_peer, speak

        if isinstance(error, RuntimeError) and not lost_peer(error):
            raise
        speak(error, int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))))
        return 1
    except KeyboardInterrupt:
        return 130


def run(args: argparse.Namespace) -> int:
    """Imports come after what they would hold up: help needs none, and a mistake in the settings few."""
    from c4c.config import load, require

    words = [f"run.seed={args.seed}"] if args.seed is not None else []
    words += ["run.deterministic=true"] if args.deterministic else []
    config = load(args.cfg, args.overrides + words, [Path(__file__).parent / "cfg"])
    require(config)
    if args.check:
        from c4c.check import check

        check(config)
    elif args.replay is not None:
        from c4c.replay import replay

        return 0 if replay(config, args.replay) else 1
    else:
        from c4c.train import train

        train(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
