"""An engine's state copied out to a checkpoint, while training goes on, and put back into any number of ranks."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from c4c.settings import CheckpointConfig
from c4c.zero import checkpoint, patches, state
from c4c.zero.checkpoint import EMA, FROZEN, MODEL, OPTIMIZER, CheckpointError
from c4c.zero.ema import KEY

SCALARS = ("clip.logit_scale", "clip.logit_bias")  # in files; c4c.training.step.Learner gives them an axis


class Saver:
    """Saves a run's checkpoints: the state is copied at once, and rank 0 writes it in a thread while training goes on.

    What cannot be written is passed to `say`, and `latest` still names the last good checkpoint.
    """

    def __init__(self, run: Path, config: CheckpointConfig, say: Callable[[str], None] = lambda text: None):
        self.run, self.config = run, config
        self.error: str | None = None
        self._say = say
        self._thread: threading.Thread | None = None
        self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether one is due after `step` steps. Clocks differ: where `every_minutes` is set, only rank 0's answer counts."""
        by_steps = self.config.every_steps and step % self.config.every_steps == 0
        minutes = (time.monotonic() - self._saved) / 60
        return bool(by_steps or (self.config.every_minutes and minutes >= self.config.every_minutes))

    def save(self, engine, step: int, extra: dict | None = None) -> None:
        """Save the engine's state after `step` steps; extra: more keys of state.json. Called on every rank."""
        self.wait()
        self._saved = time.monotonic()
        copied = snapshot(engine, step, extra)
        if copied is not None:
            self._thread = threading.Thread(target=self._write, args=(step, *copied), name="c4c-saver")
            self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], about: dict) -> None:
        try:
            checkpoint.write(self.run, step, tensors, about)
            checkpoint.prune(self.run, self.config)
            self.error = None
        except (OSError, CheckpointError) as error:
            self.error = f"the checkpoint after step {step} could not be written: {error}; {self._last_good()}"
            self._say(f"warning: {self.error}. Make room; the next one is tried when it is due")

    def _last_good(self) -> str:
        try:
            return f"the last good one is {checkpoint.latest(self.run)}"
        except (OSError, CheckpointError):  # also where someone deleted the one that was
            return "there is none"


def save(engine, run: Path, step: int, keep_last: int = 1, extra: dict | None = None) -> None:
    """Write the engine's state after `step` steps, at once; extra: more keys of state.json. Called on every rank.

    Raises CheckpointError.
    """
    saver = Saver(run, CheckpointConfig(keep_last=keep_last, keep_best=0))
    saver.save(engine, step, extra)
    saver.wait()
    if saver.error:
        raise CheckpointError(saver.error)


def snapshot(engine, step: int, extra: dict | None = None) -> tuple[dict[str, dict[str, Tensor]], dict] | None:
    """(tensors of each file, state.json) on rank 0, copied out of the engine; called on every rank, None on others."""
    first = engine.global_rank == 0
    model: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    averages: dict[str, Tensor] = {}
    without = {f"model.{name}" for name in getattr(engine.module, "left_out", ())}
    for name, tensor in state.weights(engine, without):
        if first:
            _add(model, name, tensor)
    for name, key, tensor in state.moments(engine):
        if first and key == KEY:
            _add(averages, name, tensor)
        elif first:
            optimizer[f"{name}/{key}"] = _copy(tensor)
    for rank, states in enumerate(_random_states()):
        optimizer |= {f"random.{rank}.{device}": content for device, content in states.items()}
    if not first:
        return None
    about = {"step": step, "updates": state.updates(engine), "loss_scaler": patches.loss_scaler(engine)}
    about |= {"ranks": engine.world_size, "zero_stage": engine.zero_optimization_stage()} | (extra or {})
    return {MODEL: model, OPTIMIZER: optimizer} | ({EMA: averages} if averages else {}), about


def restore(engine, run: Path, tag: str | None = None) -> dict:
    """Load a checkpoint (the newest) into the engine, on every rank; returns its state.json.

    Any number of ranks and any ZeRO stage may have written it. Executes nothing from the file. Raises CheckpointError.
    """
    from safetensors import safe_open

    folder = run / checkpoint.FOLDER / (tag or checkpoint.latest(run))
    checkpoint.refuse_damage(folder)
    with checkpoint.reading(folder):
        about, average = checkpoint.read_state(folder), getattr(engine, "average", None)
        model, optimizer = (safe_open(folder / part, "pt") for part in (MODEL, OPTIMIZER))
        keys = sorted({key.rpartition("/")[2] for key in optimizer.keys() if "/" in key})  # noqa: SIM118 no mapping
        if average is not None:
            if not checkpoint.has_average(folder):
                raise CheckpointError(f"{folder} holds no averaged weights: it was written without train.ema")
            averages = safe_open(folder / EMA, "pt")
            keys.append(KEY)

        def read(name: str, key: str | None) -> Tensor:
            if key not in (None, KEY):
                return optimizer.get_tensor(f"{name}/{key}")
            name = name.removeprefix("model.")
            tensor = (model if key is None else averages).get_tensor(name)
            return tensor.reshape(1) if name in SCALARS else tensor

        stored, own = set(model.keys()), engine.module.state_dict() if FROZEN in about else {}
        without = {name for name in own if name.removeprefix("model.") not in stored}
        state.write(engine, read, keys, about["updates"], without)
        if average is not None:
            average.updates = about["updates"]
        patches.set_loss_scaler(engine, about["loss_scaler"])
        _set_random(optimizer, engine.global_rank)
    return about


def _add(file: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    name = name.removeprefix("model.")  # as c4c.training.step.Learner names and shapes them
    file[name] = _copy(tensor.reshape(()) if name in SCALARS else tensor)


def _copy(tensor: Tensor) -> Tensor:
    """In host memory, where later steps do not change it."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _random_states() -> list[dict[str, Tensor]]:
    """Each rank's generators, on every rank."""
    own = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    states: list = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return states


def _set_random(file, rank: int) -> None:
    names = set(file.keys())
    if f"random.{rank}.cpu" in names:  # more ranks than before: the new ones keep those they were started with
        torch.set_rng_state(file.get_tensor(f"random.{rank}.cpu"))
    if torch.cuda.is_available() and f"random.{rank}.cuda" in names:
        torch.cuda.set_rng_state(file.get_tensor(f"random.{rank}.cuda"))
