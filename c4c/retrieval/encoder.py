"""Sentences and clips to vectors, for an index and for searching it.

`TextEncoder` is what a search needs: the text tower, the head and the tokenizer. `save` puts all of it into a folder of an index, from
which `load` makes it again without the run, without a network, and without the image tower. `Encoder` is the whole model.

A vector depends on its own text or frame alone: towers are given blocks of one shape, so that what else is encoded with it
changes no bit of it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from c4c.config import override_data
from c4c.files import read_json_object
from c4c.models import towers
from c4c.models.backbone import FOLDER, preprocess_of
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.export.folder import save_json, save_tensors, written
from c4c.models.pretrained import check_names, evaluation_settings, open_checkpoint
from c4c.models.prompts import add_prompts, prompts_in, prompts_of
from c4c.models.tokenizer_spec import with_files, without_files
from c4c.retrieval import runtimes
from c4c.training.run_folder import is_run, located
from c4c.zero import checkpoint as run_checkpoint
from c4c.zero.patches import quiet_libraries
from pipelines.config import DataConfig
from pipelines.tokens import Tokenizer
from shards import first_line

FORMAT = 1  # of the folder that TextEncoder.save writes
WEIGHTS, ABOUT = "text.safetensors", "encoder.json"
_VISUAL = "clip.visual."
# stands for the image tower while the text side is put together on torch's meta device, and is then taken out
_NO_PICTURES = {"image_size": 16, "patch_size": 16, "width": 64, "layers": 1}
_PATHS = ("files", "hub")  # of a tokenizer's description: where it lies
_CPU_TEXTS, _GPU_TEXTS = 1, 32  # texts that the tower is given at once: one query must not wait for padding


@dataclass(frozen=True)
class Identity:
    """Which weights made a vector.

    checkpoint: what `Encoder.load` took, with an absolute path where it was one; tag: of a run's checkpoint. backbone_option: what
    --backbone named. digest: hex sha256 of all weights in fp32, of what the model is built by, and of `settings`: the same for a run,
    the file that was exported from it, and any device. backbone: the image tower in words. width: of the features. settings: how clips
    and captions are made (`c4c.models.pretrained.evaluation_settings`). ema: whether a run's averaged weights were asked for.
    """

    checkpoint: str
    tag: str | None
    backbone_option: str | None
    digest: str
    backbone: str
    head: str
    width: int
    settings: dict[str, Any]
    ema: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Identity":
        """What `to_dict` gave. Raises ValueError if a value is missing."""
        values = {"ema": True} | values  # from before there was one
        if missing := [field.name for field in fields(cls) if field.name not in values]:
            raise ValueError(f"the description of the model lacks {', '.join(missing)}")
        return cls(**{field.name: values[field.name] for field in fields(cls)})


class TextEncoder:
    """Sentences to vectors, and scores of them. It holds no image tower.

    identity: of the whole model. late: whether the head compares frames or words one by one, so that vectors are a first choice only.
    """

    def __init__(self, model: CLIP4Clip, identity: Identity, device: torch.device):
        self.model, self.identity, self.device = model, identity, device
        self.late = model.head.late
        self.tokenizer = Tokenizer(model.spec.get("tokenizer"))
        self.max_words: int = identity.settings["max_words"]
        self.tokenizer.length(self.max_words)
        self._block = _GPU_TEXTS if device.type == "cuda" else _CPU_TEXTS

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None) -> "TextEncoder":
        """Of a folder that `save` wrote. device: None means the CPU, which answers one query sooner than a GPU starts.

        Raises ValueError for a folder that holds none, or a damaged one.
        """
        folder = Path(folder)
        if not (folder / ABOUT).is_file():
            raise ValueError(f"{folder} holds no text encoder: there is no {ABOUT}")
        about = read_json_object(folder / ABOUT)
        if about.get("format") != FORMAT:
            raise ValueError(
                f"{folder} is of format {about.get('format')}, and this c4c reads format {FORMAT}: make the index again"
            )
        place = usable(device or "cpu")
        try:
            spec = with_files(about["spec"], folder)
            tensors = load_file(folder / WEIGHTS)
            prompts = about.get("prompts", prompts_in(tensors))  # which older folders do not name
            model = _text_side(spec, about["head"], about["blocks"], about["segments"], prompts)
            _assign(model, tensors)
            identity = Identity.from_dict(about["identity"])
        except (KeyError, TypeError, AttributeError, RuntimeError, OSError, safetensors.SafetensorError) as error:
            reason = first_line(error, named=True)
            raise ValueError(f"{folder}: the text encoder is damaged ({reason})") from error
        return TextEncoder(model.to(place).eval().requires_grad_(False), identity, place)

    def save(self, folder: Path) -> None:
        """Write all that `load` needs into `folder`: text.safetensors, encoder.json and, where it has some, the tokenizer's files.

        The folder is made; it appears whole or not at all. Raises OSError that names it.
        """
        model = self.model
        about = {
            "format": FORMAT, "spec": without_files(model.spec), "head": model.head.name, "blocks": model.blocks,
            "segments": model.segments, "prompts": prompts_of(model), "identity": self.identity.to_dict(),
        }  # fmt: skip
        state = dict(model.state_dict()) | dict(_unsaved_buffers(model))
        with written(folder) as beside:
            save_tensors(
                {name: tensor for name, tensor in state.items() if not name.startswith(_VISUAL)}, beside / WEIGHTS
            )
            self.tokenizer.save(beside)
            save_json(about, beside / ABOUT)

    @torch.inference_mode()
    def texts(self, sentences: Sequence[str]) -> Tensor:
        """What the head compares with videos: float32 [N, D], or [N, L, D] for a head that scores words. On `device`.

        Longer sentences are cut at `max_words` tokens.
        """
        tokens = self.tokenizer(list(sentences), self.max_words)
        parts = []
        for start in range(0, len(tokens), self._block):
            rows = tokens[start : start + self._block]
            encoded = self.model.encode_text(_filled(rows, self._block).to(self.device))
            parts.append(self.model.head.text(encoded).float()[: len(rows)])
        if parts:
            return torch.cat(parts)
        words = (tokens.shape[1],) if self.model.head.tokens else ()
        return torch.zeros(0, *words, self.identity.width, device=self.device)

    @torch.inference_mode()
    def vectors(self, texts: Tensor) -> Tensor:
        """Unit vectors [N, D] of what `texts` gave, for the first stage of a search; the only stage for a head that is not late."""
        return _one_by_one(self.model.head.text_vector, texts.to(self.device), self.identity.width)

    @torch.inference_mode()
    def score(self, texts: Tensor, videos: Tensor) -> Tensor:
        """The head's scores [N, M], before the temperature, of what `texts` and `Encoder.videos` gave."""
        if not (len(texts) and len(videos)):
            return torch.zeros(len(texts), len(videos), device=self.device)
        return self.model.head.score(texts.to(self.device), videos.to(self.device)).float()


class Encoder(TextEncoder):
    """The whole model.

    data: how clips are made for it, complete. framewise: whether frames are encoded one by one; False where they meet in the image
    tower. runtime: what runs the image tower (see c4c.retrieval.runtimes). block: frames that it is given at once.
    """

    def __init__(
        self, model: CLIP4Clip, identity: Identity, data: DataConfig, device: torch.device, runtime: str = "torch"
    ):
        super().__init__(model, identity, device)
        self.data, self.framewise = data, not model.frames_meet
        self._tower = runtimes.start(runtime, model, device, identity.digest)
        self.runtime, self.block = self._tower.name, self._tower.block

    @classmethod
    def load(  # type: ignore[override]  # of a checkpoint, not of a folder that `save` wrote
        cls, checkpoint: str, tag: str | None = None, backbone: str | None = None,
        device: str | torch.device | None = None, runtime: str = "torch", *, ema: bool = True, overrides: Sequence[str] = (),
    ) -> "Encoder":  # fmt: skip
        """A run, or any checkpoint that `c4c.models.pretrained.open_checkpoint` takes.

        tag, backbone, ema: as there. device: None means a GPU where there is one. runtime: of the image tower: torch, torch-bf16, onnx,
        onnx-int8, or auto, which measures. overrides: `data.key=value`, over the checkpoint's own settings. Raises ValueError.
        """
        runtimes.check(runtime)
        place = usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_names(checkpoint, tag, backbone, ema)
        quiet_libraries()
        name, tag, ema = located(checkpoint, tag, ema)
        if is_run(name):
            tag = run_checkpoint.resolve(Path(name), tag)
        model, data = open_checkpoint(name, tag, backbone, ema)
        data = override_data(data, list(overrides)).filled(preprocess_of(model.spec))
        model.resize_pictures(data.image_size)
        model.check_data(data, name)
        model.set_pixels(data)
        identity = Identity(
            checkpoint=_absolute(name), tag=tag, backbone_option=backbone, digest=digest(model, data),
            backbone=_tower_in_words(model.spec), head=model.head.name, width=model.spec["embed_dim"], settings=evaluation_settings(data), ema=ema,
        )  # fmt: skip
        return cls(model.to(place).eval().requires_grad_(False), identity, data, place, runtime)

    @torch.inference_mode()
    def frames(self, pixels: np.ndarray | Tensor) -> Tensor:
        """Frames as bytes, uint8 [n, S, S, 3], of the size that the tower takes -> their features, float32 [n, D], on `device`.

        Frames of several clips may come together, which is quicker. Raises ValueError if the model is not `framewise`.
        """
        if not self.framewise:
            raise ValueError(
                "this model's frames meet in its image tower (linear_patch=3d, or merge_frames): it encodes clips, not frames"
            )
        pixels = torch.as_tensor(pixels)
        parts = []
        for start in range(0, len(pixels), self.block):
            rows = pixels[start : start + self.block]
            parts.append(self._tower(_filled(rows, self.block))[: len(rows)].to(self.device))
        return torch.cat(parts) if parts else torch.zeros(0, self.identity.width, device=self.device)

    def loss(self, pixels: np.ndarray | Tensor) -> float:
        """What `runtime` costs on a sample of frames, uint8 [n, S, S, 3], n >= 3: 1 where each frame's nearest 10 are those by torch's
        fp32, 0.9 where 9 of 10 are. (see c4c.retrieval.runtimes)"""
        return runtimes.loss(self.model, self._tower, torch.as_tensor(pixels))

    @torch.inference_mode()
    def clips(self, pixels: np.ndarray | Tensor, mask: np.ndarray | Tensor) -> Tensor:
        """Clips uint8 [M, F, S, S, 3] and the frames that they have, bool [M, F] -> features [M, F, D], zeros outside the mask."""
        pixels, mask = torch.as_tensor(pixels), torch.as_tensor(mask).bool()
        if self.framewise:
            features = torch.zeros(*mask.shape, self.identity.width, device=self.device)
            features[mask.to(self.device)] = self.frames(pixels[mask])
            return features
        clips = [self._tower.clip(clip, seen) for clip, seen in zip(pixels, mask, strict=True)]
        features = torch.stack(clips) if clips else torch.zeros(*mask.shape, self.identity.width)
        return features.to(self.device) * mask.to(self.device)[..., None]

    @torch.inference_mode()
    def videos(self, features: Tensor, mask: np.ndarray | Tensor) -> Tensor:
        """Frame features [M, F, D] and the mask [M, F] -> what the head compares with texts: [M, D], or [M, F, D] for late heads."""
        features, mask = features.to(self.device), torch.as_tensor(mask).bool().to(self.device)
        kept_features = features * mask[..., None]
        parts = [self.model.head.video(kept_features[i : i + 1], mask[i : i + 1]).float() for i in range(len(mask))]
        return (
            torch.cat(parts)
            if parts
            else features.new_zeros(0, *(features.shape[1:] if self.late else features.shape[2:]))
        )

    @torch.inference_mode()
    def video_vectors(self, videos: Tensor) -> Tensor:
        """Unit vectors [M, D] of what `videos` gave, for the first stage of a search."""
        return _one_by_one(self.model.head.video_vector, videos.to(self.device), self.identity.width)


def usable(device: str | torch.device) -> torch.device:
    """A device by name. Raises ValueError if torch knows none of that name, or this machine has not got it."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device}: must be cpu, cuda or cuda:N") from error
    gpus = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= gpus:
        raise ValueError(f"--device {device}: this machine has {gpus} GPUs that torch can use")
    return place


def digest(model: CLIP4Clip, data: DataConfig) -> str:
    """Hex sha256 of what makes the model's vectors: its weights in fp32, by name, how it is put together, and how clips are made."""
    about = json.loads(json.dumps(_used(model, data)))  # as it is read from a file: names are strings
    known = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    state = model.state_dict()
    for name in sorted(state):
        values = state[name].detach().cpu()
        values = (values.float() if values.is_floating_point() else values).contiguous()
        known.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        known.update(values.flatten().numpy())
    return known.hexdigest()


def _used(model: CLIP4Clip, data: DataConfig) -> dict[str, Any]:
    """All but the weights that a vector depends on, without places on a disk and versions of libraries.

    Of settings, those that are not the default ones: a version of c4c that has more of them gives the same digest.
    """
    usual = evaluation_settings(DataConfig())
    # `data` holds the settings of preprocess_cfg
    spec = {key: value for key, value in model.spec.items() if key not in ("preprocess_cfg", "hf_config")}
    about = {key: value for key, value in spec.get("tokenizer", {}).items() if key not in _PATHS}
    if Path(about.get("name", "")).is_absolute():
        about["name"] = ""
    text = {key: value for key, value in spec["text_cfg"].items() if not key.startswith("hf_") or "name" not in key}
    hugging_face = {
        key: value for key, value in model.spec.get("hf_config", {}).items()
        if key not in ("transformers_version", "_name_or_path")
    }  # fmt: skip
    return {
        "spec": spec | {"tokenizer": about, "text_cfg": text}, "hf_config": hugging_face, "head": model.head.name,
        "linear_patch": model.linear_patch, "blocks": model.blocks, "segments": model.segments,
        "data": {name: value for name, value in evaluation_settings(data).items() if value != usual[name]},
    } | ({"merging": asdict(model.merging)} if model.merging else {})  # fmt: skip


def _absolute(name: str) -> str:
    """A checkpoint's name that means the same from any folder."""
    if name.startswith(FOLDER):
        return f"{FOLDER}{Path(name.removeprefix(FOLDER)).absolute()}"
    return str(Path(name).absolute()) if Path(name).exists() else name


def _tower_in_words(spec: dict) -> str:
    """The image tower, `ViT-L/14 at 224` say."""
    vision = spec["vision_cfg"]
    patch = f" of patches of {vision['patch_size']}" if towers.kind(spec) == "ViT" and vision.get("patch_size") else ""
    return f"{towers.kind(spec)}{patch}, {towers.image_size(spec)} pixels"


def _text_side(spec: dict, head: str, blocks: int, segments: int, prompts: int) -> CLIP4Clip:
    """A model without an image tower; its weights are on the meta device."""
    with towers.on_meta():
        model = CLIP4Clip(spec | {"vision_cfg": _NO_PICTURES}, head, "2d", blocks, segments)
        add_prompts(model.clip, prompts)
    model.spec = spec
    del model.clip.visual
    return model


def _unsaved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a state dict leaves out, as masks of attention: computed when a model is built, which the meta device does not do."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name not in saved)


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a model on the meta device these weights and buffers. Raises RuntimeError if they are not exactly those that it has."""
    saved = model.state_dict().keys()
    unsaved = list(_unsaved_buffers(model))
    if strange := tensors.keys() - saved - {name for name, _ in unsaved}:  # without them the tower would be another one
        raise RuntimeError(f"it has {len(strange)} weights with no place in the model, as {min(strange)}")
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in saved}, assign=True)
    for name, buffer in unsaved:
        if name not in tensors or tensors[name].shape != buffer.shape:
            raise RuntimeError(f"it lacks {name}")
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, tensors[name])


def _filled(rows: Tensor, length: int) -> Tensor:
    """Rows [n, ...], and copies of the last one up to `length`."""
    if len(rows) == length:
        return rows
    return torch.cat([rows, rows[-1:].expand(length - len(rows), *rows.shape[1:])])


def _one_by_one(function: Any, rows: Tensor, width: int) -> Tensor:
    """function([1, ...]) -> [1, D] of each row: what stands beside a row changes no bit of it."""
    return (
        torch.cat([function(rows[i : i + 1]).float() for i in range(len(rows))])
        if len(rows)
        else rows.new_zeros(0, width)
    )
