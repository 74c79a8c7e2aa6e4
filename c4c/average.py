"""`python -m c4c.average RUN [RUN ...] --out PATH`: the average of the weights of several checkpoints, as one model.

python -m c4c.average runs/x --last 5 --out runs/x-average            # a run's newest checkpoints
python -m c4c.average runs/x --tags step00000400 best --weights 1 3 --out average.safetensors
python -m c4c.average runs/a runs/b runs/c --tags best --out runs/soup   # one checkpoint of each of several runs

PATH is a folder that launch/eval.py, c4c.export, c4c.index and model.init_from take as they take a run, or a file as
`python -m c4c.export` writes it, if it ends with .safetensors.
"""

import argparse
import math
import sys
from pathlib import Path

from c4c.errors import exit_code
from c4c.helptext import NO_EMA
from c4c.launched import quick_imports


def main() -> int:
    """The command; returns its exit code."""
    return exit_code(lambda: run(_parser().parse_args()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m c4c.average", description="Average the weights of checkpoints of one run, or of runs of the same model.",
        epilog=(__doc__ or "").partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders, or RUN/checkpoints/TAG/model.safetensors for one checkpoint",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tags", nargs="+", metavar="TAG", help="these checkpoints of each run: their names, or best")
    which.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints of each run")
    add("--weights", nargs="+", type=float, metavar="W", help="what each checkpoint counts, in their order, runs first; only their ratios "
        "matter (default: all the same)")  # fmt: skip
    add("--no-ema", action="store_true", help=NO_EMA)
    add("--out", type=Path, required=True, metavar="PATH", help="a new folder, or a file that ends with .safetensors")
    return parser


def run(args: argparse.Namespace) -> int:
    """Average. Mistakes are found first; nothing is written before all weights are read and averaged."""
    check_out(args.out)
    if args.last is not None and args.last < 1:
        raise ValueError(f"--last {args.last}: must be at least 1")
    for weight in args.weights or ():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"--weights {weight:g}: must be numbers of at least 0")
    if args.weights and not sum(args.weights):
        raise ValueError("--weights are all 0: one at least must be above")
    if not math.isfinite(sum(args.weights or ())):  # each would count 0 / inf, nothing
        raise ValueError("--weights are too large to be summed: only their ratios matter, so divide all by one number")
    with quick_imports():
        from c4c.models.averaging import CheckpointChoice, average
        from c4c.zero.patches import quiet_libraries
    quiet_libraries()

    chosen = CheckpointChoice(tuple(args.runs), tuple(args.tags or ()), args.last or 0, not args.no_ema)
    for line in average(chosen, args.weights, args.out):
        print(line)
    return 0


def check_out(out: Path) -> None:
    """Raise ValueError if the average cannot be written there: an earlier result is not replaced."""
    from c4c.export import check_target
    from c4c.files import require_folder
    from c4c.training.run_folder import run_of_file

    if run_of_file(out):
        raise ValueError(f"--out {out} lies in a run's checkpoint, which it would damage: name another place")
    if out.suffix == ".safetensors":
        check_target(out, "c4c", named="--out")
        return
    require_folder(f"--out {out}", out)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is a folder with files in it: name another, or delete it first")


if __name__ == "__main__":
    sys.exit(main())
