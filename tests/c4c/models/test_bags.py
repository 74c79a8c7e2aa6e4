"""MIL-NCE as a training step: plain, with gradient caching and accumulated, on one rank and on two, against its formula."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from c4c.models.clip4clip import CLIP4Clip
from c4c.training import step
from c4c.training.step import Learner
from tests.c4c.models.plain_engine import ROWS, SPEC, WAYS, Taken, by_formula, on_two_ranks, same, taken

pytestmark = pytest.mark.slow

BAG, FRAMES = 3, 2
SIZES = [3, 1, 2, 3, 1, 3, 2, 0]  # captions of each bag; the last row is padding


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


def expected(way: str, head: str) -> Taken:
    whole, one = batch(), learner(head)
    return by_formula(way, one, lambda rows: formula(one.model, whole, rows))


def took(way: str, head: str, rows: slice = slice(None), one: SimpleNamespace | None = None) -> Taken:
    return taken(way, learner(head), step.inputs_of(one or batch(rows), "mil_nce"))


@pytest.mark.parametrize("head", ["meanP", "wti"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_has_the_formulas_gradient(way, head):
    same(took(way, head), expected(way, head), 1e-4, 1e-6)


def test_two_ranks(tmp_path):
    for case, found in on_two_ranks(took, [(way, "meanP") for way in WAYS], tmp_path).items():
        same(found, expected(*case), 1e-4, 1e-6)


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
