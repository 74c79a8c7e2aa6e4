"""Random faults over packing, training, resuming and evaluation: is everything as if nothing had happened?

    python tests/launch/faults.py [--faults 200] [--seed 0] [--folder DIR]

Every command is a fork of this process, which has imported everything, so a fault costs about a second. A fault is a kill,
a limit on the size of files, an error at the Nth write, rename, sync or read, or damage to a file that it is fair to damage.
After each: no traceback, no committed shard and no recorded step changed or gone. At the end of every packing, run and
evaluation its files, curve or metrics are compared with the undisturbed ones. Exits with 1, naming the fault, if any differs.
"""

import argparse
import contextlib
import errno
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.launch.faulty import Command, Fault, FaultError
from tests.launch.runs import lines

SAME = ("step", "train/loss", "train/grad_norm", "train/lr", "train/logit_scale")
ERRORS = (errno.ENOSPC, errno.EIO, errno.ENOMEM)


class Set:
    """What is packed, trained and evaluated, with and without faults."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        self.videos = folder / "source" / "train"
        self.packed, self.whole = folder / "packed", folder / "whole"
        self.seconds: dict[str, float] = {}

    def command(self, kind: str, out: Path) -> Command:
        """kind: pack, train or evaluate; out: the split, the run folder, or the file of metrics."""
        data = [f"data.train={self.whole / 'train'}", f"data.test={self.whole / 'test'}"]
        small = [
            "data.num_frames=2",
            "data.eval_batch_size=8",
            "data.threads=1",
            "data.prefetch=1",
            "engine.precision=fp32",
        ]
        words = {
            "pack": ("c4c.shard", ["folder", "--videos", str(self.videos), "--out", str(out), "--workers", "1", "--short-side",
                                   "64", "--shard-videos", "3"]),
            "train": ("launch/train.py", ["--cfg", "demo.yaml", *data, *small, f"run.dir={out}", "run.resume=auto",
                                          "train.batch_size=16", "train.epochs=2", "checkpoint.every_steps=1",
                                          "train.eval_every=1", "run.deterministic=true"]),
            "evaluate": ("launch/eval.py", ["--ckpt", str(self.folder / "unbroken"), "--json", str(out)]),
        }[kind]  # fmt: skip
        return Command(*words)

    def undisturbed(self) -> None:
        """The splits, the run and the metrics that all others are compared with."""
        from shards.demo import shapes
        from shards.packing.pack import pack
        from shards.video.profiles import Profile

        items = shapes.generate(self.folder / "source", seed=0, train=12, test=6, workers=2)
        for split in ("train", "test"):
            pack(
                items[split], self.whole / split, dataset="demo", split=split, profile=Profile(short_side=64), workers=2
            )
        for item in items["train"]:  # as a user lays them: captions beside the video
            item.path.with_suffix(".txt").write_text("".join(f"{caption.text}\n" for caption in item.captions))
        for kind, out in (("pack", "packed"), ("train", "unbroken"), ("evaluate", "unbroken.json")):
            command = self.command(kind, self.folder / out)
            code, said = command.run(Fault())
            if code:
                raise FaultError(f"{kind} without a fault ends with {code}: {said}")
            self.seconds[kind] = command.seconds

    def fault(self, kind: str, out: Path) -> Fault:
        """One that is drawn for a command of this kind; damage is done to its files at once."""
        rng, fault = self.rng, Fault()
        way = rng.choice(["kill", "kill", "signal", "size", "call", "call", "damage"])
        if way == "kill":
            fault.kill_after_s = rng.uniform(0.05, 1.0) * self.seconds[kind]
        elif way == "signal":
            fault.kill_after_s, fault.with_signal = rng.uniform(0.05, 1.0) * self.seconds[kind], signal.SIGTERM
        elif way == "size":
            fault.largest_file = int(10 ** rng.uniform(1, 6.5))
        elif way == "call" or not (done := DAMAGE[kind](out, rng)):
            calls = [("replace", "rename", "link"), ("fsync",), ("write", "pwrite"), ("open",), ("unlink", "mkdir")]
            fault.calls, fault.error = rng.choice([*calls, ("read", "pread")]), rng.choice(ERRORS)
            fault.fail_at = int(10 ** rng.uniform(0, 1.6))
        else:
            fault.damage = done
        return fault


def _damage_packing(out: Path, rng: random.Random) -> str:
    """To what no parquet vouches for: temporary files and a shard that is not committed."""
    there = [
        p
        for p in sorted(out.glob("*"))
        if p.suffix == ".tmp" or (p.suffix == ".tar" and not p.with_suffix(".parquet").exists())
    ]
    return _spoil(rng.choice(there), rng) if there else ""


def _damage_run(out: Path, rng: random.Random) -> str:
    """A torn last line of a log, a lost pointer, or damage to the newest of several checkpoints."""
    logs = [p for p in (out / "metrics.jsonl", out / "eval.jsonl", out / "quarantine.jsonl") if p.exists()]
    kept = sorted((out / "checkpoints").glob("step*")) if out.exists() else []
    ways = [*(["log"] if logs else []), *(["pointer"] if kept else []), *(["checkpoint"] if len(kept) > 1 else [])]
    if not ways:
        return ""
    way = rng.choice(ways)
    if way == "log":
        log = rng.choice(logs)
        with open(log, "ab") as file:
            file.write(b'{"step": 99, "train/lo')
        return f"a torn line in {log.name}"
    if way == "pointer":
        (out / "checkpoints" / "latest").unlink(missing_ok=True)
        return "checkpoints/latest is gone"
    return _spoil(rng.choice([p for p in sorted(kept[-1].iterdir()) if p.is_file()]), rng)


def _spoil(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    if content and rng.random() < 0.5:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        said = "a bit flipped"
    else:
        del content[rng.randrange(len(content) + 1) :]
        said = f"cut at {len(content)}"
    path.write_bytes(content)
    return f"{path.parent.name}/{path.name} {said}"


DAMAGE = {"pack": _damage_packing, "train": _damage_run, "evaluate": lambda out, rng: ""}


def committed(split: Path) -> dict[str, bytes]:
    """The files of shards that are whole, and of a split that is."""
    names = [p.stem for p in split.glob("*.parquet") if not p.name.startswith(".")]
    files = [split / f"{name}.{suffix}" for name in names for suffix in ("tar", "idx", "parquet")]
    if (split / "dataset.json").exists():
        files += [split / name for name in ("dataset.json", "captions.npy", "rejects.jsonl") if (split / name).exists()]
    return {path.name: path.read_bytes() for path in files}


def curve(run: Path) -> dict[int, tuple]:
    """What is recorded of every step; a torn line is none."""
    found = {}
    for line in (
        (run / "metrics.jsonl").read_text(errors="replace").splitlines() if (run / "metrics.jsonl").exists() else ()
    ):
        with contextlib.suppress(ValueError, KeyError):
            row = json.loads(line)
            found[row["step"]] = tuple(row[key] for key in SAME)
    return found


def validations(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "time_unix_s"} for row in lines(run / "eval.jsonl")]


def saved_step(run: Path) -> int:
    """The newest step that a checkpoint, which a resumed run may go on from, keeps."""
    from c4c.zero.checkpoint import CheckpointError, newest_intact

    try:
        return int(newest_intact(run)[0].removeprefix("step"))
    except CheckpointError:
        return 0


def pack_with_faults(work: Set, say: Callable[[str], None]) -> bool:
    """One command. Whether the split is complete."""
    out = work.folder / "faulty" / work.packed.name  # the folder's name is the split's
    before, fault = committed(out), work.fault("pack", out)
    code, said = work.command("pack", out).run(fault)
    after, whole = committed(out), committed(work.packed)
    say(f"pack: {fault}: {_told(code, said)}; {len(after)} of {len(whole)} files")
    if lost := before.keys() - after.keys():
        raise FaultError(f"committed files are gone: {sorted(lost)}\n{said}")
    if wrong := [name for name, content in after.items() if whole.get(name) != content]:
        raise FaultError(f"{wrong} differ from the undisturbed ones\n{said}")
    if code == 0 and after.keys() != whole.keys():
        raise FaultError(f"it reports success without {sorted(whole.keys() - after.keys())}\n{said}")
    if complete := after.keys() == whole.keys():
        shutil.rmtree(out)
    return complete


def train_with_faults(work: Set, say: Callable[[str], None]) -> bool:
    run, unbroken = work.folder / "run", work.folder / "unbroken"
    fault = work.fault("train", run)
    safe, before = saved_step(run) if run.exists() else 0, curve(run)
    code, said = work.command("train", run).run(fault)
    after, whole = curve(run), curve(unbroken)
    say(
        f"train: {fault}: {_told(code, said)}; {len(after)} of {len(whole)} steps, {saved_step(run) if run.exists() else 0} saved"
    )
    if lost := [step for step in before if step <= safe and step not in after]:
        raise FaultError(f"steps {lost} were recorded and saved, and are gone\n{said}")
    if wrong := [step for step, values in after.items() if whole.get(step) != values]:
        raise FaultError(f"steps {wrong} differ from the undisturbed ones\n{said}")
    if not (run / "done.json").exists():
        return False
    if after.keys() != whole.keys() or validations(run) != validations(unbroken):
        raise FaultError(f"the run is done, and its history is not the undisturbed one\n{said}")
    shutil.rmtree(run)
    return True


def evaluate_with_faults(work: Set, say: Callable[[str], None]) -> bool:
    out, right = work.folder / "metrics.json", (work.folder / "unbroken.json").read_bytes()
    fault = work.fault("evaluate", out)
    code, said = work.command("evaluate", out).run(fault)
    say(f"evaluate: {fault}: {_told(code, said)}")
    if out.exists() and out.read_bytes() != right:
        raise FaultError(f"other metrics than the undisturbed ones\n{said}")
    if (code == 0) != out.exists():
        raise FaultError(f"ended with {code}, and metrics are {'there' if out.exists() else 'missing'}\n{said}")
    out.unlink(missing_ok=True)
    return code == 0


def _told(code: int, said: str) -> str:
    last = next((line for line in reversed(said.splitlines()) if line.startswith("error")), "")
    return f"{'SIG' if code < 0 else ''}{abs(code)}{f' ({last[:160]})' if last else ''}"


WAYS = {"pack": pack_with_faults, "train": train_with_faults, "evaluate": evaluate_with_faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    args = parser.parse_args()
    import c4c.retrieval.evaluate
    import c4c.shard
    import c4c.training.trainer  # noqa: F401 what a fork then need not

    rng, complete = random.Random(args.seed), Counter()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="faults-") as folder:
        work = Set(Path(folder), rng)
        work.undisturbed()
        began = time.monotonic()
        print("undisturbed:", ", ".join(f"{kind} {s:.1f} s" for kind, s in work.seconds.items()), flush=True)
        for number in range(1, args.faults + 1):
            kind = rng.choices(list(WAYS), (4, 3, 3))[0]
            try:
                complete[kind] += WAYS[kind](work, lambda text, n=number: print(f"{n:4} {text}", flush=True))
            except FaultError as error:
                print(f"fault {number} of seed {args.seed}: {kind}: {error}", flush=True)
                return 1
        for kind, way in WAYS.items():  # to the end, without faults
            work.fault = lambda *_: Fault()
            if not way(work, print):
                print(f"{kind} does not come to its end without faults")
                return 1
        ends = ", ".join(f"{kind} {complete[kind] + 1}" for kind in WAYS)
        print(f"{args.faults} faults in {time.monotonic() - began:.0f} s; came to the undisturbed end: {ends} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
