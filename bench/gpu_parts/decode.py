"""The decoders alone, with two graphs under way as in the loader."""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from bench.gpu_parts.clips import SIDE, requests_of, split_of
from bench.gpu_parts.clock import synchronise
from bench.gpu_parts.parts import Given
from pipelines.config import DataConfig
from pipelines.requests import ClipRequest
from pipelines.stages.augment import view
from pipelines.stages.fetch import Reader
from pipelines.stages.graph import Graph, Plan
from shards.split import Split

_BYTES_A_THREAD = 8 << 20  # of frames that a CPU makes at once, as the loader has it


@dataclass(frozen=True)
class Feed:
    """Arguments of a graph's `start`, and how many frames come of them."""

    arguments: tuple
    frames: int


def graph_of(
    source: str, units: int, device: torch.device, threads: int, *, resize: bool = False, roi: bool = True, load: float = 0.0
) -> Graph:  # fmt: skip
    """A graph of the loader's. roi: decode the crop alone. load: share of the hardware decoder."""
    plan = Plan(source, resize, roi=roi)
    return Graph(plan, SIDE, units, device, threads, load)


def jpeg_feeds(split: Split, requests: Sequence[ClipRequest], most: int) -> list[Feed]:
    """The stored JPEGs of the clips and the crop of each, at most so many at once."""
    first = requests[0].video
    config = DataConfig(resize=min(first.width, first.height)).filled()
    pieces = [piece for r in requests for piece in Reader(split).jpegs(r.video, r.positions).pieces]
    views = [view((r.video.width, r.video.height), config) for r in requests for _ in r.positions]
    groups = [slice(i, i + most) for i in range(0, len(pieces), most)]
    return [Feed((pieces[g], views[g]), len(pieces[g])) for g in groups]


def rate(
    graphs: list[Graph], feeds: list[Feed], seconds: float, device: torch.device, take: Callable | None = None
) -> float:
    """Frames a second, the graphs taking turns. take: what is done with the frames of each turn."""
    turns: deque[tuple[Graph, int]] = deque()
    again = cycle(feeds)

    def start(graph: Graph) -> None:
        feed = next(again)
        graph.start(*feed.arguments)
        turns.append((graph, feed.frames))

    def finish() -> tuple[Graph, int]:
        graph, count = turns.popleft()
        frames = graph.result()
        if take is not None:
            take(frames)
        return graph, count

    for graph in graphs * 2:  # the first turns allocate
        start(graph), finish()
    synchronise(device)
    began, done = time.perf_counter(), 0
    for graph in graphs:
        start(graph)
    while time.perf_counter() - began < seconds:
        graph, count = finish()
        done += count
        start(graph)
    while turns:
        done += finish()[1]
    synchronise(device)
    return done / (time.perf_counter() - began)


def jpegs(
    given: Given, *, crop: str, load: float, threads: int, stored: str = "intra", key: str = "frames_per_s"
) -> None:
    """Frames a second of the image decoder, measured twice."""
    device, split = given.device, split_of(given, stored)
    (feed,) = jpeg_feeds(split, requests_of(split, given.batch_size), 1 << 20)
    graphs = [graph_of("jpegs", feed.frames, device, threads, roi=crop == "roi", load=load) for _ in range(2)]
    given.note(**{key: [rate(graphs, [feed], given.seconds / 4, device) for _ in range(2)]})


def sizes(given: Given, *, threads: int) -> None:
    """As `jpegs`, of larger pictures."""
    for side in (240, 256):
        jpegs(given, crop="whole", load=0.0, threads=threads, stored=f"intra{side}", key=f"frames_per_s_of_{side}")


def on_cpu(given: Given, *, threads: int) -> None:
    """Frames a second decoded on the CPU and copied to the GPU through pinned memory, where there is one; measured twice."""
    device, split = given.device, split_of(given, "intra")
    threads = min(threads, os.cpu_count() or 1)
    units = threads * _BYTES_A_THREAD // (SIDE * SIDE * 3)
    feeds = jpeg_feeds(split, requests_of(split, given.batch_size), units)
    graphs = [graph_of("jpegs", units, torch.device("cpu"), threads) for _ in range(2)]
    take = _Copies(units, device) if device.type == "cuda" else None
    found = [rate(graphs, feeds, given.seconds / 4, device, take) for _ in range(2)]
    given.note(frames_per_s=found, threads=threads, copied_to_a_gpu=take is not None)


class _Copies:
    """Frames in memory to a GPU through two pinned buffers in turn, on a stream of its own."""

    def __init__(self, units: int, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._turns = cycle([self._buffer(units) for _ in range(2)])

    @staticmethod
    def _buffer(units: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        return torch.empty(units, SIDE, SIDE, 3, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()

    def __call__(self, frames) -> torch.Tensor:
        pinned, copied = next(self._turns)
        copied.synchronize()  # its last copy may be under way
        pinned[: len(frames)].copy_(torch.from_numpy(frames))
        with torch.cuda.stream(self._stream):
            moved = pinned[: len(frames)].to(self._device, non_blocking=True)
            copied.record()
        return moved


def videos(given: Given, *, stored: str) -> None:
    """Frames that are used, a second, of the video decoder; measured twice."""
    device, split = given.device, split_of(given, stored)
    requests = requests_of(split, min(32, given.batch_size))  # each clip has a decoder of its own, with its surfaces
    pieces = [Reader(split).file(r.video, r.positions).pieces[0] for r in requests]
    views = [view((r.video.width, r.video.height), DataConfig().filled()) for r in requests]
    positions = [r.positions for r in requests]
    feed = Feed((pieces, views, (), positions), sum(map(len, positions)))
    graphs = [graph_of("files", len(pieces), device, os.cpu_count() or 1, resize=True) for _ in range(2)]
    given.note(frames_per_s=[rate(graphs, [feed], given.seconds / 4, device) for _ in range(2)])
