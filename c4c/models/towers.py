"""The two towers of any CLIP that open_clip can build, described by a plain dict: `spec`.

A spec is open_clip's own model config, {"embed_dim", "quick_gelu", "vision_cfg": {...}, "text_cfg": {...}, ...}, with what goes
with the weights beside it where that is known:

preprocess_cfg  size, mean, std, interpolation, resize_mode and fill_color of pictures, in open_clip's words
tokenizer       see c4c.models.tokenizer_spec
hf_config       the configuration of a Hugging Face text tower, so that it can be built again without a network
"""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode

from c4c.models.text_tower import give_words
from shards import first_line

_OF_LOSS = ("init_logit_scale", "init_logit_bias")  # numbers that a spec hands to open_clip's models
# what makes a step random, and what only pretraining by their authors needs: the first is left out, nothing is fetched
_PLAIN_VISION = {"timm_model_pretrained": False, "timm_drop": 0.0, "timm_drop_path": None, "patch_dropout": 0.0,
                 "output_tokens": False}  # fmt: skip
_PLAIN_TEXT = {"hf_model_pretrained": False, "output_tokens": False}
_RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
_FILLING = {
    "normal_",
    "uniform_",
    "trunc_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "erfinv_",
    "clamp_",
    "mul_",
    "add_",
    "div_",
    "zero_",
    "fill_",
}
HEAD_WIDTH = 64  # of attention heads where nothing says: OpenAI's


def parts(spec: dict) -> tuple[CLIPVisionCfg, CLIPTextCfg]:
    """The two towers' own settings. Raises ValueError if `spec` is no description of towers."""
    try:
        vision, text = CLIPVisionCfg(**spec["vision_cfg"]), CLIPTextCfg(**spec["text_cfg"])
        _ = spec["embed_dim"], spec["quick_gelu"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the description of the towers is damaged ({type(error).__name__}: {error})") from error
    return vision, text


def is_plain(spec: dict) -> bool:
    """Whether these are CLIP's own kinds of towers: a ViT, and a causal text transformer read at its end-of-text token."""
    vision, text = spec["vision_cfg"], spec["text_cfg"]
    odd = {"embed_cls", "no_causal_mask", "pool_type", "proj_type", "proj_bias", "hf_model_name", "ls_init_value"}
    return (
        kind(spec) == "ViT" and not spec.get("custom_text") and not odd & text.keys() and not vision.get("block_type")
    )


def kind(spec: dict) -> str:
    """Of the image tower: ViT and ResNet as open_clip has them, or the name of timm's model."""
    vision = spec["vision_cfg"]
    if name := vision.get("timm_model_name"):
        return name
    return "ViT" if isinstance(vision.get("layers", 12), int) else "ResNet"


def context_length(spec: dict) -> int:
    """Tokens of the longest caption that the text tower takes."""
    return spec["text_cfg"].get("context_length", 77)


def image_size(spec: dict) -> int:
    """Side of the square pictures that the towers take, pixels."""
    size = spec["vision_cfg"].get("image_size", 224)
    return size if isinstance(size, int) else size[0]


def build(spec: dict) -> CLIP | CustomTextCLIP:
    """Towers with random weights; nothing in them is random in training. Raises ValueError for a damaged spec.

    CoCa's are built without the decoder, which writes captions.
    """
    # fp32 is fp32 in patch embeddings, too: torch rounds convolutions to TF32 by default
    torch.backends.cudnn.allow_tf32 = False
    with quiet(), _hugging_face(spec) as text_over:
        vision = CLIPVisionCfg(**spec["vision_cfg"] | _PLAIN_VISION)
        text = CLIPTextCfg(**spec["text_cfg"] | _PLAIN_TEXT | text_over)
        numbers = {key: spec[key] for key in _OF_LOSS if key in spec}
        model = CustomTextCLIP if is_custom(spec) else CLIP
        clip = model(spec["embed_dim"], vision, text, quick_gelu=spec["quick_gelu"], **numbers)
    for module in clip.modules():
        if isinstance(module, _RANDOM):
            module.p = 0.0
    keep_statistics(clip)
    if isinstance(clip.visual, TimmModel):
        _set_gelu(clip.visual, vision.act_kwargs or {})
    if isinstance(clip.visual, TimmModel) and _timm_size(clip.visual) not in (None, image_size(spec)):
        resize_pictures(clip, image_size(spec))
    if isinstance(clip, CustomTextCLIP):
        give_words(clip.text)
    return clip


def _set_gelu(visual: TimmModel, arguments: dict) -> None:
    """Have timm's GELUs be what vision_cfg's act_kwargs say: `approximate`, which open_clip itself passes to its own towers only."""
    for module in visual.modules():
        if isinstance(module, nn.GELU) and "approximate" in arguments:
            module.approximate = arguments["approximate"]


def change_patches(state: dict[str, Tensor], have: str, wanted: str, source: str) -> None:
    """Make weights of `clip.…` with 2d or 3d patches those of the other kind, in place. source: of the weights, for messages."""
    kernel = "clip.visual.conv2.weight"  # of 3d patches; ResNets have a convolution of the same name in their stem
    if (have, wanted) == ("2d", "3d"):
        flat = state["clip.visual.conv1.weight"]
        state[kernel] = torch.stack([torch.zeros_like(flat), flat, torch.zeros_like(flat)], dim=2)
    if (have, wanted) == ("3d", "2d"):
        del state[kernel]
        what = f"{source} was trained with 3d patches, and their kernel is left out: set model.linear_patch=3d to go on with it"
        warnings.warn(what, stacklevel=3)


def build_on_meta(spec: dict) -> CLIP | CustomTextCLIP:
    """Towers on torch's meta device, where weights take no memory and no time."""
    with on_meta():
        return build(spec)


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built inside has its weights on torch's meta device."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Weights are not filled: on the meta device that changes nothing, and takes most of the time of building."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")  # torch.nn.init names it
        if getattr(func, "__name__", "") in _FILLING and target is not None and target.is_meta:
            return target
        return func(*args, **kwargs)


def is_custom(spec: dict) -> bool:
    """Whether the text tower is a module of its own, `text`, in open_clip's model."""
    return bool(spec.get("custom_text")) or "hf_model_name" in spec["text_cfg"]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of libraries, as open_clip's that it loaded no weights."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _hugging_face(spec: dict) -> Iterator[dict]:
    """What to change in a text tower's settings so that Hugging Face's configuration is read from the spec, without dropout."""
    if "hf_model_name" not in spec["text_cfg"]:
        yield {}
        return
    from transformers import AutoConfig

    config = AutoConfig.for_model(**spec["hf_config"])  # with the defaults of what the spec leaves out
    for key in config.to_dict():
        if "dropout" in key or "layerdrop" in key:
            setattr(config, key, 0.0)
    with tempfile.TemporaryDirectory(prefix="c4c-") as folder:
        config.save_pretrained(folder)
        yield {"hf_model_name": folder}


def keep_statistics(clip: nn.Module) -> None:
    """Have batch norms use the statistics that they came with, in training too: what a batch holds must not change features, or
    results would depend on how it is cut over ranks and passes."""
    for module in _batch_norms(clip):
        module.eval()


def match_statistics(clip: nn.Module) -> None:
    """Bring the statistics of batch norms to the precision of their weights, which torch asks for."""
    for module in _batch_norms(clip):
        if module.weight is not None and module.running_mean is not None and module.running_var is not None:
            module.running_mean = module.running_mean.to(module.weight.dtype)
            module.running_var = module.running_var.to(module.weight.dtype)


def has_batch_norms(clip: nn.Module) -> bool:
    """Whether there are any."""
    return bool(_batch_norms(clip))


def _batch_norms(clip: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in clip.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


# -- pictures of another size


def resize_pictures(clip: nn.Module, size: int) -> None:
    """Have the image tower take pictures of another size, in place: its position embeddings are interpolated (bicubic, as
    open_clip does). Raises ValueError if it cannot."""
    visual = clip.visual
    try:
        if isinstance(visual, VisionTransformer):
            _resize_vit(visual, size)
        elif isinstance(visual, ModifiedResNet):
            _resize_resnet(visual, size)
        else:
            _resize_timm(visual, size)
    except (AssertionError, RuntimeError, NotImplementedError, TypeError) as error:
        reason = first_line(error)
        raise ValueError(f"its image tower cannot take pictures of {size} pixels ({reason})") from error


def _resize_vit(visual: VisionTransformer, size: int) -> None:
    patch = visual.patch_size[0]
    if size % patch:
        raise ValueError(_no_multiple(patch, size))
    first, grid = visual.positional_embedding[:1], visual.positional_embedding[1:]
    resized = nn.Parameter(torch.cat([first, _resized(grid, size // patch)]).detach())
    visual.positional_embedding = resized.requires_grad_(grid.requires_grad)
    visual.image_size, visual.grid_size = (size, size), (size // patch, size // patch)


def _no_multiple(patch: int, size: int) -> str:
    return f"its image tower cuts pictures into patches of {patch} pixels, and {size} is no multiple of that"


def _resize_resnet(visual: ModifiedResNet, size: int) -> None:
    if size % 32:
        raise ValueError(f"its image tower halves pictures five times, and {size} is no multiple of 32")
    table = visual.attnpool.positional_embedding
    resized = nn.Parameter(torch.cat([table[:1], _resized(table[1:], size // 32)]).detach())
    visual.attnpool.positional_embedding = resized.requires_grad_(table.requires_grad)
    visual.image_size = size


def _resized(grid: Tensor, side: int) -> Tensor:
    """Position embeddings [n * n, D] -> [side * side, D]."""
    old = round(len(grid) ** 0.5)
    # [n * n, D] -> [1, D, n, n]
    planes = grid.detach().reshape(old, old, -1).permute(2, 0, 1)[None]
    planes = interpolate(planes.float(), (side, side), mode="bicubic", antialias=True, align_corners=False)
    return planes[0].permute(1, 2, 0).reshape(side * side, -1).to(grid.dtype)


def _timm_size(visual: TimmModel) -> int | None:
    """Side of the pictures that timm's model was made for; None where it has no such size."""
    embedding = getattr(visual.trunk, "patch_embed", None)
    size = getattr(embedding, "img_size", None)
    return size[0] if size else None


def _resize_timm(visual: TimmModel, size: int) -> None:
    patch = getattr(getattr(visual.trunk, "patch_embed", None), "patch_size", None)
    if patch and size % patch[0]:
        raise ValueError(_no_multiple(patch[0], size))
    if hasattr(visual.trunk, "set_input_size"):
        visual.set_input_size(size)
    elif _timm_size(visual) is not None:
        raise ValueError(
            f"its image tower, timm's {type(visual.trunk).__name__}, takes {_timm_size(visual)} pixels alone"
        )
    else:
        reduction = max((int(info["reduction"]) for info in visual.trunk.feature_info), default=32)
        if size % reduction:
            raise ValueError(f"its image tower takes pictures of a multiple of {reduction} pixels, and not of {size}")
        visual.image_size = (size, size)


# -- three frames in a patch


class VideoTransformer3d(VisionTransformer):
    """CLIP's ViT with a patch embedding that also spans three frames; takes [M, F, 3, H, W], gives [M * F, D].

    Made from a 2d one by `to_3d`. The centre tap starts as the 2d kernel and the others as zeros, so at first nothing
    changes. The 2d kernel stays in the state dict, unused, as in CLIP4Clip.

    Bytes, if its patch embedding takes some (see c4c.models.patch_embedding), come with their mask, (uint8 [M, F, 3, H, W], bool [M, F]).
    """

    def _embeds(self, video: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        frames, *mask = video if isinstance(video, tuple) else (video,)
        # [M, F, 3, H, W] -> [M, W, F, gh, gw] -> [M * F, gh * gw, W]
        x = self.conv2(frames.transpose(1, 2), *mask).transpose(1, 2).flatten(0, 1).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)  # not len(x), which torch.export fixes
        return self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype))


def to_3d(visual: nn.Module) -> None:
    """Give a ViT the 3d patch embedding, in place. Raises ValueError for other image towers."""
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            "model.linear_patch=3d is made for open_clip's own ViTs, not for this backbone: use model.linear_patch=2d"
        )
    kernel = visual.conv1.weight
    width, _, height, across = kernel.shape
    visual.conv2 = nn.Conv3d(3, width, (3, height, across), stride=(1, height, across), padding=(1, 0, 0), bias=False)
    with torch.no_grad():
        visual.conv2.weight.zero_()
        visual.conv2.weight[:, :, 1] = kernel
    kernel.requires_grad_(False)
    visual.__class__ = VideoTransformer3d


# -- sizes


def sizes(spec: dict) -> dict[str, object]:
    """What the shapes of the weights depend on, by names for people. Raises ValueError if `spec` is no description of towers."""
    vision, text = parts(spec)
    if kind(spec) == "ViT":
        image: dict[str, object] = {
            "picture size": vision.image_size, "patch size": vision.patch_size, "width": vision.width, "layers": vision.layers,
        }  # fmt: skip
    elif kind(spec) == "ResNet":
        image = {"picture size": vision.image_size, "width": vision.width, "layers": tuple(vision.layers)}
    else:
        image = {"image tower": vision.timm_model_name, "picture size": vision.image_size}
    if text.hf_model_name:
        caption: dict[str, object] = {"text tower": spec.get("hf_config", {}).get("model_type", text.hf_model_name)}
    else:
        caption = {
            "text width": text.width,
            "text layers": text.layers,
            "words": text.context_length,
            "vocabulary": text.vocab_size,
        }
    return image | caption | {"feature size": spec["embed_dim"]}
