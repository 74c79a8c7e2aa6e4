"""CLIP4Clip: CLIP's two towers, a similarity head, and a temperature."""

import math
import warnings
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn

from c4c.models import towers
from c4c.models.heads import HEADS
from c4c.models.weights import Weights, read, read_backbone
from c4c.settings import ModelConfig
from pipelines.config import DataConfig
from pipelines.stages.pixels import Pixels

_NAMED = 3  # weights of each kind that an error names
MAX_SCALE = 100.0  # CLIP's bound on the temperature's inverse


class CLIP4Clip(nn.Module):
    """Scores texts against videos. The towers' weights keep CLIP's own names under `clip.`, the head's are under `head.`.

    spec: the towers (see c4c.models.towers). segments: frames a clip, for heads that are made for that many.
    """

    def __init__(self, spec: dict, head: str = "meanP", linear_patch: str = "2d", blocks: int = 4, segments: int = 12):
        super().__init__()
        self.spec, self.linear_patch, self.blocks, self.segments = spec, linear_patch, blocks, segments
        self.clip = towers.build(spec)
        self.pixels = Pixels(DataConfig.mean, DataConfig.std)  # for frames that come as bytes
        if linear_patch == "3d":
            towers.to_3d(self.clip.visual)
        text = spec["text_cfg"]
        self.head = HEADS[head](
            spec["embed_dim"], blocks=blocks, segments=segments, attention_heads=text["heads"],
            positions=text["context_length"],
        )  # fmt: skip

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, allow: tuple[str, ...] = (), *, quick_gelu: bool | None = None, tag: str | None = None
    ) -> "CLIP4Clip":
        """The model in any file or folder that `c4c.models.weights.read` knows; eval mode, fp32.

        Raises ValueError listing missing, unexpected and mis-shaped weights, but for missing or unexpected ones that a
        pattern in `allow` matches ("clip.visual.*"). quick_gelu: as in `c4c.models.weights.read`. tag: of a run's checkpoint;
        None: its latest.
        """
        return cls.from_weights(read(path, quick_gelu=quick_gelu, tag=tag), path, allow)

    @classmethod
    def from_weights(cls, weights: Weights, source: object, allow: tuple[str, ...] = ()) -> "CLIP4Clip":
        """from_checkpoint for weights that are in memory; source: what to call them where they do not fit."""
        try:
            model = cls(weights.spec, weights.head, weights.linear_patch, weights.blocks, weights.segments)
        except (KeyError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            raise ValueError(f"{source}: its description of the towers is damaged ({reason})") from error
        model.head.start_from(model.clip)
        load_strictly(model, weights.state, source, allow)
        return model.eval()

    def check_data(self, data: DataConfig, name: str) -> None:
        """Raise ValueError if pictures, captions or clips of that size do not fit. name: what to call the model."""
        if data.image_size != self.image_size:
            raise ValueError(
                f"data.image_size={data.image_size}, but {name} takes pictures of {self.image_size}: "
                f"set data.image_size={self.image_size}"
            )
        if data.max_words > self.context_length:
            raise ValueError(
                f"data.max_words={data.max_words} is longer than the {self.context_length} tokens that {name} takes"
            )
        most = self.head.most_frames
        if most is not None and data.num_frames > most:
            raise ValueError(
                f"data.num_frames={data.num_frames} is more than the {most} frames that the head {self.head.name} has "
                f"positions for: set data.num_frames={most} or fewer"
            )

    def set_pixels(self, data: DataConfig) -> None:
        """Normalise frames that come as bytes with the mean and deviation of `data`."""
        self.pixels = Pixels(data.mean, data.std)

    @property
    def context_length(self) -> int:
        """The longest caption in tokens."""
        return self.clip.context_length

    @property
    def image_size(self) -> int:
        """Side of the square pictures that it takes, in pixels."""
        size = self.clip.visual.image_size
        return size[0] if isinstance(size, tuple) else size

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [N, L], L up to the context length -> features [N, D], taken at the end-of-text token.

        For a head that scores every token: [N, L, D], zeros after the end-of-text token.
        """
        clip, length = self.clip, tokens.shape[1]
        dtype = clip.token_embedding.weight.dtype
        x = clip.token_embedding(tokens) + clip.positional_embedding[:length].to(dtype)
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length].to(dtype)))
        end = tokens.argmax(dim=-1)
        if not self.head.tokens:
            return x[torch.arange(len(x), device=x.device), end] @ clip.text_projection
        inside = torch.arange(length, device=x.device) <= end[:, None]
        return (x @ clip.text_projection) * inside.unsqueeze(-1).to(dtype)

    def encode_video(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """[M, F, 3, H, W], or bytes uint8 [M, F, H, W, 3], and [M, F] -> frame features [M, F, D].

        Slots outside the mask are encoded too, and mean nothing.
        """
        m, f = frame_mask.shape
        frames = self._numbers(frames)
        if self.linear_patch == "3d":  # three frames meet in the patch embedding
            frames = frames * frame_mask[:, :, None, None, None].to(frames.dtype)
            return self.clip.visual(frames).unflatten(0, (m, f))
        return self.clip.visual(frames.flatten(0, 1)).unflatten(0, (m, f))

    def _encode_kept(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """encode_video without work on empty slots, which come as zeros."""
        if frames.is_cuda or self.linear_patch == "3d":  # fixed shapes: no wait for the mask to reach the host
            return self.encode_video(frames, frame_mask)
        kept = frame_mask.clone()
        kept[0, 0] |= not bool(frame_mask.any())  # at least one frame, so that all ranks run the same modules
        encoded = self.clip.visual(self._numbers(frames[kept]))
        features = encoded.new_zeros(*frame_mask.shape, encoded.shape[-1])
        features[kept] = encoded
        return features

    def _numbers(self, frames: Tensor) -> Tensor:
        """Frames in the towers' precision, [..., 3, H, W]; bytes, [..., H, W, 3], are normalised."""
        dtype = self.clip.visual.class_embedding.dtype
        return self.pixels(frames, dtype) if frames.dtype == torch.uint8 else frames.to(dtype)

    def scale(self) -> Tensor:
        """What scores are multiplied by: the inverse temperature, at most 100; 1 for heads that use none."""
        if not self.head.scaled:
            return torch.ones((), device=self.clip.logit_scale.device)
        return self.clip.logit_scale.float().clamp(max=math.log(MAX_SCALE)).exp()

    def similarity(self, text: Tensor, video: Tensor, frame_mask: Tensor) -> Tensor:
        """Features that encode_text and encode_video gave, and the mask [M, F] -> scores [N, M], scaled."""
        return self.scale() * self.head.score(self.head.text(text), self.head.video(video, frame_mask.bool()))

    def forward(self, frames: Tensor, frame_mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What stands for each text and for each video, float32; ranks exchange it and the head scores it.

        frames are normalised, or bytes (see encode_video). tokens [N, L] give texts [N, ...]; bags of captions [N, bag, L] give [N, bag, ...].
        """
        mask = frame_mask.bool()
        video = self._encode_kept(frames, mask) * mask.unsqueeze(-1)
        text = self.head.text(self.encode_text(tokens.flatten(0, -2))).float()
        return text.unflatten(0, tokens.shape[:-1]), self.head.video(video, mask).float()


def build(config: ModelConfig, num_frames: int) -> CLIP4Clip:
    """A model with the weights that `config.init_from` names. Raises ValueError if they are not to be had.

    Random towers only if asked for by name, `scratch`. A head that the weights do not hold starts as its class says.
    """
    if not config.init_from:
        raise ValueError(
            "model.init_from is not set: name an open_clip tag (openai), a weights file, a run folder, or scratch for "
            "random weights"
        )
    if config.init_from == "scratch":
        # the head starts at random too: there is nothing to gain from copies of untrained blocks and positions
        spec = towers.named(config.backbone)
        return CLIP4Clip(spec, config.head, config.linear_patch, config.head_layers, num_frames)
    return _start(config, read_backbone(config.backbone, config.init_from, config.init_tag or None), num_frames)


def _start(config: ModelConfig, weights: Weights, num_frames: int) -> CLIP4Clip:
    source = config.init_from
    own = towers.named(config.backbone)
    _same_size(config.backbone, own, weights, source)
    spec = own | {"quick_gelu": weights.spec["quick_gelu"]}
    model = CLIP4Clip(spec, config.head, config.linear_patch, config.head_layers, num_frames)
    clip = {k: v for k, v in weights.state.items() if k.startswith("clip.")}
    if config.linear_patch == "3d" and "clip.visual.conv2.weight" not in clip:
        kernel = clip["clip.visual.conv1.weight"]
        clip["clip.visual.conv2.weight"] = torch.stack(
            [torch.zeros_like(kernel), kernel, torch.zeros_like(kernel)], dim=2
        )
    if config.linear_patch == "2d":
        clip.pop("clip.visual.conv2.weight", None)
    head = {k: v for k, v in weights.state.items() if k.startswith("head.")}
    same = weights.head == config.head
    if head and not same:
        warnings.warn(
            f"{source} has head {weights.head}; model.head={config.head} starts from its towers instead", stacklevel=2
        )
    load_strictly(model, clip | (head if same else {}), source, () if same and head else ("head.*",))
    if not (same and head):
        model.head.start_from(model.clip)
    return model


def _same_size(backbone: str, spec: dict, weights: Weights, source: str) -> None:
    """Raise ValueError that names the backbone to set if the weights are of another size."""
    try:
        theirs, own = towers.sizes(weights.spec), towers.sizes(spec)
    except ValueError as error:
        raise ValueError(f"model.init_from={source}: {error}") from error
    differing = [name for name in own if theirs[name] != own[name]]
    if differing:
        given, wanted = (", ".join(f"{name} {of[name]}" for name in differing) for of in (theirs, own))
        names = towers.of_size(weights.spec)[:3]
        hint = f"set model.backbone={names[0]}" if names else "no backbone that c4c knows is of that size"
        hint += f" (or {', '.join(names[1:])})" if names[1:] else ""
        raise ValueError(
            f"model.init_from={source} has {given}; model.backbone={backbone} has {wanted}: {hint}, or take other weights"
        )


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: object, allow: tuple[str, ...] = ()) -> None:
    """Load weights; raises ValueError that counts missing, unexpected and mis-shaped ones, and names the first of each.

    Missing and unexpected ones that a pattern in `allow` matches are left out.
    """
    own = model.state_dict()
    wrong = [
        [f"missing {k}" for k in own.keys() - state.keys() if not _allowed(k, allow)],
        [f"unexpected {k}" for k in state.keys() - own.keys() if not _allowed(k, allow)],
        [
            f"{k} has shape {list(state[k].shape)}, the model {list(own[k].shape)}"
            for k in own.keys() & state.keys()
            if own[k].shape != state[k].shape
        ],
    ]
    if any(wrong):
        raise ValueError(f"the weights in {source} do not fit the model: {'; '.join(map(_few, filter(None, wrong)))}")
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def _few(lines: list[str]) -> str:
    more = f"; {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return "; ".join(sorted(lines)[:_NAMED]) + more


def _allowed(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
