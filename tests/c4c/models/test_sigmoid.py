"""The sigmoid loss against its formula and against open_clip's, on one process and on several; what it holds in memory."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.loss import SigLipLoss
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from c4c import losses
from c4c.losses import sigmoid_loss
from c4c.models.heads import HEADS, Head
from c4c.models.heads.mean import MeanPooling
from c4c.performance.counts import _Meter

ROWS, WIDTH, WORDS, FRAMES = 12, 8, 5, 3  # rows of the global batch
# on 2 ranks 5 and 0 rows; on 3 ranks 4, 1 and 0; on 4 ranks 2, 3, 0 and 0
VALID = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]).bool()
HEADS_HERE = ["meanP", "wti", "tightTransf"]
SHARED = ("layer", "scale", "bias", "head")  # what all ranks have one of
score = MeanPooling(WIDTH).score


def inputs(head: Head) -> tuple[Tensor, Tensor]:
    """Raw texts and videos of the global batch, of the head's shapes; some words and frames are padding."""
    random = torch.Generator().manual_seed(0)
    texts = torch.randn(ROWS, *([WORDS] if head.tokens else []), WIDTH, generator=random, dtype=torch.float64)
    videos = torch.randn(
        ROWS, *([FRAMES] if head.name != "meanP" else []), WIDTH, generator=random, dtype=torch.float64
    )
    for tensor in (texts, videos):
        if tensor.dim() == 3:
            tensor[1::2, -1] = 0.0
    return texts, videos


def model(name: str) -> tuple[Head, nn.Linear, nn.Parameter, nn.Parameter]:
    """What all ranks share: a head, a layer, a temperature and a bias."""
    torch.manual_seed(1)
    head = HEADS[name](WIDTH, blocks=1, segments=FRAMES, attention_heads=2, positions=FRAMES + 1).double()
    for weight in head.parameters():  # so that they matter
        nn.init.normal_(weight, std=0.5)
    scalars = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (1.2, -2.0))
    return head, nn.Linear(WIDTH, WIDTH, bias=False).double(), *scalars


def features(head: Head, layer: nn.Linear, *raw: Tensor) -> list[Tensor]:
    """Zeros stay zeros; a head with weights gets float32, as from a model."""
    return [layer(tensor) if head.name == "meanP" else layer(tensor).float() for tensor in raw]


def formula(text: Tensor, video: Tensor, valid: Tensor, scale: Tensor, bias: Tensor, head: Head) -> Tensor:
    """Over the valid rows alone, pair by pair."""
    texts, videos = text[valid], video[valid]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(texts)):
        for j in range(len(videos)):
            z = 1 if i == j else -1
            total -= logsigmoid(z * (scale * head.score(texts[i : i + 1], videos[j : j + 1]).double() + bias)).squeeze()
    return total / len(texts)


def ours(text: Tensor, video: Tensor, valid: Tensor, scale: Tensor, bias: Tensor, head: Head) -> Tensor:
    return sigmoid_loss(text, video, valid, scale, bias, head.score, head.parameters())


def run(loss, name: str, rows: slice = slice(None), valid: Tensor = VALID) -> dict[str, Tensor]:
    """The loss and all its gradients."""
    head, layer, log_scale, bias = model(name)
    text, video = (tensor[rows].requires_grad_() for tensor in inputs(head))
    value = loss(*features(head, layer, text, video), valid[rows], log_scale.exp(), bias, head)
    value.backward()
    weights = [weight.grad for weight in head.parameters()]
    return {
        "loss": value.detach().double(), "layer": layer.weight.grad, "scale": log_scale.grad, "bias": bias.grad,
        "head": torch.cat([w.flatten() for w in weights]) if weights else torch.zeros(0),
        "text": text.grad, "video": video.grad,
    }  # fmt: skip


def assert_same(got: dict, expected: dict, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(
            got[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def tolerance(name: str) -> float:
    return 1e-12 if name == "meanP" else 1e-6  # heads with weights weigh or score in float32


def test_a_number_worked_out_by_hand():
    text = video = torch.eye(2)
    got = sigmoid_loss(text, video, torch.ones(2).bool(), torch.tensor(3.0), torch.tensor(-1.0), score)
    # two pairs at 3 - 1, two others at -1, by two texts
    assert got.item() == pytest.approx((torch.tensor(-2.0).exp().log1p() + torch.tensor(-1.0).exp().log1p()).item())


@pytest.mark.parametrize("rows", [None, 2, 5])
def test_open_clips_loss(rows, monkeypatch):
    """rows: that are scored at once."""
    monkeypatch.setattr(losses, "_ROWS", rows or losses._ROWS)

    def theirs(text, video, valid, scale, bias, head):
        return SigLipLoss()(video, text, scale, bias)

    valid = torch.ones(ROWS).bool()
    assert_same(run(ours, "meanP", valid=valid), run(theirs, "meanP", valid=valid), 1e-12)


@pytest.mark.parametrize("name", HEADS_HERE)
def test_one_process(name, monkeypatch):
    monkeypatch.setattr(losses, "_ROWS", 5)
    assert_same(run(ours, name), run(formula, name), tolerance(name))


@pytest.mark.parametrize("kept", ["text", "video", "all but the bias"])
def test_gradients_of_only_some(kept):
    head, layer, log_scale, bias = model("wti")
    text, video = (t.detach() for t in features(head, layer, *inputs(head)))
    text.requires_grad_(kept == "text"), video.requires_grad_(kept == "video")
    bias.requires_grad_(kept != "all but the bias")
    everything = [t for t in (text, video, log_scale, bias, *head.parameters()) if t.requires_grad]
    found, expected = (
        torch.autograd.grad(loss(text, video, VALID, log_scale.exp(), bias, head), everything)
        for loss in (ours, formula)
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_without_gradients_it_is_the_same_number():
    head, layer, log_scale, bias = model("wti")
    with torch.no_grad():
        value = ours(*features(head, layer, *inputs(head)), VALID, log_scale.exp(), bias, head)
    assert not value.requires_grad
    torch.testing.assert_close(value.double(), run(ours, "wti")["loss"])


def test_padding_is_in_no_pair():
    text, video = (t.detach() for t in inputs(HEADS["meanP"](WIDTH)))
    arguments = (VALID, torch.tensor(5.0), torch.tensor(-2.0), score)
    before = sigmoid_loss(text, video, *arguments)
    text[~VALID], video[~VALID] = 1e3, 0.0  # zeros are what the loader pads with
    text.requires_grad_(), video.requires_grad_()
    after = sigmoid_loss(text, video, *arguments)
    after.backward()
    torch.testing.assert_close(after, before)
    assert text.grad[~VALID].abs().max() == 0 and video.grad[~VALID].abs().max() == 0
    empty = sigmoid_loss(text, video, torch.zeros(ROWS).bool(), *arguments[1:])
    empty.backward()
    assert empty == 0 and text.grad.isfinite().all()


def test_small_gradients_do_not_vanish_in_fp16():
    """Inside a head in fp16 they are as large as fp16's loss scale makes those of the rest."""

    def gradient(dtype: torch.dtype, scale: float) -> Tensor:
        weight = torch.ones(WIDTH, WIDTH, dtype=dtype, requires_grad=True)
        text, video = (t.float() for t in inputs(HEADS["meanP"](WIDTH)))

        def scores(texts: Tensor, videos: Tensor) -> Tensor:
            return (1e-3 * texts.to(dtype) @ weight @ (1e-3 * videos.to(dtype)).T).float()

        bias = torch.tensor(-9.0)
        value = sigmoid_loss(text, video, VALID, torch.tensor(1e-2), bias, scores, [weight], scale)
        (value * scale).backward()
        return weight.grad.double() / scale

    exact = gradient(torch.float32, 1.0)
    assert (gradient(torch.float16, 2.0**16) - exact).norm() < 0.01 * exact.norm()
    assert (gradient(torch.float16, 1.0) - exact).norm() > 0.1 * exact.norm()  # else nothing is shown


# ---- several ranks ----

MEMORY = (16, 64)  # rows a rank, and their width


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    """{ranks: [what each rank found]}"""
    multiprocessing.set_forkserver_preload([__name__])  # one import of torch for all ranks
    results = {}
    for world in (2, 3, 4):
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        mp.start_processes(_rank, (world, str(folder)), nprocs=world, start_method="forkserver")
        results[world] = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return results


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    results = {}
    for name in HEADS_HERE:
        results[name] = run(ours, name, mine)
        for key in ("loss", *SHARED):
            dist.all_reduce(results[name][key])
            results[name][key] /= world
    results["memory"] = _held()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _held() -> tuple[int, int]:
    """(most bytes that tensors made by the loss and its backward pass hold at once, numbers of the largest of them)."""
    rows, width = MEMORY
    text, video = (torch.randn(rows, width).requires_grad_() for _ in range(2))
    largest = 0

    class Meter(_Meter):
        def _follow(self, tensors: list[Tensor]) -> None:
            nonlocal largest
            largest = max([largest, *(tensor.numel() for tensor in tensors)])
            super()._follow(tensors)

    with Meter() as meter:
        sigmoid_loss(text, video, torch.ones(rows).bool(), torch.tensor(2.0), torch.tensor(-1.0), score).backward()
    return meter.peak, largest


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS_HERE)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_average_over_ranks_is_the_whole_batch(world, name, found):
    parts, expected = [part[name] for part in found[world]], run(formula, name)
    for part in parts:  # averaged by all_reduce: every rank has them
        keys = ("loss", *SHARED)
        assert_same({k: part[k] for k in keys}, {k: expected[k] for k in keys}, 100 * tolerance(name))
    for side in ("text", "video"):  # each rank holds its own rows' gradients, which the average over ranks divides
        whole = torch.cat([part[side] for part in parts]) / world
        assert_same({side: whole}, {side: expected[side]}, 100 * tolerance(name))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_ranks(found):
    """No rank holds all ranks' features, nor scores of all pairs."""
    rows, width = MEMORY
    peaks = {world: max(part["memory"][0] for part in found[world]) for world in (2, 3, 4)}
    assert peaks[4] - peaks[2] <= 100 * rows  # which rows of others are padding
    for world in (2, 3, 4):
        largest = max(part["memory"][1] for part in found[world])
        assert largest == 2 * rows * width  # the travelling features and their gradient
