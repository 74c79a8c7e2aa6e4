"""What stage one is worth on the demo, and what MIL-NCE is worth over cross-entropy on captions that stand in wrong places.

    python bench/two_stage.py [--seeds 42 43 44] [key=value ...]

For each seed: the small set from scratch; stage one on the narrated set with either loss; zero-shot after it; fine-tuned
after it. Both losses see the same clips in the same number of steps. Needs data/narrated (python -m c4c.shard
demo-narrated --out data/narrated). Writes bench/results/two_stage.json; started again, it goes on where it was.
"""

import argparse
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from rich.console import Console

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness
from bench.harness import ROOT
from c4c.training import stages
from c4c.training.run_folder import validations

CE = {"train.loss": "cross_entropy", "clips.bag": 1}
FINE = {"train.lr": 5e-4}  # from a start that is good already
# the training stage whose last validation, on the test set, stands for it
ROWS = {
    "scratch": "from scratch on the small set",
    "pretrain": "zero-shot after stage one, MIL-NCE",
    "pretrain-ce": "zero-shot after stage one, cross-entropy",
    "finetune": "fine-tuned after stage one, MIL-NCE",
    "finetune-ce": "fine-tuned after stage one, cross-entropy",
}


def main() -> int:
    parser = harness.parser(__doc__, "two_stage")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--launcher", default="python", help="how training is started (%(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds at once, each with its share of the cores (%(default)s)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_two_stage"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all training stages")
    args = parser.parse_intermixed_args()
    if args.jobs > 1:  # each seed in a process of its own; what follows then finds everything done
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: _alone(seed, args), args.seeds))
    console, found = Console(soft_wrap=True), {}
    for seed in args.seeds:
        folder = args.runs / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        common = dict(word.split("=", 1) for word in args.overrides) | {"run.seed": seed}
        (folder / "stages.yaml").write_text(yaml.safe_dump({"stages": _stages(folder, common)}))
        pipeline = stages.read(folder / "stages.yaml", search=[ROOT / "launch/cfg"], launcher=args.launcher)
        stages.run(pipeline, ROOT / "launch", lambda text: console.print(text, highlight=False, markup=False))
        found[seed] = {stage.name: validations(stage.run)[-1] for stage in pipeline.stages}
        _write(args.json, found, args.overrides)
    _show(found)
    return 0


def _alone(seed: int, args: argparse.Namespace) -> None:
    words = ["--seeds", str(seed), "--launcher", args.launcher, "--runs", str(args.runs), *args.overrides]
    part = args.runs / str(seed) / "result.json"
    share = {"LOCAL_WORLD_SIZE": str(args.jobs)}  # by which training divides the machine's cores
    command = [sys.executable, __file__, *words, "--json", str(part)]
    subprocess.run(command, cwd=ROOT, env=harness.environment(**share), check=True)


def _stages(folder: Path, common: dict) -> list[dict]:
    def training(name: str, cfg: str, settings: dict, source: str = "") -> dict:
        stage = {"name": name, "cfg": cfg, "set": {"run.dir": str(folder / name), **settings, **common}}
        return stage | ({"from": source} if source else {})

    out = [training("scratch", "demo_small.yaml", {})]
    for end, settings in (("", {}), ("-ce", CE)):
        out += [
            training(f"pretrain{end}", "demo_narrated.yaml", settings),
            training(f"finetune{end}", "demo_small.yaml", FINE, f"pretrain{end}"),
        ]
    return out


def _mean(found: dict, name: str) -> tuple[float, float]:
    values = [result[name] for result in found.values()]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _show(found: dict) -> None:
    rows = []
    for name, title in ROWS.items():
        values = [*(result[name] for result in found.values()), _mean(found, name)[0]]
        rows.append([title, *map(harness.number, values)])
    harness.show(["", *(f"seed {seed}" for seed in found), "mean"], rows, "text-to-video R@1 %")


def _write(path: Path, found: dict, overrides: list[str]) -> None:
    each = {str(seed): {title: result[name] for name, title in ROWS.items()} for seed, result in found.items()}
    means = {name: dict(zip(("mean", "standard_deviation"), _mean(found, name), strict=True)) for name in ROWS}
    gains = {
        "fine-tuned over scratch, R@1 points": means["finetune"]["mean"] - means["scratch"]["mean"],
        "MIL-NCE over cross-entropy, zero-shot, R@1 points": means["pretrain"]["mean"] - means["pretrain-ce"]["mean"],
        "MIL-NCE over cross-entropy, fine-tuned, R@1 points": means["finetune"]["mean"] - means["finetune-ce"]["mean"],
    }
    about = {"machine": platform.machine(), "system": platform.platform(), "overrides": overrides}
    out = {"gains": gains, "t2v_R1": {ROWS[name]: mean for name, mean in means.items()}, "seeds": each, **about}
    harness.save(path, out)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
