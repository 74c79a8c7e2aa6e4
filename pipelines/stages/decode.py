"""Stored frames of many clips to frames of the recipe's size, whatever single clips do to the graph."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from operator import is_

import torch

from pipelines.config import DataConfig
from pipelines.frame_sampling import generator
from pipelines.stages.augment import View, view
from pipelines.stages.buffers import keep_freed_memory
from pipelines.stages.fetch import BadSample, Request, Source
from pipelines.stages.graph import Graph, GraphError, Plan, bounded, copied
from pipelines.stats import Stats
from shards.schema import Video
from shards.video.picture import scaled_size

_UNDER_WAY = 2  # groups of clips at once, the one that is waited for included


@dataclass(eq=False)
class Started:
    """Clips whose frames are being made: rows of a batch, what was read of each, and the graph at work."""

    rows: list[int]
    requests: list[Request]
    sources: list[Source]
    graph: Graph | None = None  # None: one failed at them, or they were given up


class Clips:
    """Clips of a batch on their way through the graph, some at a time."""

    def __init__(self, requests: list[Request], sources: list[Source], groups: list[list[int]]):
        self.requests, self.sources = requests, sources
        self.left, self.begun = deque(groups), deque[Started]()

    def are(self, requests: list[Request], sources: list[Source]) -> bool:
        pairs = ((self.requests, requests), (self.sources, sources))
        return all(len(a) == len(b) and all(map(is_, a, b)) for a, b in pairs)


class Decoder:
    """Graphs for clips, as many as are under way at once; one that fails is made anew. At most `units` pieces (see
    Source) are taken by each.

    scaled: pictures come resized to the recipe's short side already."""

    def __init__(
        self, plan: Plan, config: DataConfig, units: int, device: torch.device, threads: int, stats: Stats, scaled: bool = False
    ):  # fmt: skip
        self.units, self._plan, self._config, self._scaled, self._stats = units, plan, config, scaled, stats
        self._make: Callable[[], Graph] = lambda: Graph(plan, config.image_size, units, device, threads)
        self._resting: list[Graph] = []
        self._under_way: deque[Started] = deque()
        if device.type == "cpu":
            keep_freed_memory()

    def clips(self, requests: list[Request], sources: list[Source]) -> Clips:
        """Those that are not ready yet, as many at a time as are taken at once."""
        rows = [i for i, source in enumerate(sources) if not source.ready]
        return Clips(requests, sources, self.groups(rows, sources))

    def begin(self, clips: Clips) -> None:
        """Begin with as many of them as there is room for."""
        while clips.left and len(self._under_way) < _UNDER_WAY:
            clips.begun.append(self.start(clips.left.popleft(), clips.requests, clips.sources))

    def groups(self, rows: Sequence[int], sources: Sequence[Source]) -> list[list[int]]:
        """Rows of a batch, as many at a time as are taken at once."""
        return bounded(rows, [len(sources[i].pieces) for i in rows], self.units) if rows else []

    def start(self, rows: list[int], requests: list[Request], sources: list[Source]) -> Started:
        """Begin with these rows of a batch. Several groups may be under way."""
        part = Started(rows, [requests[i] for i in rows], [sources[i] for i in rows])
        with suppress(GraphError):  # `finish` will find out which clip it is
            part.graph = self._fed(part.requests, part.sources)
        self._under_way.append(part)
        return part

    def finish(self, part: Started) -> tuple[dict, dict[int, BadSample]]:
        """{row: uint8 frames [n, side, side, 3]}, good until the next `start`, and {row: why} of those that do not decode."""
        began = time.perf_counter()
        self._under_way.remove(part)
        try:
            out, bad = self._taken(part), {}
        except GraphError:
            out, bad = self._bisected(part)
        stage = "resize_s" if self._plan.source == "pictures" else "decode_s"
        setattr(self._stats, stage, getattr(self._stats, stage) + time.perf_counter() - began)
        return out, bad

    def drop(self) -> None:
        """Give up what is under way."""
        for part in self._under_way:
            part.graph = None  # before the sources: it waits for the run that reads them
        self._under_way.clear()

    def close(self) -> None:
        """Give up what is under way, and the graphs with their threads and memory."""
        self.drop()
        self._resting.clear()

    def _bisected(self, part: Started) -> tuple[dict, dict[int, BadSample]]:
        """As `finish`; groups that the graph fails at are halved until the bad ones are found."""
        bad, out = {}, {}
        groups = self.groups(range(len(part.rows)), part.sources)
        while groups:
            group = groups.pop()
            some = Started(*([values[i] for i in group] for values in (part.rows, part.requests, part.sources)))
            try:
                some.graph = self._fed(some.requests, some.sources)
                found = self._taken(some)
            except GraphError as error:
                if len(group) == 1:
                    bad[some.rows[0]] = BadSample(f"the decoder rejects it: {error}")
                else:
                    groups += [group[: len(group) // 2], group[len(group) // 2 :]]
            else:
                out |= {row: copied(frames) for row, frames in found.items()}
        return out, bad

    def _fed(self, requests: list[Request], sources: list[Source]) -> Graph:
        files, whole = self._plan.source == "files", self._plan.whole
        pieces = [piece for source in sources for piece in source.pieces]
        views, sizes = [], []
        for request, source in zip(requests, sources, strict=True):
            size, scaled = self._sizes(request.video)
            random = generator(*request.draw, view=True) if self._plan.augment and request.draw else None
            count = 1 if files else len(source.pieces)
            views += [View(0, 0, *size) if whole else view(size, self._config, random)] * count
            sizes += [scaled] * count
        graph = self._resting.pop() if self._resting else self._make()
        graph.start(pieces, views, sizes, [s.positions for s in sources] if files else None)
        return graph

    def _taken(self, part: Started) -> dict:
        graph, part.graph = part.graph, None
        if graph is None:
            raise GraphError("it refused them")
        output, ends = graph.result(), list(accumulate(len(s.positions) for s in part.sources))
        self._resting.append(graph)
        return {row: output[a:b] for row, a, b in zip(part.rows, [0, *ends], ends, strict=False)}

    def _sizes(self, video: Video) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height of what the graph is given, and of it scaled to the recipe's short side."""
        size = (video.width, video.height)
        scaled = scaled_size(*size, self._config.short_side)
        return (scaled if self._scaled else size), scaled
