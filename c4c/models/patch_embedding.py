"""Bytes straight into the patch embedding: the normalisation of pixels becomes part of its weights.

A patch embedding is linear, so W * (pixel * scale + offset) = (W * scale) * pixel + sum(W * offset). The weights that are stored, trained
and saved stay the plain ones: the folded ones are computed from them in every pass, and gradients go through.
"""

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from c4c.models.towers import VideoTransformer3d
from pipelines.stages.pixels import Pixels

# Taken from each byte first. What is left, -128 to 127, is exact in bf16 and fp16, and close to 0 in the mean: sums over a patch
# would otherwise be large numbers that cancel with the bias, which 16 bits do not bear.
CENTRE = 128


class BytesConv2d(nn.Conv2d):
    """A convolution of patches side by side, which also takes bytes and normalises them by its weights.

    scale, offset: of the normalisation pixel * scale + offset, float32 [3], on the device of the weights.
    """

    scale: Tensor
    offset: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W], numbers or uint8 of any layout -> [N, width, H / patch, W / patch]."""
        if x.dtype != torch.uint8:
            return super().forward(x)
        weight, bias = folded(self.weight, self.bias, self.scale, self.offset)
        patches = patches_of(x, self.kernel_size, weight.dtype)
        # [N, gh, gw, p * q * 3] -> [N, gh, gw, width]
        return linear(patches, weight, bias).permute(0, 3, 1, 2)


class BytesConv3d(nn.Conv3d):
    """The same for patches that also span the frames before and behind. scale, offset: see BytesConv2d."""

    scale: Tensor
    offset: Tensor

    def forward(self, x: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """[M, 3, F, H, W], numbers, or uint8 with the mask [M, F] -> [M, width, F, H / patch, W / patch].

        Bytes outside the mask, and what is before the first and behind the last frame, count as zeros after normalisation.
        """
        if x.dtype != torch.uint8:
            return super().forward(x)
        assert frame_mask is not None
        # [width, 3, taps, p, q] -> [taps * width, 3, p, q]
        weight, bias = folded(self.weight.permute(2, 0, 1, 3, 4).flatten(0, 1), None, self.scale, self.offset)
        patches = patches_of(x.transpose(1, 2).flatten(0, 1), self.kernel_size[1:], weight.dtype)
        # [M * F, gh, gw, p * q * 3] -> [M, F, gh, gw, taps * width]
        seen = linear(patches, weight, bias).unflatten(0, frame_mask.shape)
        seen = seen * frame_mask[:, :, None, None, None].to(seen.dtype)
        # what a frame adds to the one behind it, to itself, and to the one before it
        before, at, behind = seen.chunk(3, dim=-1)
        out = at + pad(before[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)) + pad(behind[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))
        return out.permute(0, 4, 1, 2, 3)


def patches_of(pictures: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """uint8 [N, 3, H, W] of any layout -> pixels less CENTRE of patches of size (p, q), [N, H / p, W / q, p * q * 3]."""
    _, _, height, across = pictures.shape
    p, q = size
    # [N, 3, H, W] -> [N, gh, gw, p, q, 3]
    patches = pictures.unflatten(3, (across // q, q)).unflatten(2, (height // p, p)).permute(0, 2, 4, 3, 5, 1)
    numbers = torch.empty(patches.shape, dtype=dtype, device=pictures.device)
    torch.sub(patches, float(CENTRE), out=numbers)  # one pass from bytes to patches of numbers
    return numbers.flatten(3)


def folded(weight: Tensor, bias: Tensor | None, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [width, 3, p, q] of normalised pixels -> [width, p * q * 3] and a bias [width], of pixels less CENTRE.

    Computed in float32, given in the precision of `weight`.
    """
    exact = weight.float()
    shift = (exact.sum(dim=(2, 3)) * (offset + CENTRE * scale)).sum(dim=1)
    if bias is not None:
        shift = shift + bias.float()
    matrix = (exact * scale[:, None, None]).permute(0, 2, 3, 1).flatten(1)
    return matrix.to(weight.dtype), shift.to(weight.dtype)


def fold(visual: nn.Module) -> str:
    """Have an image tower take bytes, in place; its weights keep their names and values. Returns why it cannot, '' if it does.

    Before each pass over bytes `set_normalisation` has to be called.
    """
    conv = _patches(visual)
    if isinstance(conv, str):
        return conv
    conv.__class__ = BytesConv3d if isinstance(conv, nn.Conv3d) else BytesConv2d
    return ""


def set_normalisation(visual: nn.Module, pixels: Pixels, device: torch.device) -> None:
    """Tell a tower that takes bytes what to make of them."""
    conv = _patches(visual)
    assert isinstance(conv, BytesConv2d | BytesConv3d)
    conv.scale, conv.offset = pixels.on(device)


def _patches(visual: nn.Module) -> nn.Conv2d | nn.Conv3d | str:
    """The convolution that a tower begins with, or why bytes cannot go into it."""
    if isinstance(visual, VideoTransformer3d):
        return visual.conv2
    if isinstance(visual, VisionTransformer):
        conv: object = visual.conv1
    elif isinstance(visual, TimmModel) and isinstance(visual.trunk, Eva | TimmTransformer):
        embedding = visual.trunk.patch_embed
        if type(embedding) is not PatchEmbed or embedding.dynamic_img_pad:
            return "its image tower does not begin with plain patches"
        conv = embedding.proj
    else:
        return "its image tower does not begin with plain patches"
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != conv.stride or conv.padding != (0, 0):
        return "its image tower does not begin with plain patches"
    if conv.in_channels != 3 or conv.groups != 1 or conv.dilation != (1, 1):
        return "its image tower does not begin with plain patches"
    return conv
