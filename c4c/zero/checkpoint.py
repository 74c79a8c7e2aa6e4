"""Saving a run's state, whole and atomically, and reading it back into any number of ranks and any ZeRO stage.

A checkpoint is a folder:

    model.safetensors       fp32 master weights under CLIP4Clip's names
    optimizer.safetensors   NAME/exp_avg and NAME/exp_avg_sq of every trained weight; random.N.cpu, random.N.cuda of rank N
    state.json              steps done, updates of the weights, fp16's loss scale, who wrote it; length and crc32c of the
                            other files and, as `crc32c`, of the rest of itself

What is read is checked. Checkpoints from before there were checksums are read without. No part of it knows of ranks or ZeRO, and nothing in it can be executed.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from crc32c import crc32c
from torch import Tensor

from c4c.files import looked_in, with_usual_mode
from c4c.settings import CheckpointConfig
from c4c.training.run_folder import scores

FOLDER = "checkpoints"
STATE = "state.json"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that is not there, or cannot be read or written."""


def tag_of(step: int) -> str:
    return f"step{step:08d}"


def step_of(tag: str) -> int:
    return int(tag.removeprefix("step"))


class Saver:
    """Saves a run's checkpoints: the state is copied at once, and rank 0 writes it in a thread while training goes on.

    What cannot be written is told through `say`, and the last good checkpoint stays what `latest` names.
    """

    def __init__(self, run: Path, config: CheckpointConfig, say: Callable[[str], None] = lambda text: None):
        self.run, self.config, self.error = run, config, None
        self._say, self._thread = say, None
        self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether one is due after `step` steps. Clocks differ: where `every_minutes` is set, only rank 0's word counts."""
        by_steps = self.config.every_steps and step % self.config.every_steps == 0
        minutes = (time.monotonic() - self._saved) / 60
        return bool(by_steps or (self.config.every_minutes and minutes >= self.config.every_minutes))

    def save(self, engine, step: int, extra: dict | None = None) -> None:
        """Called on every rank."""
        self.wait()
        self._saved = time.monotonic()
        taken = snapshot(engine, step, extra)
        if taken is not None:
            self._thread = threading.Thread(target=self._write, args=(step, *taken), name="c4c-saver")
            self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        try:
            write(self.run, step, tensors, state)
            prune(self.run, self.config)
            self.error = None
        except OSError as error:
            there = (
                f"the last good one is {latest(self.run)}"
                if (self.run / FOLDER / "latest").exists()
                else "there is none"
            )
            self.error = f"the checkpoint after step {step} could not be written: {error}; {there}"
            self._say(f"warning: {self.error}. Make room; the next one is tried when it is due")


def save(engine, run: Path, step: int, keep_last: int = 1) -> None:
    """Write the engine's state after `step` steps, at once; called on every rank. Raises CheckpointError."""
    saver = Saver(run, CheckpointConfig(keep_last=keep_last, keep_best=0))
    saver.save(engine, step)
    saver.wait()
    if saver.error:
        raise CheckpointError(saver.error)


def snapshot(engine, step: int, extra: dict | None = None) -> tuple[dict[str, dict[str, Tensor]], dict] | None:
    """(tensors of each file, state.json) on rank 0, copied out of the engine; called on every rank, None on others."""
    from c4c.zero import state as zero

    first, model, optimizer = engine.global_rank == 0, {}, {}
    for name, tensor in zero.weights(engine):
        if first:
            name = name.removeprefix("model.")  # as c4c.zero.engine.Learner names and shapes them
            tensor = tensor.reshape(()) if name == "clip.logit_scale" else tensor
            model[name] = _kept(tensor)
    for name, key, tensor in zero.moments(engine):
        if first:
            optimizer[f"{name}/{key}"] = _kept(tensor)
    for rank, states in enumerate(_random_states()):
        optimizer |= {f"random.{rank}.{device}": state for device, state in states.items()}
    if not first:
        return None
    state = {"step": step, "updates": zero.updates(engine), "loss_scaler": zero.loss_scaler(engine)}
    state |= {"ranks": engine.world_size, "zero_stage": engine.zero_optimization_stage()} | (extra or {})
    return {MODEL: model, OPTIMIZER: optimizer}, state


def write(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
    """Make a checkpoint and point `latest` at it. Whatever stops this, earlier ones and the pointer stay whole.

    Raises OSError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{tag_of(step)}.tmp"
    try:
        for old in folder.glob(".step*.tmp"):  # of a killed run
            shutil.rmtree(old)
        beside.mkdir()
        for name, content in tensors.items():
            save_file(content, beside / name)
            with_usual_mode(beside / name)
        state = state | {"files": {name: _measured(beside / name) for name in tensors}}
        (beside / STATE).write_text(json.dumps(state | {"crc32c": _own_checksum(state)}, indent=2) + "\n")
        for file in beside.iterdir():
            _sync(file)
        _sync(beside)
        aside = folder / f".{tag_of(step)}.old.tmp"
        if (folder / tag_of(step)).exists():  # the same step, saved once more after a restart
            os.replace(folder / tag_of(step), aside)
        os.replace(beside, folder / tag_of(step))
        point(run, tag_of(step))
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from error


def prune(run: Path, config: CheckpointConfig) -> None:
    """Drop all checkpoints but the newest and the best, and never the one that `latest` names."""
    newest = latest(run)
    there = [
        tag for tag in tags(run) if step_of(tag) <= step_of(newest)
    ]  # what a killed run left of later steps is no reason to drop one
    scored = sorted((t for t in there if t in (r1 := validated(run))), key=lambda t: (r1[t], t), reverse=True)
    kept = {newest, *there[-config.keep_last :], *scored[: config.keep_best]}
    for old in set(there) - kept:
        shutil.rmtree(run / FOLDER / old)


def validated(run: Path) -> dict[str, float]:
    """Text-to-video R@1 of the checkpoints that were validated, by name."""
    return {tag_of(step): r1 for step, r1 in scores(run).items()}


def best(run: Path) -> str | None:
    """The kept checkpoint with the best validated text-to-video R@1, the newest of equals."""
    scores = {tag: r1 for tag, r1 in validated(run).items() if tag in tags(run)}
    return max(scores, key=lambda tag: (scores[tag], tag), default=None)


def resolve(run: Path, tag: str | None) -> str:
    """The name of a kept checkpoint. tag: its name, `best`, or None for the newest. Raises CheckpointError."""
    tag = (best(run) if tag == "best" else tag) or latest(run)
    if tag not in tags(run):
        raise CheckpointError(f"{run} has no checkpoint {tag}; there are {_listed(run)}")
    return tag


def restore(engine, run: Path, tag: str | None = None) -> dict:
    """Load a checkpoint (the newest) into the engine, on every rank; returns its state.json.

    Any number of ranks and any ZeRO stage may have written it. Executes nothing from the file. Raises CheckpointError.
    """
    from safetensors import safe_open

    from c4c.zero import state as zero

    tag = tag or latest(run)
    folder = run / FOLDER / tag
    _refuse_damage(folder)
    with _reading(folder):
        state = read_state(folder)
        model, optimizer = (safe_open(folder / part, "pt") for part in (MODEL, OPTIMIZER))
        keys = sorted({key.rpartition("/")[2] for key in optimizer.keys() if "/" in key})  # noqa: SIM118 no mapping

        def read(name: str, key: str | None) -> Tensor:
            if key is not None:
                return optimizer.get_tensor(f"{name}/{key}")
            tensor = model.get_tensor(name.removeprefix("model."))
            return tensor.reshape(1) if name.endswith("clip.logit_scale") else tensor

        zero.write(engine, read, keys, state["updates"])
        zero.set_loss_scaler(engine, state["loss_scaler"])
        _set_random(optimizer, engine.global_rank)
    return state


def tags(run: Path) -> list[str]:
    """Names of the checkpoints there are, oldest first."""
    found = (p.name for p in (run / FOLDER).glob("step*") if p.name[4:].isdecimal() and p.is_dir())
    return sorted(found, key=lambda t: (len(t), t))


def exist(run: Path) -> bool:
    """Whether a run folder holds checkpoints, whole or not, and so must not be trained over."""
    return bool(tags(run)) or (run / FOLDER / "latest").exists()


def latest(run: Path) -> str:
    """The newest finished checkpoint's name: the one in `latest` or, where that is gone, the newest that is whole.

    Raises CheckpointError if there is none.
    """
    tag = _pointed(run)
    if tag in tags(run):
        return tag
    if not run.is_dir():
        raise CheckpointError(f"there is no run folder {run}{looked_in(run)}")
    if tag is None and not tags(run):
        raise CheckpointError(f"{run} holds no checkpoint (no {FOLDER}/latest): train it first, or longer")
    return newest_whole(run)[0]


def trained_on(run: Path) -> str | None:
    """The digest of the data that a run was trained on, as its newest readable checkpoint has it."""
    for tag in reversed(tags(run)):
        with suppress(CheckpointError, OSError):
            return read_state(run / FOLDER / tag).get("data")
    return None


def newest_whole(run: Path, before: float = float("inf")) -> tuple[str, list[str]]:
    """(the checkpoint to go on from, lines that say why it is not simply the latest); before: only of earlier steps.

    Reads every file of it to compare checksums. Raises CheckpointError if none is whole.
    """
    pointed, there = _pointed(run), [tag for tag in tags(run) if step_of(tag) < before]
    newest_first = sorted(there, key=lambda tag: (tag == pointed, step_of(tag)), reverse=True)
    notes, pointer = [], run / FOLDER / "latest"
    if before == float("inf") and pointed not in there:
        wrong = "is missing" if pointed is None else f"names {pointed or 'nothing'}, which is not there"
        notes.append(f"{pointer} {wrong}")
    for tag in newest_first:
        if not (found := damage(run / FOLDER / tag)):
            return tag, [f"warning: {note}; continuing from {tag}, the newest whole checkpoint" for note in notes]
        notes.append(f"{run / FOLDER / tag} is damaged: {found}")
    raise CheckpointError(
        f"{run} has no whole checkpoint to go on from: {'; '.join(notes)}. Choose another run.dir, or start anew with "
        "run.resume=never, which moves the old run aside"
    )


def _pointed(run: Path) -> str | None:
    """What `latest` says; None if it is gone."""
    pointer = run / FOLDER / "latest"
    return pointer.read_text(errors="replace").strip() if pointer.is_file() else None


def damage(folder: Path, parts: tuple[str, ...] = (MODEL, OPTIMIZER)) -> str:
    """What is wrong with these files of a checkpoint or with its state.json; nothing: ''."""
    from safetensors import safe_open

    name = STATE
    try:
        known = read_state(folder).get("files")
        for name in parts:
            if known is not None:
                _compare(folder / name, known.get(name))
            else:  # from before there were checksums: safetensors compares the length
                with safe_open(folder / name, "pt"):
                    pass
    except FileNotFoundError as error:
        return f"{Path(error.filename or folder / name).name} is missing"
    except CheckpointError as error:
        return str(error)
    except Exception as error:  # safetensors' own kind is a plain Exception
        return f"{name}: {str(error).partition(chr(10))[0]}"
    return ""


def read_state(folder: Path) -> dict:
    """What a checkpoint's state.json says. Raises CheckpointError, FileNotFoundError."""
    try:
        state = json.loads((folder / STATE).read_bytes())
        step, updates, _ = int(state["step"]), int(state["updates"]), dict(state["loss_scaler"])
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{STATE} cannot be read ({type(error).__name__}: {error})") from error
    checked = "files" in state or "crc32c" in state
    if checked and (state.get("crc32c") != _own_checksum(state) or not isinstance(state.get("files"), dict)):
        raise CheckpointError(f"{STATE} does not match its checksum")
    return state | {"step": step, "updates": updates}


def _compare(file: Path, known: dict | None) -> None:
    found = _measured(file)
    if known is None:
        raise CheckpointError(f"{STATE} has no checksum of {file.name}")
    if found["bytes"] != known.get("bytes"):
        raise CheckpointError(
            f"{file.name} has {found['bytes']} bytes and had {known.get('bytes')} when it was written"
        )
    if found != known:
        raise CheckpointError(f"{file.name} does not match its checksum in {STATE}")


def _measured(file: Path) -> dict:
    """Length and checksum, read from the file."""
    buffer, check, size = bytearray(1 << 22), 0, 0
    with open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            check, size = crc32c(memoryview(buffer)[:count], check), size + count
    return {"bytes": size, "crc32c": f"{check:08x}"}


def _own_checksum(state: dict) -> str:
    rest = {key: value for key, value in state.items() if key != "crc32c"}
    return f"{crc32c(json.dumps(rest, sort_keys=True).encode()):08x}"


def _refuse_damage(folder: Path, parts: tuple[str, ...] = (MODEL, OPTIMIZER)) -> None:
    if found := damage(folder, parts):
        others = [t for t in reversed(tags(folder.parent.parent)) if t != folder.name]
        whole = next((t for t in others if not damage(folder.parent / t, parts)), None)
        more = f"{whole} is whole: --tag {whole} reads it" if whole else "the run has no other that is whole"
        raise CheckpointError(f"{folder} is damaged: {found}; {more}")


def load_weights(run: Path, tag: str | None = None) -> dict[str, Tensor]:
    """fp32 state dict of a run's CLIP4Clip. Reads DeepSpeed's own ZeRO checkpoints too, of any stage and number of ranks.

    tag: a checkpoint's name, `best`, or None for the newest. Executes nothing from the file. Raises CheckpointError.
    """
    from safetensors.torch import load_file

    folder = run / FOLDER / resolve(run, tag)
    if not any(folder.glob("*_states.pt")):  # which are DeepSpeed's
        _refuse_damage(folder, (MODEL,))
    with _reading(folder):
        if (folder / MODEL).exists():
            return load_file(folder / MODEL)
        return _deepspeeds(folder)


def _deepspeeds(folder: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if list(folder.glob("*_optim_states.pt")):
        with _quiet():
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    else:  # stage 0 in fp32 keeps whole weights in the model's own file
        state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu")["module"]
    state = {name.removeprefix("model."): tensor.float() for name, tensor in state.items()}
    state["clip.logit_scale"] = state["clip.logit_scale"].reshape(())
    return state


def _kept(tensor: Tensor) -> Tensor:
    """A copy in host memory that later steps do not change."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _random_states() -> list[dict[str, Tensor]]:
    """Each rank's generators, on every rank."""
    mine = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    states: list = [None] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    return states


def _set_random(file, rank: int) -> None:
    there = set(file.keys())
    if f"random.{rank}.cpu" in there:  # more ranks than before: the new ones keep those they were started with
        torch.set_rng_state(file.get_tensor(f"random.{rank}.cpu"))
    if torch.cuda.is_available() and f"random.{rank}.cuda" in there:
        torch.cuda.set_rng_state(file.get_tensor(f"random.{rank}.cuda"))


def point(run: Path, tag: str) -> None:
    """Make `latest` name a checkpoint."""
    folder = run / FOLDER
    temporary = folder / ".latest.tmp"
    temporary.write_text(tag)
    _sync(temporary)
    os.replace(temporary, folder / "latest")
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listed(run: Path) -> str:
    return ", ".join(tags(run)) or "none"


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Load safely, and make of whatever goes wrong one CheckpointError that names the folder."""
    try:
        with safe_loading():
            yield
    except CheckpointError:
        raise
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
