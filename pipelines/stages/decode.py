"""Stage: what was fetched of clips, to uint8 frames of the recipe's size, whatever single clips do to the graph."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

import torch

from pipelines.chain import Stream
from pipelines.config import DataConfig
from pipelines.frame_sampling import generator
from pipelines.requests import Sample
from pipelines.stages.augment import View, view
from pipelines.stages.buffers import keep_freed_memory
from pipelines.stages.fetch import NOTHING, BadSample
from pipelines.stages.graph import Graph, GraphError, Plan, copied
from shards.schema import Video
from shards.video.picture import scaled_size

_UNDER_WAY = 2  # groups of clips at once, the one that is waited for included


@dataclass(eq=False)
class _Group:
    """Samples that are decoded together, in the order of the stream."""

    samples: list[Sample]
    graph: Graph | None = None  # None: nothing for it to do, or it failed at them

    @property
    def encoded(self) -> list[Sample]:
        """Those that the graph has to decode."""
        return [sample for sample in self.samples if not sample.source.ready]


class Decoder:
    """A stream of samples to groups of samples with frames, in the same order.

    A group takes at most `units` pieces (see Source) and `clips` samples, whatever batch they belong to: the graph is
    filled, and the next group is decoded while the last one is used. scaled: pictures come resized to the recipe's short
    side already."""

    def __init__(
        self, plan: Plan, config: DataConfig, units: int, clips: int, device: torch.device, threads: int, scaled: bool = False
    ):  # fmt: skip
        self.units, self._clips = units, clips
        self._plan, self._config, self._scaled = plan, config, scaled
        self._make: Callable[[], Graph] = lambda: Graph(plan, config.image_size, units, device, threads)
        self._resting: list[Graph] = []
        if device.type == "cpu":
            keep_freed_memory()

    def __call__(self, samples: Stream) -> Iterator[list[Sample]]:
        """Groups of samples. Frames are good until the next group is asked for. Clips that do not decode come with
        `error`; what the stream raises is raised behind the samples before."""
        under_way: deque[_Group] = deque()
        waiting: list[Sample] = []  # for a group to be full
        held = 0  # pieces of those
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
                    pieces = 0 if sample.source.ready else len(sample.source.pieces)
                    if waiting and (len(waiting) == self._clips or held + pieces > self.units):
                        under_way.append(self._start(waiting))
                        waiting, held = [], 0
                    waiting.append(sample)
                    held += pieces
                if ended is not None and waiting and len(under_way) < _UNDER_WAY:
                    under_way.append(self._start(waiting))
                    waiting = []
                if not under_way:
                    break
                yield self._finish(under_way.popleft())
        finally:
            for group in under_way:
                group.graph = None  # before the sources: it waits for the run that reads them
        if ended is not None and not isinstance(ended, StopIteration):
            raise ended

    @property
    def takes_pictures(self) -> bool:
        """Whether it is given pictures that are decoded already."""
        return self._plan.source == "pictures"

    def close(self) -> None:
        """Give up the graphs with their threads and memory."""
        self._resting.clear()

    def _start(self, samples: list[Sample]) -> _Group:
        group = _Group(samples)
        if encoded := group.encoded:
            with suppress(GraphError):  # `_finish` will find out which clip it is
                group.graph = self._fed(encoded)
        return group

    def _finish(self, group: _Group) -> list[Sample]:
        encoded = group.encoded
        if encoded:
            try:
                self._take(group.graph, encoded)
            except GraphError:
                self._bisect(encoded)
            finally:
                group.graph = None
        for sample in group.samples:
            sample.positions = sample.source.positions
            if sample.source.ready and sample.source.pieces:
                sample.frames = sample.source.pieces[0]
        return group.samples

    def _bisect(self, samples: list[Sample]) -> None:
        """As `_take`; groups that the graph fails at are halved until the bad clips are found."""
        groups = [samples]
        while groups:
            some = groups.pop()
            try:
                self._take(self._fed(some), some)
            except GraphError as error:
                if len(some) == 1:
                    some[0].error, some[0].source = BadSample(f"the decoder rejects it: {error}"), NOTHING
                else:
                    groups += [some[: len(some) // 2], some[len(some) // 2 :]]
            else:
                for sample in some:
                    sample.frames = copied(sample.frames)

    def _fed(self, samples: list[Sample]) -> Graph:
        files, uncropped = self._plan.source == "files", self._plan.uncropped
        sources = [sample.source for sample in samples]
        pieces = [piece for source in sources for piece in source.pieces]
        views, sizes = [], []
        for sample, source in zip(samples, sources, strict=True):
            size, scaled = self._sizes(sample.request.video)
            draw = sample.request.draw
            random = generator(*draw, view=True) if self._plan.augment and draw else None
            count = 1 if files else len(source.pieces)
            views += [View(0, 0, *size) if uncropped else view(size, self._config, random)] * count
            sizes += [scaled] * count
        graph = self._resting.pop() if self._resting else self._make()
        graph.start(pieces, views, sizes, [s.positions for s in sources] if files else [])
        return graph

    def _take(self, graph: Graph | None, samples: list[Sample]) -> None:
        """Set the samples' frames to what the graph made of them. A graph that fails is not used again."""
        if graph is None:
            raise GraphError("it refused them")
        output = graph.result()
        ends = accumulate(len(sample.source.positions) for sample in samples)
        self._resting.append(graph)
        for sample, end in zip(samples, ends, strict=True):
            sample.frames = output[end - len(sample.source.positions) : end]

    def _sizes(self, video: Video) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height of what the graph is given, and of it scaled to the recipe's short side."""
        size = (video.width, video.height)
        scaled = scaled_size(*size, self._config.short_side)
        return (scaled if self._scaled else size), scaled
