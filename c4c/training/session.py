"""Model, data and engine of one rank, built as a configuration says; what training, --check and --replay share."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from c4c.config import Config, require, to_dict
from c4c.models.clip4clip import build
from c4c.retrieval.evaluate import evaluate
from c4c.training.agreement import agree, any_rank, on_first_rank
from c4c.training.memory import out_of_memory
from c4c.training.outcome import Outcome
from c4c.training.param_groups import freeze
from c4c.training.run_folder import check_continuation
from c4c.training.step import Learner, train_step
from c4c.zero import checkpoint, state
from c4c.zero.engine import build_engine
from c4c.zero.skipping import was_applied
from c4c.zero.snapshot import restore
from pipelines.lanes import require_decoder
from pipelines.loader import Batch, Loader
from pipelines.survey import notes
from shards.concat import open_splits
from shards.dataset import Dataset
from shards.split import Split


class Session:
    """One rank's engine and loader. Raises ValueError for what cannot be done.

    resume: the run folder to load the state from, None for a new start. tag: which of its checkpoints, None for the newest
    that is not damaged; `notes` has a line for each reason why that is not the latest. from_start: start at step 0, as the run in
    `resume` did.
    """

    def __init__(
        self, config: Config, rank: int, world: int, device: torch.device, *, resume: Path | None = None,
        tag: str | None = None, from_start: bool = False, quarantine: Path | None = None,
    ):  # fmt: skip
        self.config, self.rank, self.world, self.device = config, rank, world, device
        require(config)
        self.split = open_splits(config.data.train, config.data.local)
        self.test = Split(config.data.test, config.data.local)
        for split in (self.split, self.test):
            require_decoder(split, config.data, device)
        if resume:
            same_data = checkpoint.trained_on(resume) == self.split.digest
            check_continuation(resume, to_dict(config), to_dict(Config()), ("data.train",) if same_data else ())
        agree(_identity(config, self.split, self.test), world)
        self.tag = tag  # of the checkpoint to go on from, None at the start of a run
        self.notes: list[str] = []
        if resume and tag is None and not from_start:
            self.tag, self.notes = on_first_rank(lambda: checkpoint.newest_whole(resume), rank, world)
        torch.manual_seed(config.run.seed)
        self.model = build(config.model, config.data.num_frames)
        freeze(self.model, config.train.freeze_layers)
        self.model.check_data(config.data, config.model.backbone)
        self.model.set_pixels(config.data)
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        with self._memory(f"the model has {size:.1f} M weights, beside which optimizers keep masters and moments",
                          "engine.offload=optimizer, or engine.zero_stage=3 on several ranks"):  # fmt: skip
            learner = Learner(self.model, config.train.loss)
            self.engine = build_engine(learner, config.engine, config.train, world, config.deepspeed)
        about = restore(self.engine, resume, self.tag) if resume and self.tag else {}
        self.done = int(about.get("step", 0))  # steps
        if (digest := about.get("data", self.split.digest)) != self.split.digest:
            raise ValueError(
                f"run.resume=auto: {self.split.path} is not the data that {resume} was trained on (digest "
                f"{self.split.digest[:12]}, was {digest[:12]}). Name the same split, or start anew with run.resume=never"
            )
        self.loader = Loader(
            self.split, config.data, batch_size=config.train.batch_size, seed=config.run.seed,
            drop_last=config.train.drop_last, rank=rank, world=world, device=device, quarantine=quarantine,
            cache=config.cache, clips=config.clips, raw=device.type == "cuda",
        )  # fmt: skip
        self.per_epoch = self.loader.steps_per_epoch
        # what hosts decide they exchange between hosts: on the default group of GPUs, each answer would wait for the step
        self._hosts: dist.ProcessGroup | None = None
        if device.type == "cuda" and world > 1:
            hosts = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.engine.timeout_s + 300))
            self._hosts = hosts if isinstance(hosts, dist.ProcessGroup) else None
        self.total = config.train.total_steps(self.per_epoch)

    def warnings(self) -> list[str]:
        """What a person should know before the steps begin. Reads captions for a second."""
        return notes(self.split, self.test, self.config.data) + list(
            filter(None, [self.config.train.endless_warmup(self.per_epoch)])
        )

    @property
    def weights(self) -> int:
        """How many the model has."""
        return sum(state.size(p) for p in self.engine.module.parameters())

    def batches(self, count: int):
        """The next `count` batches after the steps that are done."""
        epoch, step = divmod(self.done, self.per_epoch)
        return self.loader.batches(epoch, step, max(0, count))

    def step(self, batch: Batch, *asked: bool) -> Outcome:
        """One update on every rank. Returns as soon as it is launched: see `Outcome`.

        asked: what ranks want to decide alike; in `answers` each is true if it is on any rank.
        """
        train = self.config.train
        factor = train.factor(self.done, self.per_epoch)
        with self._memory(*self._step_memory(len(batch.valid))):
            loss = train_step(self.engine, batch, factor, train, train.frozen(self.done / self.per_epoch))
        sums = torch.stack([loss.double(), batch.valid.sum().double()])
        if self.world > 1:
            dist.all_reduce(sums)
        self.done += 1
        with state.gathered(self.model.clip.logit_scale):  # of which no rank has the whole under ZeRO 3
            scale = self.model.scale().detach()
        return Outcome(
            sums[0], sums[1], scale, self.engine.get_global_grad_norm(), world=self.world, lr=train.lr * factor,
            applied=was_applied(self.engine), answers=any_rank(asked, self._hosts),
        )  # fmt: skip

    def evaluate(self, split: Split | None = None, each: Callable[[], None] = lambda: None) -> dict:
        """Metrics of a split (the test split), the same on every rank. each: called before each batch."""

        def encode(*inputs: torch.Tensor):
            each()
            return self.engine(*inputs)

        data = self.config.data
        self.engine.eval()
        with self._memory(f"validation encodes {data.eval_batch_size} videos of {data.num_frames} frames at once, then "
                          "captions as many at a time", "a smaller data.eval_batch_size"):  # fmt: skip
            result, _ = evaluate(self.model, encode, split or self.test, data, self.device)
        self.engine.train()
        return result

    def position(self) -> dict:
        """What a checkpoint says beside the step, for people and to recognise the data."""
        epoch, step = divmod(self.done, self.per_epoch)
        return {"epoch": epoch, "step_of_epoch": step, "data": self.split.digest}

    @contextmanager
    def _memory(self, doing: str, remedies: str) -> Iterator[None]:
        """Turn running out of memory into an error that says what to change."""
        try:
            yield
        except RuntimeError as error:
            explanation = out_of_memory(error, doing, remedies)
            if explanation is None:
                raise
            raise ValueError(explanation) from error

    def _step_memory(self, rows: int) -> tuple[str, str]:
        train, frames = self.config.train, self.config.data.num_frames
        encoded = rows // train.accumulate if train.accumulate > 1 else min(train.micro_batch_size or rows, rows)
        return (
            f"each rank encodes {encoded} of its {rows} pairs at once, {encoded * frames} frames",
            f"train.micro_batch_size={max(1, encoded // 2)} (same losses, a second forward pass), "
            "engine.activation_checkpointing=true, engine.offload=optimizer, a higher engine.zero_stage on several ranks, "
            "or a smaller train.batch_size",
        )


def _identity(config: Config, train: Dataset, test: Split) -> dict[str, object]:
    """What has to be the same on every rank."""
    flat = {f"{group}.{key}": value for group, keys in to_dict(config).items() for key, value in keys.items()}
    versions = {name: version(name) for name in ("torch", "deepspeed")} | {"python": platform.python_version()}
    return flat | versions | {"contents of data.train": train.digest, "contents of data.test": test.digest}


def make_deterministic() -> None:
    """Bit for bit the same on the same machine and number of ranks. Before anything touches a GPU."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # all memory is written before it is read
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
