"""The training run, from a configuration to a run folder."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from c4c import checkpoint
from c4c.config import Config, dump, to_dict
from c4c.engine import Learner, build_engine, read_scale, start_distributed, stop_distributed, train_step
from c4c.evaluate import evaluate
from c4c.model import CLIP4Clip, build
from c4c.optim import freeze
from c4c.report import Report
from c4c.run import Metrics, check_continuation, last_validation, prepare, save_description
from pipelines.loader import Batch, Loader
from shards.dataset import Split
from shards.joined import open_splits


def train(config: Config) -> None:
    """Train as `config` says, on every rank of the launcher. Raises ValueError for what cannot be done."""
    if config.run.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    rank, world, device = start_distributed()
    try:
        Trainer(config, rank, world, device).run()
    finally:
        stop_distributed()


class Trainer:
    """One rank's part of a run."""

    def __init__(self, config: Config, rank: int, world: int, device: torch.device):
        self.config, self.rank, self.world, self.device = config, rank, world, device
        self.folder = Path(config.run.dir)
        for key in ("train", "test"):
            if not getattr(config.data, key):
                raise ValueError(f"data.{key} is not set: name the folder of a packed split, data.{key}=data/…")
        self.split, self.test = open_splits(config.data.train), Split(config.data.test)
        resuming = config.run.resume == "auto" and (self.folder / checkpoint.FOLDER / "latest").exists()
        if resuming:
            check_continuation(self.folder, to_dict(config))
        torch.manual_seed(config.run.seed)
        model = build(config.model, config.data.num_frames)
        freeze(model, config.train.freeze_layers)
        _check_sizes(model, config)
        self.engine = build_engine(Learner(model), config.engine, config.train, world, config.deepspeed)
        self.step = checkpoint.restore(self.engine, self.folder) if resuming else 0
        self.loader = Loader(
            self.split, config.data, batch_size=config.train.batch_size, seed=config.run.seed,
            drop_last=config.train.drop_last, rank=rank, world=world,
            device=device, quarantine=self.folder / "quarantine.jsonl", cache=config.cache,
        )  # fmt: skip
        # only now that nothing is left to be refused: a mistake must not move an earlier run aside
        moved = prepare(self.folder, config.run.resume) if rank == 0 else None
        dist.barrier()
        self.per_epoch = self.loader.steps_per_epoch
        self.total = config.train.total_steps(self.per_epoch)
        self.validated = last_validation(self.folder) == self.step
        dist.barrier()
        self.report = Report(rank == 0, self.total, self.per_epoch, self.step)
        self.metrics = None
        if rank == 0:
            save_description(self.folder, dump(config), model.spec)
            self.metrics = Metrics(self.folder, self.step)
        self._introduce(moved)

    def run(self) -> None:
        """The training loop."""
        epoch, first = divmod(self.step, self.per_epoch)
        with self.loader, self.report:
            if self.step and not self.validated:
                self._validate()  # the run was killed between saving and validating
            self._mark = time.perf_counter()
            for batch in self.loader.batches(epoch, first, max(0, self.total - self.step)):
                factor = self.config.train.factor(self.step, self.per_epoch)
                loss = train_step(self.engine, batch, factor, self.config.train.micro_batch_size)
                self.step += 1
                self._log(batch, loss, self.config.train.lr * factor)
                if self.step % self.per_epoch == 0 or self.step == self.total:
                    self._end_of_epoch()
        if self.metrics:
            self.metrics.close()
        self.report.say(
            f"done: {self.step} steps. Evaluate with\n    python launch/eval.py --ckpt {self.folder}\n"
            f"and see the curves with\n    tensorboard --logdir {self.folder}"
        )

    def _log(self, batch: Batch, loss: torch.Tensor, lr: float) -> None:
        if self.world > 1:
            dist.all_reduce(loss)
            loss /= self.world
        scale = read_scale(self.engine)
        if self.rank:
            return
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        clips = len(batch.valid) * self.world
        values = {
            "epoch": (self.step - 1) // self.per_epoch,
            "train/loss": loss.item(),
            "train/lr": lr,
            "train/logit_scale": scale,
            "train/grad_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "data/wait_s": batch.wait_s,
            "data/wait_pct": 100 * batch.wait_s / seconds,
            "step_s": seconds,
            "clips_per_s": clips / seconds,
            **batch.stats.metrics(),
        }
        self.metrics.step(self.step, values)
        self.report.step(self.step, values)

    def _end_of_epoch(self) -> None:
        checkpoint.save(self.engine, self.folder, self.step, self.config.checkpoint.keep_last)
        self._validate()
        self._mark = time.perf_counter()  # neither saving nor validation is part of a step

    def _validate(self) -> None:
        """If one is due at this step."""
        every, epochs = self.config.train.eval_every, self.step // self.per_epoch
        if self.step != self.total and not (every and self.step % self.per_epoch == 0 and epochs % every == 0):
            return
        self.engine.eval()
        result, _ = evaluate(self.engine.module.model, self.engine, self.test, self.config.data, self.device)
        self.engine.train()
        if self.metrics:
            self.metrics.validation(self.step, result)
        self.report.validation(self.step, result)

    def _introduce(self, moved: Path | None) -> None:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        if moved:
            self.report.say(f"an earlier run in {self.folder} was moved to {moved}; run.resume=auto would continue it")
        self.report.say(
            f"{self.config.model.backbone} + {self.config.model.head}, {parameters / 1e6:.1f} M weights; {len(self.split)} "
            f"videos, {self.loader.order.pairs} pairs; {self.total} steps of {self.config.train.batch_size} on {self.world} "
            f"x {self.device.type}, ZeRO {self.config.engine.zero_stage}, {self.config.engine.precision}; -> {self.folder}"
        )
        if self.step:
            self.report.say(f"continuing after step {self.step}")


def _check_sizes(model: CLIP4Clip, config: Config) -> None:
    if model.image_size != config.data.image_size:
        raise ValueError(
            f"data.image_size={config.data.image_size}, but {config.model.backbone} takes pictures of {model.image_size}: "
            f"set data.image_size={model.image_size}"
        )
    if config.data.max_words > model.context_length:
        raise ValueError(
            f"data.max_words={config.data.max_words} is longer than the {model.context_length} tokens that "
            f"{config.model.backbone} takes"
        )
