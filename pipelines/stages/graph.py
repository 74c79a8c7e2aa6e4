"""The DALI graph: stored frames to uint8 frames of the recipe's size."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from pipelines.stages.augment import View, margin

_KERNELS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
_AHEAD_OF_JPEG = 6 * 8 * 64  # bytes; jdhuff.c: blocks in a 4:2:0 MCU, eight for each of a block's coefficients


# of errors that are the device's: its memory, its driver, a fault of its own. What NVDEC says of a video it cannot decode
# (CUDA_ERROR_NOT_SUPPORTED, CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_INVALID_IMAGE) is not among them
_OF_THE_DEVICE = re.compile(
    r"CUDA runtime API error|CUDA error|cudaError|out of memory|CUDA allocation failed|Can't allocate \d+ bytes|bad_alloc"
    r"|illegal (memory access|address|instruction)|device-side assert|uncorrectable ECC|no CUDA-capable device"
    r"|driver version is insufficient|CUDA_ERROR_(OUT_OF_MEMORY|ILLEGAL|DEINITIALIZED|NOT_INITIALIZED|NO_DEVICE|ECC|HARDWARE)"
    r"|CUDA_ERROR_(MISALIGNED|ASSERT|INVALID_CONTEXT|CONTEXT)",
    re.IGNORECASE,
)
# NVDEC says it of broken videos as well
_MAYBE_OF_THE_DEVICE = re.compile(r"CUDA_ERROR_(UNKNOWN|LAUNCH)|launch fail", re.IGNORECASE)


# how lines of DALI's reports begin that do not say what happened
_AROUND = ("Critical error in", "Error in", "Error when", "Current pipeline object", "C++ context")


class GraphError(Exception):
    """DALI could not turn what it was given into frames. The graph cannot be used any more."""


class DeviceError(ValueError):
    """The device failed, or its memory is full: no fault of what it was given. The message says what to do."""


@dataclass(frozen=True)
class Plan:
    """What a graph does.

    source    jpegs: encoded pictures. pictures: uint8 [H, W, 3]. files: encoded videos, of which it decodes frames by
              their number (a GPU's NVDEC)
    resize    whether windows are scaled to the frame's size; if not, they have it already
    uncropped scale all of the picture to a size of its own, and cut nothing (for the cache, before augmentation)
    augment   flip and change colours as the views say
    roi       of a JPEG that is only cropped, decode no more than the crop needs; otherwise all of it, and cut the crop out
    fill      the colour around pictures that do not fill the frame; None: all fill it
    interpolation   bicubic or bilinear
    """

    source: str
    resize: bool
    uncropped: bool = False
    augment: bool = False
    roi: bool = True
    fill: int | None = None
    interpolation: str = "bicubic"


class Graph:
    """A DALI pipeline that makes at most `units` frames (files: clips) of `side` x `side` pixels at once.

    hw_decoder_load: share of the JPEGs that a GPU's JPEG engines decode, where it has such.
    """

    def __init__(
        self, plan: Plan, side: int, units: int, device: torch.device, threads: int, hw_decoder_load: float = 0.0
    ):
        self.plan, self.units, self.hw_decoder_load = plan, units, hw_decoder_load
        self._side, self._device, self._gpu = side, device, device.type == "cuda"
        # one unit of the graph is a frame where frames come singly, and a clip where NVDEC delivers sequences
        self._pipeline = Pipeline(
            batch_size=units,
            num_threads=threads,
            device_id=device.index or 0 if self._gpu else None,
            prefetch_queue_depth=1,
        )
        with self._pipeline:
            self._pipeline.set_outputs(self._define())
        self._pipeline.build()

    def _define(self):
        plan, device = self.plan, "gpu" if self._gpu else "cpu"
        fills = plan.fill is not None
        crops = not (plan.resize or plan.uncropped or fills)
        start = fn.external_source(name="start", ndim=1, dtype=types.INT32) if crops else None
        window: dict[str, Any] = {"start": start, "shape": [self._side, self._side], "axis_names": "WH"}
        if plan.source == "jpegs":
            source = fn.external_source(name="source", no_copy=True, dtype=types.UINT8, ndim=1)
            if crops and plan.roi:
                frames = fn.decoders.image_slice(source, output_type=types.RGB, **self._decoding(), **window)
            else:
                frames = fn.decoders.image(source, output_type=types.RGB, **self._decoding())
                if crops:
                    frames = fn.slice(frames, **window)
        else:
            frames = self._pictures(device)
            if crops:
                frames = fn.slice(frames, **window)
        if plan.resize:
            frames = fn.resize(frames, interp_type=_KERNELS[plan.interpolation], antialias=True, **self._scaling())
        if plan.augment:
            frames = fn.flip(frames, horizontal=fn.external_source(name="flip", ndim=0, dtype=types.INT32))
            factors = ("brightness", "contrast", "saturation")
            inputs = {n: fn.external_source(name=n, ndim=0, dtype=types.FLOAT) for n in factors}
            frames = fn.color_twist(frames, **inputs)
        if fills:  # the last, or the margins were changed as well
            place = fn.external_source(name="place", ndim=1, dtype=types.INT32)
            frames = fn.slice(
                frames, start=place, shape=[self._side, self._side], axis_names="WH", out_of_bounds_policy="pad",
                fill_values=plan.fill,
            )  # fmt: skip
        return frames

    def _decoding(self) -> dict:
        """Where JPEGs are decoded. On a GPU, chroma is scaled up as libjpeg-turbo does it, so that its pixels are the CPU's."""
        if not self._gpu:
            return {"device": "cpu"}
        # threads that are tied to cores would be in the way of those that launch the step
        return {
            "device": "mixed",
            "hw_decoder_load": self.hw_decoder_load,
            "jpeg_fancy_upsampling": True,
            "affine": False,
        }

    def _pictures(self, device: str):
        if self.plan.source == "files":
            source = fn.external_source(name="source", no_copy=True, dtype=types.UINT8, ndim=1)
            wanted = fn.external_source(name="positions", ndim=1, dtype=types.INT32)
            # a frame that DALI does not count is an error, and not black
            return fn.decoders.video(source, device="mixed", affine=False, pad_mode="none", frames=wanted)
        pictures = fn.external_source(name="source", no_copy=True, dtype=types.UINT8, ndim=3, layout="HWC")
        return pictures.gpu() if device == "gpu" else pictures

    def _scaling(self) -> dict:
        size = [self._side, self._side]
        if self.plan.uncropped or self.plan.fill is not None:
            size = fn.external_source(name="size", ndim=1, dtype=types.FLOAT)
        if self.plan.uncropped:
            return {"size": size}
        ends = {f"roi_{n}": fn.external_source(name=n, ndim=1, dtype=types.FLOAT) for n in ("start", "end")}
        return {"size": size, **ends}

    def start(
        self,
        pieces: list[np.ndarray],
        views: list[View],
        sizes: Sequence[tuple[int, int]] = (),
        positions: Sequence[np.ndarray] = (),
    ) -> None:
        """Begin to make frames, which `result` hands over; one call after another. One view a unit; `sizes` (width,
        height) only where the plan is `uncropped`. `pieces` must stay as they are until then. Raises GraphError, DeviceError."""
        with _errors_told_apart(self._device):
            self._feed(pieces, views, sizes, positions)
            self._pipeline.schedule_run()

    def result(self) -> list[np.ndarray] | np.ndarray | torch.Tensor | list[torch.Tensor]:
        """uint8 frames [n, side, side, 3]; `uncropped`: a list of pictures [height, width, 3] in memory.

        They are DALI's own memory: on a CPU good until the next `start`, on a GPU as long as the tensors are held. There, who
        reads them holds them until that is done, not only until it is launched: a GPU's JPEG engines write into memory that is
        given back without waiting for the stream. On a GPU files give a tensor for each clip. Raises GraphError, DeviceError.
        """
        with _errors_told_apart(self._device):
            # in whose order DALI may use the memory again
            (output,) = self._pipeline.outputs(torch.cuda.current_stream(self._device) if self._gpu else None)
        if self.plan.uncropped:
            output = output.as_cpu()
            made = [np.array(output.at(i)) for i in range(len(output))]
            return [picture for clip in made for picture in clip] if self.plan.source == "files" else made
        if not self._gpu:
            return np.asarray(output.as_tensor()) if output.is_dense_tensor() else output.as_array()
        if self.plan.source == "files":
            return list(map(torch.from_dlpack, output))
        return torch.from_dlpack(output.as_tensor())

    def _feed(self, pieces: list, views: list[View], sizes: Sequence, positions: Sequence) -> None:
        feed, plan, side = self._pipeline.feed_input, self.plan, (self._side, self._side)
        self._fed = pieces if self._gpu or plan.source != "jpegs" else _one_array(pieces)
        feed("source", self._fed)
        if plan.source == "files":
            feed("positions", [p.astype(np.int32) for p in positions])
        if plan.uncropped:
            if plan.resize:
                feed("size", np.array([[height, width] for width, height in sizes], np.float32))
        elif plan.resize:  # rows first, as the picture lies in memory
            feed("start", np.array([[v.y, v.x] for v in views], np.float32))
            feed("end", np.array([[v.y + v.height, v.x + v.width] for v in views], np.float32))
            if plan.fill is not None:
                feed("size", np.array([(v.scaled or side)[::-1] for v in views], np.float32))
        elif plan.fill is None:
            feed("start", np.array([[v.x, v.y] for v in views]).round().astype(np.int32))
        if plan.fill is not None:
            feed("place", np.array([[-margin(self._side, n) for n in v.scaled or side] for v in views], np.int32))
        if plan.augment:
            feed("flip", np.array([v.flip for v in views], np.int32))
            for name in ("brightness", "contrast", "saturation"):
                feed(name, np.array([getattr(v, name) for v in views], np.float32))


def _one_array(pieces: list[np.ndarray]) -> np.ndarray:
    """Encoded pictures as rows, which DALI takes faster than as many arrays. Zeros follow each: libjpeg-turbo decodes faster
    as long as there are so many bytes to come."""
    rows = np.zeros((len(pieces), max(map(len, pieces)) + _AHEAD_OF_JPEG), np.uint8)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece)] = piece
    return rows


@contextmanager
def _errors_told_apart(device: torch.device) -> Iterator[None]:
    """Turn a RuntimeError of DALI into one that says whose fault it is."""
    try:
        yield
    except RuntimeError as error:
        found = _OF_THE_DEVICE.search(str(error))
        if found is None and _is_broken(device):
            found = _MAYBE_OF_THE_DEVICE.search(str(error))
        if found:
            line = next(line.strip() for line in str(error).splitlines() if found.group() in line)
            raise DeviceError(
                f"the GPU failed while it decoded frames: {line[:300]}. Go on with run.resume=auto; if its memory was full, with "
                "data.decode=cpu or smaller batches"
            ) from error
        raise GraphError(_reason(error)) from error


def _is_broken(device: torch.device) -> bool:
    """Whether a GPU has an error from which its process does not recover."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _reason(error: RuntimeError) -> str:
    """The line of DALI's report that says what happened."""
    lines = [line.strip() for line in str(error).rpartition("encountered:")[2].splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(_AROUND)]
    reason = (reasons or lines or [type(error).__name__])[0]
    return re.sub(r" sample #\d+ *:?", "", reason).strip()[:300]  # its place in the run, which tells nobody anything


def copied(frames):
    """What a graph's next run does not overwrite."""
    if isinstance(frames, torch.Tensor):
        return frames  # which holds DALI's memory
    return [np.array(f) for f in frames] if isinstance(frames, list) else np.array(frames)
