"""This loader beside what a user would use instead, on the same clips, in one run.

    python bench/loader.py [--clips 64] [--repeats 3] [--only PART ...] [--json OUT] [--png OUT]

From stored clips to normalised tensors of 12 frames of 224 x 224 pixels, all ways taking the same frames (at most 12 of one
a second). Source clips as in bench/packing.py (320x240, H.264 with a keyframe in 250 frames, B-frames), made once in
data/bench with all that is packed or compressed of them. The others run in a torch DataLoader with a worker a core, ours
with a thread a core. Every way does all clips once a round, fast ones several times; processes, graphs and memory for batches
are there before, and files are in the page cache. Rounds are interleaved; rates are medians.

`compressed` are files compressed beforehand as by the official script (3 frames a second, short side 224). `x cpu` is the
ratio in processor time, on which what else runs on the machine weighs less. Frames decoded per used frame: counted by ours,
from the places of the keyframes for the others. PSNR against exact decoding, PIL's bicubic resize and the centre crop, of
the same frames (of compressed files: of the source frame that fits best).

Needs pip install -e '.[bench]', ffmpeg on the path (or imageio-ffmpeg) and, for torchcodec, FFmpeg's shared libraries (Debian:
apt-get install ffmpeg). Rows of what does not load are left out, with the reason.
"""

import os
import sys
import tempfile
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import gcd
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path

import numpy as np
import psutil
import torch

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness, rivals
from bench.harness import ROOT, Stopwatch
from bench.loader_report import COMPRESSED, DALI, PSNR_CLIPS, TURBO, chart, missing, pixels, report, show, targets
from bench.packing import FFMPEG, ffmpeg, make_clips, run_ffmpeg
from pipelines.config import CacheConfig, DataConfig
from pipelines.frame_sampling import choose
from pipelines.loader import Loader
from shards.annotations import Caption, Item
from shards.packing.pack import pack
from shards.split import Split
from shards.video.profiles import Profile

SECONDS = 2.0  # a round of a way lasts about so long at least
BATCH = 32  # the official recipe's on each of four GPUs; fewer where they do not divide the clips
STORED = {
    "intra": Profile(name="intra", short_side=224),
    "intra256": Profile(name="intra", short_side=256),
    "copy": Profile(name="copy"),
    "h264": Profile(name="h264"),
    "hevc": Profile(name="hevc"),
    "av1": Profile(name="av1"),
}
# name: profile, data settings, then what of: raw (uint8 handed over), cache (cold or warm)
OURS = {
    "intra, float32": ("intra", {}, ""),
    "intra, float16": ("intra", {"pixels": "float16"}, ""),
    "intra, uint8": ("intra", {}, "raw"),
    "intra 256, crop 224": ("intra256", {"resize": 256}, ""),
    "intra, filling the cache": ("intra", {}, "cold"),
    "cache, float32": ("intra", {}, "warm"),
    "cache, float16": ("intra", {"pixels": "float16"}, "warm"),
    "cache, uint8": ("intra", {}, "warm raw"),
    "video, originals": ("copy", {}, ""),
    "video, h264 shards": ("h264", {}, ""),
    "video, hevc shards": ("hevc", {}, ""),
    "video, av1 shards": ("av1", {}, ""),
}
# name: the function, the packages it needs, how it finds frames
OTHERS = {
    "OpenCV as the official code": (rivals.official, ("cv2",), "official"),
    "decord as mmaction2": (rivals.decord, ("decord", "cv2"), "seek"),
    "torchcodec": (rivals.torchcodec, ("torchcodec.decoders",), "seek"),
    "PyAV, sequential": (rivals.pyav_sequential, (), "sequential"),
    "PyAV, seek": (rivals.pyav_seek, (), "seek"),
}


PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "av", "torchcodec", "decord", "opencv-python-headless", "simplejpeg",
            "pillow", "numpy")  # fmt: skip


@dataclass
class Way:
    """One row. `run()` does every clip and returns (clips, seconds, seconds of processor, bytes read)."""

    name: str
    group: str  # ours, others or bare
    run: object
    side: int = 224  # short side before the crop
    stored: float = 0.0  # bytes a clip on disk
    decoded: float | None = None  # frames, for each used one
    shown: dict = field(default_factory=dict)  # {clip: (pixels [n, 224, 224, 3], frame numbers)} of the first clips
    rounds: list = field(default_factory=list)


def main() -> int:
    parser = harness.parser(__doc__, "loader", repeats=3, only=True)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=ROOT / "data/bench", help="where clips and shards are kept")
    parser.add_argument("--cache", type=Path, help="folder of the cache of decoded frames (default: a temporary one)")
    parser.add_argument("--png", type=Path, default=harness.RESULTS / "loader.png")
    args = parser.parse_args()
    chosen = partial(harness.is_chosen, args.only)
    clips = make_clips(args.folder / "packing", args.clips, os.cpu_count())
    with tempfile.TemporaryDirectory(dir=args.cache) as cache:
        ways = [*bare(args.folder, clips, chosen), *ours(args.folder, clips, chosen, Path(cache)),
                *others(args.folder, clips, chosen)]  # fmt: skip
        if not ways:
            raise SystemExit(f"--only {' '.join(args.only)}: no way of loading has that in its name")
        watch = Stopwatch()
        rounds = harness.in_turn({way.name: way.run for way in ways}, args.repeats)
        seconds, _ = watch.read()
    for way in ways:
        way.rounds = rounds[way.name]
    rows = report(ways, clips)
    met = targets(rows)
    show(rows, met, len(clips), args.repeats)
    found = {"clips": len(clips), "repeats": args.repeats, "cores": os.cpu_count(), "processor": harness.machine()["cpu"],
             "seconds": seconds, "load": os.getloadavg(), "versions": harness.versions(*PACKAGES), "ways": rows,
             "targets": met}  # fmt: skip
    harness.save(harness.result_path(args.json, "loader.json", args.only), found)
    if png := harness.result_path(args.png, "loader.png", args.only):
        chart(rows, png)
    return 0


# ---- the ways ----


def ours(folder: Path, clips: list[Path], chosen, cache: Path) -> list[Way]:
    found = []
    for name, (profile, settings, how) in OURS.items():
        if not chosen(name):
            continue
        split = packed(folder / f"shards/{profile}-{len(clips)}", clips, STORED[profile])
        config, way = DataConfig(**settings), Way(name, "ours", None, side=settings.get("resize", 224))
        folder_of = partial(_cache_folder, cache, "" if "warm" in how or not how or how == "raw" else name)
        way.run = partial(run_ours, way, split, config, how, folder_of)
        way.stored = sum(p.stat().st_size for p in split.path.glob("*.tar")) / len(clips)
        if "warm" in how:
            way.stored = FRAME_BYTES * rivals.FRAMES
        passed = {"passes": 1}
        way.run(**passed)  # graphs are compiled, caches filled, frames kept for the PSNR
        clips_per_s = len(clips) / max(way.run(**passed)[1], 1e-3)
        way.run = partial(way.run, passes=max(1, round(SECONDS * clips_per_s / len(clips))))
        found.append(way)
    return found


FRAME_BYTES = 224 * 224 * 3


def _cache_folder(root: Path, own: str) -> Path:
    return Path(tempfile.mkdtemp(prefix="cold-", dir=root)) if own else root / "warm"


def run_ours(way: Way, split: Split, config: DataConfig, how: str, folder_of, passes: int):
    if "cold" in how:  # every pass into a new cache
        found = [_pass(way, split, config, how, CacheConfig(dir=str(folder_of())), 1) for _ in range(passes)]
        return tuple(map(sum, zip(*found, strict=True)))
    cache = CacheConfig(dir=str(folder_of())) if "warm" in how else None
    return _pass(way, split, config, how, cache, passes)


def _pass(way: Way, split: Split, config: DataConfig, how: str, cache: CacheConfig | None, passes: int):
    clips = bytes_read = used = decoded = 0
    with Loader(split, config, batch_size=gcd(len(split), BATCH), seed=0, cache=cache, raw="raw" in how) as loader:
        # memory for batches is taken once and used again; the first epoch of a cold cache is what is measured of it
        first = 0 if "cold" in how else 1 if way.name.startswith("video") else config.prefetch + 4
        watch, held = Stopwatch(), deque(maxlen=2)
        for i, batch in enumerate(loader.batches(count=first + passes * loader.steps_per_epoch)):
            if i < first:
                held.append(batch)  # for a while, so that as many are about at once as there will ever be
                watch = Stopwatch()
                continue
            held.clear()
            clips += len(batch.keys)
            bytes_read += batch.stats.bytes_read
            used, decoded = used + batch.stats.frames_used, decoded + batch.stats.frames_decoded
            if len(way.shown) < PSNR_CLIPS:
                _remember(way, batch)
        spent = watch.read()
    way.decoded = decoded / used
    return clips, *spent, bytes_read


def _remember(way: Way, batch) -> None:
    for i, key in enumerate(batch.keys):
        if int(key) < PSNR_CLIPS:
            numbers = batch.frame_numbers[i]
            frames = batch.frames[i][: int((numbers >= 0).sum())]
            way.shown[int(key)] = pixels(frames), numbers[numbers >= 0]


def others(folder: Path, clips: list[Path], chosen) -> list[Way]:
    found = []
    packages = [package for _, needed, _ in OTHERS.values() for package in needed]
    set_forkserver_preload(["torch", "torchvision.transforms.v2", "av", "PIL.Image", *packages])
    for prefix in ("", COMPRESSED):
        files = compressed(folder / "compressed", clips) if prefix else clips
        for name, (load, needed, seeks) in OTHERS.items():
            if not chosen(prefix + name) or (prefix and seeks == "sequential") or not files or missing(name, needed):
                continue
            way = Way(prefix + name, "others", None, side=256 if load is rivals.decord else 224)
            some = Some()
            loader = torch.utils.data.DataLoader(
                rivals.Clips(load, files),
                sampler=some,
                batch_size=2,  # small, so that the workers end at the same time
                num_workers=os.cpu_count(),
                persistent_workers=True,
                multiprocessing_context="forkserver",
            )
            some.indices = [0, 0] * os.cpu_count()
            list(loader)  # workers are started, libraries imported
            some.indices = list(range(len(files)))
            way.run = partial(run_other, way, loader)
            way.stored = sum(f.stat().st_size for f in files) / len(files)
            counts = [rivals.decoded(seeks, f) for f in files]
            way.decoded = sum(n for n, _ in counts) / sum(n for _, n in counts)
            found.append(way)
    return found


class Some(torch.utils.data.Sampler):
    """These indices, which may be others from one pass to the next."""

    indices: list[int]

    def __iter__(self):
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def run_other(way: Way, loader):
    clips, before, watch = 0, spent_by_all(), Stopwatch()
    for frames, numbers in loader:
        for clip, shown in zip(frames, numbers, strict=True):
            if clips < PSNR_CLIPS and clips not in way.shown:
                there = shown >= 0
                way.shown[clips] = pixels(clip[there]), shown[there].numpy()
            clips += 1
    after = spent_by_all()
    return clips, watch.read()[0], after[0] - before[0], after[1] - before[1]


def spent_by_all() -> tuple[float, int]:
    """Seconds of processor time and bytes read, of this process and its children so far."""
    cpu = read = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        times = process.cpu_times()
        cpu += times.user + times.system
        read += process.io_counters().read_chars
    return cpu, read


def bare(folder: Path, clips: list[Path], chosen) -> list[Way]:
    """What decodes the JPEGs of the wanted frames and does nothing else: no shards, no crop, no numbers."""
    if not chosen(TURBO) and not chosen(DALI):
        return []
    split = packed(folder / f"shards/intra-{len(clips)}", clips, STORED["intra"])
    pictures = []
    for video in map(split.video, range(len(split))):
        at = choose(video, "uniform", rivals.FRAMES)
        places = zip(video.frames.offset[at].tolist(), video.frames.size[at].tolist(), strict=True)
        pictures.append([np.frombuffer(split.read(video, offset, size), np.uint8) for offset, size in places])
    found = []
    if chosen(TURBO) and not missing(TURBO, ("simplejpeg",)):
        found.append(Way(TURBO, "bare", partial(run_turbo, pictures)))
    if chosen(DALI):
        found.append(Way(DALI, "bare", partial(run_dali, pictures)))
    for way in found:
        way.run()
    return found


def run_turbo(pictures: list[list[np.ndarray]], passes: int = 16):
    import simplejpeg

    here = threading.local()  # each thread writes over its own memory

    def decode(clip: list[np.ndarray]) -> None:
        if not hasattr(here, "room"):
            here.room = np.empty(640 * 480 * 3, np.uint8)
        for picture in clip:
            simplejpeg.decode_jpeg(picture, "RGB", buffer=here.room)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        watch = Stopwatch()
        list(pool.map(decode, pictures * passes))
        return len(pictures) * passes, *watch.read(), 0


def run_dali(pictures: list[list[np.ndarray]], passes: int = 16):
    from nvidia.dali import fn, pipeline_def, types

    size = gcd(len(pictures), BATCH)  # as ours

    @pipeline_def(batch_size=size * rivals.FRAMES, num_threads=os.cpu_count(), device_id=None, prefetch_queue_depth=1)
    def graph():
        source = fn.external_source(name="source", no_copy=True, dtype=types.UINT8, ndim=1)
        return fn.decoders.image(source, device="cpu", output_type=types.RGB)

    pipeline = graph()
    pipeline.build()
    batches = [list(chain.from_iterable(pictures[i : i + size])) for i in range(0, len(pictures), size)]
    pipeline.feed_input("source", batches[0])
    pipeline.run()
    watch = Stopwatch()
    for batch in batches * passes:
        pipeline.feed_input("source", batch)
        pipeline.run()
    return len(pictures) * passes, *watch.read(), 0


# ---- what they read ----


def packed(folder: Path, clips: list[Path], profile: Profile) -> Split:
    if not (folder / "dataset.json").exists():
        print(f"packing {folder.name}", file=sys.stderr)
        items = [Item(clip.stem, clip, (Caption(f"clip {clip.stem}"),)) for clip in clips]
        pack(items, folder, dataset="bench", split="train", profile=profile, workers=os.cpu_count())
    for tar in folder.glob("*.tar"):
        tar.read_bytes()  # into the page cache
    return Split(folder)


def compressed(folder: Path, clips: list[Path]) -> list[Path]:
    """The clips as the official script compresses them."""
    program = ffmpeg()
    if program is None:
        print("no ffmpeg on the path and no imageio-ffmpeg: compressed files are left out", file=sys.stderr)
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / clip.name for clip in clips]
    todo = [(clip, file) for clip, file in zip(clips, files, strict=True) if not file.exists()]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        list(pool.map(partial(compress, program), *zip(*todo, strict=True))) if todo else None
    for file in files:
        file.read_bytes()
    return files


def compress(program: str, clip: Path, file: Path) -> None:
    temporary = file.with_name(f"part-{file.name}")
    run_ffmpeg(program, FFMPEG["ffmpeg, official"], clip, temporary)
    temporary.rename(file)


if __name__ == "__main__":
    sys.exit(main())
