"""Pairs of videos that differ in order only: which they are, and how often a text prefers its own."""

import numpy as np
import pytest
import torch

from c4c.retrieval.metrics import ScoreGrid, grid_ranks
from c4c.retrieval.order_pairs import pair_groups, score_pairs
from c4c.retrieval.work import EvalWork
from tests.c4c.retrieval.score_matrix import of_matrix


class Split:
    remote = None

    def __init__(self, *metas):
        self.metas, self.read = metas, 0

    def __len__(self):
        return len(self.metas)

    def video(self, index):
        return index

    def json(self, index):
        self.read += 1
        return {"meta": self.metas[index]} if self.metas[index] is not None else {}


def test_which_videos_are_in_a_pair():
    split = Split(*({"pair": name} for name in ("a", None, "b", "a", 3, "c", "b", "b")))
    assert pair_groups(split).tolist() == [0, -1, 1, 0, -1, -1, 1, 1]  # 3 and c have lost their twins


@pytest.mark.parametrize("metas", [({"pair": None}, {}), ({"pair": "a"}, {"pair": "b"}), (None, None), ("text", {})])
def test_a_split_without_pairs(metas):
    assert pair_groups(Split(*metas)) is None


def test_other_splits_cost_one_json_member():
    split = Split(*({"kind": "move"} for _ in range(50)))
    assert pair_groups(split) is None and split.read == 1


def test_a_split_on_a_server_counts_as_without():
    split = Split({"pair": "a"}, {"pair": "a"})
    split.remote = object()
    assert pair_groups(split) is None and not split.read


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (128, 1024)])
def test_against_a_direct_count(rows, columns):
    draw = np.random.default_rng(5)
    videos = 23
    owner = np.sort(np.r_[np.arange(videos), draw.integers(0, videos, 20)])
    scores = draw.integers(0, 6, (len(owner), videos)).astype(np.float32)  # with many ties
    scores[3, 5] = np.nan
    groups = np.full(videos, -1)
    groups[[0, 4, 7, 9, 11, 20]] = [0, 0, 1, 1, 2, 2]
    groups[[2, 3, 22]] = 3  # three at once
    texts, of_videos, score = of_matrix(torch.tensor(scores))
    grid = ScoreGrid.of(texts, of_videos, torch.tensor(owner), score, rows, columns)
    by_text, _ = grid_ranks(grid)
    found = score_pairs(grid, torch.tensor(groups), by_text, EvalWork(torch.device("cpu"), ranks=False))

    own_first, first = [], []
    for text, video in enumerate(owner):
        if groups[video] >= 0:
            twins = [v for v in range(videos) if groups[v] == groups[video] and v != video]
            own_first.append(all(scores[text, video] > scores[text, twin] for twin in twins))
            first.append(by_text[text].item() == 0)
    expected = {"R1": 100 * np.mean(first), "own_first": 100 * np.mean(own_first), "n_texts": len(first), "n_pairs": 0}
    assert found == pytest.approx(expected, abs=1e-4) and 0 < found["own_first"] < 100


def test_a_model_that_ignores_order_has_nothing():
    """Twins score the same, and ties count against."""
    texts, videos, score = of_matrix(torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 1.0]]))
    grid = ScoreGrid.of(texts, videos, torch.arange(3), score)
    by_text, _ = grid_ranks(grid)
    found = score_pairs(grid, torch.tensor([0, 0, -1]), by_text, EvalWork(torch.device("cpu"), ranks=False))
    assert found == {"R1": 0.0, "own_first": 0.0, "n_texts": 2, "n_pairs": 1}
