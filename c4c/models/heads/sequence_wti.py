"""DRL's whole head: CLIP4Clip's temporal transformer before weighted token interaction (https://arxiv.org/abs/2203.07111)."""

from c4c.models.heads.sequence import FrameTransformer
from c4c.models.heads.wti import WeightedTokenInteraction


class SequentialWTI(FrameTransformer, WeightedTokenInteraction):
    """seqWTI: the frames pass through seqTransf's transformer, and wti scores what comes out.

    DRL's code (github.com/foolwood/DRL) calls it `--agg_module seqTransf --interaction wti`. Weights have the names of its checkpoints.
    """

    name = "seqWTI"
