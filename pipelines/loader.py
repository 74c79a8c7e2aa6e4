"""The next batches, ready before the step asks for them."""

import json
import os
import queue
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipelines.config import DataConfig
from pipelines.lane import BadSample, Lane, Request
from pipelines.mixture import order_of
from pipelines.order import rank_rows
from pipelines.sampling import choose
from pipelines.tokens import tokenize
from shards import ShardError
from shards.dataset import Split
from shards.joined import Joined

_REPLACEMENT_TRIES = 64  # batches looked through for a replacement


@dataclass
class Batch:
    """One rank's share of a global batch, padded to the same number of rows B on every rank.

    frames        float32 [B, num_frames, 3, image_size, image_size], normalised; empty slots are 0
    frame_mask    bool [B, num_frames]
    tokens        int64 [B, max_words]
    valid         bool [B]; False: the row is padding
    frame_numbers int32 [B, num_frames], numbers of the source video's frames; -1: empty
    wait_s        seconds the step waited for this batch
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


class Loader:
    """Training batches from a position on, made by a thread `config.prefetch` batches ahead.

    Use it as `with Loader(...) as loader: for batch in loader.batches(epoch, step, steps)`. A video that cannot be
    read or decoded is replaced by another pair of the epoch (by padding where a tiny set has none to spare), named once
    in a warning and in `quarantine` (a JSON-lines file); past `config.max_bad_fraction` of what was read, ShardError
    ends the run.
    """

    def __init__(
        self,
        split: Split | Joined,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        quarantine: Path | None = None,
    ):
        self.split, self.config, self.seed = split, config, seed
        self.order = order_of(split, config, batch_size, seed, drop_last)
        self._rows = rank_rows(batch_size, rank, world)
        self._lane = Lane(split, config, torch.device(device), self._rows.stop - self._rows.start)
        self._quarantine, self._bad, self._read = quarantine, {}, 0
        self._stop = threading.Event()
        self._queue: queue.Queue = queue.Queue(maxsize=config.prefetch)
        self._thread: threading.Thread | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def batches(self, epoch: int = 0, step: int = 0, count: int | None = None) -> Iterator[Batch]:
        """`count` batches (without end if None) from `step` of `epoch` on, across epoch boundaries."""
        if self._thread is not None:
            raise RuntimeError("this loader is already running: make another for another position")
        self._thread = threading.Thread(target=self._produce, args=(epoch, step, count), name="c4c-loader", daemon=True)
        self._thread.start()
        while True:
            started = time.perf_counter()
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            item.wait_s = time.perf_counter() - started
            yield item

    def close(self) -> None:
        """Stop the thread. Safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            while self._thread.is_alive():  # it may be waiting for room in the queue
                _empty(self._queue)
                self._thread.join(timeout=0.05)
            _empty(self._queue)
            self._queue.put(None)  # whoever still iterates comes to an end
        self._lane.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _produce(self, epoch: int, step: int, count: int | None) -> None:
        try:
            made = 0
            while (count is None or made < count) and not self._stop.is_set():
                self._put(self._make(epoch, step))
                made, step = made + 1, step + 1
                if step == self.steps_per_epoch:
                    epoch, step = epoch + 1, 0
            self._put(None)
        except BaseException as error:  # handed to the step, which raises it
            self._put(error)

    def _put(self, item) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _make(self, epoch: int, step: int) -> Batch:
        whole = self.order.batch(epoch, step)
        pairs = list(whole[self._rows])
        requests = [self._request(pair, epoch) for pair in pairs]
        rows = list(zip(pairs, requests, self._lane.read(requests), strict=True))
        self._read += len(rows)
        for i, (_, request, source) in enumerate(rows):
            if isinstance(source, BadSample):
                self._report(request.video, source)
                rows[i] = self._replace(epoch, step, self._rows.start + i)
        kept = [row for row in rows if row is not None]
        if not kept and len(rows) == len(whole):
            raise ShardError(
                f"step {step} of epoch {epoch}: no video of {self.split.path} is readable. Verify the shards"
            )
        pairs, requests, sources = map(list, zip(*kept, strict=True)) if kept else ([], [], [])
        pairs = np.array(pairs, np.int64).reshape(-1, 2)
        return self._assemble(epoch, step, pairs, requests, sources)

    def _assemble(self, epoch: int, step: int, pairs: np.ndarray, requests: list[Request], sources: list) -> Batch:
        rows = self._rows.stop - self._rows.start
        frames, mask = self._lane.decode(requests, sources)
        captions = [texts_of(self.split, int(v), self.config)[int(c)] for v, c in pairs]
        tokens = tokenize(captions, self.config.max_words)
        numbers = np.full((rows, self.config.num_frames), -1, np.int32)
        for row, request in enumerate(requests):
            numbers[row, : len(request.positions)] = request.video.frames.number[request.positions]
        device = frames.device
        return Batch(
            epoch=epoch,
            step=step,
            frames=_pad(frames, rows),
            frame_mask=_pad(mask, rows),
            tokens=_pad(tokens, rows).to(device),
            valid=(torch.arange(rows) < len(pairs)).to(device),
            frame_numbers=numbers,
            pairs=pairs,
            keys=[r.video.key for r in requests],
            captions=captions,
        )

    def _request(self, pair: np.ndarray, epoch: int) -> Request:
        video = self.split.video(int(pair[0]))
        random = None
        if self.config.sampling == "segment":  # drawn from counters, so a resumed run draws the same
            key = np.array([self.seed & (2**64 - 1), 1], np.uint64)
            counter = [0, epoch, int(pair[0]), int(pair[1])]  # the first counts the draws
            random = np.random.Generator(np.random.Philox(key=key, counter=counter))
        config = self.config
        return Request(video, choose(video, config.sampling, config.num_frames, config.fps, random))

    def _replace(self, epoch: int, step: int, row: int) -> tuple[np.ndarray, Request, list[np.ndarray]] | None:
        """Another pair of the epoch for a row of the global batch; None, for padding, if there is none to spare."""
        for pair in self._spares(epoch, step, row):
            request = self._request(pair, epoch)
            (source,) = self._lane.read([request])
            self._read += 1
            if not isinstance(source, BadSample):
                return pair, request, source
            self._report(request.video, source)
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

    def _report(self, video, reason: BadSample) -> None:
        self._bad[video.index] = self._bad.get(video.index, 0) + 1
        if self._bad[video.index] == 1:
            warnings.warn(f"{self.split.path}: {video.key} cannot be used and is replaced: {reason}", stacklevel=2)
            if self._quarantine is not None and not self._listed(video.key):
                line = json.dumps({"split": str(self.split.path), "key": video.key, "reason": str(reason)}) + "\n"
                descriptor = os.open(self._quarantine, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.write(descriptor, line.encode())  # one write: ranks share the file
                os.close(descriptor)
        bad = sum(self._bad.values())
        limit = self.config.max_bad_fraction
        if bad > limit * max(self._read, 1000):
            raise ShardError(
                f"{bad} of {self._read} samples read from {self.split.path} are bad, more than "
                f"data.max_bad_fraction={limit} allows. Last: {video.key}: {reason}. Run: python -m c4c.shard verify "
                f"{self.split.path}"
            )

    def _listed(self, key: str) -> bool:
        """Whether another rank, or this run before it was resumed, has listed the video."""
        if not self._quarantine.exists():
            return False
        there = [json.loads(line) for line in self._quarantine.read_text().splitlines()]
        return any(entry["key"] == key and entry["split"] == str(self.split.path) for entry in there)


def texts_of(split: Split, video: int, config: DataConfig) -> list[str]:
    """The texts that describe a video: its captions, or with `config.paragraph` all of them as one."""
    texts = [caption["text"] for caption in split.captions(video)]
    return [" ".join(texts)] if config.paragraph else texts


class VideoReader:
    """Every video of a split once, in order, for evaluation; ranks take turns.

    Each rank gets the same number of batches (collectives need that); a rank without videos left gets empty ones.
    """

    def __init__(self, split: Split, config: DataConfig, *, rank: int = 0, world: int = 1, device="cpu"):
        self.split, self.config = split, config
        self._mine = np.arange(rank, len(split), world)
        size = config.eval_batch_size
        most = -(-len(split) // world)  # videos of a rank
        self.batches = -(-most // size)
        self._lane = Lane(split, config, torch.device(device), size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """(video indices [n], frames [n, num_frames, 3, H, W], mask [n, num_frames]), n <= eval_batch_size, n may be 0.

        Raises ShardError for a video that cannot be decoded: a score over fewer videos would not be the score.
        """
        size = self.config.eval_batch_size
        for i in range(self.batches):
            indices = self._mine[i * size : (i + 1) * size]
            videos = [self.split.video(int(v)) for v in indices]
            config = self.config
            requests = [Request(v, choose(v, config.sampling, config.num_frames, config.fps)) for v in videos]
            sources = self._lane.read(requests)
            for video, source in zip(videos, sources, strict=True):
                if isinstance(source, BadSample):
                    raise ShardError(
                        f"{self.split.path}: {video.key} cannot be evaluated: {source}. Pack the split again."
                    )
            yield indices, *self._lane.decode(requests, sources)

    def close(self) -> None:
        self._lane.close()


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
