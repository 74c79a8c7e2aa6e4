"""Other libraries' decoders on the same files: used frames a second, resized to the frame's size, on the GPU.

Signatures are those of torchcodec 0.17, DALI 2.4 and SPDL 0.8. What is not installed, or was built without, is left out with
the reason.
"""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch

from bench.gpu_parts.clips import SIDE, SOURCES, requests_of, split_of
from bench.gpu_parts.clock import synchronise
from bench.gpu_parts.parts import FRAMES, Given, Missing
from pipelines.stages.fetch import Reader

CLIPS = 32  # that are decoded in a turn


def needed(name: str, package: str) -> ModuleType:
    """The module. Raises Missing where it is not installed, or a library that it needs is not."""
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None or importlib.util.find_spec(name) is None:
        raise Missing(f"{name} is not installed: pip install {package}")
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise Missing(f"{name} cannot be imported: {str(error).strip().splitlines()[0][:200]}") from error


def torchcodec(given: Given) -> None:
    """VideoDecoder on untouched files, its frames resized by torch."""
    decoders, device = needed("torchcodec.decoders", "torchcodec"), given.device

    def decode(clip: tuple[bytes, list[int]]) -> None:
        data, wanted = clip
        decoder = decoders.VideoDecoder(data, device=str(device), seek_mode="approximate")
        _resized(decoder.get_frames_at(wanted).data)

    _note(given, decode, _files(given))


def torchcodec_jpeg(given: Given) -> None:
    """decode_jpeg on a clip's stored JPEGs at a time."""
    decoders, device = needed("torchcodec.decoders", "torchcodec"), given.device
    if not hasattr(decoders, "decode_jpeg"):
        raise Missing("this torchcodec has no decode_jpeg: pip install -U torchcodec")
    _note(given, lambda pieces: _resized(torch.stack(decoders.decode_jpeg(pieces, device=device))), _jpegs(given))


def dali_reader(given: Given) -> None:
    """DALI's own reader, which picks frames at equal distances itself."""
    files = [str(SOURCES / f"{i:03d}.mp4") for i in range(min(CLIPS, given.clips))]
    pipeline = reader_of(files, 0)
    pipeline.build()
    given.note(frames_per_s=_twice(pipeline.run, len(files) * FRAMES, given))


def reader_of(files: list[str], device_id: int | None):
    """A pipeline whose batch is one clip of each file. Raises Missing where DALI's reader cannot pick frames so."""
    from nvidia.dali import fn, types
    from nvidia.dali.backend import GetSchema
    from nvidia.dali.pipeline import Pipeline

    if not GetSchema("experimental__readers__Video").HasArgument("uniform_sample"):
        raise Missing("this DALI's video reader has no uniform_sample: pip install -U nvidia-dali-cuda130")
    threads = os.cpu_count() or 1
    pipeline = Pipeline(batch_size=len(files), num_threads=threads, device_id=device_id, prefetch_queue_depth=2)
    with pipeline:
        clips = fn.experimental.readers.video(
            device="gpu", filenames=files, sequence_length=FRAMES, uniform_sample=True, name="reader"
        )
        pipeline.set_outputs(fn.resize(clips, size=[SIDE, SIDE], interp_type=types.INTERP_CUBIC, antialias=True))
    return pipeline


def spdl_nvjpeg(given: Given) -> None:
    """decode_image_nvjpeg on a clip's stored JPEGs at a time, resized by NPP."""
    io = _spdl("nvjpeg")
    config = _cuda_config(io)
    _note(
        given,
        lambda pieces: io.decode_image_nvjpeg(pieces, device_config=config, scale_width=SIDE, scale_height=SIDE),
        _jpegs(given),
    )


def spdl_nvdec(given: Given) -> None:
    """decode_packets_nvdec on untouched files: every frame is decoded, and those that are used are picked then."""
    io = _spdl("nvcodec")
    config = _cuda_config(io)

    def decode(clip: tuple[bytes, list[int]]) -> None:
        data, wanted = clip
        packets = io.demux_video(data)
        buffer = io.decode_packets_nvdec(packets, device_config=config, scale_width=SIDE, scale_height=SIDE)
        io.to_torch(buffer)[torch.tensor(wanted)]

    _note(given, decode, _files(given))


def _spdl(feature: str) -> ModuleType:
    io = needed("spdl.io", "spdl_io")
    if not getattr(importlib.import_module("spdl.io.utils"), f"built_with_{feature}")():
        raise Missing(f"spdl.io was built without {feature}, or a library that this needs is missing")
    return io


def _cuda_config(io: ModuleType):
    # torch's allocator keeps memory, where SPDL's own asks the driver for each buffer
    allocator = (torch.cuda.caching_allocator_alloc, torch.cuda.caching_allocator_delete)
    return io.cuda_config(device_index=0, allocator=allocator)


def _files(given: Given) -> list[tuple[bytes, list[int]]]:
    """Untouched files, and the numbers of the frames that are used."""
    split = split_of(given, "copy")
    requests = requests_of(split, CLIPS)
    return [(bytes(Reader(split).file(r.video, r.positions).pieces[0]), r.positions.tolist()) for r in requests]


def _jpegs(given: Given) -> list[list[bytes]]:
    """The stored JPEGs of each clip."""
    split = split_of(given, "intra")
    return [
        [bytes(piece) for piece in Reader(split).jpegs(r.video, r.positions).pieces] for r in requests_of(split, CLIPS)
    ]


def _resized(frames: torch.Tensor) -> torch.Tensor:
    """[n, 3, H, W] to the frame's size."""
    return torch.nn.functional.interpolate(frames.float(), (SIDE, SIDE), mode="bicubic", antialias=True)


def _note(given: Given, decode: Callable, clips: Sequence) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        given.note(frames_per_s=_twice(lambda: list(pool.map(decode, clips)), len(clips) * FRAMES, given))


def _twice(turn: Callable[[], object], frames: int, given: Given) -> list[float]:
    """Used frames a second, measured twice after a turn that is not counted."""
    turn(), synchronise(given.device)
    found = []
    for _ in range(2):
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < given.seconds / 4:
            turn()
            done += frames
        synchronise(given.device)
        found.append(done / (time.perf_counter() - began))
    return found
