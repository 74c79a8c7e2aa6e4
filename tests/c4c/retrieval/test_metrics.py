"""Ranks and figures: planted answers, ties, broken scores, and the reference implementation's numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from c4c.retrieval.metrics import ranks, report, summarize
from tests.c4c.retrieval.score_matrix import of_matrix

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "metrics.npz")
# those without ties
SQUARE = ["random", "clear_diag", "weak_diag", "anti_diag", "hub_column", "tiny3", "even_n_median"]
MULTI = ["ragged", "ragged_even", "clear", "single_each", "uniform", "half_median"]


def text_ranks(similarity: torch.Tensor, owner: torch.Tensor, tile: int = 2048) -> torch.Tensor:
    texts, videos, score = of_matrix(similarity)
    return ranks(texts, videos, owner, score, tile)[0]


def video_ranks(similarity: torch.Tensor, owner: torch.Tensor, tile: int = 2048) -> torch.Tensor:
    texts, videos, score = of_matrix(similarity)
    return ranks(texts, videos, owner, score, tile)[1]


def retrieval(similarity: torch.Tensor, owner: torch.Tensor) -> dict:
    return report(text_ranks(similarity, owner), video_ranks(similarity, owner))


def one_each(n: int) -> torch.Tensor:
    return torch.arange(n)


def several_captions(groups: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random scores [texts, videos], and each text's video, in no order."""
    random = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    owner = owner[torch.randperm(len(owner), generator=random)]
    return torch.randn(len(owner), len(groups), generator=random), owner


def test_planted_ranks():
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.5, 0.6, 0.4]])
    assert text_ranks(similarity, one_each(3)).tolist() == [0, 1, 2]
    assert video_ranks(similarity, one_each(3)).tolist() == [0, 0, 0]
    assert text_ranks(similarity, torch.tensor([1, 0, 1])).tolist() == [2, 0, 0]


def test_planted_figures():
    figures = summarize(torch.tensor([0, 0, 3, 4, 5, 9, 10, 99]))
    assert figures == {"R1": 25.0, "R5": 50.0, "R10": 75.0, "MdR": 5.5, "MnR": 17.25}


def test_the_shape_of_the_result():
    similarity, owner = several_captions([2, 1, 3])
    result = retrieval(similarity, owner)
    assert list(result) == ["t2v", "v2t", "n_texts", "n_videos"]
    assert (result["n_texts"], result["n_videos"]) == (6, 3)
    for way in ("t2v", "v2t"):
        assert list(result[way]) == ["R1", "R5", "R10", "MdR", "MnR"]
        assert all(type(value) is float for value in result[way].values())


def test_a_tie_never_helps():
    equal = torch.ones(7, 7)
    assert text_ranks(equal, one_each(7)).tolist() == [6] * 7
    assert video_ranks(equal, one_each(7)).tolist() == [6] * 7
    assert retrieval(equal, one_each(7))["t2v"]["R5"] == 0.0
    similarity = torch.tensor([[0.5, 0.5, 0.1], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    assert text_ranks(similarity, one_each(3)).tolist() == [1, 1, 0]
    assert video_ranks(similarity, one_each(3)).tolist() == [0, 0, 1]


def test_what_is_no_number_comes_last():
    similarity = torch.eye(4)
    similarity[1, 1] = torch.nan
    assert text_ranks(similarity, one_each(4)).tolist() == [0, 3, 0, 0]
    assert video_ranks(similarity, one_each(4)).tolist() == [0, 3, 0, 0]
    similarity = torch.eye(4)
    similarity[1, 2] = torch.nan  # and never makes way for the right answer
    assert text_ranks(similarity, one_each(4)).tolist() == [0, 1, 0, 0]
    assert video_ranks(similarity, one_each(4)).tolist() == [0, 0, 1, 0]
    assert video_ranks(torch.full((4, 4), torch.nan), one_each(4)).tolist() == [3] * 4


def test_one_broken_caption_puts_its_video_last():
    similarity, owner = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 2])
    similarity[1, 0] = torch.nan
    assert video_ranks(similarity, owner).tolist() == [2, 0, 0]


@pytest.mark.parametrize("tile", [1, 2, 4, 5, 7, 14])
def test_tiles_equal_the_whole_matrix(tile):
    similarity, owner = several_captions([3, 1, 4, 2, 5], seed=1)
    similarity = (similarity * 2).round()  # many ties
    similarity[4, 2] = similarity[7, 0] = torch.nan
    assert torch.equal(text_ranks(similarity, owner, tile), text_ranks(similarity, owner))
    assert torch.equal(video_ranks(similarity, owner, tile), video_ranks(similarity, owner))


def test_no_tile_is_larger_than_asked_for():
    similarity, owner = several_captions([3, 1, 4, 2, 5], seed=1)
    texts, videos, score = of_matrix(similarity)
    shapes = set()

    def watched(t, v):
        shapes.add((len(t), len(v)))
        return score(t, v)

    ranks(texts, videos, owner, watched, tile=5)
    assert max(n for n, _ in shapes) <= 5 and max(m for _, m in shapes) == 5 and len(shapes) > 1


@pytest.mark.parametrize("seed", range(5))
def test_several_captions_a_video_against_a_loop(seed):
    similarity, owner = several_captions([3, 1, 4, 2, 5, 1], seed)
    scores = similarity.numpy()
    t2v = [sum(row[j] >= row[v] for j in range(6) if j != v) for row, v in zip(scores, owner.tolist(), strict=True)]
    assert text_ranks(similarity, owner).tolist() == t2v
    v2t = []
    for video in range(6):
        best = [max(scores[t, video] for t in range(16) if owner[t] == other) for other in range(6)]
        v2t.append(sum(best[other] >= best[video] for other in range(6) if other != video))
    assert video_ranks(similarity, owner).tolist() == v2t


@pytest.mark.parametrize("name", SQUARE)
def test_one_caption_a_video_as_the_reference(name):
    case = f"square/{name}"
    similarity = torch.from_numpy(GOLDEN[f"{case}/sim"])
    owner = one_each(len(similarity))
    assert text_ranks(similarity, owner).tolist() == GOLDEN[f"{case}/t2v_ranks"].tolist()
    assert video_ranks(similarity, owner).tolist() == GOLDEN[f"{case}/v2t_ranks"].tolist()
    result = retrieval(similarity, owner)
    for way in ("t2v", "v2t"):
        expected = dict(zip(GOLDEN["square_keys"].tolist(), GOLDEN[f"{case}/{way}"].tolist(), strict=True))
        renamed = {"MdR": expected["MedianR"], "MnR": expected["MeanR"]} | {k: expected[k] for k in ("R1", "R5", "R10")}
        assert result[way] == pytest.approx(renamed, abs=1e-4)


@pytest.mark.parametrize("name", MULTI)
def test_several_captions_a_video_as_the_reference(name):
    case = f"multi/{name}"
    similarity = torch.from_numpy(GOLDEN[f"{case}/sim_flat"])
    groups = torch.from_numpy(GOLDEN[f"{case}/group_sizes"])
    owner = torch.repeat_interleave(torch.arange(len(groups)), groups)
    assert text_ranks(similarity, owner).tolist() == GOLDEN[f"{case}/t2v_ranks_derived"].tolist()
    assert video_ranks(similarity, owner).tolist() == GOLDEN[f"{case}/v2t_ranks"].tolist()
    result = retrieval(similarity, owner)
    t2v = dict(zip(GOLDEN["multi_keys"].tolist(), GOLDEN[f"{case}/t2v"].tolist(), strict=True))
    v2t = dict(zip(GOLDEN["square_keys"].tolist(), GOLDEN[f"{case}/v2t"].tolist(), strict=True))
    for key in ("R1", "R5", "R10"):
        assert result["t2v"][key] == pytest.approx(t2v[key], abs=1e-4)
        assert result["v2t"][key] == pytest.approx(v2t[key], abs=1e-4)
    if name != "single_each":  # one text a video: there the official code takes the usual median
        assert result["t2v"]["MdR"] == t2v["MedianR"]
    assert result["t2v"]["MnR"] == pytest.approx(t2v["MeanR"], abs=1e-4)
    assert result["v2t"]["MdR"] == v2t["MedianR"]
