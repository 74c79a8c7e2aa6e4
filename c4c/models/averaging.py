"""The average of several checkpoints' weights: of one run (as in https://arxiv.org/abs/1803.05407), or of several runs of one model ("model
soups", https://arxiv.org/abs/2203.05482).

What is averaged are whole models, as evaluation sees them: with the frozen weights that a checkpoint leaves out, and with LoRA's matrices
merged, because the average of products is not the product of averages. Weight after weight is read from all files and summed in float64,
so that besides the result and the shared frozen weights only one tensor is in memory.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from c4c.config import Config, dump, from_dict
from c4c.export import export
from c4c.files import read_json_object
from c4c.models.backbone import named, other_towers, preprocess_of
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.lora import A, B, merged
from c4c.models.origin import frozen_weights
from c4c.models.pretrained import evaluation_settings
from c4c.models.tokenizer_spec import FILES, with_files
from c4c.models.weights.runs import weights_of_run
from c4c.training.run_folder import located, read_config, save_description
from c4c.zero import checkpoint
from c4c.zero.checkpoint import EMA, FROZEN, MODEL, CheckpointError

# of model.*: what has to be the same beside the towers
_HEAD = ("head", "linear_patch", "head_layers", "merge", "merge_frames")


@dataclass(frozen=True)
class CheckpointChoice:
    """Which checkpoints. runs: folders, or the file of weights of one checkpoint. tags: of each run; or its newest `last`; neither: its
    latest. ema: their averaged weights, where they have some."""

    runs: tuple[str, ...]
    tags: tuple[str, ...] = ()
    last: int = 0
    ema: bool = True

    def checkpoints(self) -> list["CheckpointWeights"]:
        """In the order of runs, then of tags. Raises ValueError for one that does not exist, is damaged, or is named twice."""
        found: dict[tuple[Path, str], CheckpointWeights] = {}
        bases: dict[str, dict[str, Tensor]] = {}
        for name in self.runs:
            for run, tag, ema in self._of(name):
                if (key := (run.resolve(), tag)) in found:
                    raise ValueError(
                        f"{run}, checkpoint {tag}, is named twice: leave it out once (--weights can make it count more)"
                    )
                found[key] = CheckpointWeights(run, tag, ema, bases)
        if len(found) < 2:
            only = next(iter(found.values()))
            raise ValueError(
                f"{only.folder} alone has no average: name several with --tags or --last N, or several runs. The run has "
                f"{', '.join(checkpoint.tags(only.run))}"
            )
        return list(found.values())

    def _of(self, name: str) -> list[tuple[Path, str, bool]]:
        folder, tag, ema = located(name, None, self.ema)
        run = Path(folder)
        read_config(run)  # says what is no run folder
        if tag is not None:
            if self.tags or self.last:
                raise ValueError(f"{name} is one checkpoint: name the run folder {folder} with --tags or --last")
            return [(run, tag, ema)]
        newest = checkpoint.step_of(checkpoint.latest(run))  # later ones are what a killed run left
        known = [tag for tag in checkpoint.tags(run) if checkpoint.step_of(tag) <= newest]
        if self.last > len(known):
            raise ValueError(f"--last {self.last}: {run} has {len(known)} checkpoints: {', '.join(known) or 'none'}")
        wanted = known[-self.last :] if self.last else [checkpoint.resolve(run, tag) for tag in self.tags or (None,)]
        return [(run, tag, ema) for tag in wanted]


class CheckpointWeights:
    """The whole weights of a run's checkpoint, read one at a time.

    bases: frozen weights by their digest, shared by checkpoints that leave out the same ones. Raises ValueError.
    """

    def __init__(self, run: Path, tag: str, ema: bool, bases: dict[str, dict[str, Tensor]]):
        self.run, self.tag, self.folder = run, tag, run / checkpoint.FOLDER / tag
        self.config: Config = from_dict(read_config(run))
        about = run / "towers.json"
        self.spec = read_json_object(about) if about.is_file() else named(self.config.model.backbone)
        if not (self.folder / MODEL).is_file() and list(self.folder.glob("*_states.pt")):
            raise CheckpointError(
                f"{self.folder} is one of DeepSpeed's own checkpoints, of an older run: it cannot be averaged"
            )
        self.ema = ema and checkpoint.has_average(self.folder)
        self.kind = checkpoint.which_weights(self.folder, ema)
        parts = (EMA, MODEL) if self.ema else (MODEL,)
        checkpoint.refuse_damage(self.folder, parts)
        with checkpoint.reading(self.folder):
            self.step = checkpoint.step_of(tag)
            files = [safe_open(self.folder / part, "pt") for part in parts]
            self._stored: dict[str, Any] = {}
            for file in reversed(files):
                self._stored |= dict.fromkeys(file.keys(), file)
            state = checkpoint.read_state(self.folder)
        self._base = self._frozen(state.get(FROZEN, {}).get("digest", ""), bases)
        lora = (f".{A}", f".{B}")
        self.names = {name for name in self._stored if not name.endswith(lora)} | self._base.keys()

    def _frozen(self, digest: str, bases: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        if digest not in bases:
            bases[digest] = frozen_weights(self.run, self.tag, self._stored, self.config)
        return bases[digest]

    def shape(self, name: str) -> list[int]:
        """Of a weight, without reading it."""
        if name in self._stored:
            return list(self._stored[name].get_slice(name).get_shape())
        return list(self._base[name].shape)

    def tensor(self, name: str) -> Tensor:
        """A weight, with LoRA merged into it."""
        value = self._stored[name].get_tensor(name) if name in self._stored else self._base[name]
        module = (
            name.removesuffix("in_proj_weight") if name.endswith(".in_proj_weight") else name.removesuffix("weight")
        )
        if module == name or module + B not in self._stored:
            return value
        low_rank = {module + part: self._stored[module + part].get_tensor(module + part) for part in (A, B)}
        return merged({name: value} | low_rank, self.config.train.lora_alpha)[name]


def average(chosen: CheckpointChoice, weights: Sequence[float] | None, out: Path) -> list[str]:
    """Write the average of checkpoints to `out`, a new folder or a .safetensors file; returns lines for people.

    weights: what each counts, of which only the ratios matter; None: all the same. Raises ValueError, before anything is written, for
    checkpoints that do not fit together or hold numbers that are not finite; OSError.
    """
    parts = chosen.checkpoints()
    if weights and len(weights) != len(parts):
        raise ValueError(
            f"--weights has {len(weights)} numbers for {len(parts)} checkpoints: {', '.join(str(p.folder) for p in parts)}"
        )
    shares = [weight / sum(weights) for weight in weights] if weights else [1 / len(parts)] * len(parts)
    for other in parts[1:]:
        require_same(parts[0], other)
    state = {name: averaged_tensor(name, parts, shares) for name in sorted(parts[0].names)}
    if out.suffix == ".safetensors":
        _write_file(out, state, parts[0])
    else:
        _write_folder(out, state, parts, shares)
    size = sum(tensor.numel() for tensor in state.values()) / 1e6
    lines = [f"{out}: the average of {len(parts)} checkpoints, {size:.1f} M weights"]
    lines += [f"  {share:.3f}  {part.folder}{part.kind}" for share, part in zip(shares, parts, strict=True)]
    return lines + _notes(parts)


def require_same(first: CheckpointWeights, other: CheckpointWeights) -> None:
    """Raise ValueError if two checkpoints are of different models."""
    pair = f"{first.folder} and {other.folder}"
    if changed := other_towers(first.spec, other.spec):
        raise ValueError(
            f"{pair} have other towers ({', '.join(changed)} differ): only weights of the same model can be averaged"
        )
    for key in _HEAD:
        ours, theirs = getattr(first.config.model, key), getattr(other.config.model, key)
        if ours != theirs and not (key == "head_layers" and first.names == other.names):
            raise ValueError(f"{pair} have other heads: model.{key} is {ours} and {theirs}")
    if first.config.train.lora != other.config.train.lora:
        ranks = f"train.lora={first.config.train.lora} and {other.config.train.lora}"
        raise ValueError(
            f"{pair} were trained in different ways: {ranks}. Average checkpoints with LoRA of one rank, or all without"
        )
    if differ := sorted(first.names ^ other.names):
        raise ValueError(
            f"{pair} hold different weights: {', '.join(differ[:3])} {'is' if len(differ) == 1 else 'are'} in one of them only"
        )
    for name in sorted(first.names):
        if first.shape(name) != other.shape(name):
            raise ValueError(
                f"{pair} hold different weights: {name} has the shapes {first.shape(name)} and {other.shape(name)}"
            )


def averaged_tensor(name: str, parts: Sequence[CheckpointWeights], shares: Sequence[float]) -> Tensor:
    """One weight, summed in float64. Raises ValueError if one is not finite, or for whole numbers that differ."""
    first = parts[0].tensor(name)
    total = torch.zeros(first.shape, dtype=torch.float64)
    for part, share in zip(parts, shares, strict=True):
        value = part.tensor(name)
        if not value.is_floating_point():  # counters, indices
            if not torch.equal(value, first):
                raise ValueError(
                    f"{name} is a buffer of whole numbers, and others in {part.folder} than in {parts[0].folder}"
                )
            continue
        if not bool(value.isfinite().all()):
            raise ValueError(f"{part.folder}: {name} holds numbers that are not finite: leave that checkpoint out")
        total.add_(value.double(), alpha=share)
    return total.to(first.dtype) if first.is_floating_point() else first.clone()


def _notes(parts: Sequence[CheckpointWeights]) -> list[str]:
    """On settings of the data that runs do not share."""
    first, notes = parts[0], []
    ours = evaluation_settings(first.config.data.filled(preprocess_of(first.spec)))
    for run, part in {part.run: part for part in parts[1:] if part.run != first.run}.items():
        theirs = evaluation_settings(part.config.data.filled(preprocess_of(part.spec)))
        if differ := [f"data.{key} is {theirs[key]}" for key in ours if ours[key] != theirs[key]]:
            notes.append(f"note: in {run}, {', '.join(differ)}; the average keeps the settings of {first.run}")
    return notes


def _write_file(out: Path, state: dict[str, Tensor], first: CheckpointWeights) -> None:
    config, spec = first.config, with_files(first.spec, first.run / FILES)
    data = config.data.filled(preprocess_of(spec))
    built = CLIP4Clip.from_weights(weights_of_run(state, spec, config), first.folder)
    built.resize_pictures(data.image_size)
    export(built, out, "c4c", data)


def _write_folder(
    out: Path, state: dict[str, Tensor], parts: Sequence[CheckpointWeights], shares: Sequence[float]
) -> None:
    """A run folder with one checkpoint of weights alone, made beside and renamed."""
    first, beside = parts[0], out.with_name(f".{out.name}.tmp")
    config = first.config
    train = replace(config.train, ema=0.0, lora=0, lora_also=(), freeze=(), freeze_layers=-1)
    described = replace(
        config, train=train, run=replace(config.run, dir=str(out)), checkpoint=replace(config.checkpoint, whole=True)
    )
    sources = [
        {"run": str(part.run.resolve()), "tag": part.tag, "weights": "ema" if part.ema else "last", "share": share}
        for part, share in zip(parts, shares, strict=True)
    ]
    step = max(part.step for part in parts)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        save_description(beside, dump(described), first.spec)
        if (first.run / FILES).is_dir():
            shutil.copytree(first.run / FILES, beside / FILES)
        about = {"step": step, "updates": 0, "loss_scaler": {}, checkpoint.AVERAGE: sources}
        checkpoint.write(beside, step, {MODEL: state}, about)
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
