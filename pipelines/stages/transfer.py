"""To a GPU and back, and into its batches. Nothing here waits for the GPU but `on_host`, and `Transfer` where it holds much.

Everything is launched on the current stream of the calling thread, which is the loader's own.
"""

from collections import deque
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from pipelines.requests import Sample
from pipelines.workers import Workers

_HELD = 2  # groups whose frames may be read at the same time


@cache
def loader_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which all its loaders work. One: memory that torch keeps belongs to a stream."""
    return torch.cuda.Stream(device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same on the device; the caller does not wait for a copy to a GPU."""
    if device.type == "cpu":
        return tensor
    memory = pinned(tensor.shape, tensor.dtype)
    memory.copy_(tensor)
    return memory.to(device, non_blocking=True)


def pinned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory that a GPU copies from or to by itself; torch keeps it for the next until that copy is done."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


def recorded(device: torch.device) -> torch.cuda.Event | None:
    """What happens once the current stream has done all that it was given; None on a CPU."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def handed_over(ready: torch.cuda.Event | None, *tensors: torch.Tensor) -> None:
    """Have the caller's stream wait for `ready`, and keep the tensors' memory from others until that stream has read them."""
    if ready is None:
        return
    stream = torch.cuda.current_stream(tensors[0].device)
    stream.wait_event(ready)
    for tensor in tensors:
        tensor.record_stream(stream)


def on_host(clips: Sequence) -> list[np.ndarray]:
    """Clips, each an array, a list of pictures or a tensor on a device, as arrays; waits for copies from a device."""
    arrays: list = [np.asarray(clip) if not isinstance(clip, torch.Tensor) else clip for clip in clips]
    there = [clip for clip in arrays if isinstance(clip, torch.Tensor)]
    if not there:
        return arrays
    copies = [pinned(clip.shape, clip.dtype) for clip in there]
    for copy, clip in zip(copies, there, strict=True):
        copy.copy_(clip, non_blocking=True)
    torch.cuda.current_stream(there[0].device).synchronize()
    made = iter(copies)
    return [next(made).numpy() if isinstance(clip, torch.Tensor) else clip for clip in arrays]


def slots(sample: Sample) -> np.ndarray:
    """Which of the sample's frames its clip shows, in the clip's order: int64 [frames]."""
    among, wanted = sample.positions, sample.request.positions
    return np.arange(len(among)) if np.array_equal(among, wanted) else np.searchsorted(among, wanted)


class Transfer:
    """Writes clips into batches on a GPU.

    What it reads is held until the GPU has read it: memory of a decoder's that is given back earlier may be written to by
    engines that do not wait for the stream (see Graph.result).
    """

    def __init__(self, device: torch.device, workers: Workers):
        self._device, self._workers = device, workers
        self._held: deque[tuple[torch.cuda.Event, list]] = deque()

    def write(self, frames: torch.Tensor, samples: list[Sample]) -> None:
        """Clips into their rows of frames, uint8 [rows, slots, H, W, 3]; slots that they do not fill stay as they are."""
        flat, of_a_row = frames.flatten(0, 1), frames.shape[1]
        there = [sample for sample in samples if isinstance(sample.frames, torch.Tensor)]
        if there:
            self._gather(flat, of_a_row, there)
        if len(there) < len(samples):
            self._upload(flat, of_a_row, [sample for sample in samples if not isinstance(sample.frames, torch.Tensor)])

    def close(self) -> None:
        """Let go of what is held, once it is read."""
        while self._held:
            self._held.popleft()[0].synchronize()

    def _gather(self, flat: torch.Tensor, of_a_row: int, samples: list[Sample]) -> None:
        clips: list = [sample.frames for sample in samples]
        shown = [slots(sample) for sample in samples]
        first = np.cumsum([0, *(len(clip) for clip in clips)])
        picked = np.concatenate([start + numbers for start, numbers in zip(first, shown, strict=False)])
        source = _one(clips)
        if not np.array_equal(picked, np.arange(len(source))):
            source = source.index_select(0, to_device(torch.from_numpy(picked), self._device))
        self._put(flat, _places(samples, shown, of_a_row), source)
        read = recorded(self._device)
        assert read is not None
        self._held.append((read, clips))
        while self._held and self._held[0][0].query():
            self._held.popleft()
        while len(self._held) > _HELD:
            self._held.popleft()[0].synchronize()

    def _upload(self, flat: torch.Tensor, of_a_row: int, samples: list[Sample]) -> None:
        shown = [slots(sample) for sample in samples]
        ends = np.cumsum([0, *map(len, shown)])
        memory = pinned((int(ends[-1]), *flat.shape[1:]), torch.uint8)
        rows = memory.numpy()

        def fill(n: int) -> None:
            np.take(np.asarray(samples[n].frames), shown[n], axis=0, out=rows[ends[n] : ends[n + 1]], mode="clip")

        self._workers.map(fill, range(len(samples)))
        self._put(flat, _places(samples, shown, of_a_row), memory)

    def _put(self, flat: torch.Tensor, places: np.ndarray, source: torch.Tensor) -> None:
        """Frames into these places of a batch, in one copy where they are side by side."""
        first, count = int(places[0]) if len(places) else 0, len(places)
        if np.array_equal(places, np.arange(first, first + count)):
            flat[first : first + count].copy_(source, non_blocking=True)
        else:
            where = to_device(torch.from_numpy(places), self._device)
            flat.index_copy_(0, where, source.to(self._device, non_blocking=True))


def _places(samples: list[Sample], shown: list[np.ndarray], of_a_row: int) -> np.ndarray:
    """Where the samples' frames stand in their batch, rows one after another."""
    return np.concatenate([s.row * of_a_row + np.arange(len(n)) for s, n in zip(samples, shown, strict=True)])


def _one(clips: list[torch.Tensor]) -> torch.Tensor:
    """Clips one after another, without a copy where they are neighbours in one tensor."""
    base, first = clips[0]._base, clips[0].storage_offset()
    for clip in clips:
        if clip._base is None or clip._base is not base or clip.storage_offset() != first:
            return torch.cat(clips) if len(clips) > 1 else clips[0]
        first += clip.numel()
    assert base is not None
    start = clips[0].storage_offset() - base.storage_offset()
    frame = clips[0][0].numel()
    return base.flatten()[start : first - base.storage_offset()].view(-1, *clips[0].shape[1:]) if frame else clips[0]
