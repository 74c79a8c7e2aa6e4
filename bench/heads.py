"""Train several heads on the demo set and compare them where only order or direction tells videos apart.

    python bench/heads.py [--heads meanP seqTransf] [--seeds 42] [key=value ...]

Segment sampling (data.sampling=segment) with an even number of frames is the fair setting: of one frame a second from
the start on, a few more show what was first, and even an average tells that. Each run's best validated checkpoint is
scored, since heads overfit at different times. A run in runs/heads that is done is only scored.

Needs data/demo (python -m c4c.shard demo --out data/demo). Writes bench/results/heads.json after every run; rows that
are there already, of other heads and seeds with the same settings, stay.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness
from bench.harness import ROOT
from c4c.training.run_folder import read_done


def main() -> int:
    parser = harness.parser(__doc__, "heads")
    parser.add_argument("--heads", nargs="+", default=["meanP", "seqTransf"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("overrides", nargs="*", help="settings for launch/train.py, key=value")
    args = parser.parse_intermixed_args()
    rows = [r for r in read(args.json) if r["settings"] == args.overrides]
    for head in args.heads:
        for seed in args.seeds:
            rows = [r for r in rows if (r["head"], r["seed"]) != (head, seed)] + [measure(head, seed, args.overrides)]
            harness.save(args.json, rows)
    told = [
        [row["head"], str(row["seed"]), *(harness.number(row[k]) for k in ("R1", "R1_pairs", "R1_others"))]
        for row in rows
    ]
    harness.show(["head", "seed", "t2v R@1 %", "in pairs, t2v R@1 %", "others, t2v R@1 %"], told)
    return 0


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def measure(head: str, seed: int, overrides: list[str]) -> dict:
    run = ROOT / f"runs/heads/{head}-{seed}"
    words = [
        f"model.head={head}",
        f"run.seed={seed}",
        f"run.dir={run.relative_to(ROOT)}",
        "run.resume=auto",
        *overrides,
    ]
    subprocess.run(["deepspeed", "launch/train.py", "--cfg", "demo.yaml", *words], cwd=ROOT, check=True)
    ranks, best = run / "ranks.jsonl", read_done(run)["best"]
    subprocess.run(
        [sys.executable, "launch/eval.py", "--ckpt", run, "--tag", best, "--ranks", ranks], cwd=ROOT, check=True
    )
    texts = [json.loads(line) for line in ranks.read_text().splitlines()]
    pairs = [t for t in texts if t["meta"].get("pair")]
    others = [t for t in texts if not t["meta"].get("pair")]
    share = {name: 100 * sum(t["rank"] == 1 for t in part) / max(1, len(part))
             for name, part in (("R1", texts), ("R1_pairs", pairs), ("R1_others", others))}  # fmt: skip
    return {
        "head": head,
        "seed": seed,
        "settings": overrides,
        "best": best,
        "texts": len(texts),
        "texts_in_pairs": len(pairs),
    } | share


if __name__ == "__main__":
    sys.exit(main())
