"""`launch/train.py --check`: try everything a run needs in seconds, without writing to the run folder."""

import time
from itertools import islice
from pathlib import Path

from c4c.config import Config
from c4c.models import origin
from c4c.performance.memory_table import memory_table
from c4c.training.memory import memory_gib
from c4c.training.screen import Report, span
from c4c.training.session import Session, make_deterministic
from c4c.zero import checkpoint
from c4c.zero.distributed import start_distributed, stop_distributed
from shards import count, first_line
from shards.remote import Local
from shards.split import Split

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def check(config: Config) -> None:
    """Build everything, take two steps, encode one evaluation batch, and say what a run would be. Raises ValueError."""
    if config.run.deterministic:
        make_deterministic()
    rank, world, device = start_distributed(config.engine.timeout_s + 300)
    try:
        folder = Path(config.run.dir)
        say = Report(rank == 0, 1, 1, 0).say
        resuming = config.run.resume == "auto" and checkpoint.exist(folder)
        session = Session(config, rank, world, device, resume=folder if resuming else None)
        for note in (*session.notes, *session.model.notes, *session.engine.module.notes, *session.loader.notes):
            say(note)
        for note in session.warnings() if rank == 0 else ():
            say(f"warning: {note}")
        damaged = rank == 0 and _any_damaged(say, folder)
        steps: list[float] = []
        with session.loader:
            mark = time.perf_counter()
            for batch in islice(session.batches(2), 2):
                loss = session.step(batch).loss  # reading it waits for the step
                now = time.perf_counter()
                steps.append(now - mark)
                mark = now
                say(
                    f"step {session.done}: loss {loss:.4f}, {steps[-1]:.2f} s, of which {batch.wait_s:.2f} s waiting for data"
                )
        if (compiled := session.engine.module.compiled) is not None and compiled.problem:
            say(f"warning: {compiled.problem}")
        mark = time.perf_counter()
        first = Part(config.data.test, config.data.eval_batch_size * world, config.data.local)
        session.evaluate(first)
        say(f"evaluation: {len(first)} of {count(len(session.test), 'video')} in {time.perf_counter() - mark:.2f} s")
        _describe(say, config, session, steps, folder)
        for line in _memory_lines(session.config, world) if rank == 0 else ():
            say(line)
        say(f"everything {'else ' * damaged}works; nothing was written to the run folder")
    finally:
        stop_distributed()


def _any_damaged(say, folder: Path) -> bool:
    """Compare every checkpoint of the run folder with its checksums."""
    intact = []
    for tag in checkpoint.tags(folder):
        if reason := checkpoint.damage(folder / checkpoint.FOLDER / tag):
            say(f"warning: {folder / checkpoint.FOLDER / tag} is damaged: {reason}")
        else:
            intact.append(tag)
    if intact:
        say(f"intact checkpoints: {', '.join(intact)}")
    return len(intact) < len(checkpoint.tags(folder))


class Part(Split):
    """The first videos of a split."""

    def __init__(self, path: str, videos: int, local: Local | None = None):
        super().__init__(path, local)
        self._videos = min(videos, super().__len__())

    def __len__(self) -> int:
        return self._videos


def memory_per_rank_gib(
    weights: int, trained: int, precision: str, stage: int, world: int, offload: str, averaged: bool = False
) -> tuple[float, float]:
    """(on the device, on the host) GiB of weights, gradients, fp32 masters, moments and their average; activations come on top."""
    size = _BYTES[precision]
    model = weights * size / (world if stage == 3 else 1)
    grads = trained * size / (world if stage >= 2 else 1)
    state = (8 if precision == "fp32" and stage == 0 else 12) + 4 * averaged
    masters = trained * state / (world if stage >= 1 else 1)
    host = (masters if offload != "none" else 0.0) + (model if offload == "all" else 0.0)
    return (model + grads + masters - host) / 2**30, host / 2**30


def _memory_lines(config: Config, world: int) -> list[str]:
    """What fits a 24 GB card; one line with the reason where the model cannot be counted."""
    try:
        return memory_table(config, world)
    except (ValueError, NotImplementedError, RuntimeError) as error:  # what a tower makes of torch's meta device
        reason = first_line(error)
        return [f"what fits a card of 24 GB cannot be counted for {config.model.backbone} ({reason})"]


def _describe(say, config: Config, session: Session, steps: list[float], folder: Path) -> None:
    engine, world = config.engine, session.world
    trained = session.trained
    device, host = memory_per_rank_gib(
        session.weights, trained, engine.precision, session.engine.zero_optimization_stage(), world, engine.offload,
        averaged=bool(config.train.ema),
    )  # fmt: skip
    remaining = max(0, session.total - session.done + 2)
    last = steps[-1] if steps else 0.0
    say(
        f"model: {config.model.backbone} + {config.model.head}, {session.weights / 1e6:.1f} M weights, {session.trained / 1e6:.2f} M trained"
    )
    say(
        f"memory of each of {world} x {session.device.type}: {device:.2f} GiB for weights, gradients and optimizer"
        f"{f', {host:.2f} GiB on the host' if host else ''}; with activations {memory_gib():.2f} GiB at most in these steps"
    )
    say(
        f"an epoch: {count(session.per_epoch, 'step')} of {count(config.train.batch_size, config.train.row)}; the run: {count(session.total, 'step')}, about "
        f"{span(remaining * last)} at {last:.2f} s a step, without validations"
    )
    sets = [config.data.train] if isinstance(config.data.train, str) else config.data.train
    say(f"reads:  {f'{chr(10)}        '.join([*sets, config.data.test])}")
    if config.model.init_from not in ("", "scratch"):
        say(f"        {config.model.init_from} (weights to start from)")
    if config.train.teacher and config.train.teacher_weight:
        say(f"        {config.train.teacher} (the teacher)")
    moves = config.run.resume == "never" and (folder / "config.yaml").exists()
    say(f"writes: {folder}{' (the earlier run there would be moved aside)' if moves else ''}")
    names = (
        "config.yaml towers.json versions.json metrics.jsonl eval.jsonl ranks.jsonl tensorboard/ checkpoints/ done.json"
    )
    say(f"        {names}\n        and, if needed: tokenizer/ quarantine.jsonl bad_steps.jsonl")
    if config.cache.dir:
        say(
            f"        {config.cache.dir} (decoded frames, at most {config.cache.max_gb:g} GB; these two steps have written some)"
        )
    size = (session.stored * 4 + trained * (12 if config.train.ema else 8)) / 2**20
    takes = f"{size / 2**10:.2f} GiB" if size > 2**10 / 10 else f"{size:.1f} MiB"
    most = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    say(f"        a checkpoint takes {takes}, and up to {most} exist at once")
    if session.stored < session.weights:
        left = (session.weights - session.stored) / 1e6
        say(
            f"        it leaves out {left:.1f} M frozen weights: keep {origin.source(config.model)}, from which they are read again "
            "(checkpoint.whole=true stores them)"
        )
