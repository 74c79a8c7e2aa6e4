"""MIL-NCE against a direct evaluation of its formula, with bags of different sizes, on one process and on two."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from c4c.losses import mil_nce_loss

WIDTH, ROWS, SLOTS = 5, 6, 12  # videos, caption slots
OWNER = torch.tensor([0, 0, 0, 1, 2, 2, -1, 3, 4, 4, -1, -1])  # video 5 is padding, and has no captions
VALID = torch.tensor([1, 1, 1, 1, 1, 0]).bool()
SCALE = torch.tensor(2.5, dtype=torch.float64)


def score(text: Tensor, video: Tensor) -> Tensor:
    return text @ video.T


def inputs() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return (torch.randn(n, WIDTH, generator=random, dtype=torch.float64).requires_grad_() for n in (SLOTS, ROWS))


def direct(text: Tensor, video: Tensor) -> Tensor:
    """Sums of exponentials, video by video."""
    e = (SCALE * text @ video.T).exp()
    total = 0.0
    for i in range(5):
        bag = [t for t in range(SLOTS) if OWNER[t] == i]
        positive = sum(e[t, i] for t in bag)
        negative = sum(e[t, i] for t in range(SLOTS) if OWNER[t] not in (-1, i))
        negative = negative + sum(e[t, j] for t in bag for j in range(5) if j != i)
        total = total - (positive / (positive + negative)).log()
    return total / 5


def _run(loss) -> tuple[Tensor, Tensor, Tensor]:
    text, video = inputs()
    value = loss(text, video)
    value.backward()
    return value.detach(), text.grad, video.grad


def test_one_process():
    got = _run(lambda t, v: mil_nce_loss(t, v, OWNER, VALID, SCALE, score))
    for mine, expected in zip(got, _run(direct), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_bags_of_one_count_each_negative_of_both_directions():
    text, video = torch.eye(3), torch.eye(3)
    got = mil_nce_loss(text, video, torch.arange(3), torch.ones(3).bool(), torch.tensor(2.0), score)
    e = torch.tensor(2.0).exp()
    assert got.item() == pytest.approx(-(e / (e + 4)).log().item())


@pytest.mark.slow
def test_two_ranks(tmp_path):
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    loss, text, video = _run(direct)
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, loss)
    for i, expected in ((1, text), (2, video)):
        torch.testing.assert_close(torch.cat([p[i] for p in parts]) / 2, expected, rtol=1e-10, atol=1e-12)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    # captions of videos 0-2 stand in the first half of the slots, of 3-5 in the second
    text, video = inputs()
    text, video = (x.detach()[rank * len(x) // 2 : (rank + 1) * len(x) // 2].requires_grad_() for x in (text, video))
    owner = OWNER[rank * 6 : rank * 6 + 6]
    owner = torch.where(owner >= 0, owner - 3 * rank, owner)
    value = mil_nce_loss(text, video, owner, VALID[rank * 3 : rank * 3 + 3], SCALE, score)
    value.backward()
    torch.save((value.detach(), text.grad, video.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
