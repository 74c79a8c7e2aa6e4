"""Any checkpoint as a model with the data settings it goes with: a run, a file or folder of weights, or a name that open_clip knows."""

from dataclasses import fields, replace
from pathlib import Path

from c4c.config import from_dict
from c4c.merging import Merging
from c4c.models.backbone import UnknownBackbone, named, preprocess_of
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.weights import Weights, is_schema, read, read_backbone
from c4c.training.run_folder import is_run, located, read_config
from c4c.zero import checkpoint
from pipelines.config import EVALUATION_SETTINGS, DataConfig
from pipelines.tokens import CLIPS

# how each project samples and sizes pictures and captions; a run says so itself
_SETTINGS = {
    "mmaction2": DataConfig(sampling="segment", resize=256, max_words=77),
    "c4c": DataConfig(sampling="segment", max_words=77),
}
_CLIPS_WORDS = 32  # of a caption, by the official CLIP4Clip, for towers that CLIP's tokenizer goes with


def open_checkpoint(
    name: str, tag: str | None = None, backbone: str | None = None, ema: bool = True, merging: Merging | None = None
) -> tuple[CLIP4Clip, DataConfig]:
    """The model, in eval mode, and its data settings, complete. Raises ValueError.

    name: a run folder; a file or folder that `c4c.models.weights.read` knows; `local-dir:DIR`, `hf-hub:ID`, or TAG:BACKBONE as
    open_clip names them (openai:ViT-B-32). tag: a run's checkpoint. backbone: what a file's weights are of that does not say. ema: a
    run's averaged weights, where it was trained with `train.ema`. merging: of tokens in the image tower; None: the checkpoint's own.
    """
    check_names(name, tag, backbone, ema)
    name, tag, ema = located(name, tag, ema)
    path = Path(name)
    if is_run(name):
        config = from_dict(read_config(path))
        model = CLIP4Clip.from_weights(_merged(read(path, None, tag, ema), merging), path)
        return model, config.data.filled(preprocess_of(model.spec))
    if path.exists() or ":" not in name:
        weights = read(path, backbone)
    else:
        weights = _known(name)
    model = CLIP4Clip.from_weights(_merged(weights, merging), name)
    return model, _data(weights, model)


def _known(name: str) -> Weights:
    """Weights that open_clip or a hub knows. What is wrong with them is told of this name, and not of settings of a training."""
    pretrained, _, known = (name, "", name) if is_schema(name) else name.partition(":")
    try:
        if pretrained != name:
            named(known)
        return read_backbone(known, pretrained, called=name)
    except UnknownBackbone as error:
        raise UnknownBackbone(f"{name}{str(error).removeprefix(f'model.backbone={known}')}") from error


def _merged(weights: Weights, merging: Merging | None) -> Weights:
    return weights if merging is None else replace(weights, merging=merging)


def weights_taken(name: str, tag: str | None, ema: bool) -> str:
    """For people, which weights of a run `open_checkpoint` takes; '' where there is only one kind."""
    name, tag, ema = located(name, tag, ema)
    if not is_run(name):
        return ""
    run = Path(name)
    return checkpoint.which_weights(run / checkpoint.FOLDER / checkpoint.resolve(run, tag), ema)


def check_names(name: str, tag: str | None, backbone: str | None, ema: bool = True) -> None:
    """Raise ValueError for a tag or a backbone that does not go with the checkpoint, or `ema` false for weights of no run."""
    run, path = is_run(located(name, tag, ema)[0]), Path(name)
    if tag and not run:
        raise ValueError(f"--tag {tag} names a run's checkpoint, and {name} is no run folder")
    if not ema and not run:
        raise ValueError(f"--no-ema chooses among the weights of a run's checkpoint, and {name} is no run folder")
    if backbone and (run or path.is_dir() or (":" in name and not path.exists())):
        raise ValueError(f"--backbone {backbone}: it is for files of weights; {name} names its backbone itself")


def _data(weights: Weights, model: CLIP4Clip) -> DataConfig:
    known = preprocess_of(model.spec)
    if weights.data:
        names = {field.name for field in fields(DataConfig)} & weights.data.keys()
        return DataConfig.from_plain({name: weights.data[name] for name in names}).filled(known)
    tokenizer = model.spec.get("tokenizer", CLIPS)
    clips = tokenizer["kind"] == "clip" and not tokenizer["fixed_length"]
    data = _SETTINGS.get(weights.kind, DataConfig(max_words=_CLIPS_WORDS if clips else 0))
    size, words = model.image_size, min(data.max_words, model.context_length)
    resize = round(data.resize * size / 224) if data.resize and known.resize_mode == "shortest" else 0
    return replace(data, num_frames=weights.segments, image_size=size, resize=resize, max_words=words).filled(known)


def evaluation_settings(data: DataConfig) -> dict:
    """How clips and captions are made in evaluation, as plain values: what an exported file keeps of a run's settings, and
    `open_checkpoint` takes back."""
    values = {name: getattr(data, name) for name in EVALUATION_SETTINGS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
