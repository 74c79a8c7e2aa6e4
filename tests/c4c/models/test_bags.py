"""MIL-NCE as a training step: plain, with gradient caching and accumulated, on one rank and on two, against its formula."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from c4c.models.clip4clip import CLIP4Clip
from c4c.training import step
from c4c.training.step import Learner
from tests.c4c.models.plain_engine import Engine

pytestmark = pytest.mark.slow

SPEC = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 100, "width": 32, "heads": 1, "layers": 1},
}
ROWS, BAG, FRAMES = 8, 3, 2
SIZES = [3, 1, 2, 3, 1, 3, 2, 0]  # captions of each bag; the last row is padding
WAYS = {"plain": 0, "cached": 3, "accumulated": 2}


def learner(head: str = "meanP") -> Learner:
    torch.manual_seed(5)
    model = CLIP4Clip(SPEC, head, "2d", blocks=1, segments=FRAMES).double()
    return Learner(model, "mil_nce")


def batch(rows: slice = slice(None)) -> SimpleNamespace:
    random = torch.Generator().manual_seed(1)
    frames = torch.randn(ROWS, FRAMES, 3, 32, 32, generator=random, dtype=torch.float64)
    tokens = torch.randint(1, 98, (ROWS, BAG, 6), generator=random)
    tokens[..., 5] = 99
    tokens[torch.arange(BAG) >= torch.tensor(SIZES)[:, None]] = 0
    valid = torch.tensor(SIZES) > 0
    mask = torch.ones(ROWS, FRAMES, dtype=torch.bool)
    captions = torch.arange(BAG) < torch.tensor(SIZES)[:, None]
    whole = SimpleNamespace(frames=frames, frame_mask=mask, tokens=tokens, caption_mask=captions, valid=valid)
    return SimpleNamespace(**{name: value[rows] for name, value in vars(whole).items()})


def formula(model: CLIP4Clip, whole: SimpleNamespace, rows: list[int]) -> Tensor:
    """Equation 1 of the paper over these rows: sums of exponentials of scores of single captions and videos."""
    video = {i: model(whole.frames[i : i + 1], whole.frame_mask[i : i + 1], whole.tokens[:1, 0])[1] for i in rows}
    bags = {i: [whole.tokens[i, k : k + 1] for k in range(SIZES[i])] for i in rows}
    texts = {i: [model.head.text(model.encode_text(t)).float() for t in bag] for i, bag in bags.items()}

    def e(text: Tensor, i: int) -> Tensor:
        return (model.scale() * model.head.score(text, video[i])).double().exp().squeeze()

    total = 0.0
    for i in rows:
        positive = sum(e(t, i) for t in texts[i])
        others = sum(e(t, i) for j in rows if j != i for t in texts[j])
        others = others + sum(e(t, j) for j in rows if j != i for t in texts[i])
        total = total - (positive / (positive + others)).log()
    return total / len(rows)


def expected(way: str, head: str) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradient of every weight."""
    whole, one = batch(), learner(head)
    valid = list(range(ROWS - 1))
    if way == "accumulated":  # each half of a rank's rows has only its own negatives; halves count by their rows
        parts = [[i for i in valid if i % 2 == k] for k in range(2)]
        loss = sum(formula(one.model, whole, part) * len(part) for part in parts) / len(valid)
    else:
        loss = formula(one.model, whole, valid)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in one.named_parameters() if p.grad is not None}


def took(
    way: str, head: str, rows: slice = slice(None), one: SimpleNamespace | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    module = learner(head)
    inputs = step.inputs_of(one or batch(rows), "mil_nce")
    if way == "plain":
        loss = module(*inputs)
        loss.backward()
    elif way == "cached":
        loss = step._cached_step(Engine(module), inputs, WAYS[way])
    else:
        loss = step._accumulated_step(Engine(module), inputs, WAYS[way])
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def same(found: tuple, wanted: tuple) -> None:
    assert float(found[0]) == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("head", ["meanP", "wti"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_has_the_formulas_gradient(way, head):
    same(took(way, head), expected(way, head))


def test_two_ranks(tmp_path):
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for way in WAYS:
        (loss_a, a), (loss_b, b) = ranks[0][way], ranks[1][way]
        same(((loss_a + loss_b) / 2, {name: (a[name] + b[name]) / 2 for name in a}), expected(way, "meanP"))


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    share = ROWS // world
    found = {way: took(way, "meanP", slice(rank * share, (rank + 1) * share)) for way in WAYS}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_one_caption_a_clip_is_a_bag_of_one():
    one = batch()
    one.tokens, one.caption_mask = one.tokens[:, 0], one.caption_mask[:, :1]
    _, _, tokens, valid = step.inputs_of(one, "mil_nce")
    assert tokens.shape == (ROWS, 1, 6) and valid.tolist() == [[True]] * 7 + [[False]]
    assert step.inputs_of(one, "cross_entropy")[3] is one.valid


@pytest.mark.parametrize("way", WAYS)
def test_what_stands_where_a_bag_has_no_caption_is_never_seen(way):
    """Vocabularies differ in what begins a caption and in what fills it up: only the mask tells which are captions."""
    whole = batch()
    missing = ~whole.caption_mask
    assert missing[whole.valid].any()
    other = SimpleNamespace(**vars(whole) | {"tokens": whole.tokens.clone()})
    other.tokens[missing] = whole.tokens[0, 0]
    zero_first = SimpleNamespace(**vars(whole) | {"tokens": whole.tokens.clone()})
    zero_first.tokens[:, :, 0] = 0  # in some vocabularies a word, or the start
    found = [took(way, "meanP", one=one) for one in (whole, other, zero_first)]
    (loss, gradients), (same, same_gradients), (different, _) = found
    torch.testing.assert_close(same, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, atol=1e-7, rtol=1e-4)
    assert torch.isfinite(different) and (different - loss).abs() > 1e-6
    assert step.inputs_of(zero_first, "mil_nce")[3].sum() == sum(SIZES)
