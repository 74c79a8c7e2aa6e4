"""Similarity heads: from frame features and text features to a score for every pair.

A head is a module with

    video(frames [M, F, D], mask [M, F])  -> what stands for a video; the first axis is M. Ranks exchange this.
    score(text [N, D], video [M, ...])    -> [N, M], before the temperature

One file a head; name it here.
"""

from c4c.heads.mean import MeanPooling

HEADS = {"meanP": MeanPooling}
