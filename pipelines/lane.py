"""Clips of a split as normalised frames on a device.

`intra`  each frame's JPEG is sliced out of the shard and decoded alone (libjpeg-turbo, or nvJPEG on a GPU), and of it
         only the crop; nothing is resized where the stored short side is the recipe's
`video`  the wanted frames are decoded out of the stored video (NVDEC on a GPU; without one, PyAV goes by the frame
         table to the keyframe before and hands pictures to the same graph: DALI's CPU decoder has no H.264)

In every lane DALI decodes, resizes and crops to uint8, pipelines/normalise.py makes numbers of that, and a cache of
decoded frames may stand between the two. Sizes are given exactly as PIL/torchvision compute them.
"""

import os
import time
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from pipelines.ahead import span
from pipelines.augment import View, augments, view
from pipelines.buffers import Buffers
from pipelines.cache import FrameCache
from pipelines.config import CacheConfig, DataConfig
from pipelines.graph import Graph, GraphError, Plan, bounded, copied
from pipelines.normalise import Normalise
from pipelines.read import BadSample, Reader, Source
from pipelines.sampling import candidates, choose, distinct, draws, generator
from pipelines.stats import Stats
from pipelines.workers import Hung, Job, Workers
from shards.dataset import Split
from shards.joined import Joined
from shards.schema import Video
from shards.video import scaled_size

__all__ = ["BadSample", "Lane", "Request", "Source", "Undecodable", "lane_name"]


_BYTES_A_THREAD = (
    4 << 20
)  # of frames that the graph makes at once on a CPU: more fall out of its caches before they are used
_UNITS_TO_CACHE = 1024  # frames the graph takes at once where all frames of a video may be kept


class Undecodable(Exception):
    """Clips of a batch that were read well and still did not come out of the graph: {row: BadSample}."""

    def __init__(self, rows: dict[int, BadSample]):
        super().__init__(f"{len(rows)} clips do not decode")
        self.rows = rows


@dataclass(frozen=True)
class Request:
    """The frames of one clip: positions in the video's frame table, int64 [frames], in clip order, any of them twice.

    `draw`, (seed, epoch, video, caption), decides its view where training augments; without it the clip looks as the
    recipe says. `texts`: what is said of it, in training."""

    video: Video
    positions: np.ndarray
    draw: tuple[int, int, int, int] | None = None
    texts: tuple[str, ...] = ()


def lane_name(split: Split | Joined, config: DataConfig) -> str:
    """The lane that suits a split. Raises ValueError if the one asked for does not."""
    intra = split.info["profile"]["name"] == "intra"
    if config.lane == "intra" and not intra:
        raise ValueError(
            f"data.lane=intra needs shards of independent JPEGs, and {split.path} has profile "
            f"{split.info['profile']['name']}: pack with --profile intra, or use data.lane=auto"
        )
    return config.lane if config.lane != "auto" else "intra" if intra else "video"


class Lane:
    """Decodes clips of one split. `device` is torch's; `max_clips` bounds a call of `decode`.

    `training`: views may be drawn, and the cache holds what training draws from.
    """

    def __init__(
        self,
        split: Split | Joined,
        config: DataConfig,
        device: torch.device,
        max_clips: int,
        *,
        cache: CacheConfig | None = None,
        training: bool = False,
    ):
        self.name = lane_name(split, config)
        self._split, self._config, self._device = split, config, device
        self._training, self._augments = training, training and augments(config)
        self._max_clips = max_clips
        self.threads = config.threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self._reader, self._normalise = Reader(split), Normalise(config)
        # a server that is away for a while is no hanging read
        self._patience = config.read_timeout_s + (config.server_timeout_s if split.remote else 0)
        self._nvdec = device.type == "cuda" and self.name == "video"
        self._draws = training and draws(config.sampling)
        self._pool = cache.frames if cache is not None else 0  # stored frames to draw from; 0: all
        self.cache = self._open_cache(cache) if cache is not None and cache.dir else None
        self._graph, self._second = self._make_graph(), self._make_second()
        self._readers = Workers(self.threads, "c4c-read")
        self._workers = Workers(self.threads, "c4c-pixels")
        self._buffers = Buffers(self._device, config.prefetch + 3)
        self.stats = Stats()

    # -- what a clip consists of

    def candidates(self, video: Video) -> np.ndarray | None:
        """The stored frames that training may draw from; None: all."""
        return candidates(video, self._pool) if self._draws and self._pool else None

    def _cacheable(self, video: Video) -> np.ndarray:
        """The frames of a video that the cache keeps; increasing."""
        config = self._config
        if self._draws:
            return candidates(video, self._pool or len(video.frames))
        return distinct(choose(video, config.sampling, config.num_frames, config.fps))

    # -- reading

    def start(self, requests: list[Request]) -> Job:
        """Begin to fetch what the graph needs of each clip, in the background; `finish` waits for it."""
        return self._readers.start(self._fetch, requests)

    def finish(self, job: Job) -> list[Source | BadSample]:
        """What was fetched, checked against the crc32c of packing. Bad ones come as such."""
        started = time.perf_counter()
        out = []
        for result in job.results(self._patience):
            if isinstance(result, Hung):
                result = BadSample(f"reading hangs: {result} (data.read_timeout_s)")
            elif isinstance(result, BaseException) and not isinstance(result, BadSample):
                raise result
            out.append(result)
        sources = [s for s in out if isinstance(s, Source)]
        read, decode = sum(s.read_s for s in sources), sum(s.decode_s for s in sources)
        waited = time.perf_counter() - started
        share = decode / max(read + decode, 1e-9)
        self.stats.add(Stats(read_s=waited * (1 - share), decode_s=waited * share))
        return out

    def read(self, requests: list[Request]) -> list[Source | BadSample]:
        return self.finish(self.start(requests))

    def bytes_of(self, request: Request) -> tuple[int, int]:
        """Bytes [low, high) of the stored file that making the clip reads: none where it is cached."""
        if self._cached(request.video) is not None:
            return 0, 0
        return span(request.video, None if self._nvdec else self._to_decode(request))

    def _fetch(self, request: Request) -> Source:
        video = request.video
        if (cached := self._cached(video)) is not None:
            return cached
        wanted = self._to_decode(request)
        if self.name == "intra":
            return self._reader.jpegs(video, wanted)
        return self._reader.file(video, wanted) if self._nvdec else self._reader.pictures(video, wanted)

    def _cached(self, video: Video) -> Source | None:
        if self.cache is None:
            return None
        keep, clip = self._cacheable(video), self.cache.get(video.index)
        return Source([clip], keep, cached=True) if clip is not None and len(clip) == len(keep) else None

    def _to_decode(self, request: Request) -> np.ndarray:
        """The stored frames of a clip that is not cached; all that the cache keeps of its video, if that takes more."""
        if self.cache is not None and self.cache.has_room:
            keep = self._cacheable(request.video)
            if len(keep) <= self._graph.units:
                return keep
        return distinct(request.positions)

    # -- decoding

    def decode(
        self, requests: list[Request], sources: list[Source], raw: bool = False, rows: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames [clips, num_frames, 3, image_size, image_size] on the device, and mask bool [clips, num_frames].

        Slots that a clip does not fill are 0 and False. `sources` is what `read` gave, none of it bad. `raw`: uint8
        [clips, num_frames, image_size, image_size, 3], not normalised. `rows`: so many clips at least come out, the
        last ones empty. Raises Undecodable.
        """
        config, clips, side = self._config, len(requests), self._config.image_size
        rows = max(rows, clips)
        mask = torch.zeros(rows, config.num_frames, dtype=torch.bool)
        for i, request in enumerate(requests):
            mask[i, : len(request.positions)] = True
        shape = (side, side, 3) if raw else (3, side, side)
        dtype = torch.uint8 if raw else self._normalise.dtype
        frames, bad = self._buffers.take((rows, config.num_frames, *shape), dtype), {}
        frames[clips:] = 0
        for group in bounded(range(clips), [len(s.pieces) for s in sources], self._graph.units) if clips else []:
            part = slice(group[0], group[-1] + 1)
            try:
                self._decode_into(frames[part], requests[part], sources[part], raw)
            except Undecodable as error:
                bad |= {group[i]: reason for i, reason in error.rows.items()}
        if bad:
            raise Undecodable(bad)
        self._count(requests, sources)
        return frames, mask.to(self._device)

    def _decode_into(self, frames: torch.Tensor, requests: list[Request], sources: list[Source], raw: bool) -> None:
        """As many clips as the graph takes at once; its output is used while it is in the processor's caches."""
        pictures, positions = self._decoded(requests, sources)
        started = time.perf_counter()
        picks = [_places(p, r.positions) for p, r in zip(positions, requests, strict=True)]
        if self._device.type == "cuda":
            self._normalise.fill_on_device(frames, pictures, picks, raw)
        else:
            self._workers.map(
                lambda i: self._normalise.fill(frames[i], pictures[i], picks[i], raw), range(len(requests))
            )
        self.stats.normalise_s += time.perf_counter() - started

    def close(self) -> None:
        self._readers.close()
        self._workers.close()
        if self.cache is not None:
            self.cache.close()

    def _count(self, requests: list[Request], sources: list[Source]) -> None:
        used = [len(distinct(r.positions)) for r in requests]
        self.stats.add(
            Stats(
                clips=len(requests),
                bytes_read=sum(s.bytes_read for s in sources),
                frames_used=sum(used),
                frames_decoded=sum(s.decoded for s in sources),
                frames_cached=sum(n for n, s in zip(used, sources, strict=True) if s.cached),
            )
        )

    def _decoded(self, requests: list[Request], sources: list[Source]) -> tuple[list, list[np.ndarray]]:
        """For each clip uint8 [n, side, side, 3], and which stored frames these are, increasing [n]."""
        new = [i for i, s in enumerate(sources) if not s.cached]
        stored = self._run(self._graph, requests, sources, new)
        stored |= {i: s.pieces[0] for i, s in enumerate(sources) if s.cached}
        if self.cache is not None and new:
            self._keep(requests, sources, stored, new)
        every = range(len(sources))
        if self._second is not None:
            sources = [self._shown(requests[i], sources[i], stored[i]) for i in every]
            stored = self._run(self._second, requests, sources, list(every))
        return [stored[i] for i in every], [s.positions for s in sources]

    def _shown(self, request: Request, source: Source, pictures: list | np.ndarray) -> Source:
        """Of all that is cached of a video, the pictures that the clip shows."""
        wanted = distinct(request.positions)
        return Source([pictures[k] for k in np.searchsorted(source.positions, wanted)], wanted)

    def _keep(self, requests: list[Request], sources: list[Source], stored: dict, new: list[int]) -> None:
        started = time.perf_counter()

        def keep(i: int) -> None:
            video = requests[i].video
            if np.array_equal(sources[i].positions, self._cacheable(video)):
                clip = stored[i].cpu().numpy() if isinstance(stored[i], torch.Tensor) else np.asarray(stored[i])
                self.cache.put(video.index, clip)

        if self.cache.has_room:
            self._workers.map(keep, new)
        self.stats.copy_s += time.perf_counter() - started

    def _run(self, graph: Graph, requests: list[Request], sources: list[Source], rows: list[int]) -> dict:
        """{row: frames} of these rows. A graph that fails is made anew and the rows halved until the bad ones are found."""
        started, bad, out = time.perf_counter(), {}, {}
        batches = bounded(rows, [len(sources[i].pieces) for i in rows], graph.units)
        many = len(batches) > 1
        while batches:
            part = batches.pop()
            try:
                found = self._run_once(graph, [requests[i] for i in part], [sources[i] for i in part])
            except GraphError as error:
                graph = self._rebuild(graph)
                if len(part) == 1:
                    bad[part[0]] = BadSample(f"the decoder rejects it: {error}")
                else:
                    batches += [part[: len(part) // 2], part[len(part) // 2 :]]
                many = True
                continue
            out |= zip(part, [copied(f) for f in found] if many else found, strict=True)
        if bad:
            raise Undecodable(bad)
        stage = "decode_s" if graph.plan.source != "pictures" else "resize_s"
        setattr(self.stats, stage, getattr(self.stats, stage) + time.perf_counter() - started)
        return out

    def _run_once(self, graph: Graph, requests: list[Request], sources: list[Source]) -> list:
        if not requests:
            return []
        files = graph.plan.source == "files"
        pieces = [piece for source in sources for piece in source.pieces]
        views, sizes = [], []
        for request, source in zip(requests, sources, strict=True):
            size = self._picture_size(request.video, graph)
            random = generator(*request.draw, view=True) if graph.plan.augment and request.draw else None
            seen = View(0, 0, *size) if graph.plan.whole else view(size, self._config, random)
            count = 1 if files else len(source.pieces)
            views += [seen] * count
            sizes += [scaled_size(*size, self._config.short_side)] * count
        output = graph.run(pieces, views, sizes, [s.positions for s in sources] if files else None)
        ends = list(accumulate(len(s.positions) for s in sources))
        return [output[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def _picture_size(self, video: Video, graph: Graph) -> tuple[int, int]:
        """Width and height of what the graph is given."""
        size = (video.width, video.height)
        return scaled_size(*size, self._config.short_side) if graph is self._second else size

    # -- graphs

    def _make_graph(self) -> Graph:
        config = self._config
        source = "files" if self._nvdec else "jpegs" if self.name == "intra" else "pictures"
        whole = self.cache is not None and self._augments
        splits = getattr(self._split, "splits", [self._split])
        stored = {split.info["profile"].get("short_side") for split in splits}
        resize = not (self.name == "intra" and stored == {config.short_side})
        if self._augments and not whole:
            plan = Plan(source, resize or config.random_crop > 0, augment=True)
        else:
            plan = Plan(source, resize, whole)
        units = self._max_clips * (1 if self._nvdec else config.num_frames)
        if self._device.type == "cpu":
            held = self.threads * _BYTES_A_THREAD // (config.image_size**2 * 3)
            units = min(units, max(config.num_frames, held))
        if self.cache is not None and not self._nvdec and self._draws:
            units = max(units, _UNITS_TO_CACHE)
        return Graph(plan, config.image_size, units, self._device, self.threads)

    def _make_second(self) -> Graph | None:
        """From cached pictures to frames, where training augments them."""
        if self.cache is None or not self._augments:
            return None
        config, plan = self._config, Plan("pictures", self._config.random_crop > 0, augment=True)
        return Graph(plan, config.image_size, self._max_clips * config.num_frames, self._device, self.threads)

    def _rebuild(self, graph: Graph) -> Graph:
        if graph is self._second:
            self._second = self._make_second()
            return self._second
        self._graph = self._make_graph()
        return self._graph

    def _open_cache(self, cache: CacheConfig) -> FrameCache:
        config, split = self._config, self._split
        if self._draws and self.name == "video" and not self._pool:
            raise ValueError(
                f"cache.dir with data.sampling={config.sampling} would keep every frame of the videos in {split.path}: "
                "say with cache.frames how many of each to draw from, 24 for example"
            )
        what = {
            "digest": split.digest,
            "lane": self.name,
            "decoder": self._device.type,
            "rule": "evenly spread" if self._draws else config.sampling,
            "frames": self._pool if self._draws else config.num_frames,
            "fps": 0 if self._draws else config.fps,
            "resize": config.short_side,
            "crop": 0 if self._augments else config.image_size,
        }
        first = split.video(0)
        width, height = scaled_size(first.width, first.height, config.short_side)
        area = width * height if self._augments else config.image_size**2
        return FrameCache(cache, what, len(split), len(self._cacheable(first)) * area * 3)


def _places(among: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted position stands among increasing ones that hold them all."""
    return np.arange(len(among)) if np.array_equal(among, wanted) else np.searchsorted(among, wanted)
