"""Stage: what was fetched of clips, to uint8 frames of the recipe's size, whatever single clips do to the graph."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from numpy.random import Generator
from nvidia.dali import backend

from pipelines.chain import Stream
from pipelines.config import DataConfig
from pipelines.frame_sampling import generator
from pipelines.requests import Sample
from pipelines.stages.augment import View, view
from pipelines.stages.buffers import keep_freed_memory
from pipelines.stages.fetch import NOTHING, BadSample, Source
from pipelines.stages.graph import DeviceError, Graph, GraphError, Plan, copied
from shards.schema import Video

_UNDER_WAY = 2  # groups of clips at once, the one that is waited for included
_ALL_AT_ONCE = 8  # clips that a GPU fails at one by one: then it is the GPU
_GPU_BYTES = 2 << 30  # of decoded pictures that a group has on a GPU at most, before they are scaled


@dataclass(eq=False)
class _Part:
    """Samples of a group that one graph decodes."""

    plan: Plan
    samples: list[Sample]
    graph: Graph | None = None  # None: it failed at them


@dataclass(eq=False)
class _Group:
    """Samples that are decoded together, in the order of the stream; those that are `ready` are in none of the parts."""

    samples: list[Sample]
    parts: list[_Part]


@dataclass(eq=False)
class _Waiting:
    """Samples for a group to be full."""

    samples: list[Sample] = field(default_factory=list)
    pieces: int = 0
    bytes: int = 0


class Decoder:
    """A stream of samples to groups of samples with frames, in the same order.

    A group takes at most `units` pieces (see Source) and `clips` samples, whatever batch they belong to: the graph is
    filled, and the next group is decoded while the last one is used. On a GPU its pictures take 2 GiB at most.

    scaled: pictures come scaled as the recipe says already. otherwise: what the CPU decodes of a sample that the
    graph fails at; raises BadSample."""

    def __init__(
        self, plan: Plan, config: DataConfig, units: int, clips: int, device: torch.device, threads: int, *,
        scaled: bool = False, otherwise: Callable[[Sample], Source] | None = None,
    ):  # fmt: skip
        self.units, self._clips = units, clips
        self._plan, self._config, self._scaled, self._otherwise = plan, config, scaled, otherwise
        self._device, self._threads = device, threads
        self._most = _GPU_BYTES if device.type == "cuda" else None
        self._resting: dict[Plan, list[Graph]] = {}
        if device.type == "cpu":
            keep_freed_memory()

    def __call__(self, samples: Stream) -> Iterator[list[Sample]]:
        """Groups of samples. Frames are good until the next group is asked for. Clips that do not decode come with
        `error`; what the stream raises is raised behind the samples before."""
        under_way: deque[_Group] = deque()
        waiting = _Waiting()
        ended: BaseException | None = None
        try:
            while True:
                # take what is at hand; wait for more only where nothing is being decoded meanwhile
                while ended is None and len(under_way) < _UNDER_WAY and (samples.at_hand or not under_way):
                    try:
                        sample = next(samples)
                    except BaseException as error:  # StopIteration too
                        ended = error
                        break
                    if not self._has_room(waiting, sample):
                        under_way.append(self._start(waiting.samples))
                        waiting = _Waiting()
                    waiting.samples.append(sample)
                    waiting.pieces += self._pieces(sample)
                    waiting.bytes += self._bytes(sample)
                if ended is not None and waiting.samples and len(under_way) < _UNDER_WAY:
                    under_way.append(self._start(waiting.samples))
                    waiting = _Waiting()
                if not under_way:
                    break
                yield self._finish(under_way.popleft())
        finally:
            for group in under_way:
                group.parts.clear()  # before the sources: a graph waits for the run that reads them
        if ended is not None and not isinstance(ended, StopIteration):
            raise ended

    @property
    def takes_pictures(self) -> bool:
        """Whether it is given pictures that are decoded already."""
        return self._plan.source == "pictures"

    def takes(self, video: Video, frames: int) -> bool:
        """Whether so many frames of a video fit into a group."""
        if self._plan.source == "files":
            return frames * video.width * video.height * 3 <= _GPU_BYTES
        return frames <= self.units

    def close(self) -> None:
        """Give up the graphs with their threads and memory, which a GPU's torch may want."""
        self._resting.clear()
        if self._device.type == "cuda":
            backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]  # it is made at run time

    # -- what a group holds

    def _has_room(self, waiting: _Waiting, sample: Sample) -> bool:
        if not waiting.samples:
            return True
        if len(waiting.samples) == self._clips or waiting.pieces + self._pieces(sample) > self.units:
            return False
        return self._most is None or waiting.bytes + self._bytes(sample) <= self._most

    def _pieces(self, sample: Sample) -> int:
        return 0 if sample.source.ready else len(sample.source.pieces)

    def _bytes(self, sample: Sample) -> int:
        """Of the sample's pictures as they are decoded, where that is counted."""
        if self._most is None or sample.source.ready:
            return 0
        return len(sample.source.positions) * sample.request.video.width * sample.request.video.height * 3

    # -- graphs

    def _start(self, samples: list[Sample]) -> _Group:
        by_plan: dict[Plan, list[Sample]] = {}
        for sample in samples:
            if not sample.source.ready:
                by_plan.setdefault(self._plan_for(sample), []).append(sample)
        group = _Group(samples, [_Part(plan, some) for plan, some in by_plan.items()])
        for part in group.parts:
            with suppress(GraphError):  # `_finish` will find out which clip it is
                part.graph = self._fed(part.plan, part.samples)
        return group

    def _plan_for(self, sample: Sample) -> Plan:
        return replace(self._plan, source="pictures") if sample.source.pictures else self._plan

    def _finish(self, group: _Group) -> list[Sample]:
        for part in group.parts:
            try:
                self._take(part.graph, part.samples)
            except GraphError:
                self._bisect(part.samples)
            finally:
                part.graph = None
        for sample in group.samples:
            sample.positions = sample.source.positions
            if sample.source.ready and sample.source.pieces:
                sample.frames = sample.source.pieces[0]
        return group.samples

    def _bisect(self, samples: list[Sample]) -> None:
        """As `_take`, after a run that failed: groups are halved until the bad clips are found."""
        groups = _halves(samples)
        while groups:
            some = groups.pop()
            try:
                self._take(self._fed(self._plan_for(some[0]), some), some)
            except GraphError as error:
                if len(some) > 1:
                    groups += _halves(some)
                elif self._decoded_otherwise(some[0], error) and not some[0].source.ready:
                    groups.append(some)
            else:
                for sample in some:
                    sample.frames = copied(sample.frames)
        bad = [sample.error for sample in samples if sample.error is not None]
        # JPEGs were decoded when they were packed, and their bytes are checked: then it is not they
        if len(bad) == len(samples) >= _ALL_AT_ONCE and self._device.type == "cuda" and self._otherwise is None:
            raise DeviceError(f"the GPU decodes none of {len(samples)} clips: {bad[0]}. Try data.decode=cpu")

    def _decoded_otherwise(self, sample: Sample, error: GraphError) -> bool:
        """Have the CPU decode a sample that a GPU's decoder rejects. False: it cannot either, and the sample has its error."""
        reason = f"the decoder rejects it: {error}"
        if self._otherwise is not None and not sample.source.pictures:
            try:
                sample.source = self._otherwise(sample)
                return True
            except BadSample as bad:
                reason = str(bad)
        sample.error, sample.source = BadSample(reason), NOTHING
        return False

    def _fed(self, plan: Plan, samples: list[Sample]) -> Graph:
        files = plan.source == "files"
        sources = [sample.source for sample in samples]
        pieces = [piece for source in sources for piece in source.pieces]
        views, sizes = [], []
        for sample, source in zip(samples, sources, strict=True):
            size, scaled = self._sizes(sample.request.video)
            given = scaled if self._scaled else size
            draw = sample.request.draw
            random = generator(*draw, view=True) if plan.augment and draw else None
            count = 1 if files else len(source.pieces)
            views += [View(0, 0, *given) if plan.uncropped else self._view(size, given, random)] * count
            sizes += [scaled] * count
        resting = self._resting.setdefault(plan, [])
        graph = resting.pop() if resting else self.make(plan)
        graph.start(pieces, views, sizes, [s.positions for s in sources] if files else [])
        return graph

    def make(self, plan: Plan) -> Graph:
        """A new graph for a plan; the decoder's own takes `units` pieces, that for pictures as many as its clips have frames."""
        own = plan == self._plan
        units = self.units if own else self._clips * self._config.num_frames
        load = self._config.hw_decoder_load
        return Graph(plan, self._config.image_size, units, self._device, self._threads, load)

    def _take(self, graph: Graph | None, samples: list[Sample]) -> None:
        """Set the samples' frames to what the graph made of them. A graph that fails is not used again."""
        if graph is None:
            raise GraphError("it refused them")
        output: Any = graph.result()
        self._resting[graph.plan].append(graph)
        if graph.plan.source == "files" and not graph.plan.uncropped:  # a tensor a clip
            for sample, frames in zip(samples, output, strict=True):
                sample.frames = frames
            return
        ends = accumulate(len(sample.source.positions) for sample in samples)
        for sample, end in zip(samples, ends, strict=True):
            sample.frames = output[end - len(sample.source.positions) : end]

    def _sizes(self, video: Video) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height of what is stored, and of it scaled as the recipe says."""
        size = (video.width, video.height)
        return size, self._config.geometry.size(*size)

    def _view(self, size: tuple[int, int], given: tuple[int, int], random: Generator | None) -> View:
        if self._config.resize_mode == "shortest":
            return view(given, self._config, random)
        # a random window is drawn in the stored picture's shape
        return view(size, self._config, random).within(size, given)


def _halves(samples: list[Sample]) -> list[list[Sample]]:
    middle = len(samples) // 2
    return [samples[:middle], samples[middle:]] if middle else [samples]
