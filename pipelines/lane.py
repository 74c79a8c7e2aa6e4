"""Bytes to normalised frames: one DALI graph a lane, the same code for a CPU and a GPU.

`intra`  each frame's JPEG is sliced out of the shard and decoded alone (libjpeg-turbo, or nvJPEG on a GPU)
`video`  the wanted frames are decoded out of the stored video (NVDEC on a GPU; without one, PyAV goes by the frame
         table to the keyframe before and hands pictures to the same graph: DALI's CPU decoder has no H.264)

Resize, crop and normalisation are DALI's in every lane. Sizes are given exactly as PIL/torchvision compute them.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from crc32c import crc32c
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from pipelines.config import DataConfig
from shards import ShardError
from shards.dataset import Split
from shards.schema import Video
from shards.video import VideoError, pick_frames, scaled_size


class BadSample(Exception):
    """A stored video whose wanted frames cannot be had, and why."""


@dataclass(frozen=True)
class Request:
    """The frames of one clip: positions in the video's frame table, int64 [frames], in clip order."""

    video: Video
    positions: np.ndarray


def lane_name(split: Split, config: DataConfig) -> str:
    """The lane that suits a split. Raises ValueError if the one asked for does not."""
    intra = split.info["profile"]["name"] == "intra"
    if config.lane == "intra" and not intra:
        raise ValueError(
            f"data.lane=intra needs shards of independent JPEGs, and {split.path} has profile "
            f"{split.info['profile']['name']}: pack with --profile intra, or use data.lane=auto"
        )
    return config.lane if config.lane != "auto" else "intra" if intra else "video"


class Lane:
    """Decodes clips of one split. `device` is torch's; `max_clips` bounds a call of `decode`."""

    def __init__(self, split: Split, config: DataConfig, device: torch.device, max_clips: int):
        self.name = lane_name(split, config)
        self._split, self._config, self._device = split, config, device
        stored = split.info["profile"].get("short_side")
        self._resize = not (self.name == "intra" and stored == config.short_side)
        threads = config.threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="c4c-read")
        gpu = device.type == "cuda"
        self._nvdec = gpu and self.name == "video"
        # one unit of the graph is a frame where frames come singly, and a clip where NVDEC delivers sequences
        self._pipeline = Pipeline(
            batch_size=max_clips if self._nvdec else max_clips * config.num_frames,
            num_threads=threads,
            device_id=device.index or 0 if gpu else None,
            prefetch_queue_depth=1,
        )
        self._define(gpu)

    def _define(self, gpu: bool) -> None:
        config = self._config
        with self._pipeline:
            source = fn.external_source(name="source", no_copy=True, **self._source_type())
            if self._nvdec:
                frames = fn.decoders.video(source, device="mixed", frames=fn.external_source(name="positions", ndim=1))
            elif self.name == "intra":
                frames = fn.decoders.image(source, device="mixed" if gpu else "cpu", output_type=types.RGB)
            else:
                frames = source
            if self._resize:
                size = fn.external_source(name="size", ndim=1, dtype=types.FLOAT)
                frames = fn.resize(frames, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
            x, y = (fn.external_source(name=n, ndim=0, dtype=types.FLOAT) for n in ("crop_x", "crop_y"))
            frames = fn.crop_mirror_normalize(
                frames,
                crop=(config.image_size, config.image_size),
                crop_pos_x=x,
                crop_pos_y=y,
                mean=[255 * m for m in config.mean],
                std=[255 * s for s in config.std],
                dtype=types.FLOAT,
                output_layout="FCHW" if self._nvdec else "CHW",
            )
            self._pipeline.set_outputs(frames)
        self._pipeline.build()

    def _source_type(self) -> dict:
        if self.name == "intra" or self._nvdec:
            return {"dtype": types.UINT8, "ndim": 1}
        return {"dtype": types.UINT8, "ndim": 3, "layout": "HWC"}

    def read(self, requests: list[Request]) -> list[list[np.ndarray] | BadSample]:
        """Fetch, and check against the crc32c of packing, what the graph needs of each clip. Bad ones come as such."""
        fetch: Callable = {"intra": self._read_jpegs, "video": self._read_pictures}[self.name]
        return list(self._pool.map(self._read_file if self._nvdec else fetch, requests))

    def decode(self, requests: list[Request], sources: list[list[np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames float32 [clips, num_frames, 3, image_size, image_size] on the device, and mask bool [clips, num_frames].

        Slots that a clip does not fill are 0 and False. `sources` is what `read` gave, none of it bad.
        """
        config, clips = self._config, len(requests)
        mask = torch.zeros(clips, config.num_frames, dtype=torch.bool)
        for i, request in enumerate(requests):
            mask[i, : len(request.positions)] = True
        shape = (clips, config.num_frames, 3, config.image_size, config.image_size)
        frames = torch.zeros(shape, device=self._device)
        if clips:
            self._feed(requests, [piece for source in sources for piece in source])
            frames[mask.to(self._device)] = self._run()
        return frames, mask.to(self._device)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _feed(self, requests: list[Request], pieces: list[np.ndarray]) -> None:
        feed = self._pipeline.feed_input
        repeats = [1 if self._nvdec else len(r.positions) for r in requests]
        feed("source", pieces)
        if self._nvdec:
            feed("positions", [r.positions.astype(np.int32) for r in requests])
        sizes = [self._sizes(r.video) for r in requests]
        if self._resize:
            feed("size", np.repeat(np.array([[h, w] for w, h in sizes], np.float32), repeats, axis=0))
        crop = self._config.image_size
        for name, axis in (("crop_x", 0), ("crop_y", 1)):
            feed(name, np.repeat(np.array([_crop_position(s[axis], crop) for s in sizes], np.float32), repeats))

    def _sizes(self, video: Video) -> tuple[int, int]:
        size = (video.width, video.height)
        return scaled_size(*size, self._config.short_side) if self._resize else size

    def _run(self) -> torch.Tensor:
        (output,) = self._pipeline.run()
        if self._device.type != "cuda":
            return torch.from_numpy(output.as_array())
        if self._nvdec:
            return torch.cat([torch.from_dlpack(clip) for clip in output])
        return torch.from_dlpack(output.as_tensor())

    def _read_jpegs(self, request: Request) -> list[np.ndarray] | BadSample:
        video, frames = request.video, request.video.frames
        out = []
        for position in request.positions:
            try:
                data = self._split.read(video, int(frames.offset[position]), int(frames.size[position]))
            except (OSError, ShardError) as error:
                return BadSample(str(error))
            if crc32c(data) != frames.crc32c[position]:
                return BadSample(
                    f"crc32c of stored frame {position} differs from the sample table: the shard is damaged"
                )
            out.append(np.frombuffer(data, np.uint8))
        return out

    def _read_pictures(self, request: Request) -> list[np.ndarray] | BadSample:
        video = request.video

        def read(offset: int, size: int) -> bytes:
            data = self._split.read(video, offset, size)
            if size < 0 and crc32c(data) != video.crc32c:
                raise VideoError("crc32c of the file differs from the sample table: the shard is damaged")
            return data

        try:
            found = pick_frames(video.codec, video.extradata, video.frames, video.rotation, read, request.positions)
        except (OSError, ShardError, VideoError) as error:
            return BadSample(str(error))
        return [found[int(p)] for p in request.positions]

    def _read_file(self, request: Request) -> list[np.ndarray] | BadSample:
        try:
            data = self._split.read(request.video)
        except (OSError, ShardError) as error:
            return BadSample(str(error))
        if crc32c(data) != request.video.crc32c:
            return BadSample("crc32c of the file differs from the sample table: the shard is damaged")
        return [np.frombuffer(data, np.uint8)]


def _crop_position(size: int, crop: int) -> float:
    """DALI's relative position of the window that torchvision's CenterCrop takes."""
    return round((size - crop) / 2) / (size - crop) if size > crop else 0.5
