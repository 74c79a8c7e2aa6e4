"""Any checkpoint as a model with the data settings it goes with: a run, a file of weights, or one that open_clip names."""

from dataclasses import replace
from pathlib import Path

from c4c.config import from_dict
from c4c.models import towers
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.weights import Weights, read, read_backbone
from c4c.training.run_folder import is_run, read_config
from pipelines.config import DataConfig

# how each project samples and sizes pictures and captions; a run says so itself
_SETTINGS = {
    "mmaction2": DataConfig(sampling="segment", resize=256, max_words=77),
    "c4c": DataConfig(sampling="segment", max_words=77),
}


def open_checkpoint(name: str, tag: str | None = None) -> tuple[CLIP4Clip, DataConfig]:
    """The model, in eval mode, and its data settings. Raises ValueError.

    name: a run folder, a file that `c4c.models.weights.read` knows, or TAG:BACKBONE as open_clip names them (openai:ViT-B-32).
    tag: a run's checkpoint.
    """
    path = Path(name)
    if is_run(name):
        config = from_dict(read_config(path))
        return CLIP4Clip.from_checkpoint(path, tag=tag), config.data
    if tag:
        raise ValueError(f"--tag {tag} names a run's checkpoint, and {name} is no run folder")
    if path.exists() or ":" not in name:
        weights = read(path)
    else:
        pretrained, _, backbone = name.partition(":")
        towers.named(backbone)
        weights = read_backbone(backbone, pretrained)
    model = CLIP4Clip.from_weights(weights, name)
    return model, _data(weights, model)


def _data(weights: Weights, model: CLIP4Clip) -> DataConfig:
    data = _SETTINGS.get(weights.kind, DataConfig())
    size, words = model.image_size, min(data.max_words, model.context_length)
    resize = round(data.resize * size / 224) if data.resize else 0
    return replace(data, num_frames=weights.segments, image_size=size, resize=resize, max_words=words)
