"""Channel decorrelation against its formula, of a correlation that numpy computes, on one process and on two."""

import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import normalize

from c4c.decorrelation import correlation, decorrelation
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.heads import HEADS, Compared, present
from c4c.models.heads.mean import MeanPooling
from c4c.models.heads.wti import WeightedTokenInteraction, _weights
from c4c.objective import LossOptions, loss_of
from c4c.training.step import Learner
from tests.c4c.models.small import SPEC

PAIRS, WORDS, FRAMES, WIDTH, OFF = 6, 4, 3, 5, 0.06
VALID = torch.tensor([1, 1, 1, 1, 1, 0]).bool()
LENGTHS, SHOWN = [4, 2, 3, 4, 1, 4], [3, 3, 1, 2, 3, 3]


def head() -> WeightedTokenInteraction:
    torch.manual_seed(3)
    return WeightedTokenInteraction(WIDTH).double()


def features(rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Words [B, L, D] and frames [B, F, D], zeros at padding."""
    random = torch.Generator().manual_seed(0)
    text = torch.randn(PAIRS, WORDS, WIDTH, generator=random, dtype=torch.float64) + 0.7
    video = torch.randn(PAIRS, FRAMES, WIDTH, generator=random, dtype=torch.float64)
    text = text * (torch.arange(WORDS) < torch.tensor(LENGTHS)[:, None])[..., None]
    video = video * (torch.arange(FRAMES) < torch.tensor(SHOWN)[:, None])[..., None]
    return text[rows].clone().requires_grad_(), video[rows].clone().requires_grad_()


def standardised(rows: list[Tensor]) -> Tensor:
    x = torch.stack(rows)
    return (x - x.mean(0)) / x.std(0, unbiased=False)


def direct(wti: WeightedTokenInteraction, text: Tensor, video: Tensor) -> Tensor:
    """Word by word and frame by frame, as the paper has it."""
    a = _weights(wti.text_weight_fc, text, present(text))
    b = _weights(wti.video_weight_fc, video, present(video))
    by_word, by_frame = [], []
    for i in range(PAIRS - 1):
        words = [normalize(text[i, n], dim=0) for n in range(LENGTHS[i])]
        frames = [normalize(video[i, n], dim=0) for n in range(SHOWN[i])]
        by_word += [(w, max(frames, key=lambda f: float((f @ w).detach())), a[i, n]) for n, w in enumerate(words)]
        by_frame += [(max(words, key=lambda w: float((f @ w).detach())), f, b[i, n]) for n, f in enumerate(frames)]
    matrices = []
    for rows in (by_word, by_frame):
        x, y, w = zip(*rows, strict=True)
        matrices.append(torch.einsum("r,ri,rj->ij", torch.stack(w), standardised(x), standardised(y)) / (PAIRS - 1))
    c = sum(matrices) / 2
    on = sum((1 - c[i, i]) ** 2 for i in range(WIDTH))
    return on + OFF * sum(c[i, j] ** 2 for i in range(WIDTH) for j in range(WIDTH) if i != j)


def ran(loss, rows: slice = slice(None)) -> dict[str, Tensor]:
    wti, (text, video) = head(), features(rows)
    value = loss(wti, text, video)
    value.backward()
    weights = {name: weight.grad for name, weight in wti.named_parameters()}
    return {"loss": value.detach(), "text": text.grad, "video": video.grad} | weights


def ours(wti: WeightedTokenInteraction, text: Tensor, video: Tensor, valid: Tensor = VALID) -> Tensor:
    return decorrelation([one.of(valid) for one in wti.compared(text, video)], OFF)


def assert_same(found: dict, expected: dict) -> None:
    """To the rounding of the weights of words and frames, which are fp32."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_one_process():
    expected = ran(direct)
    assert_same(ran(ours), expected)
    assert any(grad.any() for name, grad in expected.items() if name.startswith("text_weight"))


def test_a_correlation_without_weights_is_numpys():
    random = torch.Generator().manual_seed(1)
    x, y = (torch.randn(20, WIDTH, generator=random, dtype=torch.float64) for _ in range(2))
    ones = torch.ones(20, dtype=torch.float64)
    whole = np.corrcoef(x.T, y.T)[:WIDTH, WIDTH:]
    torch.testing.assert_close(correlation(Compared(x, y, ones, ones.bool())), torch.from_numpy(whole))


def test_texts_and_videos_that_agree_and_have_independent_channels_cost_nothing():
    x = torch.eye(4, dtype=torch.float64).repeat(2, 1)
    x[4:] *= -1
    ones = torch.ones(8, dtype=torch.float64)
    assert decorrelation([Compared(x, x, ones, ones.bool())], 1.0).item() == pytest.approx(0)
    turned = x[:, [1, 0, 2, 3]]  # two channels that do not match, and two that correlate with another
    assert decorrelation([Compared(x, turned, ones, ones.bool())], 0.5).item() == pytest.approx(2 + 0.5 * 2)


def test_a_channel_that_is_constant_has_no_gradient():
    random = torch.Generator().manual_seed(1)
    x, y = (torch.randn(9, WIDTH, generator=random).requires_grad_() for _ in range(2))
    flat = x.clone()
    flat[:, 2] = 0.3
    ones = torch.ones(9)
    matrix = correlation(Compared(flat, y, ones, ones.bool()))
    assert not matrix[2].any() and matrix.isfinite().all()
    matrix.sum().backward()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


def test_a_batch_of_padding_is_finite():
    text, video = features()
    found = ours(head(), text, video, torch.zeros(PAIRS, dtype=torch.bool))
    found.backward()
    assert found.item() == WIDTH and not text.grad.any()


def test_a_head_with_one_vector_a_text_compares_that():
    random = torch.Generator().manual_seed(1)
    text, video = (normalize(torch.randn(7, WIDTH, generator=random, dtype=torch.float64), dim=-1) for _ in range(2))
    valid = torch.arange(7) < 6
    c = torch.from_numpy(np.corrcoef(text[:6].T, video[:6].T)[:WIDTH, WIDTH:])
    expected = (1 - c.diagonal()).square().sum() + OFF * (c - torch.diag(c.diagonal())).square().sum()
    found = decorrelation([one.of(valid) for one in MeanPooling(WIDTH).compared(text, video)], OFF)
    torch.testing.assert_close(found, expected)


def test_a_video_is_in_as_many_pairs_as_it_has_captions():
    torch.manual_seed(2)
    model = CLIP4Clip(SPEC, "wti", "2d", segments=2)
    texts, videos = torch.randn(3, 2, 4, 64), torch.randn(3, 2, 64)
    valid, options = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool(), LossOptions(decorrelation=0.5)

    def added(text: Tensor, video: Tensor, valid: Tensor) -> Tensor:
        plain = loss_of("cross_entropy", model, text, video, valid)
        return (loss_of("cross_entropy", model, text, video, valid, options=options) - plain) / 0.5

    rows = [0, 0, 1, 2, 2]
    alone = added(texts[valid], videos[rows], torch.ones(5).bool())
    torch.testing.assert_close(added(texts, videos, valid), alone, rtol=1e-4, atol=1e-4)


def test_a_head_without_channels_is_refused():
    assert [name for name, kind in HEADS.items() if not kind.compares_channels] == ["tightTransf"]
    model = CLIP4Clip(SPEC, "tightTransf", "2d", blocks=1, segments=2)
    with pytest.raises(
        ValueError, match=r"train\.decorrelation=0\.001 needs a head that compares.*another model\.head, such as wti"
    ):
        Learner(model, options=LossOptions(decorrelation=0.001))
    Learner(model)


@pytest.mark.slow
def test_two_ranks(tmp_path):
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = ran(direct)
    assert first["loss"] == second["loss"]
    halves = {name: torch.cat([first[name], second[name]]) / 2 for name in ("text", "video")}
    assert_same({name: (first[name] + second[name]) / 2 for name in first} | halves, expected)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
    torch.save(ran(lambda wti, text, video: ours(wti, text, video, VALID[rows]), rows), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
