"""What packing costs and keeps: every profile beside bare decoding and ffmpeg's command line, on the same files.

    python bench/packing.py [--clips 64] [--workers 2] [--repeats 3] [--profiles intra copy ...]

Generates H.264 clips once (data/bench/packing: 320x240, 25 to 30 fps, 10 to 30 s, x264's default GOP of 250 with
B-frames; moving textures with noise and cuts). WORKERS processes work side by side; each takes a clip and does it every
way in turn, with one thread, so that what else runs on the machine falls on all alike. Ratios are of processor time,
which counts ffmpeg's own processes. PSNR is of the stored frames against an exact decode resized by PIL (bicubic), for
ffmpeg's files against the source frame that fits best. Prints a table and writes bench/results/packing.json.
Needs ffmpeg on the path, or the package imageio-ffmpeg (pip install -e '.[bench]').
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness
from bench.harness import ROOT
from shards.video.geometry import scaled_size
from shards.video.profiles import PROFILES, Profile, store
from shards.video.random_access import pick_frames

WIDTH, HEIGHT, SHORT_SIDE, RATE = 320, 240, 224, 3
SIZE = scaled_size(WIDTH, HEIGHT, SHORT_SIDE)
PSNR_CLIPS = 2
FFMPEG = {
    # the same frames a second, size and quantiser as --profile intra
    "ffmpeg, MJPEG q3": "-vf scale={w}:{h}:flags=bicubic -r 3 -c:v mjpeg -q:v 3 -pix_fmt yuvj420p",
    "ffmpeg, fps first": "-vf fps=3,scale={w}:{h}:flags=bicubic -c:v mjpeg -q:v 3 -pix_fmt yuvj420p",
    # CLIP4Clip preprocess/compress_video.py
    "ffmpeg, official": "-vf scale={w}:{h} -r 3",
}
BASE, BARE = "ffmpeg, MJPEG q3", "bare decoding"


def main() -> int:
    parser = harness.parser(__doc__, "packing", repeats=3)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES))
    parser.add_argument("--folder", type=Path, default=ROOT / "data/bench/packing", help="where the clips are kept")
    args = parser.parse_args()
    clips = make_clips(args.folder, args.clips, args.workers)
    seconds = sum(map(duration, clips))
    program = ffmpeg()
    ways: dict[str, Callable] = {BARE: decode_all}
    ways |= {name: partial(run_ffmpeg, program, words) for name, words in FFMPEG.items() if program}
    ways |= {name: partial(pack_one, name) for name in args.profiles}
    if not program:
        print("no ffmpeg on the path and no imageio-ffmpeg: its rows are left out", file=sys.stderr)
    rows = measure(ways, clips, args.workers, args.repeats)
    for name, row in rows.items():
        row["videos_per_s"] = len(clips) / row["clock_s"] * args.workers
        row["video_seconds_per_s"] = seconds / row["clock_s"] * args.workers
        row["times_ffmpeg"] = rows[BASE]["cpu_s"] / row["cpu_s"] if BASE in rows else None
        row["times_decoding"] = rows[BARE]["cpu_s"] / row["cpu_s"]
        row["psnr_db"], row["psnr_luma_db"] = quality(name, ways[name], clips[:PSNR_CLIPS])
    show(rows, len(clips), seconds, args.workers)
    versions = harness.versions("av") | {"ffmpeg": version(program)}
    report = {"clips": len(clips), "video_seconds": seconds, "workers": args.workers, "repeats": args.repeats,
              "cores": os.cpu_count(), "load_before": os.getloadavg()[0], "versions": versions, "ways": rows}  # fmt: skip
    harness.save(args.json, report)
    return 0


# ---- the source clips ----


def make_clips(folder: Path, count: int, workers: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    clips = [folder / f"{i:03d}.mp4" for i in range(count)]
    missing = [clip for clip in clips if not clip.exists()]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(make_clip, missing))
    return clips


def make_clip(path: Path) -> None:
    """Scenes of 2 to 6 s: bands of a texture of several scales, each drifting its own way under noise.

    The amounts make it about 46 kB of H.264 a second and 16 kB a stored JPEG: how much decoding and how much encoding
    there is decides every ratio.
    """
    seed = int(path.stem)
    draw = np.random.default_rng(seed)
    fps = (Fraction(25), Fraction(30000, 1001), Fraction(30))[seed % 3]
    frames, made = int(draw.uniform(10, 30) * fps), 0
    temporary = path.with_suffix(".tmp")
    with av.open(str(temporary), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=fps, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        while made < frames:
            sheet, grain, drift = (
                texture(draw),
                draw.normal(0, 3.5, (16, HEIGHT, WIDTH, 1)),
                draw.uniform(-3, 3, (4, 2)),
            )
            for i in range(min(int(draw.uniform(2, 6) * fps), frames - made)):
                picture = np.concatenate([band(sheet, k, i * way) for k, way in enumerate(drift)])
                picture = (picture + grain[draw.integers(16)]).clip(0, 255).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base, made = made, 1 / fps, made + 1
                file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    temporary.rename(path)


def texture(draw: np.random.Generator) -> np.ndarray:
    """Float levels [512, 640, 3]."""
    sheet = np.zeros((512, 640, 3))
    for scale in (2, 4, 8, 16, 32):
        noise = draw.normal(size=(512 // scale, 640 // scale, 3)) * scale**0.7
        sheet += noise.repeat(scale, 0).repeat(scale, 1)
    return 128 + sheet / sheet.std() * 36


def band(sheet: np.ndarray, k: int, moved: np.ndarray) -> np.ndarray:
    """The k-th of four horizontal bands of a picture, moved down and right by so many pixels."""
    height = HEIGHT // 4
    y, x = (100 + k * height + int(moved[0])) % (512 - height), (100 + int(moved[1])) % (640 - WIDTH)
    return sheet[y : y + height, x : x + WIDTH]


def duration(path: Path) -> float:
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        return float(stream.duration * stream.time_base)


# ---- the ways: each takes a clip and a file to write, and is timed ----


def decode_all(clip: Path, out: Path) -> None:
    with av.open(str(clip)) as file:
        file.streams.video[0].codec_context.thread_count = 1
        for _ in file.decode(video=0):
            pass


def run_ffmpeg(program: str, words: str, clip: Path, out: Path) -> None:
    settings = words.format(w=SIZE[0], h=SIZE[1]).split()
    command = [program, "-nostdin", "-v", "error", "-y", "-threads", "1", "-i", str(clip), "-map", "0:v",
               "-filter_threads", "1", "-threads", "1", *settings, str(out)]  # fmt: skip
    subprocess.run(command, check=True)


def pack_one(profile: str, clip: Path, out: Path) -> None:
    with open(clip, "rb") as source, open(out, "wb") as target:
        stored = store(source, clip.name, Profile(name=profile, fps=RATE, short_side=SHORT_SIDE))
        shutil.copyfileobj(stored.file, target)


def ffmpeg() -> str | None:
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg
    except ImportError:
        return None
    return imageio_ffmpeg.get_ffmpeg_exe()


def version(program: str | None) -> str | None:
    if program is None:
        return None
    return subprocess.run([program, "-version"], capture_output=True, text=True).stdout.split(" ")[2]


def measure(ways: dict[str, Callable], clips: list[Path], workers: int, repeats: int) -> dict[str, dict]:
    """{way: seconds on the clock and of processor time, one process's for all clips, and bytes a clip}."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(partial(measure_clip, ways), clips[:workers]))  # warm
        found = list(pool.map(partial(measure_clip, ways), clips * repeats))
    rows = {}
    for name in ways:
        clock, cpu, size = (sum(clip[name][i] for clip in found) / repeats for i in range(3))
        rows[name] = {"clock_s": clock, "cpu_s": cpu, "bytes_per_clip": size / len(clips)}
    return rows


def measure_clip(ways: dict[str, Callable], clip: Path) -> dict[str, tuple[float, float, int]]:
    """{way: (clock, processor time of this process and its children, bytes written)}"""
    with tempfile.TemporaryDirectory() as folder:
        turns = {name: partial(measure_way, way, clip, Path(folder) / "out.mp4") for name, way in ways.items()}
        return {name: once for name, (once,) in harness.in_turn(turns).items()}


def measure_way(way: Callable, clip: Path, out: Path) -> tuple[float, float, int]:
    watch = harness.Stopwatch(children=True)
    way(clip, out)
    clock, cpu = watch.read()
    return clock, cpu, out.stat().st_size if way is not decode_all else 0


# ---- quality ----


def quality(name: str, way: Callable, clips: list[Path]) -> tuple[float | None, float | None]:
    """Mean PSNR, dB, of the frames kept and of their luma; (None, None) where nothing is stored."""
    if way is decode_all or name == "copy":
        return None, None
    found = []
    for clip in clips:
        exact, fps = exact_frames(clip)
        if name.startswith("ffmpeg"):
            with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
                way(clip, Path(file.name))
                found += [best(p, exact, i, fps) for i, p in enumerate(decoded(file.name))]
        else:
            found += [psnr(picture, exact[number]) for number, picture in stored_frames(name, clip)]
    colour, luma = zip(*found, strict=True)
    return statistics.mean(colour), statistics.mean(luma)


def exact_frames(clip: Path) -> tuple[list[np.ndarray], Fraction]:
    with av.open(str(clip)) as file:
        fps = file.streams.video[0].average_rate
        pictures = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    return [np.asarray(picture.resize(SIZE, Image.Resampling.BICUBIC)) for picture in pictures], fps


def decoded(path: str) -> list[np.ndarray]:
    with av.open(path) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def stored_frames(profile: str, clip: Path) -> list[tuple[int, np.ndarray]]:
    with open(clip, "rb") as source:
        stored = store(source, clip.name, Profile(name=profile, fps=RATE, short_side=SHORT_SIDE))
        data, frames = stored.file.read(), stored.frames
    read = lambda offset, size: data[offset : offset + size]  # noqa: E731
    pictures = pick_frames(stored, read, range(len(frames)))
    return [(int(number), pictures[i]) for i, number in enumerate(frames.number)]


def best(picture: np.ndarray, exact: list[np.ndarray], i: int, fps: Fraction) -> tuple[float, float]:
    """The PSNR against the frame that fits best of those around where the i-th of 3 a second belongs."""
    middle = min(round(i * fps / RATE), len(exact) - 1)
    return max(psnr(picture, frame) for frame in exact[max(0, middle - 15) : middle + 16])


def psnr(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    grey = np.array([0.299, 0.587, 0.114])
    difference = a.astype(np.float64) - b
    errors = np.mean(difference**2), np.mean((difference @ grey) ** 2)
    colour, luma = (float(10 * np.log10(255**2 / max(error, 1e-9))) for error in errors)
    return colour, luma


def show(rows: dict[str, dict], clips: int, seconds: float, workers: int) -> None:
    heads = ("way", "videos/s", "video s/s", "x ffmpeg", "x decoding", "kB a clip", "PSNR dB", "luma")
    figures = (("videos_per_s", 1, 1), ("video_seconds_per_s", 1, 0), ("times_ffmpeg", 1, 2), ("times_decoding", 1, 2),
               ("bytes_per_clip", 1e3, 0), ("psnr_db", 1, 1), ("psnr_luma_db", 1, 1))  # fmt: skip
    told = [
        [name, *(harness.number(row[key] or None, f".{digits}f", unit) for key, unit, digits in figures)]
        for name, row in rows.items()
    ]
    harness.show(heads, told, f"{clips} clips, {seconds:.0f} s of video, {workers} processes", width=110)


if __name__ == "__main__":
    sys.exit(main())
