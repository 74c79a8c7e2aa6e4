"""Weights from wherever CLIP4Clip's users have them, recognised by their names; nothing in a file is executed.

runs          run folders, and safetensors files that c4c.export wrote
clip4clip     the official code's pytorch_model.bin.N, mmaction2's checkpoints
huggingface   transformers' CLIP and SigLIP: a folder with config.json, or its file of weights
openai        OpenAI's TorchScript archives and their state dicts
openclip      open_clip's state dicts, bare or wrapped, and folders with open_clip_config.json

base: what they are read into. files: tensors of a file; archives: torch's own files, without running them.
"""

from pathlib import Path
from types import ModuleType

import open_clip

from c4c.files import looked_in
from c4c.models import towers
from c4c.models.backbone import named
from c4c.models.weights import clip4clip, huggingface, openai, openclip, runs
from c4c.models.weights.base import Content, Unsaid, Weights
from c4c.models.weights.files import load
from c4c.training.run_folder import run_of_file
from pipelines.hub import mind_the_network

# in this order: names of transformers' and OpenAI's files are also those of files without their marks
_FAMILIES: tuple[ModuleType, ...] = (runs, clip4clip, huggingface, openai, openclip)
_SCHEMAS = ("hf-hub:", "local-dir:")
_FEATURES = {"caption_counts", "videos", "texts"}  # arrays of a file of features (c4c/retrieval/feature_file.py)


def read(path: str | Path, backbone: str | dict | None = None, tag: str | None = None, ema: bool = True) -> Weights:
    """Read a file, a run folder, or a folder of open_clip's or transformers'.

    backbone: what the weights are of, as open_clip names it, or its description; for files that do not say it themselves.
    tag: which checkpoint of a run; None: its latest. ema: its averaged weights, where it has some. Raises ValueError if it is none
    of the kinds known, cannot be read, or does not say what has to be known of its towers.
    """
    weights = _read(Path(path), backbone, tag, ema)
    if isinstance(backbone, str) and weights.kind not in ("c4c", "c4c run"):
        require_size(weights, backbone, path)
    return weights


def require_size(weights: Weights, backbone: str, source: object) -> None:
    """Raise ValueError if the weights are of other sizes than the backbone that was named for them."""
    spec = named(backbone)
    if differ := [key for key in openai.differing(weights.spec, spec) if key != "picture size"]:
        given, wanted = (
            ", ".join(f"{key} {sizes[key]}" for key in differ if key in sizes)
            for sizes in (towers.sizes(weights.spec), towers.sizes(spec))
        )
        what = (
            f"that {openclip.CONFIG} is of other weights"
            if is_schema(backbone)
            else "name the backbone that the weights are of"
        )
        raise ValueError(f"{source} has {given}; {backbone} has {wanted}: {what}")


def _read(path: Path, backbone: str | dict | None, tag: str | None, ema: bool = True) -> Weights:
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder of weights{looked_in(path)}")
    if path.is_dir() and (path / openclip.CONFIG).is_file():
        return _named(f"local-dir:{path}")
    if path.is_dir() and huggingface.is_folder(path):
        path = huggingface.weights_file(path)
    elif path.is_dir():
        return runs.from_run(path, tag, ema)
    elif run := run_of_file(path):
        return runs.from_run(*run)
    folder = None if isinstance(backbone, dict) or runs.stated(path) else openclip.folder_of_file(path)
    towers_of = folder or backbone
    spec = named(towers_of) if isinstance(towers_of, str) else towers_of
    if path.suffix == ".npz" and spec is not None:
        return openclip.read_big_vision(path, spec)
    weights = _recognised(load(path), spec)
    if folder:
        require_size(weights, folder, path)
    unsaid = weights.kind in ("open_clip", "transformers") and not (folder or huggingface.is_described(path))
    if unsaid and isinstance(backbone, str):
        openclip.warn_of_other_tags(path, backbone)
    return weights


def _named(name: str) -> Weights:
    """Of `local-dir:DIR` or `hf-hub:ID`, whose config counts."""
    spec, path = named(name), openclip.located(name)
    weights = _recognised(load(path), spec)
    require_size(weights, name, path)  # else the tensors' sizes would count, without the config's heads and pixels
    return weights


def _recognised(file: Content, spec: dict | None) -> Weights:
    try:
        if file.state.keys() >= _FEATURES:
            raise ValueError(
                "it holds features of videos and captions, as `python -m c4c.features` writes them, and no weights: name it as train.teacher"
            )
        if not runs.matches(file) and runs.is_stray(file):
            runs.refuse_stray()
        for family in _FAMILIES:
            if family.matches(file):
                return family.read(file, spec)
    except ValueError as error:
        raise (Unsaid if isinstance(error, Unsaid) else ValueError)(f"{file.path}: {error}") from error
    names = ", ".join(sorted(file.state)[:3]) or "no tensors at all"
    raise ValueError(
        f"{file.path}: neither CLIP4Clip, mmaction2, OpenAI, open_clip nor transformers weights (it holds {names})"
    )


def stated(source: str) -> dict | None:
    """The towers that a source of weights states itself, with the pixels and the tokenizer that it was made with, before the weights
    are read; None for a file that does not, and has no config beside it. Raises ValueError."""
    path = Path(source)
    if is_schema(source):
        return named(source)
    if (path / openclip.CONFIG).is_file():
        return named(f"local-dir:{path}")
    if path.is_file() and (run := run_of_file(path)):
        path = run[0]
    if own := runs.stated(path) or huggingface.stated(path):
        return own
    folder = openclip.folder_of_file(path)
    return named(folder) if folder else None


def is_schema(name: str) -> bool:
    """Whether a name is `hf-hub:ID` or `local-dir:DIR`, which mean towers and weights."""
    return name.startswith(_SCHEMAS)


def read_backbone(backbone: str, source: str, tag: str | None = None, ema: bool = True, called: str = "") -> Weights:
    """Weights to start `backbone` from: a path, `local-dir:DIR`, `hf-hub:ID`, or one of open_clip's tags for it; empty: those
    that the backbone's own name means.

    tag: of a run's checkpoint; ema: its averaged weights, where it has some. called: what the user calls the weights; '': by the setting
    model.init_from. Raises ValueError.
    """
    source = source or backbone
    named_as = called or f"model.init_from={source}"
    if is_schema(source):
        return _named(source)
    if Path(source).exists():
        return _read(Path(source), backbone, tag, ema)
    tags = open_clip.list_pretrained_tags_by_model(backbone)
    if source not in tags:
        other = "name a file" if called else "use scratch, or a file"
        looked = looked_in(source) if "/" in source else ""
        raise ValueError(
            f"{named_as}: no such file, folder{looked}, or open_clip tag of {backbone}; its tags are "
            f"{', '.join(tags) or f'none: {other}'}"
        )
    about = open_clip.get_pretrained_cfg(backbone, source)
    if about.get("hf_hub"):
        mind_the_network()
    try:
        path = open_clip.download_pretrained(about)
    except Exception as error:  # hubs fail in many ways
        raise ValueError(
            f"{named_as}: the weights of {backbone} are not here and could not be fetched "
            f"({type(error).__name__}). {openclip.how_to_fetch(backbone, source, called)}"
        ) from error
    return _read(Path(path), named(backbone, source), None)
