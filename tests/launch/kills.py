"""Kill a real run with SIGKILL at random moments, one rank or all of it, and go on: is the curve the unbroken one?

    python tests/launch/kills.py [--tries 20] [--ranks 2] [--seed 0] [--folder DIR] [key=value ...]

Makes a tiny data set, trains on it unbroken, then again with a kill in every start but the last. Exits with 1 if any
loss or gradient norm differs in any bit, or a validation in any number.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.launch.runs import STEPS_PER_EPOCH, Launcher, kill_all, lines, make_splits, ranks_of, wait_for_step

SAME = ("step", "epoch", "train/loss", "train/grad_norm", "train/lr", "train/logit_scale")


def curve(run: Path) -> list[dict]:
    """What every step came to; a last line that a kill has cut is left out."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [{k: json.loads(line)[k] for k in SAME} for line in text[: text.rfind("\n") + 1].splitlines()]


def validations(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "time_unix_s"} for line in lines(run / "eval.jsonl")]


def kill_and_go_on(
    launcher: Launcher, run: Path, ranks: int, kills: list[tuple[int, bool, float]], *words: str, say=print
):
    """Start the run once for each of `kills` and once more, to its end. Returns what was seen before each kill.

    kills: (the step to wait for, whether one rank is killed or all, seconds to wait after that)
    """
    seen, draw = [], random.Random(0)
    words = (f"run.dir={run}", "run.resume=auto", *words)
    for number, (steps, only_one, after) in enumerate(kills, 1):
        process = launcher.start(launcher.command(ranks, *words))
        wait_for_step(run / "metrics.jsonl", steps, process)
        time.sleep(after)
        if only_one:
            while len(there := ranks_of(process)) < ranks:  # it may be starting, and the step be one from before
                time.sleep(0.05)
            draw.choice(there).send_signal(signal.SIGKILL)
            ended = time.monotonic()
            out, err = process.communicate(timeout=120)
            how = f"one rank; the others ended within {time.monotonic() - ended:.0f} s"
            if process.returncode == 0:
                raise RuntimeError(f"a rank was killed and the launcher reports success: {out}{err}")
        else:
            kill_all(process)
            process.communicate()
            how = "all"
        seen.append(curve(run))
        latest = run / "checkpoints" / "latest"
        there = latest.read_text() if latest.exists() else "no checkpoint"
        say(f"kill {number}: {how}, after {len(seen[-1])} steps, with {there}")
    code, out, err = launcher.finish(launcher.command(ranks, *words))
    if code:
        raise RuntimeError(f"the run did not go on: {out}{err}")
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Kill a run over and over and compare its curve with the unbroken one."
    )
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of the run, train.lora=4 for example"
    )
    args = parser.parse_intermixed_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="kills-") as folder:
        launcher = Launcher(Path(folder))
        make_splits(launcher.folder)
        at, kills = 0, []
        for _ in range(args.tries):
            at += draw.randint(1, 5)
            kills.append((at, draw.random() < 0.5, draw.random() * 0.4))
        words = [
            f"train.epochs={-(-(at + 5) // STEPS_PER_EPOCH)}",
            "train.eval_every=2",
            "checkpoint.every_steps=2",
            *args.overrides,
        ]
        code, out, err = launcher.finish(
            launcher.command(args.ranks, f"run.dir={launcher.folder / 'unbroken'}", *words)
        )
        if code:
            raise RuntimeError(f"the run did not end: {out}{err}")
        unbroken = curve(launcher.folder / "unbroken")
        print(f"unbroken: {len(unbroken)} steps", flush=True)
        run = launcher.folder / "killed"
        say = lambda text: print(text, flush=True)  # noqa: E731
        seen = [*kill_and_go_on(launcher, run, args.ranks, kills, *words, say=say), curve(run)]
        same = sum(part == unbroken[: len(part)] for part in seen)
        print(f"{same} of {len(seen)} curves (at each kill, and at the end) are the unbroken one, bit for bit")
        if not (
            whole := len(seen[-1]) == len(unbroken) and validations(run) == validations(launcher.folder / "unbroken")
        ):
            print("the run that was killed did not come to the same end")
        return 0 if whole and same == len(seen) else 1


if __name__ == "__main__":
    sys.exit(main())
