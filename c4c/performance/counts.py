"""Operations, bytes and memory of a training step, counted on the real modules: on torch's meta device, where nothing is computed."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from c4c.config import Config
from c4c.models.attention import attend_directly
from c4c.models.backbone import settled, spec_of
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.tokenizer_spec import row_length
from c4c.objective import LossOptions, loss_of
from c4c.performance.work import Op, StepCounts, Work
from c4c.settings import TrainConfig
from c4c.training.param_groups import choose_trained

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PERSISTENT = 100_000  # numbers; DeepSpeed's stage3_param_persistence_threshold
_META = torch.device("meta")
_LOOKUPS = {"embedding", "index", "index_select", "gather"}  # read as much of a table as they return
_OVERWRITE = {"copy_", "fill_", "zero_"}  # do not read what they change
_SAMPLES = (64, 128, 256)  # pairs for which memory is counted, to draw its curve


class _Meter(TorchDispatchMode):
    """Notes every kernel that runs under it, and the most memory that tensors made under it hold at once, in bytes."""

    def __init__(self):
        super().__init__()
        self._kernels: Counter[tuple[int, int]] = Counter()
        self._live: dict[int, weakref.ref] = {}
        self._held = 0
        self.peak = 0

    def take(self) -> Work:
        """What ran since the last call."""
        ops = tuple(Op(flops, size, times) for (flops, size), times in sorted(self._kernels.items()))
        self._kernels.clear()
        return Work(ops)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(out)
        self._follow(made)
        name = func.overloadpacket.__name__
        inputs = {t.untyped_storage()._cdata for t in given}
        is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in inputs for t in made)
        if made and not is_view and "empty" not in name:
            formula = flop_registry.get(func.overloadpacket)
            flops = int(formula(*args, **(kwargs or {}), out_val=out)) if formula else 0
            self._kernels[flops, _traffic(name, given, made)] += 1
        return out

    def _follow(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._live and size:
                self._live[key] = weakref.ref(storage, partial(self._freed, key, size))
                self._held += size
        self.peak = max(self.peak, self._held)

    def _freed(self, key: int, size: int, _: weakref.ref) -> None:
        del self._live[key]
        self._held -= size

    def ignore(self, tensors: list[Tensor]) -> None:
        """Leave these out of the memory."""
        before = self._held
        self._follow(tensors)
        self._held = before
        self.peak = 0


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _traffic(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that a kernel reads and writes. Of an expanded tensor only what is there is read."""
    written = sum(map(_size, made))
    if name in _LOOKUPS:
        return 2 * written + sum(_size(t) for t in given[1:] if not t.is_floating_point())
    if name.endswith("_like") or name.startswith("new_"):
        return written
    return written + sum(map(_size, given[1:] if name in _OVERWRITE else given))


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def meta_model(config: Config) -> CLIP4Clip:
    """The model that a run on a GPU would train, in the engine's precision, without memory for its weights. Raises ValueError."""
    config = settled(config)
    spec = spec_of(config.model)
    with _META:
        model = CLIP4Clip(
            spec, config.model.head, config.model.linear_patch, config.model.head_layers, config.data.num_frames,
            config.model.merging,
        )  # fmt: skip
    if config.train.loss == "sigmoid" and model.clip.logit_bias is None:
        model.add_bias(config.train.logit_bias)
    model.resize_pictures(config.data.image_size)
    model.check_data(config.data, config.model.backbone)
    choose_trained(model, config.train)
    attend_directly(model)
    if config.engine.activation_checkpointing:
        model.clip.set_grad_checkpointing()
    return model.to(DTYPES[config.engine.precision]).train()


def count(config: Config, *, encoded: int, scored: int, world: int = 1) -> StepCounts:
    """Count a rank's step that encodes `encoded` pairs at once, and scores `scored` of its own against those of `world` ranks.

    Raises ValueError for models that cannot be built, and data settings that do not suit them.
    """
    config = settled(config)
    model, data = meta_model(config), config.data
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # ZeRO decides what gradients cost
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    captions = config.clips.bag if config.train.loss == "mil_nce" else config.train.captions_per_video
    bag = (captions,) if config.train.loss == "mil_nce" or captions > 1 else ()
    with _fused_attention(), _META, _Meter() as meter:
        frames = torch.empty(encoded, data.num_frames, data.image_size, data.image_size, 3, dtype=torch.uint8)
        meter.ignore([*model.parameters(), *model.buffers(), frames])
        mask = torch.ones(encoded, data.num_frames, dtype=torch.bool)
        tokens = torch.ones(encoded, *bag, row_length(model.spec, data.max_words), dtype=torch.long)
        meter.take()
        features = _encode(model, frames, mask, tokens)
        forward = meter.take()
        leaves = [torch.empty(scored, *t.shape[1:], dtype=t.dtype).requires_grad_() for t in features]
        _loss(
            model, leaves[0], leaves[1], tokens[:1].expand(scored, *tokens.shape[1:]), bag, config.train, world
        ).backward()
        size = sum(leaf.nbytes for leaf in leaves) // scored
        scoring = meter.take()
        del leaves
        outputs = [t for t in features if t.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
        backward = meter.take()
    return StepCounts(
        spec=model.spec, weights=sum(p.numel() for p in model.parameters()), trained=sum(p.numel() for p in trained),
        tensors=len(trained),
        gathered=sum(p.numel() >= _PERSISTENT for p in model.parameters()), forward=forward, backward=backward, scoring=scoring,
        activations=meter.peak, features=size,
    )  # fmt: skip


def _encode(model: CLIP4Clip, frames: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP4Clip.forward as it is on a GPU, where empty frames are encoded too."""
    video = model.encode_video(frames, mask) * mask.unsqueeze(-1)
    text = model.head.text(model.encode_text(tokens.flatten(0, -2))).float()
    return text.unflatten(0, tokens.shape[:-1]), model.head.video(video, mask).float()


def _loss(
    model: CLIP4Clip, text: Tensor, video: Tensor, tokens: Tensor, bag: tuple[int, ...], train: TrainConfig, world: int
) -> Tensor:
    """The loss of a rank. With several ranks, c4c.losses without its masks and exchanges, and without train.decorrelation.
    A teacher (train.teacher) is not counted."""
    options = LossOptions.of(train)
    if train.loss == "sigmoid" or world == 1:
        valid = torch.ones(text.shape[: 1 + len(bag)], dtype=torch.bool)
        for _ in range(world - 1):  # other ranks' features come one after another, and each block's gradients at once
            loss_of(train.loss, model, text, video, valid, options=options, tokens=tokens)
        return loss_of(train.loss, model, text, video, valid, options=options, tokens=tokens)
    if bag:
        text = text.flatten(0, 1)
    all_text, all_video = (torch.empty(world * len(t), *t.shape[1:]).requires_grad_() for t in (text, video))
    to_video = model.scale() * model.head.score(text, all_video)
    to_text = model.scale() * model.head.score(all_text, video)
    return to_video.logsumexp(dim=1).sum() + to_text.logsumexp(dim=0).sum()


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as one kernel, as on a GPU; the meta device has only the plain one, with its matrices of scores."""
    functional = torch.nn.functional
    plain, linear = functional.scaled_dot_product_attention, functional.linear

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        bias = None
        if attn_mask is not None:
            bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]

    functional.scaled_dot_product_attention = fused  # type: ignore[assignment]  # for the time of a count
    functional.linear = torch._C._nn.linear  # DeepSpeed's ZeRO 3 leaves one in its place that keeps more
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.linear = plain, linear


def activation_curve(
    config: Config, world: int = 1, *, scored: int | None = None, known: tuple[int, int] | None = None
) -> Callable[[int], float]:
    """Bytes of activations by the number of pairs that a rank encodes at once, without counting each time.

    A parabola through three counts: encoding grows with the number, scores with its square. scored: how many it scores at once,
    None for as many as it encodes. known: a number of pairs and what was counted
    for it, which the curve has exactly.
    """
    counted, samples = {}, set(_SAMPLES)
    if known:  # instead of the sample that is nearest
        counted[known[0]] = known[1]
        samples.remove(min(_SAMPLES, key=lambda n: abs(math.log(n / known[0]))))
    for n in samples:
        counted[n] = count(config, encoded=n, scored=scored or n, world=world).activations
    a, b, c = sorted(counted)
    sizes = [counted[n] for n in (a, b, c)]
    # divided differences
    first = (sizes[1] - sizes[0]) / (b - a)
    second = ((sizes[2] - sizes[1]) / (c - b) - first) / (c - a)

    def curve(n: int) -> float:
        return (
            counted[n] if n in counted else max(0.0, math.fsum((sizes[0], first * (n - a), second * (n - a) * (n - b))))
        )

    return curve
