"""A folder as open_clip loads it: open_clip.create_model_from_pretrained("local-dir:FOLDER")."""

from copy import deepcopy
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP

from c4c.models import towers
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.export.folder import TOKENIZER, drop_earlier, save_json, save_tensors, written
from c4c.models.export.towers_only import about_resize, pictures, refuse_more, without_merging
from pipelines.config import DataConfig
from pipelines.tokens import Tokenizer

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
_OURS = ("preprocess_cfg", "tokenizer", "hf_config")  # of a spec, what is no part of open_clip's model config


def write(model: CLIP4Clip, data: DataConfig | None, folder: Path) -> list[str]:
    """Returns notes for people. Raises ValueError if the layout cannot hold the model, and OSError."""
    notes = [refuse_more(model, "open_clip's layout"), *about_resize(data), *without_merging(model)]
    config = {key: deepcopy(value) for key, value in model.spec.items() if key not in _OURS}
    text, vision = config["text_cfg"], config["vision_cfg"]
    for tower in (text, vision):
        tower.pop("output_tokens", None)  # which CoCa's decoder needs, and changes what the towers return
    if "timm_model_name" in vision and "act_kwargs" in vision:  # as transformers' SigLIP has it
        notes.append("open_clip computes timm's image tower with its own GELU, not with the approximation of these weights: "
                     "features differ from the fourth digit on")  # fmt: skip
    state = model.clip.state_dict()
    if "hf_model_name" in text:
        notes.append(f"open_clip fetches the configuration of its text tower by name, {text['hf_model_name']}")
    else:
        _refuse_other_shapes(config, {name: tensor.shape for name, tensor in state.items()})
    with written(folder) as beside:
        save_tensors(state, beside / WEIGHTS)
        save_json({"model_cfg": config, "preprocess_cfg": pictures(model, data)}, beside / CONFIG)
        if "hf_tokenizer_name" in text:
            try:
                Tokenizer(model.spec.get("tokenizer")).save(beside)
                drop_earlier(folder, beside, TOKENIZER)
            except ValueError as error:
                notes.append(f"open_clip takes the tokenizer from this folder, and its files are not here: {error}")
    return notes


def _refuse_other_shapes(config: dict, own: dict[str, torch.Size]) -> None:
    """Raise ValueError if open_clip builds a model of other shapes by the config, as where pictures were resized in timm's models."""
    config = deepcopy(config)
    config["vision_cfg"].pop("timm_model_pretrained", None)
    custom = config.pop("custom_text", False)
    with torch.device("meta"), towers.quiet():
        built = (CustomTextCLIP if custom else CLIP)(**config).state_dict()
    differ = [name for name in own if name not in built or built[name].shape != own[name]]
    if differ:
        raise ValueError(
            f"open_clip {open_clip.__version__} builds this model with another {differ[0].removeprefix('visual.')}, as it does for "
            "pictures of another size than its image tower was made for: use --format c4c or onnx"
        )
