"""The sigmoid loss as a training step: plain, with gradient caching and accumulated, on one rank and on two, against its formula."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import logsigmoid

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
ROWS, FRAMES, PADDING = 8, 2, 1
WAYS = {"plain": 0, "cached": 3, "accumulated": 2}
HEADS = ["meanP", "wti", "tightTransf"]


def learner(head: str) -> Learner:
    torch.manual_seed(5)
    model = CLIP4Clip(SPEC, head, "2d", blocks=1, segments=FRAMES)
    for weight in model.head.parameters():  # so that they matter
        torch.nn.init.normal_(weight, std=0.5)
    return Learner(model, "sigmoid", -3.0)


def batch(rows: slice = slice(None)) -> SimpleNamespace:
    random = torch.Generator().manual_seed(1)
    frames = torch.randn(ROWS, FRAMES, 3, 32, 32, generator=random)
    tokens = torch.randint(1, 98, (ROWS, 6), generator=random)
    tokens[:, 5] = 99
    valid = torch.arange(ROWS) < ROWS - PADDING
    mask = torch.ones(ROWS, FRAMES, dtype=torch.bool)
    whole = SimpleNamespace(frames=frames, frame_mask=mask, tokens=tokens, valid=valid)
    return SimpleNamespace(**{name: value[rows] for name, value in vars(whole).items()})


def formula(model: CLIP4Clip, whole: SimpleNamespace, rows: list[int]) -> Tensor:
    """Over the pairs of these rows."""
    text, video = model(whole.frames[rows], whole.frame_mask[rows], whole.tokens[rows])
    logits = model.scale() * model.head.score(text, video) + model.clip.logit_bias
    return -logsigmoid((2 * torch.eye(len(rows)) - 1) * logits).sum() / len(rows)


def expected(way: str, head: str) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradient of every weight."""
    whole, one = batch(), learner(head)
    valid = list(range(ROWS - PADDING))
    if way == "accumulated":  # each half of a rank's rows has only its own negatives; halves count by their rows
        parts = [[i for i in valid if i % 2 == k] for k in range(2)]
        loss = sum(formula(one.model, whole, part) * len(part) for part in parts) / len(valid)
    else:
        loss = formula(one.model, whole, valid)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in one.named_parameters() if p.grad is not None}


def took(way: str, head: str, rows: slice = slice(None)) -> tuple[Tensor, dict[str, Tensor]]:
    module = learner(head)
    inputs = step.inputs_of(batch(rows), "sigmoid")
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
    assert found[1].keys() == wanted[1].keys() >= {"model.clip.logit_bias"}
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_has_the_formulas_gradient(way, head):
    same(took(way, head), expected(way, head))


def test_two_ranks(tmp_path):
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for way, head in ranks[0]:
        (loss_a, a), (loss_b, b) = (found[way, head] for found in ranks)
        same(((loss_a + loss_b) / 2, {name: (a[name] + b[name]) / 2 for name in a}), expected(way, head))


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    share = ROWS // world
    found = {(way, head): took(way, head, slice(rank * share, (rank + 1) * share)) for way in WAYS for head in HEADS}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
