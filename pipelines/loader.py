"""The next batches, ready before the step asks for them."""

import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipelines import narration as narration
from pipelines.config import CacheConfig, ClipsConfig, DataConfig
from pipelines.frame_sampling import choose, draws, generator, ordered
from pipelines.lanes import BadSample, Lane, Reading, Request, Source, Undecodable
from pipelines.mixture import order_of
from pipelines.narration import clip_of_pair, stored_between
from pipelines.pair_order import rank_rows
from pipelines.quarantine import Quarantine
from pipelines.remote_prefetch import Ahead, share_of, weakly
from pipelines.stats import Stats
from pipelines.tokens import tokenize
from shards import ShardError
from shards.concat import Concat
from shards.split import Split

_FAILED = object()  # in the queue, instead of a batch: `_error` says why
_REPLACEMENT_TRIES = 64  # batches looked through for a replacement


@dataclass
class Batch:
    """One rank's share of a global batch, padded to the same number of rows B on every rank.

    frames        data.pixels [B, num_frames, 3, image_size, image_size], normalised; empty slots are 0. From a loader
                  that is `raw`, uint8 [B, num_frames, image_size, image_size, 3]
    frame_mask    bool [B, num_frames]
    tokens        int64 [B, max_words]; with clips.bag above 1 [B, bag, max_words], the drawn caption first, and zeros
                  where a video says less
    valid         bool [B]; False: the row is padding
    frame_numbers int32 [B, num_frames], numbers of the source video's frames; -1: empty
    wait_s        seconds the step waited for this batch
    stats         what it cost
    """

    epoch: int
    step: int
    frames: torch.Tensor
    frame_mask: torch.Tensor
    tokens: torch.Tensor
    valid: torch.Tensor
    frame_numbers: np.ndarray
    pairs: np.ndarray
    keys: list[str]
    captions: list[str]
    wait_s: float = field(default=0.0)
    stats: Stats = field(default_factory=Stats)


@dataclass
class _Plan:
    """What a batch will consist of; with a `reading`, its clips are being read."""

    whole: int  # pairs of the global batch
    pairs: list[np.ndarray]
    requests: list[Request]
    reading: Reading | None = None


class Loader:
    """Training batches from a position on, made by a thread `config.prefetch` batches ahead.

    Use it as `with Loader(...) as loader: for batch in loader.batches(epoch, step, steps)`. A video that cannot be
    read or decoded is replaced by another pair of the epoch (by padding where a tiny set has none to spare), named once
    in a warning and in `quarantine` (a JSON-lines file); past `config.max_bad_fraction` of what was read, ShardError
    ends the run. Decoded frames are kept in `cache`. `raw` leaves the normalisation to whoever asked.
    """

    def __init__(
        self,
        split: Split | Concat,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        quarantine: Path | None = None,
        cache: CacheConfig | None = None,
        clips: ClipsConfig | None = None,
        raw: bool = False,
    ):
        self.split, self.config, self.seed, self.clips = split, config, seed, clips or ClipsConfig()
        narration.check(split, self.clips, config, cache)
        self.order = order_of(split, config, batch_size, seed, drop_last)
        self._rows = rank_rows(batch_size, rank, world)
        rows = self._rows.stop - self._rows.start
        self._lane = Lane(split, config, torch.device(device), rows, cache=cache, training=True)
        self._quarantine = Quarantine(split.path, quarantine, config.max_bad_fraction)
        self._raw, self._last = raw, None
        self._plans: dict[int, _Plan] = {}  # by place, counted through all epochs
        self._fetching = None
        if split.remote:
            self._fetching = Ahead(weakly(self._to_fetch), config.ahead, share_of(config.local_gb))
        self._stop = threading.Event()
        self._queue: queue.Queue = queue.Queue(maxsize=config.prefetch)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def threads(self) -> int:
        """Threads that decode."""
        return self._lane.threads

    def batches(self, epoch: int = 0, step: int = 0, count: int | None = None) -> Iterator[Batch]:
        """`count` batches (without end if None) from `step` of `epoch` on, across epoch boundaries."""
        if self._thread is not None:
            raise RuntimeError("this loader is already running: make another for another position")
        self._last = None if count is None else self._place(epoch, step) + count - 1
        at = (weakref.ref(self), self._queue, self._stop, epoch, step, count)
        self._thread = threading.Thread(target=_produce, args=at, name="c4c-loader", daemon=True)
        self._thread.start()
        while True:
            started, queued = time.perf_counter(), self._queue.qsize()
            item = self._get()
            if item is None:
                return
            if item is _FAILED:
                raise self._error
            item.wait_s = time.perf_counter() - started
            item.stats.queued = queued
            yield item

    def _get(self):
        while True:
            alive = self._thread.is_alive()  # asked first: what it put before it ended is in the queue
            try:
                return self._queue.get(timeout=1)
            except queue.Empty:
                if not alive:
                    raise RuntimeError(
                        "the loader's thread ended without a word; was the interpreter shutting down?"
                    ) from None

    def close(self) -> None:
        """Stop the threads. Safe to call twice; a loader that is dropped does it itself."""
        self._stop.set()
        if self._thread is not None:
            while self._thread.is_alive():  # it may be waiting for room in the queue
                _empty(self._queue)
                self._thread.join(timeout=0.05)
            _empty(self._queue)
            self._queue.put(None)  # whoever still iterates comes to an end
        if self._fetching is not None:
            self._fetching.close()
        self._lane.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        if sys.is_finalizing() or not hasattr(self, "_queue"):
            return
        self._stop.set()  # its thread keeps nothing of it, and ends soon; the lane closes itself
        if self._fetching is not None:
            self._fetching.close()

    def _make(self, epoch: int, step: int) -> Batch:
        before, place = replace(self._lane.stats), self._place(epoch, step)
        plan = self._started(place)
        rows = list(zip(plan.pairs, plan.requests, self._lane.finish(plan.reading), strict=True))
        del self._plans[place]
        self._quarantine.read += len(rows)
        spares: dict[int, Iterator] = {}
        bad = {i: source for i, (_, _, source) in enumerate(rows) if isinstance(source, BadSample)}
        while True:
            for i, reason in bad.items():
                self._quarantine.report(rows[i][1].video, reason)
                self._lane.stats.bad += 1
                rows[i] = self._replace(epoch, spares.setdefault(i, self._spares(epoch, step, self._rows.start + i)))
            kept = [i for i, row in enumerate(rows) if row is not None]
            if not kept and len(rows) == plan.whole:
                raise ShardError(
                    f"step {step} of epoch {epoch}: no video of {self.split.path} is readable. Verify the shards"
                )
            try:
                pairs, requests, sources = (
                    map(list, zip(*(rows[i] for i in kept), strict=True)) if kept else ([], [], [])
                )
                batch = self._assemble(epoch, step, np.array(pairs, np.int64).reshape(-1, 2), requests, sources)
            except Undecodable as error:
                bad = {kept[i]: reason for i, reason in error.rows.items()}
            else:
                batch.stats = self._lane.stats.minus(before)
                return batch

    def _wanted(self, place: int) -> bool:
        return self._last is None or place <= self._last

    def _planned(self, place: int) -> _Plan:
        if place not in self._plans:
            started = time.perf_counter()
            epoch, step = divmod(place, self.steps_per_epoch)
            whole = self.order.batch(epoch, step)
            pairs = list(whole[self._rows])
            self._plans[place] = _Plan(len(whole), pairs, [self._request(pair, epoch) for pair in pairs])
            self._lane.stats.order_s += time.perf_counter() - started
        return self._plans[place]

    def _started(self, place: int) -> _Plan:
        plan = self._planned(place)
        if plan.reading is None:
            if self._fetching is not None:
                self._fetching.reach(place, self._last)
            plan.reading = self._lane.start(plan.requests)
        return plan

    def _coming(self, place: int) -> tuple[list[Request], list[Source]] | None:
        """The clips of the batch at `place`, if they are read and good: their reading is begun here."""
        if not self._wanted(place):
            return None
        plan = self._started(place)
        if self._wanted(place + 1):
            self._planned(place + 1)
        return self._lane.good(plan.reading)

    def _to_fetch(self, place: int) -> list[Callable[[], int]]:
        """For each clip of the batch at `place` a function that brings its bytes to this machine and says how many."""
        epoch, step = divmod(place, self.steps_per_epoch)

        return [partial(weakly(self._fetch), pair, epoch) for pair in self.order.batch(epoch, step)[self._rows]]

    def _fetch(self, pair: np.ndarray, epoch: int) -> int:
        request = self._request(pair, epoch)
        return self.split.fetch(request.video, *self._lane.bytes_of(request))

    def _place(self, epoch: int, step: int) -> int:
        return epoch * self.steps_per_epoch + step

    def _assemble(
        self, epoch: int, step: int, pairs: np.ndarray, requests: list[Request], sources: list[Source]
    ) -> Batch:
        rows, place = self._rows.stop - self._rows.start, self._place(epoch, step)
        frames, mask = self._lane.decode(requests, sources, self._raw, rows, partial(self._coming, place + 1))
        started = time.perf_counter()
        texts = [request.texts for request in requests]
        tokens = self._tokens(texts)
        self._lane.stats.order_s += time.perf_counter() - started
        numbers = np.full((rows, self.config.num_frames), -1, np.int32)
        for row, request in enumerate(requests):
            numbers[row, : len(request.positions)] = request.video.frames.number[request.positions]
        device = frames.device
        return Batch(
            epoch=epoch,
            step=step,
            frames=frames,
            frame_mask=mask,
            tokens=_pad(tokens, rows).to(device),
            valid=(torch.arange(rows) < len(pairs)).to(device),
            frame_numbers=numbers,
            pairs=pairs,
            keys=[r.video.id for r in requests],
            captions=[bag[0] for bag in texts],
        )

    def _tokens(self, texts: list[tuple[str, ...]]) -> torch.Tensor:
        """int64 [pairs, max_words], or [pairs, bag, max_words] with zeros where a bag is smaller."""
        flat = tokenize([text for bag in texts for text in bag], self.config.max_words)
        if self.clips.bag == 1:
            return flat
        sizes = torch.tensor([len(bag) for bag in texts], dtype=torch.int64)
        tokens = flat.new_zeros(len(texts), self.clips.bag, self.config.max_words)
        tokens[torch.arange(self.clips.bag) < sizes[:, None]] = flat
        return tokens

    def _request(self, pair: np.ndarray, epoch: int) -> Request:
        video, config = self.split.video(int(pair[0])), self.config
        draw = (self.seed, epoch, int(pair[0]), int(pair[1]))
        drawn = draws(config.sampling) or config.frame_order == "random"
        random, among = generator(*draw) if drawn else None, self._lane.candidates(video)
        if self.clips.cut:
            clip = clip_of_pair(self.split.captions(video.index), int(pair[1]), video.duration, self.clips)
            between, texts = stored_between(video, clip.start, clip.end), clip.texts
        else:
            between, texts = None, (texts_of(self.split, video.index, config)[int(pair[1])],)
        positions = choose(video, config.sampling, config.num_frames, config.fps, random, among, between)
        return Request(video, ordered(positions, config.frame_order, random), draw, texts)

    def _replace(self, epoch: int, spares: Iterator[np.ndarray]) -> tuple[np.ndarray, Request, Source] | None:
        """Another pair of the epoch for a row of the global batch; None, for padding, if there is none to spare."""
        for pair in spares:
            request = self._request(pair, epoch)
            (source,) = self._lane.read([request])
            self._quarantine.read += 1
            if not isinstance(source, BadSample):
                return pair, request, source
            self._quarantine.report(request.video, source)
            self._lane.stats.bad += 1
        return None

    def _spares(self, epoch: int, step: int, row: int) -> Iterator[np.ndarray]:
        """Pairs of the batches after this one whose videos are not in it.

        They are dealt out to the rows in turn: no two rows get the same one, whichever ranks they are on, and what a
        row gets does not depend on what else was bad before.
        """
        whole = self.order.batch(epoch, step)
        seen, dealt = set(whole[:, 0].tolist()), 0
        for ahead in range(1, min(_REPLACEMENT_TRIES, self.steps_per_epoch)):
            for pair in self.order.batch(epoch, (step + ahead) % self.steps_per_epoch):
                if int(pair[0]) not in seen:
                    seen.add(int(pair[0]))
                    if dealt % len(whole) == row:
                        yield pair
                    dealt += 1


def _produce(
    found: "weakref.ref[Loader]", ready: queue.Queue, stop: threading.Event, epoch: int, step: int, count: int | None
) -> None:
    """The loader's thread. Between two batches it does not hold the loader, so that one that is dropped ends it."""

    def put(item) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    made = 0
    while (count is None or made < count) and (loader := found()) is not None and not stop.is_set():
        try:
            item, last = loader._make(epoch, step), step + 1 == loader.steps_per_epoch
        except BaseException as error:  # handed to the step, which raises it
            loader._error, item = error, _FAILED
        del loader  # an error holds it, too
        put(item)
        if item is _FAILED:
            return
        del item
        made, epoch, step = made + 1, epoch + last, 0 if last else step + 1
    loader = None
    put(None)


def texts_of(split: Split, video: int, config: DataConfig) -> list[str]:
    """The texts that describe a video: its captions, or with `config.paragraph` all of them as one."""
    texts = [caption["text"] for caption in split.captions(video)]
    return [" ".join(texts)] if config.paragraph else texts


def _pad(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _empty(waiting: queue.Queue) -> None:
    try:
        while True:
            waiting.get_nowait()
    except queue.Empty:
        pass
