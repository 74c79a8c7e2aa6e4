"""What bench/loader.py reports: quality, ratios, what was to be reached, a table and a chart."""

import importlib
import os
import statistics
import sys
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from bench import harness, rivals
from bench.packing import psnr
from shards.video.geometry import scaled_size

PSNR_CLIPS = 4
COMPRESSED = "compressed, "
OFFICIAL, MAIN = "OpenCV as the official code", "intra, float32"
TURBO, DALI = "bare libjpeg-turbo", "bare DALI image decoder"


def missing(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a package does not load; says so."""
    for package in packages:
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
            return True
    return False


# ---- quality ----


def pixels(frames: torch.Tensor) -> np.ndarray:
    """uint8 [n, H, W, 3] of frames as they come: so already, or normalised [n, 3, H, W]."""
    if frames.dtype == torch.uint8:
        return frames.numpy().copy()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (rivals.MEAN, rivals.STD))
    return ((frames.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def quality(ways: list, clips: list[Path]) -> dict[str, tuple[float, float]]:
    """{way: mean PSNR of the frames, and of their luma, dB}"""
    found: dict[str, list] = {way.name: [] for way in ways}
    for number, clip in enumerate(clips[:PSNR_CLIPS]):
        with av.open(str(clip)) as file:
            fps = file.streams.video[0].average_rate
            source = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
        exact = {side: Exact(source, side) for side in (224, 256)}
        for way in ways:
            for picture, at in zip(*way.shown.get(number, ((), ())), strict=True):
                near = [int(at)]
                if way.name.startswith(COMPRESSED):
                    middle = min(round(int(at) * fps / 3), len(source) - 1)
                    near = range(max(0, middle - 15), min(len(source), middle + 16))
                found[way.name].append(max(psnr(picture, exact[way.side][i]) for i in near))
    return {name: tuple(map(statistics.mean, zip(*values, strict=True))) for name, values in found.items() if values}


class Exact:
    """Frames of a clip scaled by PIL and cut to the square, each made when it is asked for."""

    def __init__(self, pictures: list[Image.Image], side: int):
        self._pictures, self._side, self._made = pictures, side, {}

    def __getitem__(self, i: int) -> np.ndarray:
        if i not in self._made:
            picture = self._pictures[i]
            scaled = picture.resize(scaled_size(*picture.size, self._side), Image.Resampling.BICUBIC)
            left, top = (round((n - 224) / 2) for n in scaled.size)
            self._made[i] = np.asarray(scaled.crop((left, top, left + 224, top + 224)))
        return self._made[i]


# ---- the result ----


def report(ways: list, clips: list[Path]) -> dict[str, dict]:
    dB, rows = quality(ways, clips), {}
    for way in ways:
        rates = [n / seconds for n, seconds, _, _ in way.rounds]
        rows[way.name] = {
            "group": way.group,
            "clips_per_s": statistics.median(rates),
            "clips_per_s_rounds": rates,
            "clips_per_cpu_s": statistics.median(n / cpu for n, _, cpu, _ in way.rounds),
            "frames_decoded_per_frame_used": way.decoded,
            "bytes_read_per_clip": statistics.median(read / n for n, _, _, read in way.rounds) if way.decoded is not None else None,
            "bytes_stored_per_clip": way.stored or None,
            "psnr_db": dB.get(way.name, (None, None))[0],
            "psnr_luma_db": dB.get(way.name, (None, None))[1],
        }  # fmt: skip
    for key, short in (("clips_per_s", ""), ("clips_per_cpu_s", "_cpu")):
        for name, base in ((OFFICIAL, f"times_official{short}"), (MAIN, f"ours_over_it{short}")):
            for row in rows.values():
                if name in rows:
                    ratio = row[key] / rows[name][key]
                    row[base] = ratio if name == OFFICIAL else 1 / ratio
    return rows


def targets(rows: dict[str, dict]) -> list[dict]:
    """What the loader is meant to reach, and what it did; only what was measured in this run."""
    originals = [name for name, row in rows.items() if row["group"] == "others" and name != OFFICIAL]
    small = [name for name in originals if name.startswith(COMPRESSED)]
    originals = [name for name in originals if name not in small]
    wanted = [("intra float32, x official", MAIN, [OFFICIAL], 120),
              ("intra float16, x official", "intra, float16", [OFFICIAL], 120),
              ("intra float32, x the fastest other on the originals", MAIN, originals, 28),
              ("intra float32, x the fastest on compressed files", MAIN, small, 11),
              ("intra uint8, x official", "intra, uint8", [OFFICIAL], 190),
              ("warm cache float32, x official", "cache, float32", [OFFICIAL], 650),
              ("warm cache float16, x official", "cache, float16", [OFFICIAL], 650),
              ("video on the originals, x torchcodec", "video, originals", ["torchcodec"], 1.4),
              ("intra float32, share of bare libjpeg-turbo", MAIN, [TURBO], 0.8),
              ("intra uint8, share of bare libjpeg-turbo", "intra, uint8", [TURBO], 0.8)]  # fmt: skip
    found = []
    for name, way, beside, least in wanted:
        there = [b for b in beside if b in rows]
        if way in rows and there:
            clock, cpu = (rows[way][k] / max(rows[b][k] for b in there) for k in ("clips_per_s", "clips_per_cpu_s"))
            found.append({"what": name, "wanted": least, "reached": clock, "in_processor_time": cpu})
    for name, way, exactly in (("intra", MAIN, 1.0), ("a warm cache", "cache, float32", 0.0)):
        if way in rows:
            reached = rows[way]["frames_decoded_per_frame_used"]
            found.append({"what": f"frames decoded per used frame, {name}", "wanted": exactly, "reached": reached})
    return found


def show(rows: dict[str, dict], met: list[dict], clips: int, repeats: int) -> None:
    heads = ("way", "clips/s", "x official", "ours / it", "x cpu", "decoded", "kB read", "kB stored", "PSNR dB", "luma")
    figures = (("clips_per_s", 1, 1), ("times_official", 1, 1), ("ours_over_it", 1, 2), ("times_official_cpu", 1, 1),
               ("frames_decoded_per_frame_used", 1, 1), ("bytes_read_per_clip", 1e3, 0), ("bytes_stored_per_clip", 1e3, 0),
               ("psnr_db", 1, 1), ("psnr_luma_db", 1, 1))  # fmt: skip
    told = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["clips_per_s"]):
        cells = [harness.number(row.get(key), f".{digits}f", unit) for key, unit, digits in figures]
        cells[-2:] = ["exact" if c != "-" and float(c) > 100 else c for c in cells[-2:]]
        told.append([f"[bold]{name}[/bold]" if row["group"] == "ours" else name, *cells])
    harness.show(heads, told, f"{clips} clips, {os.cpu_count()} cores, median of {repeats}", width=140)
    reached = [
        [
            row["what"],
            f"{row['wanted']:g}",
            f"{row['reached']:.2f}",
            harness.number(row.get("in_processor_time"), ".2f"),
        ]
        for row in met
    ]
    harness.show(["must reach", "at least", "reached", "in processor time"], reached, width=140)


def chart(rows: dict[str, dict], path: Path) -> None:
    if missing("the chart", ("matplotlib",)):
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = sorted(rows, key=lambda name: rows[name]["clips_per_s"])
    colours = {"ours": "#1a7f5a", "others": "#9a9a9a", "bare": "#d9b44a"}
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(order) + 1.2))
    values = [rows[name]["clips_per_s"] for name in order]
    bars = axes.barh(order, values, color=[colours[rows[name]["group"]] for name in order])
    axes.bar_label(bars, [f"{v:.1f}" if v < 100 else f"{v:.0f}" for v in values], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(1, 2 * max(values))
    axes.set_xlabel(f"clips of 12 frames a second, {os.cpu_count()} CPU cores (logarithmic)")
    names = {"ours": "c4c", "others": "others", "bare": "decoding JPEGs alone"}
    axes.legend([pyplot.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()], names.values(), loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
