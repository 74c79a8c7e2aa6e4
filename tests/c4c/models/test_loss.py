"""The contrastive loss against a direct computation on the whole batch, on one process and on several."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from c4c.losses import contrastive_loss
from c4c.models.heads.mean import MeanPooling

ROWS, WIDTH = 8, 6
VALID = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0]).bool()  # on 4 ranks: 2, 2, 1 and 0 rows
score = MeanPooling(WIDTH).score


def inputs() -> tuple[Tensor, Tensor]:
    """Raw texts and videos [ROWS, WIDTH], double precision."""
    random = torch.Generator().manual_seed(0)
    text = torch.randn(ROWS, WIDTH, generator=random, dtype=torch.float64)
    return text, text + torch.randn(ROWS, WIDTH, generator=random, dtype=torch.float64)


def model() -> tuple[nn.Linear, nn.Parameter]:
    """What all ranks share: a layer, and a temperature."""
    torch.manual_seed(1)
    return nn.Linear(WIDTH, WIDTH).double(), nn.Parameter(torch.tensor(1.7, dtype=torch.float64))


def direct(text: Tensor, video: Tensor, valid: Tensor, scale: Tensor) -> Tensor:
    """The formula, on the valid rows alone."""
    scores = scale * score(text[valid], video[valid])
    own = torch.arange(len(scores))
    return (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2


def run(loss, text: Tensor, video: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """The loss and all its gradients."""
    layer, log_scale = model()
    text, video = text.requires_grad_(), video.requires_grad_()
    value = loss(layer(text), nn.functional.normalize(layer(video), dim=-1), valid, log_scale.exp())
    value.backward()
    gradients = {"layer": layer.weight.grad, "scale": log_scale.grad, "text": text.grad, "video": video.grad}
    return {"loss": value.detach()} | gradients


def ours(text: Tensor, video: Tensor, valid: Tensor, scale: Tensor) -> Tensor:
    return contrastive_loss(text, video, valid, scale, score)


def assert_same(got: dict, expected: dict, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(
            got[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_number_worked_out_by_hand():
    text = video = torch.eye(2)
    expected = torch.tensor(1 + torch.e**-3.0).log()  # -log(e^3 / (e^3 + e^0)), in both directions
    assert contrastive_loss(text, video, torch.ones(2).bool(), torch.tensor(3.0), score) == pytest.approx(
        expected.item()
    )


@pytest.mark.parametrize(
    "valid", [torch.ones(ROWS).bool(), VALID, VALID.flip(0)], ids=["full", "padded", "padded before"]
)
def test_one_process(valid):
    assert_same(run(ours, *inputs(), valid), run(direct, *inputs(), valid), 1e-12)


def test_directions_are_not_mixed_up():
    text, video = torch.eye(3), torch.eye(3)[[0, 0, 2]]  # both of the first texts match both of the first videos
    to_video, to_text = score(text, video), score(text, video).T
    own = torch.arange(3)
    expected = (cross_entropy(5 * to_video, own) + cross_entropy(5 * to_text, own)) / 2
    assert cross_entropy(5 * to_video, own) != cross_entropy(5 * to_text, own)
    got = contrastive_loss(text, video, torch.ones(3).bool(), torch.tensor(5.0), score)
    torch.testing.assert_close(got, expected)


def test_padding_is_nobodys_negative():
    text, video = inputs()
    before = run(ours, text, video, VALID)
    text, video = (t.detach().clone() for t in (text, video))
    text[~VALID], video[~VALID] = 1e3, 0.0  # zeros are what the loader pads with
    after = run(ours, text, video, VALID)
    assert_same(after, before, 1e-12)
    assert after["text"][~VALID].abs().max() == 0
    assert after["video"][~VALID].abs().max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_average_over_ranks_is_the_whole_batch(world, tmp_path):
    multiprocessing.set_forkserver_preload([__name__])  # one import of torch for all ranks
    mp.start_processes(_rank, (world, str(tmp_path)), nprocs=world, start_method="forkserver")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    expected = run(direct, *inputs(), VALID)
    for part in parts:  # averaged by all_reduce: every rank has them
        assert_same(
            {k: part[k] for k in ("loss", "layer", "scale")},
            {k: expected[k] for k in ("loss", "layer", "scale")},
            1e-10,
        )
    for name in ("text", "video"):  # each rank holds its own rows' gradients, which the average over ranks divides
        assert_same({name: torch.cat([part[name] for part in parts]) / world}, {name: expected[name]}, 1e-10)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    text, video = inputs()
    found = run(ours, text[mine], video[mine], VALID[mine])
    for name in ("loss", "layer", "scale"):
        dist.all_reduce(found[name])
        found[name] /= world
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
