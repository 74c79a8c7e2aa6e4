"""Which of a GPU's decoders can be trusted. Each is tried in a process of its own: one that crashes takes its process with it.

    python -m pipelines.probe roi|whole|video [--device cuda:0] [--hw-decoder-load 0]

A decoder passes if it ends in time and all of its frames are near to those of the CPU. That it passes, crashes or errs is kept
for the GPU, its driver and the versions of the decoders, in ~/.cache/c4c, and found out again when any of them is another.
"""

import argparse
import fcntl
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from shards.user_cache import user_cache

FORMS = ("roi", "whole", "video")
TIMEOUT_S = 60.0
LEAST_DB = {"roi": 38.0, "whole": 38.0, "video": 30.0}  # of the frame that differs most from the CPU's
_SIDE, _PICTURES, _ROUNDS = 224, 48, 4
_SIZES = ((298, 224), (224, 398), (400, 300), (225, 227))


def jpeg_crop(device: torch.device, asked: str, load: float) -> str | None:
    """`roi` or `whole`, how JPEGs are decoded on a GPU: as asked, or for `auto` the first that passes. None: neither does."""
    if asked != "auto":
        return asked
    found = {}
    for form in ("roi", "whole"):
        found[form] = tried(form, str(device), load)
        if found[form] is None:
            break
    failed = "; ".join(f"{form}: {why}" for form, why in found.items() if why)
    passed = next((form for form, why in found.items() if why is None), None)
    if failed:
        then = (
            "the CPU decodes (data.decode=cpu)"
            if passed is None
            else "whole pictures are decoded (data.jpeg_crop=whole)"
        )
        warn_once(f"JPEGs on {device}: {failed}; {then}")
    return passed


@cache
def warn_once(text: str) -> None:
    """A warning that several lanes of a process have reason for."""
    warnings.warn(text, stacklevel=2)


def has_video(device: torch.device) -> bool:
    """Whether the GPU's video decoder passes; a warning if not."""
    why = tried("video", str(device), 0.0)
    if why:
        warn_once(f"NVDEC on {device}: {why}; the CPU decodes (data.decode=cpu)")
    return why is None


@cache
def tried(form: str, device: str, load: float) -> str | None:
    """Why a form cannot be trusted on a device, None if it can. Ranks of a machine that ask at the same time try it once."""
    kept = _kept(form, device, load)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(kept, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            with suppress(ValueError, KeyError, TypeError):
                return json.loads(file.read())["why"]
            found = _run(form, device, load)
            if found.lasting:
                file.truncate(0)
                file.write(json.dumps({"form": form, "why": found.why}) + "\n")
    except OSError:  # nowhere to keep it, or no locks there
        found = _run(form, device, load)
    return found.why


@dataclass(frozen=True)
class Found:
    """What came of a try: why not to trust it, None if it passed, and whether another try would come to the same."""

    why: str | None
    lasting: bool = True


def _kept(form: str, device: str, load: float) -> Path:
    gpu = torch.device(device)
    code = b"".join(path.read_bytes() for path in (Path(__file__), Path(__file__).parent / "stages" / "graph.py"))
    about = [form, load, gpu.type, *(_version(name) for name in _PACKAGES), hashlib.sha256(code).hexdigest()]
    if gpu.type == "cuda":
        about += [torch.cuda.get_device_name(gpu), _driver()]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return user_cache() / f"decoder-{form}-{name}.json"


_PACKAGES = ("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "torch")


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""


def _command(form: str, device: str, load: float) -> list[str]:
    words = ["--device", device, "--hw-decoder-load", str(load)]
    return [sys.executable, "-m", "pipelines.probe", form, *words]


def _run(form: str, device: str, load: float) -> Found:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            _command(form, device, load), capture_output=True, text=True, timeout=TIMEOUT_S,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Found(f"no answer within {TIMEOUT_S:g} s", lasting=False)
    if done.returncode < 0:
        return Found(f"it crashes ({signal.Signals(-done.returncode).name})", lasting=-done.returncode in _OF_A_CRASH)
    try:
        worst = json.loads(done.stdout.splitlines()[-1])["worst_psnr_db"]
    except (IndexError, ValueError, KeyError, TypeError):
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        return Found(lines[-1][:300], lasting=False)
    if worst is not None and worst < LEAST_DB[form]:
        return Found(f"its frames differ from the CPU's ({worst:.1f} dB, at least {LEAST_DB[form]:g} are expected)")
    return Found(None)


_OF_A_CRASH = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


# -- in a process of its own


def main(words: list[str] | None = None) -> int:
    """Decode, compare, print `{"worst_psnr_db": …}` (null: all frames are equal); the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.probe", description="Try one decoder of a GPU.")
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu (default: %(default)s)")
    parser.add_argument("--hw-decoder-load", type=float, default=0.0, help="as data.hw_decoder_load (default: 0)")
    args = parser.parse_args(words)
    device = torch.device(args.device)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        worst = _video(device) if args.form == "video" else _jpegs(args.form == "roi", device, args.hw_decoder_load)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    print(json.dumps({"worst_psnr_db": worst if math.isfinite(worst) else None}))
    return 0


def _jpegs(roi: bool, device: torch.device, load: float) -> float:
    from pipelines.config import DataConfig
    from pipelines.stages.augment import view
    from pipelines.stages.graph import Graph, Plan

    sizes = [_SIZES[i % len(_SIZES)] for i in range(_PICTURES)]
    pieces = [np.frombuffer(_jpeg(size, i), np.uint8) for i, size in enumerate(sizes)]
    views = [view(size, DataConfig(resize=min(size), image_size=min(_SIDE, *size)).filled()) for size in sizes]
    exact = Graph(Plan("jpegs", False), _SIDE, _PICTURES, torch.device("cpu"), 2)
    exact.start(pieces, views)
    wanted = torch.from_numpy(np.array(exact.result()))
    graphs = [Graph(Plan("jpegs", False, roi=roi), _SIDE, _PICTURES, device, 4, load) for _ in range(2)]
    worst = math.inf
    for _ in range(_ROUNDS):  # two at once, as in the loader
        for one in graphs:
            one.start(pieces, views)
        made = [torch.as_tensor(one.result()).cpu() for one in graphs]
        worst = min(worst, *(_worst(frames, wanted) for frames in made))
    return worst


def _video(device: torch.device) -> float:
    from pipelines.config import DataConfig
    from pipelines.stages.augment import view
    from pipelines.stages.graph import Graph, Plan

    size, positions = (320, 240), np.array([0, 7, 13, 30, 47])
    pictures = [_picture(size, i) for i in range(48)]
    files = [np.frombuffer(_h264(pictures), np.uint8)] * 4
    views = [view(size, DataConfig(image_size=_SIDE).filled())] * 4
    exact = Graph(Plan("pictures", True), _SIDE, len(positions), torch.device("cpu"), 2)
    exact.start([pictures[i] for i in positions], views[:1] * len(positions))
    wanted = torch.from_numpy(np.array(exact.result()))
    graph = Graph(Plan("files", True), _SIDE, len(files), device, 4)
    worst = math.inf
    for _ in range(_ROUNDS):
        graph.start(files, views, [], [positions] * len(files))
        worst = min(worst, *(_worst(torch.as_tensor(clip).cpu(), wanted) for clip in graph.result()))
    return worst


def _worst(frames: torch.Tensor, wanted: torch.Tensor) -> float:
    """PSNR in dB of the frame that differs most."""
    error = (frames.float() - wanted.float()).square().flatten(1).mean(1).max().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def _picture(size: tuple[int, int], number: int) -> np.ndarray:
    """uint8 [height, width, 3]: soft colours with a bar that moves, so that no picture is like another."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    planes = [127 + 100 * np.sin((x * a + y * b) / 40 + number / 3) for a, b in ((1, 0.3), (0.2, 1), (0.7, -0.6))]
    out = np.stack(planes, -1)
    left = number * 7 % (width - 20)
    out[:, left : left + 20] = 255 - out[:, left : left + 20]
    return out.clip(0, 255).astype(np.uint8)


def _jpeg(size: tuple[int, int], number: int) -> bytes:
    """By turns as libjpeg and as libav write one: what `intra` shards store has no JFIF header, and Huffman tables of its own."""
    if number // len(_SIZES) % 2:
        return _libavs_jpeg(_picture(size, number))
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(_picture(size, number)).save(file, "JPEG", quality=90, subsampling="4:2:0")
        return file.getvalue()


def _libavs_jpeg(picture: np.ndarray) -> bytes:
    import av
    from av.codec.context import Flags
    from av.video.reformatter import ColorRange

    height, width, _ = picture.shape
    encoder = av.CodecContext.create("mjpeg", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
    encoder.time_base, encoder.qmin, encoder.qmax = Fraction(1, 3), 3, 3
    encoder.color_range = ColorRange.JPEG
    encoder.flags |= Flags.bitexact
    frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuvj420p")
    frame.pts = 0
    return b"".join(map(bytes, [*encoder.encode(frame), *encoder.encode(None)]))


def _h264(pictures: list[np.ndarray]) -> bytes:
    import av

    with io.BytesIO() as file:
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=24, options={"crf": "10", "g": "12"})
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
