"""Clips of a split as normalised frames on a device.

`intra`  each frame's JPEG is sliced out of the shard and decoded alone (libjpeg-turbo, or nvJPEG on a GPU), and of it
         only the crop; nothing is resized where the stored short side is the recipe's
`video`  the wanted frames are decoded out of the stored video (NVDEC on a GPU; without one, PyAV goes by the frame
         table to the keyframe before, as DALI's CPU decoder has no H.264, and torch resizes, see pipelines/stages/resize.py)

Apart from that DALI decodes, resizes and crops to uint8; pipelines/stages/normalise.py makes numbers of that, and a cache of
decoded frames may stand between the two. Sizes are given exactly as PIL/torchvision compute them.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from pipelines.config import CacheConfig, DataConfig
from pipelines.frame_sampling import candidates, choose, distinct, draws
from pipelines.remote_prefetch import span
from pipelines.stages.augment import augments
from pipelines.stages.buffers import Buffers, give_back_freed_memory
from pipelines.stages.cache import FrameCache
from pipelines.stages.decode import Clips, Decoder
from pipelines.stages.fetch import BadSample, Reader, Request, Source
from pipelines.stages.graph import Plan
from pipelines.stages.normalise import Normalise
from pipelines.stages.resize import resized
from pipelines.stats import Stats
from pipelines.workers import Hung, Job, Work, Workers
from shards.concat import Concat
from shards.schema import Video
from shards.split import Split
from shards.video.picture import scaled_size

__all__ = ["BadSample", "Lane", "Reading", "Request", "Source", "Undecodable", "lane_name"]

_BYTES_A_THREAD = 8 << 20  # of frames that a CPU makes at once: more fall out of its caches before they are used
_UNITS_TO_CACHE = 1024  # frames the graph takes at once where all frames of a video may be kept


@dataclass
class Reading:
    """Clips that are being fetched, and what came of each once that was waited for."""

    requests: list[Request]
    job: Job
    found: list[Source | BaseException] | None = None


class Undecodable(Exception):
    """Clips of a batch that were read well and still did not come out of the graph: {row: BadSample}."""

    def __init__(self, rows: dict[int, BadSample]):
        super().__init__(f"{len(rows)} clips do not decode")
        self.rows = rows


def lane_name(split: Split | Concat, config: DataConfig) -> str:
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
        split: Split | Concat,
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
        self._whole = self._augments and cache is not None and bool(cache.dir)  # what is cached is augmented afterwards
        self._shape = None  # what makes frames of pictures, where no graph does
        if self.name == "video" and not self._nvdec and (self._whole or not self._augments):
            self._shape = partial(resized, config=config, whole=self._whole)
        self.cache = self._open_cache(cache) if cache is not None and cache.dir else None
        self.stats = Stats()
        self._decoder, self._second = self._make_decoder(), self._make_second()
        self._ahead: Clips | None = None  # the next call's, begun already
        # a thread that decodes waits for the interpreter's lock at every packet: another one's turn
        readers = self.threads * (2 if self.name == "video" and not self._nvdec else 1)
        self._readers = Workers(readers, "c4c-read")
        self._workers = Workers(self.threads, "c4c-pixels")
        self._closed = False
        self._buffers = Buffers(self._device, config.prefetch + 3)

    # -- what a clip consists of

    def candidates(self, video: Video) -> np.ndarray | None:
        """The stored frames that training may draw from; None: all."""
        return candidates(video, self._pool) if self._draws and self._pool else None

    def _cacheable(self, request: Request) -> np.ndarray:
        """The frames of its video that the cache keeps, increasing: those of any clip, unless clips draw theirs."""
        if self._draws:
            low, high = request.video.inside
            return candidates(request.video, self._pool or high - low)
        return distinct(request.positions)

    # -- reading

    def start(self, requests: list[Request]) -> Reading:
        """Begin to fetch what `decode` needs of each clip, in the background; `finish` waits for it."""
        return Reading(requests, self._readers.start(self._fetch, requests))

    def finish(self, reading: Reading) -> list[Source | BadSample]:
        """What was fetched, checked against the crc32c of packing. Bad ones come as such."""
        if reading.found is None:
            self._wait(reading)
        for found in reading.found:
            if not isinstance(found, Source | BadSample):
                raise found
        return reading.found

    def good(self, reading: Reading) -> tuple[list[Request], list[Source]] | None:
        """What `decode` takes, if all of it was fetched by now and none is bad."""
        if reading.found is None:
            if not reading.job.ready:
                return None
            self._wait(reading)
        return (reading.requests, reading.found) if all(isinstance(s, Source) for s in reading.found) else None

    def _wait(self, reading: Reading) -> None:
        started = time.perf_counter()
        found = reading.job.results(self._patience)
        hung = "reading hangs: {} (data.read_timeout_s)"
        reading.found = [BadSample(hung.format(f)) if isinstance(f, Hung) else f for f in found]
        sources = [s for s in reading.found if isinstance(s, Source)]
        read, decode = sum(s.read_s for s in sources), sum(s.decode_s for s in sources)
        waited = time.perf_counter() - started
        share = decode / max(read + decode, 1e-9)
        self.stats.add(Stats(read_s=waited * (1 - share), decode_s=waited * share))

    def read(self, requests: list[Request]) -> list[Source | BadSample]:
        return self.finish(self.start(requests))

    def bytes_of(self, request: Request) -> tuple[int, int]:
        """Bytes [low, high) of the stored file that making the clip reads: none where it is cached."""
        if self._cached(request) is not None:
            return 0, 0
        return span(request.video, None if self._nvdec else self._to_decode(request))

    def _fetch(self, request: Request) -> Source:
        video = request.video
        if (cached := self._cached(request)) is not None:
            return cached
        wanted = self._to_decode(request)
        if self.name == "intra":
            return self._reader.jpegs(video, wanted)
        return self._reader.file(video, wanted) if self._nvdec else self._reader.pictures(video, wanted, self._shape)

    def _cached(self, request: Request) -> Source | None:
        if self.cache is None:
            return None
        keep, clip = self._cacheable(request), self.cache.get(request.video.index)
        return Source([clip], keep, ready=True, cached=True) if clip is not None and len(clip) == len(keep) else None

    def _to_decode(self, request: Request) -> np.ndarray:
        """The stored frames of a clip that is not cached; all that the cache keeps of its video, if that takes more."""
        if self.cache is not None and self.cache.has_room:
            keep = self._cacheable(request)
            if len(keep) <= self._decoder.units:
                return keep
        return distinct(request.positions)

    # -- decoding

    def decode(
        self,
        requests: list[Request],
        sources: list[Source],
        raw: bool = False,
        rows: int = 0,
        coming: Callable[[], tuple[list[Request], list[Source]] | None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames [clips, num_frames, 3, image_size, image_size] on the device, and mask bool [clips, num_frames].

        Slots that a clip does not fill are 0 and False. `sources` is what `read` gave, none of it bad. `raw`: uint8
        [clips, num_frames, image_size, image_size, 3], not normalised. `rows`: so many clips at least come out, the
        last ones empty. Raises Undecodable.

        `coming` is called whenever the graph has got work, and says what the next call will be asked for, once that is
        read: it is begun as soon as these clips leave the graph room.
        """
        config, side = self._config, self._config.image_size
        rows = max(rows, len(requests))
        clips = self._begun(requests, sources)
        mask = torch.zeros(rows, config.num_frames, dtype=torch.bool)
        for i, request in enumerate(requests):
            mask[i, : len(request.positions)] = True
        shape = (side, side, 3) if raw else (3, side, side)
        dtype = torch.uint8 if raw else self._normalise.dtype
        frames, bad = self._buffers.take((rows, config.num_frames, *shape), dtype), {}
        frames[len(requests) :] = 0
        ready = {i: s.pieces[0] for i, s in enumerate(sources) if s.ready}
        if self.cache is not None:
            self._keep(requests, sources, {i: p for i, p in ready.items() if not sources[i].cached})
        done = ready if self._second is None else {}
        filling = self._fill(frames, requests, sources, done, raw)
        for pictures, rejected in self._in_turn(clips, coming):
            bad |= rejected
            if not bad:
                self._filled(self._fill(frames, requests, sources, pictures, raw))
        self._filled(filling)
        if bad:
            raise Undecodable(bad)
        self._count(requests, sources)
        return frames, mask.to(self._device)

    def _begun(self, requests: list[Request], sources: list[Source]) -> Clips:
        """Those that the last call began already, if it is them; otherwise what was begun is given up."""
        clips, self._ahead = self._ahead, None
        if clips is None or not clips.are(requests, sources):
            if clips is not None and clips.begun:
                self._decoder.drop()
            clips = self._decoder.clips(requests, sources)
        return clips

    def _in_turn(self, clips: Clips, coming: Callable | None) -> Iterator[tuple[dict, dict[int, BadSample]]]:
        """{row: pictures} of some clips at a time, good until the next, and {row: why} of those that do not decode.

        The graph makes the next ones while the last are used, when these are still in the processor's caches."""
        requests, sources = clips.requests, clips.sources
        try:
            while True:
                self._decoder.begin(clips)
                if coming is not None and (found := coming()) is not None and not clips.left:
                    self._ahead = self._ahead or self._decoder.clips(*found)
                    self._decoder.begin(self._ahead)
                if not clips.begun:
                    break
                pictures, rejected = self._decoder.finish(clips.begun.popleft())
                if self.cache is not None:
                    self._keep(requests, sources, pictures)
                if self._second is None:
                    yield pictures, rejected
                else:
                    yield {}, rejected
                    yield from self._augmented(requests, sources, pictures)
        except BaseException:  # GeneratorExit too: whoever asked for them wants them no more
            self._decoder.drop()
            self._ahead = None
            raise
        if self._second is not None and (ready := {i: s.pieces[0] for i, s in enumerate(sources) if s.ready}):
            yield from self._augmented(requests, sources, ready)

    def _augmented(
        self, requests: list[Request], sources: list[Source], pictures: dict
    ) -> Iterator[tuple[dict, dict[int, BadSample]]]:
        """As `_in_turn`: of all that is cached of videos, the pictures that the clips show, as training sees them."""
        shown = {}
        for i, whole in pictures.items():
            wanted = distinct(requests[i].positions)
            shown[i] = Source([whole[k] for k in np.searchsorted(sources[i].positions, wanted)], wanted)
        for group in self._second.groups(list(shown), shown):
            yield self._second.finish(self._second.start(group, requests, shown))

    def _fill(
        self, frames: torch.Tensor, requests: list[Request], sources: list[Source], pictures: dict, raw: bool
    ) -> Work:
        """Begin to write pictures into their rows of a batch; `_filled` waits for that."""
        started, picks = time.perf_counter(), {}
        for i in pictures:
            wanted = requests[i].positions
            picks[i] = _places(sources[i].positions if self._second is None else distinct(wanted), wanted)
        on_host = list(picks)
        if self._device.type == "cuda" and picks:
            rows = torch.tensor(on_host, device=self._device)
            made = frames.new_empty(len(rows), *frames.shape[1:])
            self._normalise.fill_on_device(made, list(pictures.values()), list(picks.values()), raw)
            frames[rows] = made
            on_host = []
        work = self._workers.share(lambda i: self._normalise.fill(frames[i], pictures[i], picks[i], raw), on_host)
        self.stats.normalise_s += time.perf_counter() - started
        return work

    def _filled(self, work: Work) -> None:
        started = time.perf_counter()
        work.finish()
        self.stats.normalise_s += time.perf_counter() - started

    def __del__(self):
        if not sys.is_finalizing() and hasattr(self, "_buffers"):  # all of it was made
            self.close()

    def close(self) -> None:
        """End the threads, and give back memory and handles. Safe to call twice; a lane that is dropped does it itself."""
        if self._closed:
            return
        self._closed = True
        self._decoder.close()
        if self._second is not None:
            self._second.close()
        self._ahead = None
        give_back_freed_memory()
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

    def _keep(self, requests: list[Request], sources: list[Source], pictures: dict) -> None:
        started = time.perf_counter()

        def keep(i: int) -> None:
            clip = pictures[i]
            if np.array_equal(sources[i].positions, self._cacheable(requests[i])):
                self.cache.put(
                    requests[i].video.index, clip.cpu().numpy() if isinstance(clip, torch.Tensor) else np.asarray(clip)
                )

        if self.cache.has_room:
            self._workers.map(keep, list(pictures))
        self.stats.copy_s += time.perf_counter() - started

    # -- graphs

    def _make_decoder(self) -> Decoder:
        config = self._config
        source = "files" if self._nvdec else "jpegs" if self.name == "intra" else "pictures"
        splits = getattr(self._split, "splits", [self._split])
        stored = {split.info["profile"].get("short_side") for split in splits}
        resize = not (self.name == "intra" and stored == {config.short_side})
        if self._augments and not self._whole:
            plan = Plan(source, resize or config.random_crop > 0, augment=True)
        else:
            plan = Plan(source, resize, self._whole)
        units = self._max_clips * (1 if self._nvdec else config.num_frames)
        if self._device.type == "cpu":
            held = self.threads * _BYTES_A_THREAD // (config.image_size**2 * 3)
            units = min(units, max(config.num_frames, held))
        if self.cache is not None and not self._nvdec and self._draws:
            units = max(units, _UNITS_TO_CACHE)
        return Decoder(plan, config, units, self._device, self.threads, self.stats)

    def _make_second(self) -> Decoder | None:
        """From cached pictures to frames, where training augments them."""
        if not self._whole:
            return None
        config, plan = self._config, Plan("pictures", self._config.random_crop > 0, augment=True)
        units = self._max_clips * config.num_frames
        return Decoder(plan, config, units, self._device, self.threads, self.stats, scaled=True)

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
            "resized by": "DALI" if self._shape is None else "torch",
            "rule": "evenly spread" if self._draws else config.sampling,
            "variable rate": "by time",  # caches of before counted frames there
            "frames": self._pool if self._draws else config.num_frames,
            "fps": 0 if self._draws else config.fps,
            "resize": config.short_side,
            "crop": 0 if self._augments else config.image_size,
        }
        first = split.video(0)
        request = Request(first, choose(first, config.sampling, config.num_frames, config.fps))
        width, height = scaled_size(first.width, first.height, config.short_side)
        area = width * height if self._augments else config.image_size**2
        return FrameCache(cache, what, len(split), len(self._cacheable(request)) * area * 3)


def _places(among: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted position stands among increasing ones that hold them all."""
    return np.arange(len(among)) if np.array_equal(among, wanted) else np.searchsorted(among, wanted)
