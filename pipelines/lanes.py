"""How clips of a split become frames: which stages, by what the sample table says and what the machine has.

`intra`  each frame's JPEG is sliced out of the shard and decoded alone (libjpeg-turbo, or nvJPEG on a GPU), and of it
         only the crop; nothing is resized where frames are stored as the recipe scales them
`video`  the wanted frames are decoded out of the stored video (NVDEC on a GPU, but for videos that stages/nvdec.py leaves
         out; those, and all without a GPU, PyAV decodes: it goes by the frame table to the keyframe before, as DALI's
         CPU decoder has no H.264, and torch resizes, see stages/resize.py)

Apart from that DALI decodes, resizes and crops to uint8; stages/normalise.py makes numbers of that, and a cache of
decoded frames may stand between the two. Sizes are given exactly as PIL/torchvision compute them. With data.decode=cpu, a
GPU gets frames that the CPU decoded.
"""

import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from pipelines import probe
from pipelines.chain import Stage, Stream, chain
from pipelines.config import CacheConfig, DataConfig
from pipelines.cores import cores
from pipelines.frame_sampling import candidates, choose, distinct, draws
from pipelines.geometry import require_shape
from pipelines.remote_prefetch import RemotePrefetch, share_of, span
from pipelines.requests import BatchPlan, ClipRequest, Sample
from pipelines.stages.augment import augments
from pipelines.stages.buffers import give_back_freed_memory
from pipelines.stages.cache import FrameCache
from pipelines.stages.collate import Collate
from pipelines.stages.decode import Decoder
from pipelines.stages.fetch import NOTHING, BadSample, Reader, Source
from pipelines.stages.graph import Plan
from pipelines.stages.nvdec import why_not
from pipelines.stages.resize import resized
from pipelines.stages.transfer import loader_stream, on_host, to_device
from pipelines.stats import Stats
from pipelines.workers import Hung, InOrder, Workers
from shards.dataset import Dataset
from shards.schema import Video
from shards.video.geometry import stored_geometry

_BYTES_A_THREAD = 8 << 20  # of frames that a CPU makes at once: more fall out of its caches before they are used
_UNITS_TO_CACHE = 1024  # frames the graph takes at once where all frames of a video may be kept


def _threads(device: torch.device) -> int:
    """Of a rank, as far as the machine's cores go; beside a GPU two are left to whoever launches the step."""
    own = cores()
    return own - 2 if device.type == "cuda" and own > 4 else own


def require_decoder(split: Dataset, config: DataConfig, device: torch.device) -> None:
    """Try what decodes a split on a GPU, while its memory is free. Raises ValueError as `Lane` does."""
    _where(device, lane_name(split, config), config)


def _where(device: torch.device, lane: str, config: DataConfig) -> tuple[torch.device, bool]:
    """On which device frames are decoded, and whether only a crop of each JPEG is."""
    cpu = torch.device("cpu")
    if device.type == "cpu" and config.decode == "gpu":
        probe.warn_once("data.decode=gpu: there is no GPU that torch can use, so the CPU decodes")
    if device.type == "cpu" or config.decode == "cpu":
        return cpu, True
    if lane == "intra":
        crop = probe.jpeg_crop(device, config.jpeg_crop, config.hw_decoder_load)
    else:
        crop = "roi" if probe.has_video(device) else None
    if crop is None and config.decode == "gpu":
        raise ValueError(f"data.decode=gpu: no decoder of {device} passes its try; use data.decode=cpu or auto")
    return (device, crop == "roi") if crop else (cpu, True)


def lane_name(split: Dataset, config: DataConfig) -> str:
    """The lane that suits a split. Raises ValueError if the one asked for does not, or if its pictures do not suit the recipe."""
    for part in split.parts if config.resize_mode else ():  # else it is not known yet
        require_shape(part, config)
    intra = split.info["profile"]["name"] == "intra"
    if config.lane == "intra" and not intra:
        raise ValueError(
            f"data.lane=intra needs shards of independent JPEGs, and {split.path} has profile "
            f"{split.info['profile']['name']}: pack with --profile intra, or use data.lane=auto"
        )
    return config.lane if config.lane != "auto" else "intra" if intra else "video"


class Lane:
    """The stages from requests to batches of frames, for one split. `device` is torch's; `rows` a batch has at most.

    `training`: views may be drawn, and the cache holds what training draws from. `raw`: frames stay uint8.
    """

    def __init__(
        self,
        split: Dataset,
        config: DataConfig,
        device: torch.device,
        rows: int,
        *,
        cache: CacheConfig | None = None,
        training: bool = False,
        raw: bool = False,
    ):
        config = config.filled()
        self.name = lane_name(split, config)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._split, self._config, self._device, self._rows = split, config, device, rows
        self._augments = training and augments(config)
        self.threads = config.threads or _threads(device)
        self._decoding, self._roi = _where(device, self.name, config)
        self._rejected: set[int] = set()  # videos that NVDEC did not decode, by their number
        self._reader = Reader(split)
        # a server that is away for a while is no hanging read
        self._patience = config.read_timeout_s + (config.server_timeout_s if split.is_remote else 0)
        self._nvdec = self._decoding.type == "cuda" and self.name == "video"
        self._draws = training and draws(config.sampling)
        self._pool = cache.frames if cache is not None else 0  # stored frames to draw from; 0: all
        # what is cached is augmented afterwards
        self._uncropped = self._augments and cache is not None and bool(cache.dir)
        self._shape = None  # what makes frames of pictures, where no graph does
        if self.name == "video" and (self._uncropped or not self._augments):
            self._shape = partial(resized, config=config, uncropped=self._uncropped)
        self.cache = self._open_cache(cache) if cache is not None and cache.dir else None
        self._decoder, self._augmenter = self._make_decoder(), self._make_augmenter()
        # a thread that decodes waits for the interpreter's lock at every packet: another one's turn
        readers = self.threads * (2 if self.name == "video" and not self._nvdec else 1)
        self._readers = Workers(readers, "c4c-read")
        self._workers = Workers(self.threads, "c4c-pixels")
        self._collate = Collate(config, device, self._workers, raw)
        self._closed = False

    @property
    def how(self) -> str:
        """The lane, and what decodes its frames, for people."""
        if self._decoding.type == "cpu":
            return f"{self.name} lane, the CPU decodes"
        form = "only what the crop needs" if self._roi else "whole pictures"
        return f"{self.name} lane, {self._decoding} decodes" + (f" {form}" if self.name == "intra" else "")

    # -- the chain

    def stages(self) -> list[Stage]:
        """From a stream of samples to one of batch plans, whose frames are there but for the clips with an error."""
        stages: list[Stage] = [("read_s", self._fetch), *self._after_fetch()]
        if self._split.is_remote:
            ahead = RemotePrefetch(self._bring, self._config.ahead, share_of(self._config.local_gb))
            stages.insert(0, ("read_s", ahead))
        return stages

    def _after_fetch(self) -> list[Stage]:
        stages: list[Stage] = [("resize_s" if self._decoder.takes_pictures else "decode_s", self._decoder)]
        if self.cache is not None:
            stages.append(("copy_s", self._store))
        if self._augmenter is not None:
            stages += [("copy_s", self._shown), ("resize_s", self._augmenter)]
        return [*stages, ("normalise_s", self._collate)]

    def batch(self, requests: list[ClipRequest], sources: list[Source] | None = None) -> BatchPlan:
        """A batch of these clips alone, whatever else is on its way. sources: what was fetched of them already."""
        plan, stages = BatchPlan(0, len(requests), len(requests)), self._after_fetch()
        for request in requests:
            plan.add(request)
        samples = plan.complete()
        if sources is None:
            stages.insert(0, ("read_s", self._fetch))
        else:
            for sample, source in zip(plan.clips, sources, strict=True):
                sample.source = source
        (finished,) = chain(("order_s", iter(samples)), stages, Stats())
        return finished

    def mask(self, samples: list[Sample], rows: int) -> torch.Tensor:
        """Which slots of so many rows the samples' clips fill: bool [rows, num_frames] on the device."""
        mask = torch.zeros(rows, self._config.num_frames, dtype=torch.bool)
        for row, sample in enumerate(samples):
            mask[row, : len(sample.request.positions)] = True
        return to_device(mask, self._device)

    def use_device(self) -> None:
        """Have the calling thread work for the device, on a stream of its own, so that what it launches waits for no step.

        torch keeps a current device and stream for each thread: GPU 0 and the stream of the steps at first.
        """
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(loader_stream(self._device))

    def interrupt(self) -> None:
        """Have whoever waits for clips go on at once, with an error, even where reading hangs. `close` comes next."""
        self._readers.abandon()

    def close(self) -> None:
        """End the threads, and give back memory and handles. Safe to call twice; a lane that is dropped does it itself."""
        if self._closed:
            return
        self._closed = True
        self._collate.close()
        self._decoder.close()
        if self._augmenter is not None:
            self._augmenter.close()
        give_back_freed_memory()
        self._readers.close()
        self._workers.close()
        if self.cache is not None:
            self.cache.close()

    def __del__(self):
        if not sys.is_finalizing() and hasattr(self, "_closed"):  # all of it was made
            self.close()

    # -- stages: fetch

    def _fetch(self, samples: Stream) -> InOrder:
        """What each clip needs of its shard, checked against the crc32c of packing; up to two batches of them at once."""

        def then(sample: Sample, outcome: Source | BaseException) -> Sample:
            if isinstance(outcome, Hung):
                outcome = BadSample(f"reading hangs: {outcome} (data.read_timeout_s)")
            if isinstance(outcome, BadSample):
                sample.error = outcome
            elif isinstance(outcome, StopIteration):  # which would end the stream without a word
                raise RuntimeError("reading ended in a StopIteration") from outcome
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                sample.source = outcome
            return sample

        return InOrder(self._readers, self._source, samples, then, 2 * self._rows, self._patience)

    def _source(self, sample: Sample) -> Source:
        if sample.empty:
            return NOTHING
        request = sample.request
        if (cached := self._cached(request)) is not None:
            return cached
        wanted, own = self._to_decode(request), distinct(request.positions)
        try:
            return self._read(request.video, wanted)
        except BadSample:
            if np.array_equal(wanted, own):
                raise
            return self._read(request.video, own)  # a frame may be bad that the cache alone would have kept

    def _read(self, video: Video, wanted: np.ndarray) -> Source:
        if self.name == "intra":
            return self._reader.jpegs(video, wanted)
        if self._for_nvdec(video):
            return self._reader.file(video, wanted)
        return self._reader.pictures(video, wanted, self._shape)

    def _for_nvdec(self, video: Video) -> bool:
        return self._nvdec and video.index not in self._rejected and why_not(video) is None

    def _decoded_on_cpu(self, sample: Sample) -> Source:
        """What PyAV makes of a clip that NVDEC rejects, now and from now on."""
        self._rejected.add(sample.request.video.index)
        return self._reader.pictures(sample.request.video, sample.source.positions, self._shape)

    def _cached(self, request: ClipRequest) -> Source | None:
        if self.cache is None:
            return None
        keep, clip = self._cacheable(request), self.cache.get(request.video.index)
        return Source([clip], keep, ready=True, cached=True) if clip is not None and len(clip) == len(keep) else None

    def _to_decode(self, request: ClipRequest) -> np.ndarray:
        """The stored frames of a clip that is not cached; all that the cache keeps of its video, if that takes more."""
        if self.cache is not None and self.cache.has_room:
            keep = self._cacheable(request)
            if self._decoder.takes(request.video, len(keep)):
                return keep
        return distinct(request.positions)

    def _cacheable(self, request: ClipRequest) -> np.ndarray:
        """The frames of its video that the cache keeps, increasing: those of any clip, unless clips draw theirs."""
        if self._draws:
            low, high = request.video.inside
            return candidates(request.video, self._pool or high - low)
        return distinct(request.positions)

    def _bring(self, request: ClipRequest) -> int:
        """Bring the bytes that a clip reads to this machine, and return their number: 0 if the clip is cached."""
        if self._cached(request) is not None:
            return 0
        wanted = None if self._for_nvdec(request.video) else self._to_decode(request)
        return self._split.fetch(request.video, *span(request.video, wanted))

    # -- stages: cache

    def _store(self, groups: Stream) -> Iterator[list[Sample]]:
        """Keep in the cache what was decoded, if it is what the cache keeps of the video."""
        cache = self.cache
        assert cache is not None

        def keep(both: tuple[Sample, np.ndarray]) -> None:
            sample, clip = both
            # clips of later batches are fetched before this one is kept, so a video may come twice at first
            index = sample.request.video.index
            if np.array_equal(sample.positions, self._cacheable(sample.request)) and cache.get(index) is None:
                cache.put(index, clip)

        for group in groups:
            if cache.has_room:
                decoded = [s for s in group if s.frames is not None and not s.source.cached]
                self._workers.map(keep, list(zip(decoded, on_host([s.frames for s in decoded]), strict=True)))
            yield group

    def _shown(self, groups: Stream) -> Iterator[Sample]:
        """Of all that is cached of videos, the pictures that the clips show, for the augmenter."""
        for group in groups:
            for sample in group:
                if sample.frames is not None:
                    wanted = distinct(sample.request.positions)
                    places = np.searchsorted(sample.positions, wanted)
                    old, pictures = sample.source, [sample.frames[k] for k in places]
                    sample.source = Source(
                        pictures, wanted, cached=old.cached, bytes_read=old.bytes_read, decoded=old.decoded,
                        read_s=old.read_s, decode_s=old.decode_s,
                    )  # fmt: skip
                    sample.frames = None
                yield sample

    # -- graphs

    def _make_decoder(self) -> Decoder:
        config = self._config
        source = "files" if self._nvdec else "jpegs" if self.name == "intra" else "pictures"
        splits = self._split.parts
        stored = {stored_geometry(split.info["profile"]) for split in splits}
        # other codecs store even sides, which may be a pixel less than the recipe's
        exact = self.name == "intra" or config.resize_mode == "squash"
        resize = not (exact and stored == {config.geometry})
        if self._augments and not self._uncropped:
            plan = self._plan(source, resize or config.random_crop > 0, augment=True, roi=self._roi)
        else:
            plan = self._plan(source, resize, uncropped=self._uncropped, roi=self._roi)
        units = self._rows * (1 if self._nvdec else config.num_frames)
        if self._decoding.type == "cpu":
            frames_in_cpu_cache = self.threads * _BYTES_A_THREAD // (config.image_size**2 * 3)
            units = min(units, max(config.num_frames, frames_in_cpu_cache))
        if self.cache is not None and not self._nvdec and self._draws:
            units = max(units, _UNITS_TO_CACHE)
        otherwise = self._decoded_on_cpu if self._nvdec else None
        return Decoder(plan, config, units, self._rows, self._decoding, self.threads, otherwise=otherwise)

    def _make_augmenter(self) -> Decoder | None:
        """From cached pictures to frames, where training augments them."""
        if not self._uncropped:
            return None
        config, plan = self._config, self._plan("pictures", self._config.random_crop > 0, augment=True)
        units = self._rows * config.num_frames
        return Decoder(plan, config, units, self._rows, self._decoding, self.threads, scaled=True)

    def _plan(
        self, source: str, resize: bool, *, uncropped: bool = False, augment: bool = False, roi: bool = True
    ) -> Plan:
        config = self._config
        fill = config.fill if config.resize_mode == "longest" and not uncropped else None
        return Plan(source, resize, uncropped, augment, roi, fill, config.interpolation)

    def _open_cache(self, cache: CacheConfig) -> FrameCache:
        config, split = self._config, self._split
        if self._draws and self.name == "video" and not self._pool:
            raise ValueError(
                f"cache.dir with data.sampling={config.sampling} would keep every frame of the videos in {split.path}: "
                "set cache.frames to the number of frames of each video to draw from, 24 for example"
            )
        contents: dict[str, str | int | float] = {
            "digest": split.digest,
            "lane": self.name,
            "decoder": self._decoding.type,
            "resized by": "DALI" if self._shape is None or self._nvdec else "torch",
            "rule": "evenly spread" if self._draws else config.sampling,
            "variable rate": "by time",  # caches of before counted frames there
            "frames": self._pool if self._draws else config.num_frames,
            "fps": 0 if self._draws else config.fps,
            "resize": config.short_side,
            "crop": 0 if self._augments else config.image_size,
        }
        # left out where it is what caches of before hold
        unlike = {"resize mode": config.resize_mode, "interpolation": config.interpolation}
        contents |= {name: value for name, value in unlike.items() if value not in ("shortest", "bicubic")}
        if config.resize_mode == "longest" and not self._augments:
            contents["fill"] = config.fill
        if config.crop != "centre" and not self._augments:
            contents["crop at"] = config.crop
        if any(part.info["profile"]["name"] == "copy" for part in split.parts):
            contents["stamps"] = "proved"  # caches of before hold other frames where stamps are those of decoding
        if self._decoding.type == "cuda" and config.hw_decoder_load:
            contents["JPEG engines"] = config.hw_decoder_load
        first = split.video(0)
        request = ClipRequest(first, choose(first, config.sampling, config.num_frames, config.fps))
        width, height = config.geometry.size(first.width, first.height)
        area = width * height if self._augments else config.image_size**2
        return FrameCache(cache, contents, len(split), len(self._cacheable(request)) * area * 3)
