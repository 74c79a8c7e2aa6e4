"""Saving a run's state through DeepSpeed, and reading it back, with or without DeepSpeed's engine."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FOLDER = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept."""

    keep_last: int = 2  # checkpoints

    def __post_init__(self):
        if self.keep_last < 1:
            raise ValueError(
                f"checkpoint.keep_last={self.keep_last}: must be at least 1, or nothing could be evaluated"
            )


class CheckpointError(ValueError):
    """A checkpoint that is not there or cannot be read."""


def tag_of(step: int) -> str:
    return f"step{step:08d}"


def save(engine, run: Path, step: int, keep_last: int) -> None:
    """Write the engine's state after `step` steps; called on every rank. Then drop all but the newest `keep_last`."""
    folder, tag = run / FOLDER, tag_of(step)
    # DeepSpeed's rank 0 would write `latest` before the other ranks are done; behind the barrier it ends with, all are
    engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, save_latest=False)
    if engine.global_rank == 0:
        temporary = folder / ".latest.tmp"
        temporary.write_text(tag)
        os.replace(temporary, folder / "latest")
        # what a killed run left half-written of later steps is no reason to drop this one
        for old in [t for t in tags(run) if t <= tag][:-keep_last]:
            shutil.rmtree(folder / old)


def restore(engine, run: Path) -> int:
    """Load the newest checkpoint into the engine, on every rank; returns the number of steps it has seen.

    Executes nothing from the file. Raises CheckpointError.
    """
    tag = latest(run)
    with _reading(run / FOLDER / tag):
        path, state = engine.load_checkpoint(str(run / FOLDER), tag=tag)
    if path is None:
        raise CheckpointError(f"{run / FOLDER / tag} could not be loaded")
    return int(state["step"])


def tags(run: Path) -> list[str]:
    """Names of the checkpoints there are, oldest first."""
    return sorted(p.name for p in (run / FOLDER).glob("step*") if p.is_dir())


def latest(run: Path) -> str:
    """The newest finished checkpoint's name. Raises CheckpointError if there is none."""
    pointer = run / FOLDER / "latest"
    if not pointer.is_file():
        if not run.is_dir():
            raise CheckpointError(f"there is no run folder {run}")
        raise CheckpointError(f"{run} holds no checkpoint (no {pointer.relative_to(run)}): train it first, or longer")
    tag = pointer.read_text().strip()
    if tag not in tags(run):
        raise CheckpointError(f"{pointer} names {tag or 'nothing'}, which is not there; there are {_listed(run)}")
    return tag


def load_weights(run: Path, tag: str | None = None) -> dict[str, Tensor]:
    """fp32 state dict of a run's CLIP4Clip from its ZeRO checkpoint: any stage, any number of ranks that wrote it.

    Executes nothing from the file. Raises CheckpointError.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    tag = tag or latest(run)
    folder = run / FOLDER / tag
    if tag not in tags(run):
        raise CheckpointError(f"{run} has no checkpoint {tag}; there are {_listed(run)}")
    with _reading(folder):
        if list(folder.glob("*_optim_states.pt")):
            with _quiet():
                state = get_fp32_state_dict_from_zero_checkpoint(str(run / FOLDER), tag=tag)
        else:  # stage 0 in fp32 keeps whole weights in the model's own file
            state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu")["module"]
        # as c4c.engine.Learner names and shapes them
        state = {name.removeprefix("model."): tensor.float() for name, tensor in state.items()}
        state["clip.logit_scale"] = state["clip.logit_scale"].reshape(())
    return state


def _listed(run: Path) -> str:
    return ", ".join(tags(run)) or "none"


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Load safely, and make of whatever goes wrong one CheckpointError that names the folder."""
    try:
        with safe_loading():
            yield
    except Exception as error:  # DeepSpeed raises whatever its file formats lead to
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        there = _listed(folder.parent.parent)
        raise CheckpointError(f"{folder} cannot be read ({reason}); the run has {there}") from error


@contextmanager
def safe_loading() -> Iterator[None]:
    """Make every `torch.load` inside, DeepSpeed's own too, refuse to run code from the file.

    DeepSpeed pickles a few plain classes of its own beside the tensors; those alone are let through.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars and prints of a library, unseen; what goes wrong comes as an exception."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
