"""A cache with known clips, for a process that is killed while it fills one. Imports no torch: it must start fast."""

import numpy as np

from pipelines.config import CacheConfig
from pipelines.stages.cache import FrameCache

VIDEOS = 2000


def clip(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)


def opened(folder) -> FrameCache:
    cache = FrameCache(CacheConfig(dir=str(folder), max_gb=1), {"for": "a test"}, VIDEOS, clip(0).nbytes)
    cache.videos = VIDEOS
    return cache
