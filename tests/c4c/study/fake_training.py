"""Stands for a launcher of launch/train.py: takes its arguments, trains nothing, and writes what the study looks for.

FAKE_SECONDS: how long it takes. FAKE_FAIL: a piece of a run folder's name whose training fails. Says in starts.jsonl, beside the
cells, when it began and ended.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    folder, stopped = Path(words["run.dir"]), []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    note(folder, "began", cores=os.environ.get("C4C_CORES"), gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
    progress = folder / "progress"
    until, steps = (
        float(os.environ.get("FAKE_SECONDS", "0.2")) * 20,
        int(progress.read_text()) if progress.exists() else 0,
    )
    if any(piece and piece in folder.name for piece in os.environ.get("FAKE_FAIL", "").split(":")):
        print("some words\nerror: the loss is not finite\nmore words", file=sys.stderr)
        return 3
    source = words.get("model.init_from", "scratch")
    if source != "scratch" and not Path(source, "done.json").exists():
        print(f"error: {source} is not done")
        return 1
    while steps < until:
        time.sleep(0.05)
        steps += 1
        progress.with_suffix(".tmp").write_text(str(steps))
        progress.with_suffix(".tmp").rename(progress)
        if stopped:
            note(folder, "saved")
            return 0
    r1 = sum(
        map(ord, "".join(sorted(word for word in sys.argv[2:] if not word.startswith(("run.dir", "model.init_from")))))
    )
    line = {"step": 2, "val/t2v_R1_pct": r1 % 100}
    (folder / "eval.jsonl").write_text(json.dumps({"step": 1, "val/t2v_R1_pct": 99}) + "\n" + json.dumps(line) + "\n")
    (folder / "done.tmp").write_text('{"step": 2, "best": "step2"}\n')
    (folder / "done.tmp").rename(folder / "done.json")
    note(folder, "done")
    return 0


def note(folder: Path, what: str, **more: object) -> None:
    line = (
        json.dumps({"cell": folder.name, "what": what, "pid": os.getpid(), "at": time.time(), **more}).encode() + b"\n"
    )
    file = os.open(folder.parent.parent / "starts.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)


if __name__ == "__main__":
    sys.exit(main())
