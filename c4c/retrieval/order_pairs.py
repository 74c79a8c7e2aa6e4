"""Order-only pairs: videos that show the same frames in another order, and captions that say which order.

A split has some if the `meta` of its samples has `pair`: videos with the same value differ only in order or direction, null stands
for a video without such a twin. (The generated demo sets have them.) A model that ignores the order of frames can at best guess
between the videos of a pair.
"""

import json

import torch
from torch import Tensor

from c4c.retrieval.metrics import ScoreGrid
from c4c.retrieval.work import EvalWork
from shards.split import Split


def pair_groups(split: Split) -> Tensor | None:
    """The number of each video's pair, -1 for a video without one: int64 [M]; None for a split without pairs.

    Reads the JSON members, and only the first one where that has no `pair`. Splits on a server, whose JSON members are not read, count
    as without.
    """
    if split.remote is not None or "pair" not in _meta(split, 0):
        return None
    names = [
        json.dumps(name, sort_keys=True) if (name := _meta(split, i).get("pair")) is not None else None
        for i in range(len(split))
    ]
    known = {name: number for number, name in enumerate(dict.fromkeys(n for n in names if n is not None))}
    groups = torch.tensor([-1 if name is None else known[name] for name in names])
    sizes = torch.bincount(groups[groups >= 0], minlength=1)
    groups[(groups >= 0) & (sizes[groups.clamp(min=0)] < 2)] = -1  # the twin was rejected, or is in another split
    return groups if (groups >= 0).any() else None


def score_pairs(grid: ScoreGrid, groups: Tensor, by_text: Tensor, work: EvalWork) -> dict[str, float | int]:
    """{"R1", "own_first", "n_texts", "n_pairs"} of the texts whose video is in a pair; percent. n_pairs: 0 if more
    than two videos have one name, so that a guess is right less often than half of the time.

    groups: of `pair_groups`. by_text: 0-based ranks [N]. own_first: how often a text scores its own video above every other video of the
    pair; a tie or a score that is not a number counts against it, so a model that ignores order has at most 50 where pairs have two videos.
    """
    groups = groups.to(grid.owner.device)
    of_text = groups[grid.owner]
    paired = of_text >= 0

    def count(texts: slice) -> Tensor:
        rows = paired[texts]
        scores = grid.scores(texts)[rows]
        owner = grid.owner[texts][rows]
        own = scores.gather(1, owner[:, None])
        others = groups[None, :] == of_text[texts][rows][:, None]
        others.scatter_(1, owner[:, None], False)
        return ((own > scores) | ~others).all(dim=1).sum()

    pieces = work.share([texts for texts in grid.text_tiles if paired[texts].any()])
    won = work.total(sum(work.map(count, pieces), torch.zeros((), dtype=torch.int64, device=grid.owner.device)))
    n = int(paired.sum())
    found = (by_text[paired] == 0).sum()
    sizes = groups[groups >= 0].unique(return_counts=True)[1]
    n_pairs = len(sizes) if bool((sizes == 2).all()) else 0
    return {
        "R1": round(100.0 * int(found) / n, 4),
        "own_first": round(100.0 * int(won) / n, 4),
        "n_texts": n,
        "n_pairs": n_pairs,
    }


def _meta(split: Split, index: int) -> dict:
    meta = split.json(split.video(index)).get("meta")
    return meta if isinstance(meta, dict) else {}
