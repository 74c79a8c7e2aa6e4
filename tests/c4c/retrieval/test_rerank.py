"""Re-ranking against its formulas, evaluated directly on whole matrices in float64."""

import numpy as np
import pytest
import torch

from c4c.retrieval.metrics import ScoreGrid, grid_ranks
from c4c.retrieval.rerank import (
    dsl,
    qbnorm_by_text,
    qbnorm_by_video,
    text_bank,
    video_bank,
)
from c4c.retrieval.work import EvalWork
from tests.c4c.retrieval.score_matrix import of_matrix

WORK = EvalWork(torch.device("cpu"))


def grid_of(scores: np.ndarray, owner: np.ndarray, rows: int = 4, columns: int = 3) -> ScoreGrid:
    """Small tiles, so that there are many."""
    texts, videos, score = of_matrix(torch.from_numpy(scores))
    return ScoreGrid.of(texts, videos, torch.from_numpy(owner), score, rows, columns)


def cosines(seed: int, texts: int, videos: int) -> np.ndarray:
    """As CLIP's are: close together, and some videos near to everything."""
    random = np.random.default_rng(seed)
    hubs = random.normal(0, 0.05, videos)
    return (0.25 + hubs + random.normal(0, 0.03, (texts, videos))).astype(np.float32)


def text_ranks(scores: np.ndarray, owner: np.ndarray) -> list[int]:
    return [int((row >= row[v]).sum()) - 1 for row, v in zip(scores, owner, strict=True)]


def video_ranks(scores: np.ndarray, owner: np.ndarray) -> list[int]:
    # [video that a text is of, video]
    best = np.stack([scores[owner == v].max(axis=0) for v in range(scores.shape[1])])
    return [int((best[:, v] >= best[v, v]).sum()) - 1 for v in range(scores.shape[1])]


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


OWNERS = {"one caption each": np.arange(11), "several": np.repeat(np.arange(11), [1, 3, 2, 1, 5, 2, 1, 1, 4, 2, 3])}


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("seed", range(4))
def test_dual_softmax_is_its_formula(owner, seed):
    scores = cosines(seed, len(owner), 11)
    wide = scores.astype(np.float64)
    by_text, by_video = dsl(grid_of(scores, owner), WORK, scale=100)
    assert by_text.tolist() == text_ranks(wide * softmax(100 * wide, axis=0), owner)
    assert by_video.tolist() == video_ranks(wide * softmax(100 * wide, axis=1), owner)
    assert by_text.tolist() != text_ranks(wide, owner)


def published(bank: np.ndarray, scores: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The dynamic inverted softmax, and which queries it corrects. bank, scores: [queries, items]."""
    active = np.unique(bank.argmax(axis=1))
    corrected = np.isin(scores.argmax(axis=1), active)
    normalised = np.exp(scale * scores) / np.exp(scale * bank).sum(axis=0)
    return np.where(corrected[:, None], normalised, scores), corrected


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize("seed", range(4))
def test_querybank_normalisation_is_its_formula(owner, seed):
    scores, captions = cosines(seed, len(owner), 11), cosines(seed + 10, 9, 11)
    expected, corrected = published(captions.astype(np.float64), scores.astype(np.float64), 20)
    made = text_bank(grid_of(captions, np.arange(9)), WORK, scale=20)
    assert qbnorm_by_text(grid_of(scores, owner), WORK, made, scale=20).tolist() == text_ranks(expected, owner)

    videos = cosines(seed + 20, len(owner), 7)  # of the same texts, with another split's videos
    expected, corrected = published(videos.T.astype(np.float64), scores.T.astype(np.float64), 20)
    made = video_bank(grid_of(videos, owner), WORK, scale=20)
    assert qbnorm_by_video(grid_of(scores, owner), WORK, made, scale=20).tolist() == video_ranks(expected.T, owner)
    assert corrected.sum() > 0, "some queries have to be corrected, or nothing is tested"


def test_only_queries_of_the_activation_set_are_corrected():
    """The bank's captions all find video 0, so a query whose best is another keeps its order."""
    owner = np.arange(3)
    scores = np.array([[0.9, 0.8, 0.1], [0.2, 0.6, 0.5], [0.7, 0.1, 0.65]], np.float32)
    bank = text_bank(grid_of(np.array([[0.9, 0.1, 0.0]] * 4, np.float32), np.arange(4)), WORK)
    assert bank.active.tolist() == [True, False, False]
    assert qbnorm_by_text(grid_of(scores, owner), WORK, bank).tolist() == [2, 0, 0]
    assert grid_ranks(grid_of(scores, owner))[0].tolist() == [0, 0, 1]


def test_what_is_no_number_spoils_only_itself():
    scores, owner = cosines(3, 11, 11), np.arange(11)
    scores[5] = np.nan  # a caption
    broken, by_video = dsl(grid_of(scores, owner), WORK)
    assert broken[5] == 10 and by_video[5] == 10
    whole = np.delete(scores, 5, axis=0).astype(np.float64)
    expected = whole * softmax(100 * whole, axis=0)
    assert np.delete(broken.numpy(), 5).tolist() == text_ranks(expected, np.delete(owner, 5))


def test_large_scores_do_not_overflow():
    """tightTransf's have no bound."""
    scores, owner = cosines(1, 22, 11) * 1e4, np.repeat(np.arange(11), 2)
    wide = scores.astype(np.float64)
    assert dsl(grid_of(scores, owner), WORK, scale=1)[0].tolist() == text_ranks(wide * softmax(wide, axis=0), owner)
    made = text_bank(grid_of(scores[:9], np.arange(9)), WORK)
    assert torch.isfinite(made.log_sum).all()


def test_tiles_change_nothing():
    owner = OWNERS["several"]
    scores, bank = cosines(5, len(owner), 11), cosines(6, 30, 11)
    one, other = [grid_of(scores, owner, rows, columns) for rows, columns in ((3, 2), (100, 100))]
    for a, b in zip(dsl(one, WORK), dsl(other, WORK), strict=True):
        assert a.tolist() == b.tolist()
    banks = [text_bank(grid_of(bank, np.arange(30), rows, 5), WORK) for rows in (3, 100)]
    assert torch.allclose(banks[0].log_sum, banks[1].log_sum, rtol=1e-13, atol=0)


@pytest.mark.parametrize("more", [0, -64])
def test_dsl_of_scores_without_a_zero_is_the_product_of_both_softmaxes_whatever_is_added_to_them(more):
    owner = np.repeat(np.arange(11), 2)
    scores = np.random.default_rng(0).normal(0, 2, (22, 11)).astype(np.float32)
    scores[np.arange(22), owner] += 2
    wide = scores.astype(np.float64)
    both = softmax(wide, axis=0) * softmax(wide, axis=1)
    ours, by_video = dsl(grid_of(scores + np.float32(more), owner), WORK, scale=1, cosines=False)
    assert ours.tolist() == text_ranks(both, owner) and 0 < (ours == 0).float().mean() < 1
    assert by_video.tolist() == grid_ranks(grid_of(both, owner))[1].tolist()
