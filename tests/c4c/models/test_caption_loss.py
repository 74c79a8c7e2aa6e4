"""Several captions a video, smoothed targets and equal captions: the loss against its formula, written out term by term."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import cross_entropy

from c4c.caption_loss import caption_loss
from c4c.losses import contrastive_loss, equal_rows, sigmoid_loss

ROWS, CAPTIONS, WIDTH = 6, 3, 5
SIZES = [3, 1, 2, 3, 2, 0]  # captions of each video; the last row is padding
PRESENT = torch.arange(CAPTIONS) < torch.tensor(SIZES)[:, None]
SCALE = torch.tensor(2.5, dtype=torch.float64)
# words of each caption: 0 and 4 share one, 1 and 3 have one twice between them, 3 says one twice; padding repeats one that is there
WORDS = [[1, 2, 3], [4, 0, 0], [5, 6, 0], [4, 7, 7], [1, 8, 0], [1, 4, 5]]
TOKENS = torch.tensor(WORDS)[:, :, None] * torch.tensor([1, 10, 100])
WAYS = {
    "plain": {},
    "smooth": {"smoothing": 0.2},
    "equal": {"tokens": TOKENS},
    "both": {"smoothing": 0.2, "tokens": TOKENS},
}


def score(text: Tensor, video: Tensor) -> Tensor:
    return text @ video.T


def inputs(captions: int = CAPTIONS) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((ROWS, captions, WIDTH), (ROWS, WIDTH))
    text, video = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes)
    return text.requires_grad_(), video.requires_grad_()


def direct(text: Tensor, video: Tensor, smoothing: float = 0.0, tokens: Tensor | None = None) -> Tensor:
    """Caption by caption, and video by video."""
    pairs = [(v, n) for v, size in enumerate(SIZES) for n in range(size)]
    videos = [v for v, size in enumerate(SIZES) if size]

    def apart(v: int, n: int, other: int) -> bool:
        """Whether caption (v, n) is no negative of video `other`."""
        return tokens is not None and any(WORDS[v][n] == WORDS[other][k] for k in range(SIZES[other]))

    def cost(scores: dict, positives: list) -> Tensor:
        total = sum(s.exp() for s in scores.values())
        target = {c: smoothing / len(scores) for c in scores}
        for c in positives:
            target[c] += (1 - smoothing) / len(positives)
        return -sum(target[c] * (scores[c].exp() / total).log() for c in scores)

    def s(v: int, n: int, other: int) -> Tensor:
        return SCALE * (text[v, n] * video[other]).sum()

    t2v = [cost({w: s(v, n, w) for w in videos if w == v or not apart(v, n, w)}, [v]) for v, n in pairs]
    v2t = [
        cost({p: s(*p, w) for p in pairs if p[0] == w or not apart(*p, w)}, [p for p in pairs if p[0] == w])
        for w in videos
    ]
    return (sum(t2v) / len(t2v) + sum(v2t) / len(v2t)) / 2


def ran(loss) -> tuple[Tensor, Tensor, Tensor]:
    text, video = inputs()
    value = loss(text, video)
    value.backward()
    return value.detach(), text.grad, video.grad


def assert_same(found, expected) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_one_process(way):
    found = ran(lambda text, video: caption_loss(text, video, PRESENT, SCALE, score, **WAYS[way]))
    assert_same(found, ran(lambda text, video: direct(text, video, **WAYS[way])))
    assert not found[1][~PRESENT].any() and not found[2][5].any()


def test_each_option_changes_the_loss():
    losses = {way: direct(*inputs(), **options).item() for way, options in WAYS.items()}
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses)


def test_one_caption_a_video_is_the_usual_loss():
    text, video = inputs(1)
    valid = torch.tensor(SIZES) > 0
    one = contrastive_loss(text[:, 0], video, valid, SCALE, score)
    torch.testing.assert_close(caption_loss(text, video, valid[:, None], SCALE, score), one)
    # torch counts every class, so there must be no padding
    text, video = text[:5, 0].detach(), video[:5].detach()
    scores, own = SCALE * score(text, video), torch.arange(5)
    expected = sum(cross_entropy(x, own, label_smoothing=0.3) for x in (scores, scores.T)) / 2
    found = caption_loss(text[:, None], video, torch.ones(5, 1).bool(), SCALE, score, smoothing=0.3)
    torch.testing.assert_close(found, expected)


def test_equal_rows():
    rows = torch.tensor([[1, 2], [1, 3], [1, 2]])
    assert equal_rows(rows, rows[:2]).tolist() == [[True, False], [False, True], [True, False]]


def sigmoid(rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    text, video = (x.detach()[rows].requires_grad_() for x in inputs(1))
    valid, tokens = torch.tensor(SIZES)[rows] > 0, TOKENS[rows, 0]
    value = sigmoid_loss(text[:, 0], video, valid, SCALE, torch.tensor(-1.0).double(), score, tokens=tokens)
    value.backward()
    return value.detach(), text.grad, video.grad


def direct_sigmoid() -> tuple[Tensor, Tensor, Tensor]:
    text, video = inputs(1)
    logits = SCALE * score(text[:, 0], video) - 1
    total = sum(
        -(logits[i, j] if i == j else -logits[i, j]).sigmoid().log()
        for i in range(5)
        for j in range(5)
        if i == j or WORDS[i][0] != WORDS[j][0]
    )
    (total / 5).backward()
    return (total / 5).detach(), text.grad, video.grad


def test_equal_captions_are_in_no_pair_of_the_sigmoid_loss():
    assert_same(sigmoid(), direct_sigmoid())


@pytest.mark.slow
def test_two_ranks(tmp_path):
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for way in (*WAYS, "sigmoid"):
        (loss, text, video), (other, *more) = ranks[0][way], ranks[1][way]
        whole = ((loss + other) / 2, torch.cat([text, more[0]]) / 2, torch.cat([video, more[1]]) / 2)
        assert_same(whole, direct_sigmoid() if way == "sigmoid" else ran(lambda t, v: direct(t, v, **WAYS[way])))  # noqa: B023


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    found = {"sigmoid": sigmoid(rows)}
    for way, options in WAYS.items():
        own = {name: value[rows] if name == "tokens" else value for name, value in options.items()}
        text, video = (x.detach()[rows].requires_grad_() for x in inputs())
        value = caption_loss(text, video, PRESENT[rows], SCALE, score, **own)
        value.backward()
        found[way] = value.detach(), text.grad, video.grad
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
