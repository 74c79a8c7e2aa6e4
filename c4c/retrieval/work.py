"""How ranks and threads share the work of an evaluation, without a trace in its numbers.

A matrix product's last bits depend on its shape, on the number of threads that compute it, and on where its operands lie in
memory. So the work is cut into pieces that depend on nothing but the data; a piece is computed by one thread, wherever it is
computed; several pieces are computed at once. (Seen in torch 2.12 with MKL: `x @ w.T` of 10 rows gives other bits on 2 threads
than on 1, and of 1 row others where `w` does not start at a multiple of 64 bytes.)
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from c4c.losses import world_size

_ALIGNED = 64  # bytes; torch's own allocations start there
_MOST_THREADS = 32  # each holds the activations of a piece

P = TypeVar("P")
R = TypeVar("R")


class EvalWork:
    """Shares pieces of work among ranks and, on a CPU, among threads. A context: inside, torch computes on one thread.

    lockstep: every computation exchanges data between ranks (ZeRO 3), so that all ranks compute the same things one after another.
    ranks: whether the ranks share; without, the calling one does it all. at_once: whether threads may compute at the same time.
    """

    def __init__(self, device: torch.device, *, lockstep: bool = False, ranks: bool = True, at_once: bool = True):
        self.device, self.lockstep = device, lockstep
        self.world = world_size() if ranks else 1
        self.rank = dist.get_rank() if self.world > 1 else 0
        self._at_once = at_once and not lockstep
        self._pool: ThreadPoolExecutor | None = None
        self._depth = 0

    def __enter__(self) -> "EvalWork":
        self._depth += 1
        if self._depth == 1 and self.device.type == "cpu":
            self._threads = torch.get_num_threads()
            torch.set_num_threads(1)
            if self._at_once and self._threads > 1:
                self.threads = min(self._threads, _MOST_THREADS)
                self._pool = ThreadPoolExecutor(
                    self.threads, "c4c-eval", initializer=torch.set_num_threads, initargs=(1,)
                )
        return self

    def __exit__(self, *_) -> None:
        self._depth -= 1
        if self._depth == 0 and self.device.type == "cpu":
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None
            torch.set_num_threads(self._threads)

    def share(self, pieces: Sequence[P]) -> Sequence[P]:
        """The pieces that this rank computes where every rank can compute any: all of them in lockstep."""
        return pieces if self.lockstep else pieces[self.rank :: self.world]

    def map(self, job: Callable[[P], R], pieces: Iterator[P] | Sequence[P]) -> Iterator[R]:
        """job(piece) of each, in order. A few pieces more than threads are taken ahead. Gradients are off."""
        job = torch.no_grad()(job)
        if self._pool is None:
            yield from map(job, pieces)
            return
        ahead: deque[Future[R]] = deque()
        try:
            for piece in pieces:
                ahead.append(self._pool.submit(job, piece))
                if len(ahead) > self.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks that share."""
        if self.world > 1 and not self.lockstep:
            dist.all_reduce(tensor)
        return tensor

    def most(self, tensor: Tensor) -> Tensor:
        """The largest over the ranks that share, element by element."""
        if self.world > 1 and not self.lockstep:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather(self, rows: dict[int, Tensor]) -> list[Tensor]:
        """All ranks' tensors, in the order of their numbers."""
        if self.world > 1:
            parts: list[Any] = [None] * self.world
            dist.all_gather_object(parts, {i: row.cpu() for i, row in rows.items()})
            rows = {i: row for part in parts for i, row in part.items()}
        return [rows[i].to(self.device) for i in sorted(rows)]


@contextmanager
def aligned(model: nn.Module) -> Iterator[None]:
    """Inside, weights on a CPU start at multiples of 64 bytes; DeepSpeed puts them one after another into one flat tensor.

    Those that do not are copied meanwhile. (Not those that ZeRO 3 has partitioned, which it puts together by itself.)
    """
    tensors = [*model.parameters(), *model.buffers()]
    moved = [
        (tensor, tensor.data)
        for tensor in tensors
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNED and not hasattr(tensor, "ds_id")
    ]
    for tensor, before in moved:
        tensor.data = before.clone()
    try:
        yield
    finally:
        for tensor, before in moved:
            tensor.data = before
