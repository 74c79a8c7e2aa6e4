"""Stored frames of many clips to frames of the recipe's size, whatever single clips do to the graph."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from pipelines.augment import View, view
from pipelines.config import DataConfig
from pipelines.graph import Graph, GraphError, Plan, bounded, copied
from pipelines.read import BadSample, Request, Source
from pipelines.sampling import generator
from pipelines.stats import Stats
from shards.schema import Video
from shards.video import scaled_size


@dataclass
class Started:
    """Clips whose frames are being made: rows of a batch, what was read of each, and the graph at work."""

    rows: list[int]
    requests: list[Request]
    sources: list[Source]
    graph: Graph | None  # None: it refused them


class Decoder:
    """A graph for clips, made anew where it fails. At most `units` pieces (see Source) are taken at once.

    scaled: pictures come resized to the recipe's short side already."""

    def __init__(
        self, plan: Plan, config: DataConfig, units: int, device: torch.device, threads: int, stats: Stats, scaled: bool = False
    ):  # fmt: skip
        self.units, self._plan, self._config, self._scaled, self._stats = units, plan, config, scaled, stats
        self._make: Callable[[], Graph] = lambda: Graph(plan, config.image_size, units, device, threads)
        self._graph: Graph | None = None  # made when there is something for it to do
        self._under_way: deque[Started] = deque()

    @property
    def under_way(self) -> int:
        """Groups that were begun and are not finished."""
        return len(self._under_way)

    def groups(self, rows: Sequence[int], sources: Sequence[Source]) -> list[list[int]]:
        """Rows of a batch, as many at a time as are taken at once."""
        return bounded(rows, [len(sources[i].pieces) for i in rows], self.units) if rows else []

    def start(self, rows: list[int], requests: list[Request], sources: list[Source]) -> Started:
        """Begin with these rows of a batch. Several groups may be under way; they are finished in the same order."""
        part = Started(rows, [requests[i] for i in rows], [sources[i] for i in rows], None)
        # behind groups that were lost with their graph: it has to wait, or their results would be mistaken for its own
        if all(p.graph is not None and p.graph is self._graph for p in self._under_way):
            try:
                part.graph = self._feed(part.requests, part.sources)
            except GraphError:
                self._graph = None
        self._under_way.append(part)
        return part

    def finish(self, part: Started) -> tuple[dict, dict[int, BadSample]]:
        """{row: uint8 frames [n, side, side, 3]}, good until the next call, and {row: why} of clips that do not decode."""
        began, bad = time.perf_counter(), {}
        self._under_way.popleft()
        try:
            if part.graph is None or part.graph is not self._graph:
                raise GraphError("what is under way is lost with the first that fails")
            out = self._taken(part.rows, part.sources)
        except GraphError:
            if part.graph is self._graph:
                self._graph = None
            out, bad = self._bisected(part)
        stage = "resize_s" if self._plan.source == "pictures" else "decode_s"
        setattr(self._stats, stage, getattr(self._stats, stage) + time.perf_counter() - began)
        return out, bad

    def drop(self) -> None:
        """Give up what is under way."""
        self._graph = None
        self._under_way.clear()

    def _bisected(self, part: Started) -> tuple[dict, dict[int, BadSample]]:
        """As `finish`; groups that the graph fails at are halved until the bad ones are found."""
        bad, out = {}, {}
        places = range(len(part.rows))
        groups = self.groups(places, part.sources)
        while groups:
            group = groups.pop()
            rows, sources = [part.rows[i] for i in group], [part.sources[i] for i in group]
            try:
                self._feed([part.requests[i] for i in group], sources)
                found = self._taken(rows, sources)
            except GraphError as error:
                self._graph = None
                if len(group) == 1:
                    bad[rows[0]] = BadSample(f"the decoder rejects it: {error}")
                else:
                    groups += [group[: len(group) // 2], group[len(group) // 2 :]]
            else:
                out |= {row: copied(frames) for row, frames in found.items()}
        return out, bad

    def _feed(self, requests: list[Request], sources: list[Source]) -> Graph:
        files, whole = self._plan.source == "files", self._plan.whole
        pieces = [piece for source in sources for piece in source.pieces]
        views, sizes = [], []
        for request, source in zip(requests, sources, strict=True):
            size, scaled = self._sizes(request.video)
            random = generator(*request.draw, view=True) if self._plan.augment and request.draw else None
            count = 1 if files else len(source.pieces)
            views += [View(0, 0, *size) if whole else view(size, self._config, random)] * count
            sizes += [scaled] * count
        self._graph = self._graph or self._make()
        self._graph.start(pieces, views, sizes, [s.positions for s in sources] if files else None)
        return self._graph

    def _sizes(self, video: Video) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height of what the graph is given, and of it scaled to the recipe's short side."""
        size = (video.width, video.height)
        scaled = scaled_size(*size, self._config.short_side)
        return (scaled if self._scaled else size), scaled

    def _taken(self, rows: list[int], sources: list[Source]) -> dict:
        output, ends = self._graph.result(), list(accumulate(len(s.positions) for s in sources))
        return {row: output[a:b] for row, a, b in zip(rows, [0, *ends], ends, strict=False)}
