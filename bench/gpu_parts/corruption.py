"""Whether decoded frames are what they should be while the GPU is behind: a decoder that writes before the stream gets there
destroys frames that are still to be read. Seen with nvJPEG's hardware decoder on an H100 (meta-pytorch/torchcodec#1634)."""

import math
import time

import torch

from bench.gpu_parts.clips import requests_of, split_of
from bench.gpu_parts.clock import synchronise
from bench.gpu_parts.decode import Feed, graph_of, jpeg_feeds
from bench.gpu_parts.parts import Given
from pipelines.stages.graph import Graph

QUEUED_S, ITERATIONS, QUIET = 0.1, 200, 4


def check(given: Given, *, load: float, crop: str = "whole", iterations: int = ITERATIONS) -> None:
    """Decode behind a queue of work, compare with decoding after a wait; count the batches that differ.

    First the frames are held until they have been read, as the loader holds them (`held_differ`), then given back as soon as
    their reading is launched (`released_differ`), which shows whether holding them is needed. `quiet_differ` counts differences
    between runs that wait for each other: a decoder that is not deterministic.
    """
    device, split = given.device, split_of(given, "intra")
    requests = requests_of(split, min(2 * given.batch_size, len(split)))
    half = max(1, len(requests) // 2)
    # two sets of pictures, so that what one overwrites in the other shows
    feeds = [jpeg_feeds(split, some, 1 << 20)[0] for some in (requests[:half], requests[-half:])]
    most = max(feed.frames for feed in feeds)
    graphs = [graph_of("jpegs", most, device, 8, roi=crop == "roi", load=load) for _ in range(2)]
    expected = [_quiet(graphs[0], feed, device) for feed in feeds]
    again = [difference(_quiet(graphs[i % 2], feeds[i % 2], device), expected[i % 2]) for i in range(2 * QUIET)]
    given.note(**_counts("quiet", again))
    queue = Queue(device)
    for name, held in (("held", True), ("released", False)):
        found: list[float] = []
        began = time.perf_counter()
        while len(found) < 3 * iterations and time.perf_counter() - began < max(10.0, 2 * given.seconds):
            found += [difference(*pair) for pair in _behind(queue, graphs, feeds, expected, device, held)]
            if len(found) % 30 == 0:
                given.note(**_counts(name, found))
        given.note(**_counts(name, found))


def _counts(name: str, found: list[float]) -> dict[str, float]:
    return {
        f"{name}_compared": len(found),
        f"{name}_differ": sum(share > 0 for share in found),
        f"{name}_largest_difference_pct": 100 * max(found),
    }


def _quiet(graph: Graph, feed: Feed, device: torch.device) -> torch.Tensor:
    synchronise(device)
    graph.start(*feed.arguments)
    frames = torch.as_tensor(graph.result()).clone()
    synchronise(device)
    return frames


def _behind(
    queue: "Queue",
    graphs: list[Graph],
    feeds: list[Feed],
    expected: list[torch.Tensor],
    device: torch.device,
    held: bool,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three batches that were decoded while the stream was busy, each with what it should be."""
    first, second = graphs
    queue()
    first.start(*feeds[0].arguments)
    second.start(*feeds[1].arguments)
    kept, holding = [], []
    for graph, then in ((first, feeds[1]), (second, None), (first, None)):
        frames = torch.as_tensor(graph.result())
        kept.append(frames.clone())  # behind the queue, as a step's own reading is
        holding += [frames] if held else []
        del frames  # unless it is held, its memory is free from here on, in the order of the stream
        if then is not None:
            graph.start(*then.arguments)
    synchronise(device)
    return list(zip(kept, (expected[0], expected[1], expected[1]), strict=True))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of values that differ."""
    return (a != b).float().mean().item()


class Queue:
    """About so many seconds of work on the current stream, which a call puts there without waiting."""

    def __init__(self, device: torch.device, seconds: float = QUEUED_S):
        side = 4096 if device.type == "cuda" else 64
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._a = torch.randn(side, side, device=device, dtype=dtype)
        self._out, self._times = torch.empty_like(self._a), 10
        self(), synchronise(device)
        began = time.perf_counter()
        self(), synchronise(device)
        if device.type == "cuda":
            self._times = math.ceil(self._times * seconds / (time.perf_counter() - began))

    def __call__(self) -> None:
        for _ in range(self._times):
            torch.mm(self._a, self._a, out=self._out)
