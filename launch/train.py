"""Train:  deepspeed launch/train.py --cfg demo.yaml [key=value ...]"""

import argparse
import os
import sys
from pathlib import Path

from c4c.config import ConfigError, load
from c4c.train import train


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a text-to-video retrieval model.", epilog="key=value words override "
                                     "the configuration, for example train.lr=1e-4 run.dir=runs/mine")  # fmt: skip
    parser.add_argument("--cfg", required=True, help="a yaml file: a path, or the name of one in launch/cfg")
    parser.add_argument("--seed", type=int, help="the same as run.seed=N")
    parser.add_argument(
        "--deterministic", action="store_true", help="the same as run.deterministic=true: equal losses, bit for bit"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    args = parser.parse_args()
    rank = os.environ.get("RANK", "0")
    try:
        words = [f"run.seed={args.seed}"] if args.seed is not None else []
        words += ["run.deterministic=true"] if args.deterministic else []
        train(load(args.cfg, args.overrides + words, [Path(__file__).parent / "cfg"]))
    except ConfigError as error:  # the same on every rank
        print(f"error: {error}", file=sys.stderr) if rank == "0" else None
        return 1
    except (ValueError, OSError) as error:
        print(f"error{' on rank ' + rank if rank != '0' else ''}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
