"""What a prediction assumes beyond counts and data sheets, by name. Imports nothing heavy."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace


def _assumed(value: float, unit: str, text: str, most: float = math.inf):
    return field(default=value, metadata={"unit": unit, "text": text, "most": most})


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Shares of peaks, rates and costs. None of the defaults was measured on a GPU by this project."""

    # 600 of an H100's 989 TFLOP/s; good large products there reach about 800
    gemm: float = _assumed(0.6, "of peak", "what matrix products reach", 1)
    # 2.8 of an H100's 3.35 TB/s
    bandwidth: float = _assumed(0.84, "of peak", "what memory-bound kernels reach of the GPU's memory bandwidth", 1)
    # by hand: 20 to 33 ms of the 64 (GELU) to 100 ms (QuickGELU) counted for ViT-B/32, 128 x 12 frames, on an H100
    fused: float = _assumed(
        0.3, "share", "of memory-bound traffic and launches that torch.compile leaves (engine.compile=true)", 1
    )
    launch_us: float = _assumed(17.5, "us", "of the host for a kernel launch, autograd and Python included")
    hooks: float = _assumed(2.5, "launches", "that ZeRO adds for each trained tensor (stages 1 to 3)")
    gap_ms: float = _assumed(3.0, "ms", "a step in which the GPU is idle: its host waits for the gradient norm")
    # nccl-tests' bus bandwidth over NVLink, roughly
    link: float = _assumed(0.75, "of peak", "what collectives reach of NVLink or PCIe between GPUs", 1)
    collective_us: float = _assumed(30.0, "us", "to start a collective")
    overlap: float = _assumed(0.0, "share", "of communication that is hidden behind the backward pass", 1)
    node: float = _assumed(8, "GPUs", "in a machine; more of them are connected by the network")
    network_gb_s: float = _assumed(50.0, "GB/s", "of a GPU to other machines, one direction (400 Gb/s)")
    host_link: float = _assumed(0.6, "of peak", "what copies between host and GPU reach of PCIe", 1)
    # libjpeg-turbo; one core
    jpeg_cpu: float = _assumed(143.0, "Mpx/s", "of JPEGs that a CPU core decodes")
    # 0.2 ms for a picture of 298x224
    jpeg_huffman: float = _assumed(330.0, "Mpx/s", "of JPEGs that a CPU core prepares where CUDA kernels decode them")
    # an A100, five cores: 8000 pictures of 551x676 a second
    nvjpg: float = _assumed(600.0, "Mpx/s", "of JPEGs that one JPEG core of a GPU decodes")
    video_cpu: float = _assumed(160.0, "Mpx/s", "of H.264 that a CPU core decodes")
    nvdec: float = _assumed(0.5, "of peak", "what a video engine reaches on small pictures, with parallel decoders", 1)
    # bench/loader.py: `copy` shards, a keyframe in 250 frames; h264 shards: 1.7
    decoded: float = _assumed(19.0, "frames", "decoded for each frame used (video lane; 1.7 for h264 shards)")
    aspect: float = _assumed(4 / 3, "ratio", "of the long side of stored pictures to the short one")
    video_side: float = _assumed(240, "px", "short side of stored videos (video lane; other lanes follow data.resize)")
    jpeg_kb: float = _assumed(15.0, "kB", "of a stored JPEG")
    cached_gb_s: float = _assumed(6.0, "GB/s", "at which one thread gathers frames from the cache")
    loader_ms: float = _assumed(0.12, "ms", "of Python for a clip: order, reads, checks, feeding the decoder")
    busy_cores: float = _assumed(2.0, "cores", "that a rank's training loop and loader keep from decoding")
    in_flight: float = _assumed(4.0, "batches", "of uint8 frames on the GPU: decoded, ready, and in the step")
    decoder_gib: float = _assumed(1.0, "GiB", "of GPU memory that the decoder takes (--decoder gpu)")
    context_gib: float = _assumed(1.0, "GiB", "of GPU memory for CUDA and its libraries")
    fragments: float = _assumed(0.05, "share", "of GPU memory that allocators cannot use", 0.99)
    adam_gb_s: float = _assumed(
        20.0, "GB/s", "of host memory traffic that a rank's CPU optimizer reaches (engine.offload)"
    )


def assume(words: Sequence[str]) -> Assumptions:
    """The defaults with `name=value` words over them. Raises ValueError."""
    known = {f.name: f for f in fields(Assumptions)}
    values = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"--assume {word}: unknown assumption {name}; {hint}")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        most = known[name].metadata["most"]
        if not 0 <= value < math.inf or value > most or (not value and name not in _MAY_BE_ZERO):
            bound = "a number, 0 or above" if name in _MAY_BE_ZERO else "a number above 0"
            bound += "" if math.isinf(most) else f", {most:g} at most"
            raise ValueError(f"--assume {word}: must be {bound}, for example {name}={known[name].default:g}")
        values[name] = value
    return replace(Assumptions(), **values)


_MAY_BE_ZERO = {
    "launch_us", "hooks", "gap_ms", "collective_us", "overlap", "loader_ms", "busy_cores", "in_flight", "decoder_gib",
    "context_gib", "fragments", "jpeg_kb",
}  # fmt: skip


def describe(assumptions: Assumptions) -> list[str]:
    """A line for each assumption: its name and value, the unit, and what it is. Those that were set are marked."""
    lines = []
    for f in fields(Assumptions):
        value = getattr(assumptions, f.name)
        mark = " " if value == f.default else "*"
        lines.append(f"{mark} {f'{f.name}={value:.4g}':20} {f.metadata['unit']:9} {f.metadata['text']}")
    return lines
