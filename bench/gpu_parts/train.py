"""Steps of a training session on the loader's batches: as the trainer takes them, without what it does between steps."""

import statistics
import tempfile
from collections.abc import Sequence

from bench.gpu_parts.clock import WARM, timed
from bench.gpu_parts.parts import Given
from bench.gpu_parts.step import rates, started
from c4c.training.outcome import Outcome
from c4c.training.session import Session
from pipelines.loader import Batch

LOSS_STEPS, LOSS_BATCH = 4, 8


class Steps:
    """A session's steps on its loader's batches. On a GPU a step's numbers are read one step late, as the trainer does.

    Neither checkpoints nor validations nor metrics files are made.
    """

    def __init__(self, session: Session):
        self._session, self._batches = session, session.batches(session.total)
        self._before: Outcome | None = None
        self.waits: list[float] = []  # seconds that each step waited for its batch
        self.losses: list[float] = []  # of all steps but the last

    def __call__(self) -> None:
        batch: Batch = next(self._batches)
        outcome = self._session.step(batch, False, False)
        if self._before is not None:
            self.losses.append(self._before.loss)
        self._before = outcome
        self.waits.append(batch.wait_s)


def training(given: Given, *, stored: str = "intra", cache: bool = False) -> None:
    """Rate, MFU and memory of steps on the loader's batches, and how long they waited for them."""
    with tempfile.TemporaryDirectory(prefix="gpu-cache-") as folder:
        words = [f"cache.dir={folder}", "cache.max_gb=16"] if cache else []
        with started(given, stored=stored, words=words) as (config, device):
            session = Session(config, 0, 1, device)
            with session.loader:
                steps = Steps(session)
                for _ in range(max(WARM[device.type], session.per_epoch if cache else 0)):
                    steps()
                steps.waits.clear()
                times = timed(steps, given.seconds, device)
            waited = statistics.fmean(steps.waits)
            given.note(**rates(config, device, times), data_wait_pct=100 * waited / times["mean_s"],
                       last_loss=steps.losses[-1])  # fmt: skip


def losses(given: Given, *, words: Sequence[str]) -> None:
    """The losses of the first steps."""
    with started(given, words=[*words, f"train.batch_size={LOSS_BATCH}"]) as (config, device):
        session = Session(config, 0, 1, device)
        with session.loader:
            given.note(losses=[session.step(batch).loss for batch in session.batches(LOSS_STEPS)])
