"""What a GPU does with c4c: raw decoders, each lane alone, the step alone, and training from each lane.

    python bench/gpu.py [--clips 64] [--seconds 12] [--only PART ...] [--json OUT] [key=value ...]

Clips as in bench/packing.py (320x240, H.264, 10 to 30 s, a keyframe in 250 frames), made once in data/bench; each is packed
under four names, so that batches of 128 different videos come of 64 clips. Parts run one after another in processes of their
own: one that fails is reported with its error and costs only itself, and OUT is written after each.

`raw`       DALI's image and video decoders alone, on stored JPEGs of short sides 224 and 256 and of 240, and on H.264
`lanes`     the loader alone (python -m pipelines.bench): clips a second, frames decoded per used one, share of the host's cores
`equal`     the same frames by the GPU's lanes and by the CPU's: PSNR
`step …`    c4c/training/trainer.py on one batch that is there already: eager, compiled, with plain attention
`train …`   the same on batches from a lane or from the warm cache: share of the eager step's rate, data wait
`losses`    the first steps in 16 bits on the GPU beside fp32 on the CPU

During each part nvidia-smi is asked how busy the GPU and its decoders are. Key=value words are settings of the training
parts. Without a GPU all but its own decoders runs on the CPU, which shows that the script works and nothing else: use a
small model (--batch-size 8 model.backbone=ViT-demo-16 data.image_size=64 data.max_words=24 engine.precision=fp32).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness
from bench.harness import ROOT
from bench.packing import make_clips
from bench.smi import Busy, asked, has_nvdec
from pipelines import bench as loading
from pipelines.config import CacheConfig, DataConfig
from pipelines.frame_sampling import choose
from pipelines.lanes import Lane
from pipelines.requests import ClipRequest
from pipelines.stages.augment import view
from pipelines.stages.fetch import Reader
from pipelines.stages.graph import Graph, Plan
from shards.annotations import Caption, Item
from shards.packing.pack import pack
from shards.split import Split
from shards.video.profiles import Profile

FRAMES, WORDS, PAIRS = 12, 77, 900_000  # a clip, a caption; five epochs of MSR-VTT 9k
NAMES, WARM = 4, 4  # names of each clip; steps that are not counted
PROFILES = {
    "intra": Profile(),
    "intra240": Profile(short_side=240),
    "intra256": Profile(short_side=256),
    "h264": Profile(name="h264"),
    "copy": Profile(name="copy"),
}
LANES = {"intra": "intra", "cache": "intra", "video, h264 shards": "h264", "video, originals": "copy"}
TRAINING = {
    "step": [],
    "step compiled": ["engine.compile=true"],
    "step plain attention": [],
    "train intra": [],
    "train cache": [],
    "train video h264": [],
}
PARTS = ("raw", "lanes", "equal", *TRAINING, "losses")
LOSS_STEPS, LOSS_BATCH = 4, 8


def main() -> int:
    parser = harness.parser(__doc__, "gpu-NAME-DATE", parts=PARTS)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=12.0, help="that a part is measured for (%(default)g)")
    parser.add_argument("--batch-size", type=int, default=128, help="clips (%(default)s)")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    args.folder = ROOT / "data/bench/gpu"
    if args.part:
        args.json.write_text(json.dumps(measured(args)))
        return 0
    store(args.folder, args.clips)
    report = {"machine": machine(), "settings": args.overrides, "seconds": args.seconds, "parts": {}}
    name = report["machine"]["gpu"].lower().replace(" ", "-")
    args.json = args.json.with_name(args.json.name.replace("NAME-DATE", f"{name}-{date.today()}"))
    for part in args.only:
        print(f"{part} …", file=sys.stderr, flush=True)
        report["parts"][part] = run(part, args)
        harness.save(args.json, report)
    show(report)
    print(f"-> {args.json}")
    return int(any("error" in found for found in report["parts"].values()))


def store(folder: Path, count: int) -> None:
    clips = make_clips(ROOT / "data/bench/packing", count, os.cpu_count())
    for name, profile in PROFILES.items():
        out = folder / f"{name}-{count}"
        if not (out / "dataset.json").exists():
            items = [
                Item(f"{clip.stem}-{copy}", clip, (Caption(f"clip {clip.stem}"), Caption(f"name {copy}")))
                for copy in range(NAMES if name in ("intra", "h264") else 1)
                for clip in clips
            ]
            pack(items, out, dataset="bench", split="train", profile=profile, workers=os.cpu_count())


def machine() -> dict:
    told = {"gpu": "cpu", "driver": None, "nvdec": None}
    if torch.cuda.is_available():
        told = {"gpu": torch.cuda.get_device_name(), "driver": asked("driver_version"), "nvdec": has_nvdec()}
    names = ("torch", "nvidia-dali-cuda130", "deepspeed", "open_clip_torch", "numpy")
    return told | {"cores": os.cpu_count(), "versions": harness.versions(*names)}


def run(part: str, args: argparse.Namespace) -> dict:
    """A part, in a process of its own, and how busy it kept the GPU."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        found = Path(folder) / "found.json"
        words = ["--part", part, "--clips", args.clips, "--seconds", args.seconds, "--batch-size", args.batch_size]
        command = [sys.executable, __file__, *words, "--json", found, *args.overrides]
        if part == "losses":
            return run_losses(command, found)
        return started(command, found)


def started(command: list, found: Path, **env: str) -> dict:
    with Busy() as busy:
        process = subprocess.run([*map(str, command)], env=harness.environment(**env), capture_output=True, text=True)
    if process.returncode or not found.exists():
        lines = (process.stderr or process.stdout).strip().splitlines() or [f"exit code {process.returncode}"]
        return {"error": lines[-1][:500]}
    return json.loads(found.read_text()) | busy.most()


def run_losses(command: list, found: Path) -> dict:
    here = started([*command, "engine.precision=bf16"], found)
    exact = started([*command, "engine.precision=fp32"], found, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    if failed := [found for found in (here, exact) if "error" in found]:
        return failed[0]
    pairs = zip(here["losses"], exact["losses"], strict=True)
    return {"losses": here["losses"], "fp32_on_cpu": exact["losses"], "differ_by_pct": [100 * abs(a / b - 1) for a, b in pairs]}  # fmt: skip


def measured(args: argparse.Namespace) -> dict:
    if args.part in (alone := {"raw": raw, "lanes": lanes, "equal": equal}):
        return alone[args.part](args, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    return training(args)


def split_of(args: argparse.Namespace, name: str) -> Split:
    return Split(args.folder / f"{name}-{args.clips}")


def clips_of(split: Split, count: int) -> list[ClipRequest]:
    videos = [split.video(i) for i in range(min(count, len(split)))]
    return [ClipRequest(video, choose(video, "uniform", FRAMES)) for video in videos]


def raw(args: argparse.Namespace, device: torch.device) -> dict:
    """Frames a second of the decoders, with two graphs under way as in the loader."""
    found = {}
    for name in ("intra", "intra240", "intra256"):
        split = split_of(args, name)
        requests = clips_of(split, args.batch_size)
        pieces = [piece for r in requests for piece in Reader(split).jpegs(r.video, r.positions).pieces]
        first = requests[0].video
        config = DataConfig(resize=min(first.width, first.height))
        graphs = [Graph(Plan("jpegs", False), 224, len(pieces), device, os.cpu_count()) for _ in range(2)]
        views = [view((r.video.width, r.video.height), config) for r in requests for _ in r.positions]
        found[f"JPEG, short side {config.short_side}"] = rate(graphs, (pieces, views), len(pieces), args.seconds / 3)
    if device.type == "cuda":
        for name in ("h264", "copy"):
            split, config = split_of(args, name), DataConfig()
            requests = clips_of(split, args.batch_size)
            files = [Reader(split).file(r.video, r.positions).pieces[0] for r in requests]
            positions = [r.positions for r in requests]
            graphs = [Graph(Plan("files", True), 224, len(files), device, os.cpu_count()) for _ in range(2)]
            views = [view((r.video.width, r.video.height), config) for r in requests]
            frames = sum(map(len, positions))
            found[f"NVDEC, {name}"] = rate(graphs, (files, views, None, positions), frames, args.seconds / 3)
    return {"frames_per_s": found}


def rate(graphs: list[Graph], fed: tuple, frames: int, seconds: float) -> float:
    """Frames a second, the graphs taking turns."""
    for graph in graphs * 2:
        graph.start(*fed), graph.result()
    began, done = time.perf_counter(), 0
    for graph in graphs:
        graph.start(*fed)
    while time.perf_counter() - began < seconds:
        for graph in graphs:
            graph.result(), graph.start(*fed)
            done += frames
    for graph in graphs:
        graph.result()
        done += frames
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return done / (time.perf_counter() - began)


def lanes(args: argparse.Namespace, device: torch.device) -> dict:
    found = {}
    config = DataConfig(num_frames=FRAMES, max_words=WORDS, pixels="float16")
    for name, stored in LANES.items():
        split = split_of(args, stored)
        with tempfile.TemporaryDirectory(prefix="gpu-cache-") as folder:
            cache = CacheConfig(dir=folder if name == "cache" else "", max_gb=16)
            settings = {"device": str(device), "batch_size": min(args.batch_size, len(split)), "cache": cache}
            told = loading.measure(split, config, batches=2, **settings)
            batches = max(4, round(args.seconds / 4 / (told["seconds"] / told["batches"])))
            began, used = time.perf_counter(), time.process_time()
            told = loading.measure(split, config, batches=batches, **settings)
            used = (time.process_time() - used) / (time.perf_counter() - began)
        keys = ("clips_per_s", "frames_decoded_per_frame_used", "bytes_read_per_clip", "stage_seconds")
        found[name] = {key: told[key] for key in keys}
        found[name]["host_cpu_pct"] = 100 * used / os.cpu_count()
    return {"lanes": found}


def equal(args: argparse.Namespace, device: torch.device) -> dict:
    """PSNR of the device's lanes against the CPU's, on the same frames, and on frames that are one stored frame apart."""
    found = {}
    for name in ("intra", "h264", "copy"):
        split, config = split_of(args, name), DataConfig(num_frames=FRAMES)
        requests = clips_of(split, 8)
        later = [replace(r, positions=np.minimum(r.positions + 1, len(r.video.frames) - 1)) for r in requests]
        here, exact, other = (
            shown(split, config, where, wanted)
            for where, wanted in ((device, requests), (torch.device("cpu"), requests), (torch.device("cpu"), later))
        )
        found[name] = {"psnr_db": psnr(here, exact), "psnr_of_the_next_frame_db": psnr(here, other)}
    return {"lanes": found}


def shown(split: Split, config: DataConfig, device: torch.device, requests: list[ClipRequest]) -> torch.Tensor:
    lane = Lane(split, config, device, len(requests), raw=True)
    frames = lane.batch(requests).frames
    frames = frames.cpu().clone()
    lane.close()
    return frames


def psnr(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """In dB; None: they are equal."""
    error = (a.float() - b.float()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else None


class Finished(Exception):
    """Enough steps; nothing has to be saved."""


class Steps:
    """Seconds of each counted step of a training, how much of them was waiting for data, and the losses of all steps."""

    def __init__(self, part: str, wanted_s: float, warm: int, wait: Callable[[], None]):
        self._part, self._wanted_s, self._warm, self._wait = part, wanted_s, warm, wait
        self.seconds: list[float] = []
        self.waits: list[float] = []
        self.losses: list[float] = []

    def timed(self, batches: Iterator) -> Iterator:
        """The batches, until there are enough steps; the first ones are not counted."""
        began, steps = time.perf_counter(), 0
        while len(self.seconds) < 6 or time.perf_counter() - began < self._wanted_s:
            mark = time.perf_counter()
            batch = next(batches)
            yield batch
            self._wait()
            steps += 1
            if steps > self._warm:
                self.seconds.append(time.perf_counter() - mark)
                self.waits.append(batch.wait_s)
            elif steps == self._warm:
                began = time.perf_counter()
            if self._part == "losses" and len(self.losses) == LOSS_STEPS:
                break
        raise Finished

    def noting(self, step: Callable) -> Callable:
        """A step of the session that notes its loss."""

        def noted(*given):
            outcome = step(*given)
            self.losses.append(outcome.loss)
            return outcome

        return noted


def training(args: argparse.Namespace) -> dict:
    """Steps of c4c/training/trainer.py, on one batch again and again or on the loader's."""
    from c4c.models.flops import peak, per_pair
    from c4c.training.trainer import Trainer
    from c4c.zero.distributed import start_distributed, stop_distributed

    part = args.part
    rank, world, device = start_distributed()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with tempfile.TemporaryDirectory(prefix="gpu-run-") as folder:
        config = config_of(args, Path(folder))
        trainer = Trainer(config, rank, world, device)
        session, batches = trainer.session, trainer.session.batches
        warm = max(WARM, trainer.per_epoch) if part == "train cache" else WARM
        steps = Steps(part, args.seconds, warm, wait)
        session.batches = lambda count: steps.timed(again(batches) if part.startswith("step") else batches(count))
        session.step = steps.noting(session.step)
        with attention(part), suppress(Finished):
            trainer.run()
        flops = 3 * per_pair(session.model.spec, config.data.num_frames, config.data.max_words)
        most = peak(device, config.engine.precision)
    stop_distributed()
    if part == "losses":
        return {"losses": steps.losses}
    clips = config.train.batch_size * len(steps.seconds) / sum(steps.seconds)
    return {
        "clips_per_s": clips,
        "step_s": statistics.median(steps.seconds),
        "steps": len(steps.seconds),
        "mfu_pct": 100 * flops * clips / most if most else None,
        "data_wait_pct": 100 * sum(steps.waits) / sum(steps.seconds),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "minutes_for_900000_clips": PAIRS / clips / 60,
    }


def config_of(args: argparse.Namespace, folder: Path):
    from c4c.config import load

    (folder / "bench.yaml").write_text("{}")
    part, stored = args.part, "h264" if args.part.endswith("h264") else "intra"
    words = [f"data.{kind}={args.folder / f'{stored}-{args.clips}'}" for kind in ("train", "test")]
    words += ["model.init_from=scratch", f"data.num_frames={FRAMES}", f"data.max_words={WORDS}", "train.epochs=10000"]
    words += [f"run.dir={folder}/run", "checkpoint.every_steps=0", "checkpoint.every_minutes=0"]
    words += [f"train.batch_size={LOSS_BATCH if part == 'losses' else args.batch_size}"]
    words += [f"cache.dir={folder}/cache"] if part == "train cache" else []
    return load("bench.yaml", [*words, *TRAINING.get(part, []), *args.overrides], [folder])


def again(batches: Callable) -> Iterator:
    (batch,) = batches(1)
    while True:
        yield replace(batch, wait_s=0.0)


def attention(part: str):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.MATH]) if part == "step plain attention" else nullcontext()


def show(report: dict) -> None:
    from rich.markup import escape

    rows = []
    alone = report["parts"].get("step", {}).get("clips_per_s")
    for part, found in report["parts"].items():
        if "error" in found:
            rows.append([part, f"[red]{escape(found['error'][:80])}[/]"])
        elif part == "raw":
            rows += [[name, "", cell(frames)] for name, frames in found["frames_per_s"].items()]
        elif part in ("lanes", "equal"):
            for name, row in found["lanes"].items():
                clips = row.get("clips_per_s")
                told = [cell(clips), cell(clips and clips * FRAMES), "", "", ""]
                told += [cell(row.get("frames_decoded_per_frame_used"), ".2f"), cell(row.get("host_cpu_pct"))]
                same = "equal" if row.get("psnr_db", 0) is None else cell(row.get("psnr_db"), ".1f")
                rows.append([f"{part}, {name}", *told, same])
        elif part == "losses":
            rows.append([f"losses differ by at most {max(found['differ_by_pct']):.2g} %"])
        else:
            clips, share = found["clips_per_s"], found["clips_per_s"] / alone if alone else None
            told = [cell(clips), cell(clips * FRAMES), cell(found["mfu_pct"], ".1f"), cell(share, ".3f")]
            rows.append([part, *told, cell(found["data_wait_pct"], ".2f")])
    heads = ("part", "clips/s", "frames/s", "MFU %", "of the step", "data wait %", "decoded", "host CPU %", "PSNR dB")
    harness.show(heads, rows, width=140)


def cell(value: float | None, form: str = ".0f") -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
