"""`python -m c4c.roofline --cfg msrvtt.yaml --gpu H100`: what a training step would take on a GPU, predicted without one.

It counts the operations and bytes of the real model, and needs neither data nor weights.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from c4c.errors import exit_code
from c4c.launched import seen_enough
from c4c.performance.hardware import GPUS, gpu_named
from shards.limits import POSITIVE

_RECIPES = Path(__file__).parents[1] / "launch" / "cfg"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    names = ", ".join(gpu.name for gpu in GPUS)
    parser = argparse.ArgumentParser(
        prog="python -m c4c.roofline",
        description="Predict where the time and memory of a training step go on a GPU: which one, how many, which batch.",
    )
    parser.add_argument("--cfg", required=True, help="a yaml file: a path, or the name of one in launch/cfg")
    parser.add_argument("--gpu", required=True, help=f"{names}; or all, for a table")
    parser.add_argument("--gpus", type=POSITIVE, default=1, help="how many of them (%(default)s)")
    parser.add_argument("--cores", type=POSITIVE, default=16, help="CPU cores for each GPU (%(default)s)")
    parser.add_argument(
        "--decoder", choices=("gpu", "cpu"), help="what decodes pictures or videos (data.decode, or gpu)"
    )
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE", help="replace an assumption; all are printed"
    )
    parser.add_argument("--json", type=Path, help="write the prediction here too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    args = parser.parse_intermixed_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Predict and print. Mistakes are found first; what takes long to import comes after that."""
    from c4c.config import load
    from c4c.files import replace_text, require_writable
    from c4c.performance.assumptions import assume, describe

    gpus = GPUS if args.gpu.lower() == "all" else (gpu_named(args.gpu),)
    assumptions = assume(args.assume)
    config = load(args.cfg, args.overrides, [_RECIPES])
    if args.json:
        require_writable(f"--json {args.json}", args.json, lambda start: b'"gpu"' in start)

    from c4c.performance import report
    from c4c.performance.predict import counts_of, largest_batch, predict, shape_of

    shape_of(config, args.gpus)
    from c4c.performance.counts import activation_curve

    decoder = args.decoder or ("cpu" if config.data.decode == "cpu" else "gpu")
    counts, shape = counts_of(config, args.gpus), shape_of(config, args.gpus)
    scored = shape.scored if shape.cached else None
    curve = activation_curve(config, args.gpus, scored=scored, known=(shape.encoded, counts.activations))
    found = []
    for gpu in gpus:
        prediction = predict(config, gpu, args.gpus, args.cores, assumptions, decoder=decoder, counts=counts)
        found.append((prediction, largest_batch(config, gpu, prediction, counts, curve, assumptions)))
    if args.json:
        rows = [asdict(p) | {"fits": p.fits, "largest_rank_batch": most} for p, most in found]
        about = {"gpu": args.gpu, "assumptions": asdict(assumptions), "predictions": rows}
        replace_text({args.json: json.dumps(about, indent=2) + "\n"})
    text = report.text(*found[0], config, assumptions) if len(found) == 1 else report.table(found, config)
    with seen_enough():
        print("\n".join([text, "\nassumptions (--assume name=value; * marks those you set)", *describe(assumptions)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
