"""What a GPU does with c4c, part by part: the card, the step, the decoders, the loader, training, and other libraries.

    python bench/gpu.py [--plan] [--only PART ...] [--minutes 10] [--clips 64] [--seconds 12] [--runs 2] [--json OUT] [key=value ...]

`--plan` prints the parts with their time limits, and ends. The parts run in that order, what tells most first; with `--minutes`
no part starts later, and the last one is cut short. Each is a process of its own: one that crashes is reported with its signal
and the end of its stderr, one that passes its limit is killed, and both cost only themselves. OUT is written after each run;
Ctrl-C ends with what is there. By default it is a new file: gpu-NAME-DATE.json with the GPU's name, then …-2.json, …-3.json.
PART is the name of a part, or a piece of several names (decode). A word that is a name chooses that part alone.
Every figure is measured twice: in a second run of its part once all parts have had their first, or within the part.

`card`        what the card reaches: matrix products, copies on the device and from the host
`step …`      the training step on one batch that stays on the device, without loader and trainer
`profile`     torch.profiler's account of it: kernels, copies, synchronisations, gaps, and how busy the GPU is
`predicted`   what the model of a step (python -m c4c.roofline) expects of it
`clips`       made once in data/bench, as in bench/packing.py (320x240, H.264, 10 to 30 s, a keyframe in 250 frames); each is packed
              under four names, so that batches of 128 different videos come of 64 clips. It needs no GPU: --only clips beforehand
`decode …`    DALI's image decoder in every form and on the CPU; `nvdec …` the video decoder
`corruption …` frames decoded behind 100 ms of queued work, compared with frames decoded after a wait
`lane …`      the loader alone (python -m pipelines.bench); `equal …` its frames beside the CPU's: PSNR
`train …`     steps on the loader's batches, or on those of a warm cache; nothing else is done in the time that is measured
`losses …`    the first steps in bf16 beside fp32 on the CPU
`rival …`     other libraries' decoders on the same files, where they are installed

Meanwhile nvidia-smi is asked how busy the GPU and its decoders are. Key=value words are settings of the training parts.
Without a GPU, what does not need one runs on the CPU, which shows that the script works and nothing else. Use a small model:
--clips 4 --batch-size 8 model.backbone=ViT-demo-16 data.image_size=64 data.max_words=24 engine.precision=fp32
"""

import argparse
import difflib
import faulthandler
import importlib
import json
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from datetime import date
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness, smi
from bench.gpu_parts import process
from bench.gpu_parts.parts import CLIPS, CPU_ONLY, PARTS, Given, Missing, Part, training_settings
from bench.gpu_parts.report import show, summary
from bench.harness import ROOT
from shards.limits import POSITIVE, Limits

PACKAGES = (
    "torch",
    "nvidia-dali-cuda130",
    "nvidia-nvimgcodec-cu13",
    "nvidia-nvjpeg",
    "deepspeed",
    "open_clip_torch",
    "numpy",
)
MOST_WARNINGS = 20  # of a part that are kept
LEAST_S = 10.0  # with less time left, no part is started
TIME = Limits(float, 0)
UNNAMED = "NAME-DATE"  # in the name of a result file: what this run puts in its place


def main(words: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    args = arguments(words)
    if args.call:
        return measured(args)
    gpu = smi.gpu_name()
    try:  # mistakes are told before the first part
        chosen = choose(args.only, parts)
        if args.overrides:
            require_settings(args.overrides, args.batch_size)
        if args.plan:
            return show_plan(chosen, args.runs or 2)
        args.json = result_file(args.json, gpu or "cpu")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.runs, args.seconds = args.runs or (2 if gpu else 1), args.seconds or (12.0 if gpu else 1.0)
    report: dict = {"machine": machine(gpu), "settings": args.overrides, "seconds": args.seconds, "clips": args.clips}
    report |= {"batch_size": args.batch_size, "parts": {}, "summary": []}
    try:
        measure(chosen, args, bool(gpu), report)
    except KeyboardInterrupt:
        so_far = f"results so far -> {args.json}" if report["parts"] else "no part had ended, and nothing was written"
        print(f"stopped by SIGINT; {so_far}", file=sys.stderr)
        return 128 + signal.SIGINT
    show(report)
    print(f"-> {args.json}")
    return int(any(not run["ok"] for part in report["parts"].values() for run in part.get("runs", [])))


def choose(only: Sequence[str], parts: Sequence[Part]) -> list[Part]:
    """The parts that `--only` names, with the one that makes what they read. Raises ValueError for a word that names none."""
    names = [part.name for part in parts]
    chosen = set() if only else set(names)
    for word in only:
        found = [word] if word in names else [name for name in names if word in name]
        if not found:
            firsts = list(dict.fromkeys(name.partition(" ")[0] for name in names))
            near = difflib.get_close_matches(word, [*names, *firsts], 1)
            hint = f"Did you mean {near[0]}? " if near else ""
            if "." in word.partition("=")[0]:
                hint = "Settings come before --only, or after another option. "
            raise ValueError(
                f"--only {word[:100]}: no part's name holds it. {hint}Names begin with {', '.join(firsts)}: see --plan"
            )
        chosen.update(found)
    if any(part.reads_clips for part in parts if part.name in chosen):
        chosen.add(CLIPS)
    return [part for part in parts if part.name in chosen]


def require_settings(overrides: Sequence[str], batch_size: int) -> None:
    """Raise ValueError for settings that the training parts would refuse."""
    from c4c.config import load

    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        (Path(folder) / "bench.yaml").write_text("{}")
        load("bench.yaml", [*training_settings(folder, batch_size), *overrides], [Path(folder)])


def result_file(path: Path, gpu: str) -> Path:
    """Where the results go: a name that is made here is a free one. Raises ValueError if nothing can be written there."""
    from c4c.files import require_folder, require_writable

    if UNNAMED in path.name:
        made = path.with_name(path.name.replace(UNNAMED, f"{gpu.lower().replace(' ', '-')}-{date.today()}"))
        path, number = made, 1
        while path.exists():
            number += 1
            path = made.with_stem(f"{made.stem}-{number}")
    if path.parent.exists():
        require_writable(f"--json {path}", path, lambda start: b'"machine"' in start)
    else:
        require_folder(f"--json {path}", path.parent)
    return path


def measure(chosen: Sequence[Part], args: argparse.Namespace, has_gpu: bool, report: dict) -> None:
    """Run the parts, and write the report after each."""
    until = time.monotonic() + 60 * args.minutes if args.minutes else None
    for number in range(args.runs):
        for part in chosen if number == 0 else worth_another(chosen, report):
            print(f"{part.name}{f', run {number + 1}' if number else ''} …", file=sys.stderr, flush=True)
            found = run(part, args, has_gpu, until)
            entry = report["parts"].setdefault(part.name, {})
            if "ended" in found:
                entry.setdefault("runs", []).append(found)
            elif number == 0:
                entry |= found
            report["summary"] = summary(report)
            harness.save(args.json, report)


def worth_another(parts: Sequence[Part], report: dict) -> list[Part]:
    """Those whose spread only another run can tell, and whose first run came to something."""
    first = {name: entry["runs"][0] for name, entry in report["parts"].items() if "runs" in entry}
    return [
        part
        for part in parts
        if part.again and (found := first.get(part.name)) and found["ok"] and "left_out" not in found
    ]


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, f"gpu-{UNNAMED}")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="names of parts, or pieces of names")
    parser.add_argument("--plan", action="store_true", help="print the parts with their time limits, and end")
    parser.add_argument("--minutes", type=TIME, help="start no part after so many, and cut the last one short")
    parser.add_argument(
        "--runs", type=POSITIVE, help="of each part whose spread is not measured within it (2; without a GPU 1)"
    )
    parser.add_argument("--clips", type=POSITIVE, default=64, help="how many are made (%(default)s)")
    parser.add_argument("--seconds", type=TIME, help="that a part is measured for (12; without a GPU 1)")
    parser.add_argument("--batch-size", type=POSITIVE, default=128, help="clips (%(default)s)")
    for name in ("call", "words", "limit"):  # in a process of its own
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--on-gpu", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(words)


def show_plan(parts: Sequence[Part], runs: int) -> int:
    """Print the parts with their time limits, and the sum of these."""
    rows, total, without = [], 0.0, 0.0
    for part in parts:
        times = runs if part.again else 1
        total += times * part.limit_s
        without += 0 if part.gpu else part.limit_s
        rows.append([part.name, f"{part.limit_s:.0f}", str(times), "needed" if part.gpu else "", part.about])
    harness.show(["part", "limit s", "runs", "GPU", "what it measures"], rows, width=150)
    print(f"Limits together: {total / 60:.0f} min with a GPU, {without / 60:.0f} min without one (one run each).")
    print(
        "A part normally takes --seconds and the start of its process. First runs come before second ones; --minutes N stops there."
    )
    return 0


def machine(gpu: str | None) -> dict:
    found: dict = {"gpu": gpu or "cpu", "driver": None, "nvdec": None}
    if gpu:
        found |= {"driver": smi.query("driver_version"), "nvdec": smi.has_nvdec()}
    return found | harness.machine() | {"versions": harness.versions(*PACKAGES)}


def run(part: Part, args: argparse.Namespace, has_gpu: bool, until: float | None) -> dict:
    """A part in a process of its own: its findings, how it ended, and how busy it kept the GPU; or why it is left out."""
    if part.gpu and not has_gpu:
        return {"left_out": "it needs a GPU"}
    left = until - time.monotonic() if until else part.limit_s
    if left < min(LEAST_S, part.limit_s):
        return {"left_out": f"--minutes {args.minutes:g} were over"}
    limit = min(part.limit_s, left)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        result = Path(folder) / "found.json"
        words = ["--call", part.run, "--words", json.dumps(dict(part.words)), "--limit", limit, "--json", result]
        words += ["--clips", args.clips, "--seconds", args.seconds, "--batch-size", args.batch_size]
        words += ["--on-gpu"] if has_gpu and part.env != CPU_ONLY else []
        with smi.Busy() as busy:
            ended = process.run(
                [sys.executable, __file__, *words, *args.overrides], limit, harness.environment(**part.env)
            )
        found = json.loads(result.read_text()) if result.exists() else {}
    return found | ended | busy.most()


def measured(args: argparse.Namespace) -> int:
    """Run one part here. Its findings are written as it makes them."""
    faulthandler.enable()  # a crash in a library says where it was called
    limit = float(args.limit)
    faulthandler.dump_traceback_later(max(0.8 * limit, limit - 5))  # and a part that hangs says where
    given = Given(ROOT / "data/bench/gpu", args.clips, args.seconds, args.batch_size, tuple(args.overrides), args.json)
    module, _, function = args.call.partition(":")
    said: list[str] = []
    warnings.showwarning = lambda message, *_: said.append(str(message)[:300])
    try:
        if args.on_gpu:
            require_torch_sees_it()
        getattr(importlib.import_module(module), function)(given, **json.loads(args.words))
    except Missing as reason:
        given.note(left_out=str(reason))
    if said:
        given.note(warnings=said[:MOST_WARNINGS])
    faulthandler.cancel_dump_traceback_later()
    return 0


def require_torch_sees_it() -> None:
    """Raise Missing where the driver has a GPU that torch cannot use: what would be measured is the CPU."""
    import torch

    if not torch.cuda.is_available():
        raise Missing(
            "the driver has a GPU, and torch cannot use it: see python -c 'import torch; torch.zeros(1).cuda()'"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interrupt does, it ends the part under way
    sys.exit(main())
