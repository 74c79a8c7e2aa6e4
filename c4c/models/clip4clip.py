"""CLIP4Clip: CLIP's two towers, a similarity head, and a temperature."""

import math
import warnings
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor, nn

from c4c.merging import NO_MERGING, Merging
from c4c.models import backbone, caption_rows, patch_embedding, towers
from c4c.models.heads import HEADS
from c4c.models.prompts import add_prompts
from c4c.models.text_tower import caption_features, inside_captions
from c4c.models.token_merging import merge_tokens
from c4c.models.weights import Weights, read, read_backbone
from c4c.settings import ModelConfig, names_weights
from pipelines.config import DataConfig
from pipelines.stages.pixels import Pixels
from shards import first_line

_NAMED = 3  # weights of each kind that an error names
MAX_SCALE = 100.0  # CLIP's bound on the temperature's inverse
LOGIT_BIAS = -10.0  # where the sigmoid loss starts from (SigLIP, https://arxiv.org/abs/2303.15343, section 3.2)


class CLIP4Clip(nn.Module):
    """Scores texts against videos. The towers' weights keep CLIP's own names under `clip.`, the head's are under `head.`.

    spec: the towers (see c4c.models.towers). segments: frames a clip, for heads that are made for that many. merging: of tokens in
    the image tower. notes: what a person should know of how it was made. Raises ValueError for a head, patches or merging that the
    towers do not suit.
    """

    def __init__(
        self, spec: dict, head: str = "meanP", linear_patch: str = "2d", blocks: int = 4, segments: int = 12,
        merging: Merging = NO_MERGING,
    ):  # fmt: skip
        super().__init__()
        self.notes: list[str] = []
        self.merging = merging
        self.spec, self.linear_patch, self.blocks, self.segments = spec, linear_patch, blocks, segments
        self.clip = towers.build(spec)
        if towers.has_batch_norms(self.clip):
            self.notes.append("the batch norms of the towers keep the statistics that they come with, in training too")
        known = backbone.preprocess_of(spec)
        self.pixels = Pixels(known.mean, known.std)  # for frames that come as bytes
        self.folds_pixels = self.trims_captions = self.shares_captions = False  # see use_shortcuts
        if linear_patch == "3d":
            towers.to_3d(self.clip.visual)
        merge_tokens(self.clip.visual, merging)
        self.head = HEADS[head](spec["embed_dim"], blocks=blocks, segments=segments, **head_sizes(spec))
        if self.head.tokens:
            self.spec = backbone.with_padding(spec)
            if hasattr(self.clip, "text"):
                self.clip.text.words = True

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, allow: tuple[str, ...] = (), *, backbone: str | None = None, tag: str | None = None,
        ema: bool = True,
    ) -> "CLIP4Clip":  # fmt: skip
        """The model in any file or folder that `c4c.models.weights.read` knows; eval mode, fp32.

        Raises ValueError listing missing, unexpected and mis-shaped weights, but for missing or unexpected ones that a
        pattern in `allow` matches ("clip.visual.*"). backbone: what weights are of that do not say it themselves, as open_clip
        names it. tag: of a run's checkpoint; None: its latest. ema: its averaged weights, where it has some.
        """
        return cls.from_weights(read(path, backbone, tag, ema), path, allow)

    @classmethod
    def from_weights(cls, weights: Weights, source: object, allow: tuple[str, ...] = ()) -> "CLIP4Clip":
        """from_checkpoint for weights that are in memory; source: what to call them where they do not fit."""
        try:
            model = cls(
                weights.spec, weights.head, weights.linear_patch, weights.blocks, weights.segments, weights.merging
            )
        except (KeyError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
            reason = first_line(error, named=True)
            raise ValueError(f"{source}: its description of the towers is damaged ({reason})") from error
        model.start_head()  # what `allow` lets be missing stays so
        add_prompts(model.clip, weights.prompts)
        if any(name.startswith("head.") for name in weights.state):
            model.notes = [note for note in model.notes if "starts at random" not in note]
        load_strictly(model, weights.state, source, allow)
        return model.eval()

    def start_head(self) -> None:
        """Start the head from the towers where it can, and note where it cannot."""
        if reason := self.head.start_from(self.clip):
            self.notes.append(f"the head {self.head.name} starts at random: {reason}")

    def check_data(self, data: DataConfig, name: str) -> None:
        """Raise ValueError if pictures, captions or clips of that size do not fit. name: what to call the model."""
        data = data.filled(backbone.preprocess_of(self.spec))
        if data.image_size != self.image_size:
            raise ValueError(
                f"data.image_size={data.image_size}, but {name} takes pictures of {self.image_size}: "
                f"set data.image_size={self.image_size}"
            )
        if data.max_words > self.context_length:
            raise ValueError(
                f"data.max_words={data.max_words} is longer than the {self.context_length} tokens that {name} takes"
            )
        self.merging.check_frames(data.num_frames)
        most = self.head.most_frames
        if most is not None and data.num_frames > most:
            raise ValueError(
                f"data.num_frames={data.num_frames} is more than the {most} frames that the head {self.head.name} has "
                f"positions for: set data.num_frames={most} or fewer"
            )

    def set_pixels(self, data: DataConfig) -> None:
        """Normalise frames that come as bytes with the mean and deviation of `data`."""
        data = data.filled(backbone.preprocess_of(self.spec))
        self.pixels = Pixels(data.mean, data.std)

    def use_shortcuts(self, *, fold_pixels: bool, trim_captions: bool, share_captions: bool) -> list[str]:
        """Take the shorter ways of engine.fold_pixels (bytes go straight into the patch embedding), engine.trim_captions and
        engine.share_captions (in training). Returns a line for each that these towers do not allow, and that stays off.
        """
        notes = []
        if fold_pixels and (reason := patch_embedding.fold(self.clip.visual)):
            notes.append(f"engine.fold_pixels has no effect: {reason}")
            fold_pixels = False
        if trim_captions and (reason := caption_rows.cannot_trim(self.spec)):
            notes.append(f"engine.trim_captions has no effect: {reason}")
            trim_captions = False
        self.folds_pixels, self.trims_captions, self.shares_captions = fold_pixels, trim_captions, share_captions
        return notes

    @property
    def shortens_captions(self) -> bool:
        """Whether training shows the text tower less than all tokens of a batch."""
        return self.trims_captions or self.shares_captions

    @property
    def context_length(self) -> int:
        """The longest caption in tokens."""
        return towers.context_length(self.spec)

    @property
    def image_size(self) -> int:
        """Side of the square pictures that it takes, in pixels."""
        return towers.image_size(self.spec)

    def resize_pictures(self, size: int) -> None:
        """Take pictures of another size from now on: position embeddings are interpolated. Raises ValueError if the towers cannot."""
        if size != self.image_size:
            towers.resize_pictures(self.clip, size)
            self.notes.append(f"the image tower was made for pictures of {self.image_size} pixels and now takes {size}: its "
                              "position embeddings are interpolated")  # fmt: skip
            vision = self.spec["vision_cfg"] | {"image_size": size}
            pictures = self.spec.get("preprocess_cfg", {}) | {"size": size}
            self.spec = self.spec | {"vision_cfg": vision, "preprocess_cfg": pictures}

    def train(self, mode: bool = True) -> "CLIP4Clip":
        """As torch's; batch norms keep the statistics that they came with."""
        super().train(mode)
        towers.keep_statistics(self.clip)
        return self

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [N, L], L up to the context length -> features [N, D], of captions.

        For a head that scores every token: [N, L, D], zeros at padding.
        """
        x = caption_features(self.clip, tokens, self.head.tokens)
        if not self.head.tokens:
            return x
        about = self.spec.get("tokenizer", {})
        inside = inside_captions(tokens, about.get("pad_id"), about.get("pad_ends", False))
        return x * inside.unsqueeze(-1).to(x.dtype)

    def encode_video(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """[M, F, 3, H, W], or bytes uint8 [M, F, H, W, 3], and [M, F] -> frame features [M, F, D].

        Slots outside the mask are encoded too, and mean nothing.
        """
        m, f = frame_mask.shape
        frames = self._numbers(frames)
        if self.linear_patch == "3d":  # three frames meet in the patch embedding
            if frames.dtype == torch.uint8:
                return self.clip.visual((frames, frame_mask)).unflatten(0, (m, f))
            frames = frames * frame_mask[:, :, None, None, None].to(frames.dtype)
            return self.clip.visual(frames).unflatten(0, (m, f))
        if self.merging.joins:  # frames meet in the blocks
            return self.clip.visual(frames, frame_mask).unflatten(0, (m, f))
        return self.clip.visual(frames.flatten(0, 1)).unflatten(0, (m, f))

    def _encode_kept(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """encode_video without work on empty slots, which come as zeros."""
        if frames.is_cuda or self.frames_meet:  # fixed shapes: no wait for the mask to reach the host
            return self.encode_video(frames, frame_mask)
        kept = frame_mask.clone()
        kept[0, 0] |= not bool(frame_mask.any())  # at least one frame, so that all ranks run the same modules
        encoded = self.clip.visual(self._numbers(frames[kept]))
        features = encoded.new_zeros(*frame_mask.shape, encoded.shape[-1])
        features[kept] = encoded
        return features

    @property
    def frames_meet(self) -> bool:
        """Whether a frame's feature depends on the other frames of its clip: then the image tower takes clips, not frames."""
        return self.linear_patch == "3d" or bool(self.merging.joins)

    def _numbers(self, frames: Tensor) -> Tensor:
        """Frames in the towers' precision, [..., 3, H, W]; bytes, [..., H, W, 3], are normalised, or stay bytes if the tower does that."""
        if frames.dtype == torch.uint8 and self.folds_pixels:
            patch_embedding.set_normalisation(self.clip.visual, self.pixels, frames.device)
            return frames.movedim(-1, -3)
        dtype = next(self.clip.visual.parameters()).dtype
        return self.pixels(frames, dtype) if frames.dtype == torch.uint8 else frames.to(dtype)

    def add_bias(self, start: float = LOGIT_BIAS) -> None:
        """Give the model SigLIP's bias, for the sigmoid loss. It trains if the temperature does, and its weights keep it."""
        scale = self.clip.logit_scale
        self.clip.logit_bias = nn.Parameter(torch.full_like(scale, start), requires_grad=scale.requires_grad)
        self.spec = self.spec | {"init_logit_bias": start}

    @property
    def bounded(self) -> bool:
        """Whether the inverse temperature is kept at 100 or below, as CLIP's paper found necessary for its softmax loss.

        A model with a bias is not: SigLIP's paper bounds nothing, and its published weights lie above (112.3 in SO400M/14 at
        384, https://github.com/mlfoundations/open_clip/issues/746). At 100 their probabilities would be wrong.
        """
        return self.clip.logit_bias is None

    def scale(self) -> Tensor:
        """What scores are multiplied by: the inverse temperature, see `bounded`; 1 for heads that use none."""
        if not self.head.scaled:
            return torch.ones((), device=self.clip.logit_scale.device)
        logarithm = self.clip.logit_scale.float()
        return (logarithm.clamp(max=math.log(MAX_SCALE)) if self.bounded else logarithm).exp()

    def bias(self) -> Tensor:
        """What the sigmoid loss adds to scaled scores. Raises ValueError if the model has none."""
        if self.clip.logit_bias is None:
            raise ValueError(
                "this model has no logit_bias, so its scores are no probabilities: train it with train.loss=sigmoid, or take "
                "SigLIP weights"
            )
        return self.clip.logit_bias.float()

    def similarity(self, text: Tensor, video: Tensor, frame_mask: Tensor) -> Tensor:
        """Features that encode_text and encode_video gave, and the mask [M, F] -> scores [N, M], scaled."""
        return self.scale() * self.head.score(self.head.text(text), self.head.video(video, frame_mask.bool()))

    def match_probability(self, text: Tensor, video: Tensor, frame_mask: Tensor) -> Tensor:
        """As `similarity`, but how probable it is that text and video belong together, [N, M]: sigmoid(similarity + bias).

        It ranks as `similarity` does. It is calibrated as far as the sigmoid loss has trained it. Raises ValueError for a model
        without a bias.
        """
        return (self.bias() + self.similarity(text, video, frame_mask)).sigmoid()

    def _encode_captions(self, tokens: Tensor, on_host: Tensor | None) -> Tensor:
        """encode_text, by the shorter ways that are on."""
        if on_host is None and tokens.device.type == "cpu":
            on_host = tokens
        # without tokens on the host: to read those on a GPU would wait for the step before
        if not self.shortens_captions or not self.training or on_host is None:
            return self.encode_text(tokens)
        rows = caption_rows.plan(
            on_host, self.spec, trim=self.trims_captions, share=self.shares_captions, words=self.head.tokens
        )
        return rows.spread(self.encode_text(rows.take(tokens)), tokens.shape[1])

    def forward(
        self, frames: Tensor, frame_mask: Tensor, tokens: Tensor, tokens_on_host: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What stands for each text and for each video, float32; ranks exchange it and the head scores it.

        frames are normalised, or bytes (see encode_video). tokens [N, L] give texts [N, ...]; bags of captions [N, bag, L] give [N, bag, ...].
        tokens_on_host: the same in the host's memory, for `use_shortcuts` on a GPU, where without them captions are encoded as they are.
        """
        mask = frame_mask.bool()
        video = self._encode_kept(frames, mask) * mask.unsqueeze(-1)
        on_host = None if tokens_on_host is None else tokens_on_host.flatten(0, -2)
        text = self.head.text(self._encode_captions(tokens.flatten(0, -2), on_host)).float()
        return text.unflatten(0, tokens.shape[:-1]), self.head.video(video, mask).float()


def head_sizes(spec: dict) -> dict[str, int]:
    """`attention_heads` and `positions` of a head's transformer: those of CLIP's text tower where there is one."""
    text, width = spec["text_cfg"], spec["embed_dim"]
    heads = 0 if "hf_model_name" in text else text.get("heads", 8)
    if not towers.is_custom(spec):
        return {"attention_heads": heads, "positions": towers.context_length(spec)}
    if not heads or text.get("width", 512) != width:
        heads = max(1, width // towers.HEAD_WIDTH)
    positions = max(towers.context_length(spec), 77)  # a short context is no reason for short videos
    return {"attention_heads": heads, "positions": positions}


def build(config: ModelConfig, num_frames: int, image_size: int = 0) -> CLIP4Clip:
    """A model with the weights that `config.init_from` names. Raises ValueError if they are not to be had.

    Random towers only if asked for by name, `scratch`. A head that the weights do not hold starts as its class says.
    image_size: of pictures, where it is not to be that of the weights; position embeddings are then interpolated.
    """
    if not config.init_from and not names_weights(config.backbone):
        raise ValueError(
            "model.init_from is not set: name an open_clip tag (openai), a weights file, a run folder, or scratch for "
            "random weights"
        )
    if config.init_from == "scratch":
        # the head starts at random too: there is nothing to gain from copies of untrained blocks and positions
        spec = backbone.named(config.backbone)
        model = CLIP4Clip(spec, config.head, config.linear_patch, config.head_layers, num_frames, config.merging)
    else:
        weights = read_backbone(config.backbone, config.init_from, config.init_tag or None, config.init_ema)
        model = _start(config, weights, num_frames)
    try:
        model.resize_pictures(image_size or model.image_size)
    except ValueError as error:
        raise ValueError(f"data.image_size={image_size} does not suit {config.backbone}: {error}") from error
    return model


def _start(config: ModelConfig, weights: Weights, num_frames: int) -> CLIP4Clip:
    source = config.init_from or config.backbone
    with suppress(backbone.UnknownBackbone):  # of a run's on a machine without its folder or a network
        _same_size(config.backbone, backbone.named(config.backbone), weights, source)
    model = CLIP4Clip(weights.spec, config.head, config.linear_patch, config.head_layers, num_frames, config.merging)
    add_prompts(model.clip, weights.prompts)
    clip = {k: v for k, v in weights.state.items() if k.startswith("clip.")}
    towers.change_patches(clip, weights.linear_patch, config.linear_patch, source)
    if weights.merging and weights.merging != config.merging:
        warnings.warn(
            f"{source} was trained with token merging ({weights.merging.in_words()}); this run has model.merge={config.merge}, "
            f"model.merge_frames={list(config.merge_frames)}",
            stacklevel=2,
        )
    head = {k: v for k, v in weights.state.items() if k.startswith("head.")}
    same = weights.head == config.head
    if head and not same:
        warnings.warn(
            f"{source} has head {weights.head}; model.head={config.head} starts from its towers instead", stacklevel=2
        )
    load_strictly(model, clip | (head if same else {}), source, () if same and head else ("head.*",))
    if not (same and head):
        model.start_head()
    return model


def _same_size(name: str, spec: dict, weights: Weights, source: str) -> None:
    """Raise ValueError that names the backbone to set if the weights are of another size. Pictures may be: they can be resized."""
    try:
        theirs, own = towers.sizes(weights.spec), towers.sizes(spec)
    except ValueError as error:
        raise ValueError(f"model.init_from={source}: {error}") from error
    differing = [key for key in own | theirs if theirs.get(key) != own.get(key) and key != "picture size"]
    if differing:
        given, wanted = (", ".join(f"{key} {of[key]}" for key in differing if key in of) for of in (theirs, own))
        names = backbone.of_size(weights.spec)[:3]
        hint = f"set model.backbone={names[0]}" if names else "no backbone that c4c knows is of that size"
        hint += f" (or {', '.join(names[1:])})" if names[1:] else ""
        raise ValueError(
            f"model.init_from={source} has {given}; model.backbone={name} has {wanted}: {hint}, or take other weights"
        )


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: object, allow: tuple[str, ...] = ()) -> None:
    """Load weights; raises ValueError that counts missing, unexpected, mis-shaped and not finite ones, and names the first of each.

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
        [  # buffers may: the masks of some text towers do
            f"{k} holds numbers that are not finite"
            for k, _ in model.named_parameters()
            if k in state and not state[k].isfinite().all()
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
