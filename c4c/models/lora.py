"""LoRA (https://arxiv.org/abs/2106.09685): a matrix W stays as it is, and x W^T + (alpha / rank) (x A^T) B^T is computed; A and B learn.

A [rank, in] starts at random (Kaiming, as in the paper's own code), B [out, rank] at 0: at first nothing is changed. A module that is
given A and B keeps the names of its weights, and has `lora_a` and `lora_b` beside them, so that ZeRO 3 gathers all of them at once.
"""

import math
import re

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from c4c.models.depth import Tower

A, B = "lora_a", "lora_b"
_ATTENTION = re.compile(r"Attention(?!.*(?:Block|Layer))")  # classes
_MLP = re.compile(r"mlp|ffn|intermediate|output|dense|\bfc\d|\bwi|\bwo\b", re.IGNORECASE)  # names
_SMALLEST = 16  # sides below, as in networks of position biases, have nothing of low rank


class LoraLinear(nn.Linear):
    """A linear layer with LoRA."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return functional.linear(input, self.weight, self.bias) + _added(
            input, self.lora_a, self.lora_b, self.lora_scale
        )


class LoraConv1x1(nn.Conv2d):
    """A convolution of single pixels, which is a linear layer of their channels, with LoRA."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float

    def forward(self, input: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W']."""
        step_y, step_x = self.stride
        pixels = input[:, :, ::step_y, ::step_x].movedim(1, -1)
        return super().forward(input) + _added(pixels, self.lora_a, self.lora_b, self.lora_scale).movedim(-1, 1)


class CallingAttention(nn.MultiheadAttention):
    """Self-attention that calls its linear layer of outputs. torch's own reads that layer's weight and passes its LoRA by.

    gives_keys: whether it also returns the mean of its keys over heads, which token merging needs.
    """

    gives_keys = False

    def forward(  # type: ignore[override]  # what open_clip's blocks do not use is left out
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[N, L, D] three times, the same, and a mask that is added to the scores, [L, L], [N * heads, L, L] or [N, 1, 1, L] ->
        [N, L, D], and with `gives_keys` keys [N, L, D / heads]."""
        if need_weights or not self.batch_first:
            raise ValueError("LoRA's attention is batch first, and does not return its weights")
        # three of [N, L, D] -> [N, heads, L, D / heads]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._projected(query, key, value))
        if attn_mask is not None and attn_mask.dim() == 3:  # CoCa's, [N * heads, L, L]
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask, self.dropout if self.training else 0.0)
        keys = k.mean(dim=1) if self.gives_keys else None
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), keys

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """Of queries, keys and values. (ZeRO 3 passes copies on, so that whether they are one tensor is not seen.)"""
        matrix = self.in_proj_weight
        bias = matrix.new_zeros(len(matrix)) if self.in_proj_bias is None else self.in_proj_bias
        return [functional.linear(*part) for part in zip(inputs, matrix.chunk(3), bias.chunk(3), strict=True)]


class LoraAttention(CallingAttention):
    """Self-attention with LoRA on the matrix of queries, keys and values; that of its outputs is a linear layer of its own."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        plain, rows = super()._projected(*inputs), self.lora_b.chunk(3)
        return [
            part + _added(x, self.lora_a, b, self.lora_scale) for x, part, b in zip(inputs, plain, rows, strict=True)
        ]


def _added(input: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return functional.linear(functional.linear(input, a), b) * scale


_WITH: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LoraLinear,
    NonDynamicallyQuantizableLinear: LoraLinear,
    nn.Conv2d: LoraConv1x1,
    nn.MultiheadAttention: LoraAttention,
    CallingAttention: LoraAttention,  # of towers that merge tokens
}


def matrices(tower: Tower, which: str) -> dict[str, nn.Module]:
    """The modules of a tower's blocks that can be given LoRA, by the name of their weight in the model.

    which: attention, mlp, or all. A tower without blocks has none.
    """
    found = {}
    attention: tuple[str, ...] = ()
    for path, module in tower.root.named_modules():
        if _ATTENTION.search(type(module).__name__):
            attention += (f"{path}.",)
        weight = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        name = f"{tower.prefix}{path}.{weight}"
        if type(module) not in _WITH or not 1 <= tower.places.get(name, 0) <= tower.blocks:
            continue
        if isinstance(module, nn.Conv2d) and (
            module.kernel_size != (1, 1) or module.groups > 1 or module.padding != (0, 0)
        ):
            continue
        if min(getattr(module, weight).shape[:2]) < _SMALLEST:
            continue
        kind = "attention" if f"{path}.".startswith(attention) else "mlp" if _MLP.search(path) else "other"
        if which in ("all", kind):
            found[name] = module
    return found


def add_lora(tower: Tower, modules: dict[str, nn.Module], rank: int, alpha: float) -> list[str]:
    """Give LoRA to modules that `matrices` found, in place; returns the names of the new weights in the model.

    Raises ValueError if the rank is larger than a matrix.
    """
    names = []
    for name, module in modules.items():
        own = name.rpartition(".")[2]
        weight: Tensor = getattr(module, own)
        out, inputs = weight.shape[:2]
        if rank > min(out, inputs):
            raise ValueError(f"train.lora={rank} is more than the smaller side of {name}, a matrix of {out} x {inputs}")
        module.lora_a = nn.Parameter(weight.new_empty(rank, inputs))
        module.lora_b = nn.Parameter(weight.new_zeros(out, rank))
        nn.init.kaiming_uniform_(module.lora_a, a=math.sqrt(5))
        module.lora_scale = alpha / rank  # type: ignore[assignment]  # a number is no module
        module.__class__ = _WITH[type(module)]
        names += [f"{name.removesuffix(own)}{part}" for part in (A, B)]
    for module in tower.root.modules():
        if type(module) is nn.MultiheadAttention and isinstance(module.out_proj, LoraLinear):
            module.__class__ = CallingAttention  # its other matrix is frozen
        if hasattr(module, "qkv_bias_separate"):  # timm's: else it reads the weight of `qkv` without calling it
            module.qkv_bias_separate = True  # type: ignore[assignment]
    return names


def merged(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A state dict without LoRA, whose A and B are added to the matrices that they belong to."""
    out = {name: tensor for name, tensor in state.items() if not name.endswith((f".{A}", f".{B}"))}
    for name, b in state.items():
        if name.endswith(f".{B}"):
            module = name.removesuffix(B)
            a = state[module + A]
            weight = next(w for w in (f"{module}weight", f"{module}in_proj_weight") if w in out)
            added = (b.float() @ a.float()) * (alpha / len(a))
            out[weight] = out[weight] + added.view_as(out[weight]).to(out[weight].dtype)
    return out
