"""Frozen weights that a run's checkpoints leave out, and where they are to be had again: from `model.init_from`, as when the run began.

A digest of them in each checkpoint's state.json tells whether that source is still the same. Weights that the source does not hold as they
are stay in the checkpoint: those of the head, the temperature, position embeddings, which may have been interpolated, and the kernel of
3d patches. Random weights (`model.init_from=scratch`) do too, because no version of torch promises to draw the same ones again.
"""

import hashlib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

import torch
from crc32c import crc32c
from torch import Tensor, nn

from c4c.config import Config
from c4c.models.backbone import FOLDER, folder_of
from c4c.models.lora import merged
from c4c.settings import ModelConfig
from c4c.training.param_groups import part_of
from c4c.zero import checkpoint

_DERIVED = re.compile(r"pos_embed|positional_embedding|^clip\.visual\.conv2\.")
# checkpoints whose source is being read
_reading: ContextVar[tuple[tuple[Path, str], ...]] = ContextVar("reading", default=())


def left_out(model: nn.Module, config: Config) -> frozenset[str]:
    """Names of the weights and buffers that checkpoints need not hold: frozen by `train.lora`, `train.prompts` or
    `train.freeze`, and the source's own."""
    if not config.train.partial or config.model.init_from == "scratch":
        return frozenset()
    weights = model.named_parameters(remove_duplicate=False)  # a weight may have two names
    trained = {name for name, weight in weights if weight.requires_grad}
    towers = (name for name in model.state_dict() if part_of(name) in ("text", "video") and not _DERIVED.search(name))
    return frozenset(towers) - trained


def digest(state: dict[str, Tensor], names: Iterable[str]) -> str:
    """Of the names, shapes and fp32 values of these weights."""
    lines = []
    for name in sorted(names):
        values = state[name].detach().cpu().float().contiguous()
        numbers = memoryview(values.flatten().numpy())  # type: ignore[arg-type]  # numpy's types do not say so
        lines.append(f"{name} {list(values.shape)} {crc32c(numbers):08x}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def describe(model: nn.Module, names: frozenset[str], config: ModelConfig, before: dict | None = None) -> dict:
    """What state.json says of the weights that are left out. Reads them all: about a second for 2 GB.

    before: what it said when the run was stopped. Raises ValueError if they are others now.
    """
    own, path, tag = digest(model.state_dict(), names), _path(config.init_from), config.init_tag
    if before:
        require_same(before, own, config)
    if path and (path / "config.yaml").is_file():
        with suppress(checkpoint.CheckpointError):
            tag = checkpoint.resolve(path, tag or None)
    folder = folder_of(config.backbone)
    about = {
        "backbone": config.backbone, "init_from": config.init_from, "init_tag": tag, "path": str(path or ""),
        "backbone_path": str(folder.absolute() if folder else ""), "weights": len(names), "digest": own,
    }  # fmt: skip
    for key, place in (("init_from", "path"), ("backbone", "backbone_path")):
        if before and about[place] and about[place] == before.get(place):
            about[key] = before[key]  # as in config.yaml, where it may be relative
    return about


def _path(name: str) -> Path | None:
    """The file or folder that a source or a backbone means, from the root; None if it means none, or there is none."""
    path = Path(name.removeprefix(FOLDER))
    return path.absolute() if name and path.exists() else None


def source(config: ModelConfig) -> str:
    """What the weights start from, as a setting."""
    return f"model.init_from={config.init_from}" if config.init_from else f"model.backbone={config.backbone}"


def same_source(config: ModelConfig, about: dict) -> ModelConfig:
    """`config` with the source that state.json tells of, where it does not name another one: the same checkpoint of a run, and relative
    paths from where the run was started."""
    folder = about.get("backbone_path", "")
    if folder and config.backbone == about["backbone"] and not _path(config.backbone):
        config = replace(config, backbone=f"{FOLDER}{folder}")
    if config.init_from != about["init_from"] and str(_path(config.init_from)) != about["path"]:
        return config
    init_from = config.init_from
    if about["path"] and not _path(init_from):
        init_from = f"{FOLDER if init_from.startswith(FOLDER) else ''}{about['path']}"
    return replace(config, init_tag=about["init_tag"], init_from=init_from)


def require_same(before: dict, now: str, config: ModelConfig) -> None:
    """Raise ValueError if the frozen weights are not those that a run was trained with."""
    if before["digest"] != now:
        raise ValueError(
            f"{source(config)} gives other frozen weights than the run was trained with (digest {now[:12]}, was "
            f"{before['digest'][:12]}): what it names has changed. Put the weights from then back"
        )


def full_weights(run: Path, tag: str, state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """A run's stored weights with those that its checkpoint leaves out, and with LoRA merged into the matrices it belongs to.

    Raises ValueError if the source of the frozen weights cannot be read, or holds others by now.
    """
    return merged(state | frozen_weights(run, tag, state, config), config.train.lora_alpha)


def frozen_weights(run: Path, tag: str, stored: Collection[str], config: Config) -> dict[str, Tensor]:
    """What a run's checkpoint leaves out. stored: the names of what it holds. Raises ValueError as `full_weights` does."""
    about: dict = {}
    with suppress(FileNotFoundError, checkpoint.CheckpointError):  # of before there was such a file
        about = checkpoint.read_state(run / checkpoint.FOLDER / tag)
    if not (frozen := about.get(checkpoint.FROZEN)):
        return {}
    with _once(run, tag):
        return _frozen_of(run, stored, config, frozen)


@contextmanager
def _once(run: Path, tag: str) -> Iterator[None]:
    """Raise ValueError if the source of this checkpoint's weights, or theirs in turn, is this checkpoint."""
    this = (run.resolve(), tag)
    if this in _reading.get():
        raise ValueError(f"{run}, checkpoint {tag}, would be the source of its own frozen weights")
    token = _reading.set((*_reading.get(), this))
    try:
        yield
    finally:
        _reading.reset(token)


def _frozen_of(run: Path, stored: Collection[str], config: Config, about: dict) -> dict[str, Tensor]:
    from c4c.models.clip4clip import build

    model = same_source(config.model, about)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # of heads, which come from the checkpoint
            own = build(model, config.data.num_frames, config.data.image_size).state_dict()
    except ValueError as error:
        raise ValueError(
            f"{run} holds only what was trained; its frozen weights come from {source(model)}, which cannot be read "
            f"({error}). Put it back, or set model.init_from in {run / 'config.yaml'} to where it is now"
        ) from error
    names = own.keys() - set(stored)
    require_same(about, digest(own, names), model)
    return {name: own[name] for name in names}
