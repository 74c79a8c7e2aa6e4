"""A run's checkpoints on disk: written atomically, listed, checked, and read.

A checkpoint is a folder:

    model.safetensors       fp32 master weights under CLIP4Clip's names; with train.lora, prompts or freeze only those that
                            model.init_from does not give again (see c4c.models.origin)
    ema.safetensors         only with train.ema: the moving averages of the trained weights, fp32, under the same names
    optimizer.safetensors   NAME/exp_avg and NAME/exp_avg_sq of every trained weight; random.N.cpu, random.N.cuda of rank N
    state.json              steps done, updates of the weights, fp16's loss scale, who wrote it; as `frozen`, where the weights
                            that are left out come from, and their digest; length and crc32c of the
                            other files and, as `crc32c`, of the rest of itself

What is read is checked. Checkpoints from before there were checksums are read without. No file depends on the number of ranks
or the ZeRO stage, and nothing in one can be executed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from crc32c import crc32c
from torch import Tensor

from c4c.files import looked_in, with_usual_mode
from c4c.settings import CheckpointConfig
from c4c.training.run_folder import scores
from c4c.zero import patches
from shards import first_line

FOLDER = "checkpoints"
STATE = "state.json"
MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
FROZEN = "frozen"  # the key of state.json for weights that are left out
TEACHER = "teacher"  # its key for the digest of the weights of train.teacher
AVERAGE = "average"  # its key, in what python -m c4c.average wrote, for the checkpoints that are averaged


class CheckpointError(ValueError):
    """A checkpoint that does not exist, or cannot be read or written."""


def tag_of(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step{step:08d}"


def step_of(tag: str) -> int:
    """The inverse of `tag_of`."""
    return int(tag.removeprefix("step"))


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
    newest, r1 = latest(run), validated(run)
    # later steps are what a killed run left: no reason to drop one
    present = [tag for tag in tags(run) if step_of(tag) <= step_of(newest)]
    scored = sorted((tag for tag in present if tag in r1), key=lambda tag: (r1[tag], tag), reverse=True)
    kept = {newest, *present[-config.keep_last :], *scored[: config.keep_best]}
    for old in set(present) - kept:
        shutil.rmtree(run / FOLDER / old)


def validated(run: Path) -> dict[str, float]:
    """Text-to-video R@1 of the checkpoints that were validated, by name."""
    return {tag_of(step): r1 for step, r1 in scores(run).items()}


def best(run: Path) -> str | None:
    """The kept checkpoint with the best validated text-to-video R@1, the newest of equals."""
    scores = {tag: r1 for tag, r1 in validated(run).items() if tag in tags(run)}
    return max(scores, key=lambda tag: (scores[tag], tag), default=None)


def better_gone(run: Path, tag: str | None) -> str:
    """A sentence for people who asked for the best checkpoint where a better one was validated, and is not kept any more; else ''."""
    r1, kept = validated(run), best(run)
    first = max(r1, key=lambda name: (r1[name], name), default=None)
    if tag != "best" or kept is None or first is None or r1[first] <= r1[kept]:
        return ""
    return (
        f"{kept} is the best of the checkpoints that {run} keeps (R@1 {r1[kept]:.1f} in its validation); {first} was better "
        f"({r1[first]:.1f}) and is gone (checkpoint.keep_best)"
    )


def resolve(run: Path, tag: str | None) -> str:
    """The name of a kept checkpoint. tag: its name, `best`, or None for the newest.

    Raises CheckpointError if there is no such, or none that is kept was validated and the best is asked for."""
    newest = latest(run) if tag in (None, "best") else None  # which says what is wrong where there is none at all
    if tag == "best" and (tag := best(run)) is None:
        raise CheckpointError(
            f"no checkpoint that {run} keeps was validated, so that none is the best: leave the tag away, which takes the "
            f"latest, or name one of {_listed(run)}"
        )
    tag = tag or str(newest)
    if tag not in tags(run):
        raise CheckpointError(f"{run} has no checkpoint {tag}; it has {_listed(run)}")
    return tag


def tags(run: Path) -> list[str]:
    """Names of a run's checkpoints, oldest first."""
    names = (p.name for p in (run / FOLDER).glob("step*") if p.name[4:].isdecimal() and p.is_dir())
    return sorted(names, key=lambda t: (len(t), t))


def exist(run: Path) -> bool:
    """Whether a run folder holds checkpoints, intact or not, and so must not be trained over."""
    return bool(tags(run)) or (run / FOLDER / "latest").exists()


def latest(run: Path) -> str:
    """The newest finished checkpoint's name: the one in `latest` or, where that is missing, the newest intact one.

    Raises CheckpointError if there is none.
    """
    tag = _pointed(run)
    if tag in tags(run):
        return tag
    if not run.is_dir():
        raise CheckpointError(f"there is no run folder {run}{looked_in(run)}")
    if tag is None and not tags(run):
        raise CheckpointError(f"{run} holds no checkpoint (no {FOLDER}/latest): train it first, or for longer")
    return newest_intact(run)[0]


def newest_state(run: Path) -> dict:
    """What the state.json of a run's newest readable checkpoint says; {} without one."""
    for tag in reversed(tags(run)):
        with suppress(CheckpointError, OSError):
            return read_state(run / FOLDER / tag)
    return {}


def newest_intact(run: Path, before: float = float("inf")) -> tuple[str, list[str]]:
    """(the checkpoint to continue from, a line for each reason why it is not the latest); before: only of earlier steps.

    Reads every file of it to compare checksums. Raises CheckpointError if none is intact.
    """
    pointed, known = _pointed(run), [tag for tag in tags(run) if step_of(tag) < before]
    newest_first = sorted(known, key=lambda tag: (tag == pointed, step_of(tag)), reverse=True)
    notes, pointer = [], run / FOLDER / "latest"
    if before == float("inf") and pointed not in known:
        wrong = "is missing" if pointed is None else f"names {pointed or 'nothing'}, which does not exist"
        notes.append(f"{pointer} {wrong}")
    for tag in newest_first:
        if not (reason := damage(run / FOLDER / tag)):
            return tag, [f"warning: {note}; continuing from {tag}, the newest intact checkpoint" for note in notes]
        notes.append(f"{run / FOLDER / tag} is damaged: {reason}")
    raise CheckpointError(
        f"{run} has no intact checkpoint to continue from: {'; '.join(notes)}. Choose another run.dir, or start again with "
        "run.resume=never, which moves the old run aside"
    )


def _pointed(run: Path) -> str | None:
    """What `latest` says; None if it is gone."""
    pointer = run / FOLDER / "latest"
    return pointer.read_text(errors="replace").strip() if pointer.is_file() else None


def has_average(folder: Path) -> bool:
    """Whether a checkpoint holds averaged weights beside the last ones; one whose file for them is lost does."""
    with suppress(CheckpointError, FileNotFoundError):
        return EMA in read_state(folder).get("files", {})
    return (folder / EMA).exists()


def which_weights(folder: Path, ema: bool) -> str:
    """For people, which weights of a checkpoint are taken; '' where they are simply its own. ema: as `load_weights` takes it."""
    with suppress(CheckpointError, FileNotFoundError):
        if sources := read_state(folder).get(AVERAGE):
            return f", the average of {len(sources)} checkpoints"
    return "" if not has_average(folder) else ", averaged weights" if ema else ", last weights (not averaged)"


def damage(folder: Path, parts: tuple[str, ...] = ()) -> str:
    """What is wrong with these files of a checkpoint (all) or with its state.json; nothing: ''."""
    from safetensors import safe_open

    name = STATE
    try:
        known = read_state(folder).get("files")
        for name in parts or dict.fromkeys((MODEL, OPTIMIZER, *(known or ()))):
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
        return f"{name}: {first_line(error)}"
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
    measured = _measured(file)
    if known is None:
        raise CheckpointError(f"{STATE} has no checksum of {file.name}")
    if measured["bytes"] != known.get("bytes"):
        raise CheckpointError(f"{file.name} has {measured['bytes']} bytes; {known.get('bytes')} were written")
    if measured != known:
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


def refuse_damage(folder: Path, parts: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError if one of these files of a checkpoint (all) is damaged; it names another one that is not."""
    if reason := damage(folder, parts):
        others = [t for t in reversed(tags(folder.parent.parent)) if t != folder.name]
        intact = next((t for t in others if not damage(folder.parent / t, parts)), None)
        more = f"{intact} is intact: use --tag {intact}" if intact else "the run has no intact one"
        raise CheckpointError(f"{folder} is damaged: {reason}; {more}")


def load_weights(run: Path, tag: str | None = None, ema: bool = True) -> dict[str, Tensor]:
    """fp32 state dict of a run's CLIP4Clip. Reads DeepSpeed's own ZeRO checkpoints too, of any stage and number of ranks.

    tag: a checkpoint's name, `best`, or None for the newest. ema: take the averages of the trained weights, where it holds some.
    Executes nothing from the file. Raises CheckpointError.
    """
    from safetensors.torch import load_file

    folder = run / FOLDER / resolve(run, tag)
    parts = (MODEL, EMA) if ema and has_average(folder) else (MODEL,)
    if not any(folder.glob("*_states.pt")):  # which are DeepSpeed's
        refuse_damage(folder, parts)
    with reading(folder):
        if (folder / MODEL).exists():
            return {name: tensor for part in parts for name, tensor in load_file(folder / part).items()}
        return _deepspeeds(folder)


def _deepspeeds(folder: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if list(folder.glob("*_optim_states.pt")):
        with patches.silent():
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    else:  # stage 0 in fp32 keeps whole weights in the model's own file
        state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu")["module"]
    state = {name.removeprefix("model."): tensor.float() for name, tensor in state.items()}
    state["clip.logit_scale"] = state["clip.logit_scale"].reshape(())
    return state


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
def reading(folder: Path) -> Iterator[None]:
    """Load safely, and make of whatever goes wrong one CheckpointError that names the folder."""
    try:
        with patches.safe_loading():
            yield
    except CheckpointError:
        raise
    except Exception as error:  # DeepSpeed raises whatever its file formats lead to
        reason = first_line(error, named=True)
        known = _listed(folder.parent.parent)
        raise CheckpointError(f"{folder} cannot be read ({reason}); the run has {known}") from error
