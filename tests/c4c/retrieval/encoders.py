"""Small models with random weights as files, and what they encode."""

from pathlib import Path

import numpy as np
import torch

from c4c.models.backbone import named
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.export import files
from c4c.models.prompts import add_prompts
from c4c.retrieval.encoder import Encoder
from pipelines.config import DataConfig
from tests import tiny_backbones, vocabularies

FRAMES = 4
SENTENCES = [
    "a red disc moves left",
    "Two dogs run.",
    "a red disc moves left slowly over the water and does not stop",
    "x",
]


def write(
    path: Path, head: str = "meanP", backbone: str = "tiny-vit", patch: str = "2d", seed: int = 0, prompts: int = 0,
    bias: float | None = None, **spec,
) -> Path:  # fmt: skip
    """A file of weights, as c4c.export writes one. prompts: vectors in each block; bias: as train.loss=sigmoid adds one."""
    tiny_backbones.register()
    towers = named(backbone) | spec
    if "files" not in towers["tokenizer"] and "hf_model_name" in towers["text_cfg"]:
        folder = vocabularies.xlm(path.parent / f"{path.stem}-vocabulary")
        towers["tokenizer"] = towers["tokenizer"] | {"kind": "hf", "name": folder}
    torch.manual_seed(seed)
    model = CLIP4Clip(towers, head, patch, blocks=1, segments=FRAMES).eval()
    for weight in model.parameters():
        if weight.numel() == 1 or weight.std() == 0:
            torch.nn.init.normal_(weight, float(weight.detach().mean()), 0.02)
    for name in add_prompts(model.clip, prompts):
        torch.nn.init.normal_(model.clip.get_parameter(name))
    if bias is not None:
        model.add_bias(bias)
    files.write(model, DataConfig(num_frames=FRAMES, max_words=model.context_length), path, official=False)
    return path


def encoder(path: Path, head: str = "meanP", backbone: str = "tiny-vit", patch: str = "2d", **load) -> Encoder:
    """A model on the CPU. path: of a file that is made if it is not there."""
    if not path.exists():
        write(path, head, backbone, patch)
    return Encoder.load(str(path), device="cpu", **load)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    """Random pictures."""
    side = tiny_backbones.SIZE
    return np.random.default_rng(seed).integers(0, 256, (*shape, side, side, 3), dtype=np.uint8)
