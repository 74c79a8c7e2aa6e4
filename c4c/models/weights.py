"""Weights from wherever CLIP4Clip's users have them, recognised by their names; nothing in a file is executed.

official CLIP4Clip   pytorch_model.bin.N: `clip.*` beside the head's modules
mmaction2            {"state_dict": `clip.*`, `adapter.*`}
OpenAI               a TorchScript archive, or its state dict: `visual.*`, `transformer.*`, …
open_clip            {"state_dict": …} or bare, perhaps under `module.`; `text.*` for its CustomTextCLIP
c4c                  a run folder, or a safetensors file that c4c.export wrote
"""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import open_clip
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from c4c.config import from_dict
from c4c.files import looked_in, read_json_object
from c4c.models import archives, towers
from c4c.training.run_folder import read_config
from c4c.zero.checkpoint import load_weights

_READ = (
    "Read are run folders, .safetensors files, and what torch.save or TorchScript wrote, with weights of CLIP4Clip, "
    "mmaction2, OpenAI or open_clip; files that need code to be run are refused"
)
_ARCHIVE_EXTRAS = {"input_resolution", "context_length", "vocab_size"}  # sizes that OpenAI's archives carry as tensors


@dataclass(frozen=True)
class Weights:
    """A state dict in c4c's names (`clip.*`, `head.*`), fp32, and the model it fits."""

    state: dict[str, Tensor]
    spec: dict  # the towers; see c4c.models.towers
    head: str
    linear_patch: str
    blocks: int
    segments: int
    kind: str  # what the file was recognised as


def read(path: str | Path, quick_gelu: bool | None = None, tag: str | None = None) -> Weights:
    """Read a file or run folder. Raises ValueError if it is none of the kinds known or unreadable.

    quick_gelu: the towers' activation; None: QuickGELU but for open_clip's checkpoints, whose names do not tell.
    tag: which checkpoint of a run folder; None: its latest.
    """
    path = Path(path)
    if path.is_dir():
        return _from_run(path, tag)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder of weights{looked_in(path)}")
    raw, metadata = _load(path)
    if "c4c" in metadata:
        try:
            return Weights(state=_floats(raw), kind="c4c", **json.loads(metadata["c4c"]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged: what it says of its model cannot be read") from error
    try:
        return recognise(raw, quick_gelu)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_backbone(backbone: str, source: str, tag: str | None = None) -> Weights:
    """Weights to start `backbone` from: a path, or one of open_clip's tags for it; tag: of a run's checkpoint.

    Raises ValueError.
    """
    if Path(source).exists():
        spec = towers.named(backbone)
        return read(source, quick_gelu=spec["quick_gelu"] or None, tag=tag)
    tags = open_clip.list_pretrained_tags_by_model(backbone)
    if source not in tags:
        looked = looked_in(source) if "/" in source else ""
        raise ValueError(
            f"model.init_from={source}: no such file, folder{looked}, or open_clip tag of {backbone}; its tags are "
            f"{', '.join(tags) or 'none: use scratch, or a file'}"
        )
    about = open_clip.get_pretrained_cfg(backbone, source)
    try:
        path = open_clip.download_pretrained(about)
    except Exception as error:  # hubs fail in many ways
        where = (
            about.get("url")
            or f"https://huggingface.co/{about.get('hf_hub', '').rstrip('/')} (open_clip_model.safetensors)"
        )
        raise ValueError(
            f"model.init_from={source}: the weights of {backbone} are not here and could not be fetched "
            f"({type(error).__name__}). Fetch {where} on a machine with a network, put it beside your data, and set "
            "model.init_from to its path"
        ) from error
    return read(path, quick_gelu=bool(about.get("quick_gelu", False)))


def recognise(raw: dict, quick_gelu: bool | None = None) -> Weights:
    """Weights from a loaded file of any other project. Raises ValueError if its names are none that are known."""
    wrapped = isinstance(raw.get("state_dict"), dict)
    state = raw["state_dict"] if wrapped else raw
    state = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    if state and all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith("data_preprocessor.")}
    if any(k.startswith("clip.") for k in state):
        return _clip4clip(
            state, mmaction2=wrapped or any(k.startswith("adapter.") for k in state), quick_gelu=quick_gelu
        )
    if any(k.startswith("text.") for k in state):
        state = {k.removeprefix("text."): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if k not in _ARCHIVE_EXTRAS and k != "attn_mask"}
    if "visual.conv1.weight" not in state:
        names = ", ".join(sorted(state)[:3]) or "no tensors at all"
        raise ValueError(f"neither CLIP4Clip, mmaction2, OpenAI nor open_clip ViT weights (it holds {names})")
    openai = not wrapped
    spec = towers.measured(state, quick_gelu if quick_gelu is not None else openai)
    kind = "OpenAI" if openai else "open_clip"
    return Weights(_floats({f"clip.{k}": v for k, v in state.items()}), spec, "meanP", "2d", 4, 12, kind)


def _clip4clip(state: dict[str, Tensor], mmaction2: bool, quick_gelu: bool | None) -> Weights:
    clip = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    extras = {k: v for k, v in clip.items() if k in _ARCHIVE_EXTRAS}
    rest = {k.removeprefix("adapter."): v for k, v in state.items() if not k.startswith("clip.")}
    if mmaction2:
        head = "TransformerAdapter" if "positional_embedding" in rest else "SimpleMeanAdapter"
        stack, segments = "transformer.resblocks.", len(rest.get("positional_embedding", range(12)))
    else:
        marks = {
            "lstm_visual.": "seqLSTM",
            "transformerClip.": "seqTransf",
            "cross.": "tightTransf",
            "text_weight_fc.": "wti",
        }
        head = next((name for mark, name in marks.items() if any(k.startswith(mark) for k in rest)), "meanP")
        stack, segments = {"tightTransf": "cross.transformer.resblocks."}.get(head, "transformerClip.resblocks."), 12
    spec = towers.measured(clip, True if quick_gelu is None else quick_gelu)
    ours = {f"clip.{k}": v for k, v in clip.items() if k not in extras} | {f"head.{k}": v for k, v in rest.items()}
    patch = "3d" if "visual.conv2.weight" in clip else "2d"
    blocks = len({k[len(stack) :].split(".")[0] for k in rest if k.startswith(stack)}) or 4
    return Weights(_floats(ours), spec, head, patch, blocks, segments, "mmaction2" if mmaction2 else "official")


def to_official(state: dict[str, Tensor], spec: dict) -> dict[str, Tensor]:
    """The weights of a model with towers `spec`, in the official CLIP4Clip's names.

    Raises ValueError for towers that the layout cannot describe: whoever reads it would score wrongly without knowing.
    """
    vision, text = towers.parts(spec)
    differs = ["the activation GELU"] if not spec["quick_gelu"] else []
    for kind, width in (("image", vision.head_width), ("text", text.width / text.heads)):
        if width != towers.HEAD_WIDTH:
            differs.append(f"{kind} attention heads of width {width:g}")
    if differs:
        raise ValueError(
            f"the official layout cannot hold a model with {' and '.join(differs)}: it is read as QuickGELU with heads of "
            f"width {towers.HEAD_WIDTH}, and would give wrong scores. Export without --official"
        )
    return {k.removeprefix("head."): v for k, v in state.items()}


def _from_run(folder: Path, tag: str | None) -> Weights:
    config = from_dict(read_config(folder))
    model, about = config.model, folder / "towers.json"
    state = load_weights(folder, tag)
    spec = read_json_object(about) if about.is_file() else towers.named(model.backbone)
    return Weights(state, spec, model.head, model.linear_patch, model.head_layers, config.data.num_frames, "c4c run")


def _load(path: Path) -> tuple[dict, dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path} is no file of weights. {_READ}")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                return load_file(path), file.metadata() or {}
        raw = _unpickled(path)
    except Exception as error:  # torch and safetensors raise many kinds for files that are not theirs
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"{path} cannot be read ({error.strerror})") from error
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise ValueError(f"{path}: there is not enough memory for its weights") from error
        raise ValueError(f"{path} is no file of weights, or a damaged one. {_READ}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not a dict of weights")
    return raw, {}


def _unpickled(path: Path) -> object:
    if archives.is_torchscript(path):
        return archives.read_torchscript(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it holds more than tensors, as mmengine's checkpoints do
        if not archives.is_archive(path):
            raise
        return archives.read_archive(path)


def _floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() for k, v in state.items()}
