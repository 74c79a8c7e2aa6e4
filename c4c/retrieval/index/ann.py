"""The ANN index of an index: which kind, and how it is asked (measured by bench/index.py)."""

from typing import Any

LEAST_ROWS = 1_000  # fewer vectors are searched exactly in no time
NPROBES = 80  # partitions that a search looks into
_REFINE = 40  # candidates for each result wanted, whose exact scores decide
_FEWEST = 4  # the same, where many results are wanted
_CANDIDATES = 2_000  # of all results together, as long as each has the fewest
_SHORT = 128  # numbers of a vector for which single bits say too little


def candidates(k: int) -> int:
    """How many candidates are ranked exactly for each of the k results that a search wants."""
    return max(_FEWEST, min(_REFINE, _CANDIDATES // max(1, k)))


def ann_config(rows: int, width: int) -> Any:
    """The kind of ANN index that `Store.build_ann` makes: partitions of about a thousand vectors, in which a bit stands for a number.

    RaBitQ (https://arxiv.org/abs/2405.12497) is built in a small part of the time that product quantisation takes. What it loses, the exact scores of some candidates bring back: see bench/index.py. Short vectors get a byte a number."""
    from lancedb.index import IvfRq, IvfSq

    partitions = max(1, min(4096, round(rows / 1000)))
    return (IvfSq if width % 8 or width < _SHORT else IvfRq)(distance_type="dot", num_partitions=partitions)
