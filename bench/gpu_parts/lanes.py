"""The loader alone, and its frames beside the CPU's."""

import math
import os
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch

from bench.gpu_parts.clips import requests_of, split_of
from bench.gpu_parts.parts import FRAMES, WORDS, Given
from pipelines import bench as loading
from pipelines.config import CacheConfig, DataConfig
from pipelines.lanes import Lane
from pipelines.requests import ClipRequest
from shards.split import Split

KEYS = ("clips_per_s", "frames_per_s", "frames_decoded_per_frame_used", "bytes_read_per_clip", "stage_seconds")


def lane(given: Given, *, stored: str, cache: bool = False) -> None:
    """As python -m pipelines.bench: clips a second, frames decoded per used one, share of the host's cores."""
    split, config = split_of(given, stored), DataConfig(num_frames=FRAMES, max_words=WORDS, pixels="float16").filled()
    with tempfile.TemporaryDirectory(prefix="gpu-cache-") as folder:
        settings = {
            "device": str(given.device),
            "raw": given.device.type == "cuda",  # as training asks for them
            "batch_size": min(given.batch_size, len(split)),
            "cache": CacheConfig(dir=folder if cache else "", max_gb=16),
        }
        result = loading.measure(split, config, batches=2, **settings)
        batches = max(4, round(given.seconds / 2 / (result["seconds"] / result["batches"])))
        began, used = time.perf_counter(), time.process_time()
        result = loading.measure(split, config, batches=batches, **settings)
        share = (time.process_time() - used) / (time.perf_counter() - began) / (os.cpu_count() or 1)
    given.note(**{key: result[key] for key in KEYS}, host_cpu_pct=100 * share)


def equal(given: Given, *, stored: str) -> None:
    """PSNR of the device's frames against the CPU's, and of the CPU's next frames, for a wrong frame to be told by.

    A GPU has to decode them itself: it is an error if none of its decoders passes its try (pipelines/probe.py).
    """
    split, config, cpu = split_of(given, stored), DataConfig(num_frames=FRAMES, decode="gpu"), torch.device("cpu")
    requests = requests_of(split, 8)
    later = [replace(r, positions=np.minimum(r.positions + 1, len(r.video.frames) - 1)) for r in requests]
    exact = _frames(split, config, cpu, requests)
    given.note(
        psnr_db=psnr(_frames(split, config, given.device, requests), exact),
        psnr_of_the_next_frame_db=psnr(_frames(split, config, cpu, later), exact),
    )


def _frames(split: Split, config: DataConfig, device: torch.device, requests: list[ClipRequest]) -> torch.Tensor:
    made = Lane(split, config, device, len(requests), raw=True)
    frames = made.batch(requests).frames
    frames = frames.cpu().clone()
    made.close()
    return frames


def psnr(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """In dB; None: they are equal."""
    error = (a.float() - b.float()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else None
