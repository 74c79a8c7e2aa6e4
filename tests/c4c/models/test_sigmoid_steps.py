"""The sigmoid loss as a training step: plain, with gradient caching and accumulated, on one rank and on two, against its formula."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from c4c.models.clip4clip import CLIP4Clip
from c4c.training import step
from c4c.training.step import Learner
from tests.c4c.models.plain_engine import ROWS, SPEC, VALID, WAYS, Taken, by_formula, on_two_ranks, same, taken

pytestmark = pytest.mark.slow

FRAMES = 2
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
    valid = torch.arange(ROWS) < len(VALID)
    mask = torch.ones(ROWS, FRAMES, dtype=torch.bool)
    whole = SimpleNamespace(frames=frames, frame_mask=mask, tokens=tokens, valid=valid)
    return SimpleNamespace(**{name: value[rows] for name, value in vars(whole).items()})


def formula(model: CLIP4Clip, whole: SimpleNamespace, rows: list[int]) -> Tensor:
    """Over the pairs of these rows."""
    text, video = model(whole.frames[rows], whole.frame_mask[rows], whole.tokens[rows])
    logits = model.scale() * model.head.score(text, video) + model.clip.logit_bias
    return -logsigmoid((2 * torch.eye(len(rows)) - 1) * logits).sum() / len(rows)


def expected(way: str, head: str) -> Taken:
    whole, one = batch(), learner(head)
    return by_formula(way, one, lambda rows: formula(one.model, whole, rows))


def took(way: str, head: str, rows: slice = slice(None)) -> Taken:
    return taken(way, learner(head), step.inputs_of(batch(rows), "sigmoid"))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_has_the_formulas_gradient(way, head):
    wanted = expected(way, head)
    assert "model.clip.logit_bias" in wanted[1]
    same(took(way, head), wanted, 1e-4, 1e-5)


def test_two_ranks(tmp_path):
    for case, found in on_two_ranks(took, [(way, head) for way in WAYS for head in HEADS], tmp_path).items():
        same(found, expected(*case), 1e-4, 1e-5)
