"""CLIP4Clip: CLIP's two towers, a similarity head, and a temperature."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

from c4c.checkpoint import load_weights
from c4c.heads import HEADS

MAX_SCALE = 100.0  # CLIP's bound on the temperature's inverse

open_clip.add_model_config(Path(__file__).parent / "backbones")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which towers, which head, and where the weights come from."""

    backbone: str = "ViT-B-32"  # a name open_clip knows, or one in c4c/backbones
    head: str = "meanP"
    linear_patch: str = "2d"
    init_from: str = ""  # an open_clip tag (openai, ...), a weights file, a run folder, or scratch

    def __post_init__(self):
        if self.backbone not in open_clip.list_models():
            raise ValueError(
                f"model.backbone={self.backbone}: open_clip knows no such model. Names are like ViT-B-32, ViT-B-16, "
                "ViT-L-14; python -c 'import open_clip; print(open_clip.list_models())' prints all"
            )
        if self.head not in HEADS:
            raise ValueError(f"model.head={self.head}: there are {', '.join(HEADS)}")
        if self.linear_patch != "2d":
            raise ValueError(f"model.linear_patch={self.linear_patch}: only 2d is built")


class CLIP4Clip(nn.Module):
    """Scores texts against videos. Weights of the towers keep CLIP's own names, under `clip.`."""

    def __init__(self, config: ModelConfig, clip: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.clip = _random_towers(config.backbone) if clip is None else clip
        if not hasattr(self.clip, "transformer"):
            raise ValueError(f"model.backbone={config.backbone}: its text tower is not CLIP's; choose a plain ViT")
        self.head = HEADS[config.head]()

    @property
    def context_length(self) -> int:
        """The longest caption in tokens."""
        return self.clip.context_length

    @property
    def image_size(self) -> int:
        size = self.clip.visual.image_size
        return size[0] if isinstance(size, tuple) else size

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [N, L], L up to the context length -> features [N, D], taken at the end-of-text token."""
        clip, length = self.clip, tokens.shape[1]
        dtype = clip.token_embedding.weight.dtype
        x = clip.token_embedding(tokens) + clip.positional_embedding[:length].to(dtype)
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length].to(dtype)))
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
        return x @ clip.text_projection

    def encode_video(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """[M, F, 3, H, W], [M, F] -> frame features [M, F, D]; those outside the mask are zeros."""
        m, f = frame_mask.shape
        frames = frames.to(self.clip.visual.conv1.weight.dtype)
        if frames.is_cuda:  # fixed shapes: no wait for the mask to reach the host
            features = self.clip.visual(frames.flatten(0, 1)).unflatten(0, (m, f))
            return features * frame_mask.unsqueeze(-1).to(features.dtype)
        kept = frame_mask.clone()
        kept[0, 0] |= not bool(frame_mask.any())  # at least one frame, so that all ranks run the same modules
        features = self.clip.visual(frames[kept])
        out = features.new_zeros(m, f, features.shape[-1])
        out[kept] = features
        return out * frame_mask.unsqueeze(-1).to(out.dtype)

    def scale(self) -> Tensor:
        """The inverse temperature, at most 100."""
        return self.clip.logit_scale.float().clamp(max=math.log(MAX_SCALE)).exp()

    def similarity(self, text: Tensor, video: Tensor, frame_mask: Tensor) -> Tensor:
        """Text features [N, D], frame features [M, F, D], mask [M, F] -> scores [N, M], times the scale."""
        return self.scale() * self.head.score(text, self.head.video(video, frame_mask))

    def forward(self, frames: Tensor, frame_mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(text features [B, D], what stands for each video [B, ...]), both float32."""
        text = self.encode_text(tokens).float()
        video = self.head.video(self.encode_video(frames, frame_mask).float(), frame_mask)
        return text, video


def _random_towers(backbone: str) -> nn.Module:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns that it loaded no weights
    try:
        return open_clip.create_model(backbone, pretrained=None)
    finally:
        logging.disable(before)


def build(config: ModelConfig) -> CLIP4Clip:
    """A model with the weights that `config.init_from` names. Raises ValueError if they are not to be had.

    Random weights only if asked for by name, `scratch`.
    """
    source = config.init_from
    if source == "scratch":
        return CLIP4Clip(config)
    if not source:
        raise ValueError(
            "model.init_from is not set: name an open_clip tag (openai), a weights file, a run folder, or scratch for "
            "random weights"
        )
    if Path(source).is_dir():
        model = CLIP4Clip(config)
        load_strictly(model, load_weights(Path(source)), source)
        return model
    if Path(source).is_file():
        try:
            clip = open_clip.create_model(config.backbone, pretrained=source, weights_only=True)
        except Exception as error:  # a file can be wrong in many ways
            reason = " ".join(str(error).split())
            raise ValueError(f"model.init_from={source}: cannot be loaded into {config.backbone} ({reason})") from error
        return CLIP4Clip(config, clip)
    tags = open_clip.list_pretrained_tags_by_model(config.backbone)
    if source not in tags:
        raise ValueError(
            f"model.init_from={source}: no such file, folder, or open_clip tag of {config.backbone}; its tags are "
            f"{', '.join(tags) or 'none: use scratch, or a file'}"
        )
    try:
        clip = open_clip.create_model(config.backbone, pretrained=source)
    except Exception as error:  # hubs fail in many ways
        raise ValueError(
            f"model.init_from={source}: the weights of {config.backbone} could not be fetched "
            f"({str(error).partition(chr(10))[0]}). Fetch them on a machine with a network and give their path"
        ) from error
    return CLIP4Clip(config, clip)


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """Load weights; raises ValueError that lists every missing, unexpected or mis-shaped one."""
    own = model.state_dict()
    wrong = [f"missing {k}" for k in own.keys() - state.keys()] + [f"unexpected {k}" for k in state.keys() - own.keys()]
    wrong += [
        f"{k} has shape {list(state[k].shape)}, the model {list(own[k].shape)}"
        for k in own.keys() & state.keys()
        if own[k].shape != state[k].shape
    ]
    if wrong:
        raise ValueError(f"the weights in {source} do not fit the model: {'; '.join(sorted(wrong))}")
    model.load_state_dict(state)
