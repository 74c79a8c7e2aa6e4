"""c4c: train and evaluate text-to-video retrieval models of the CLIP4Clip family."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m c4c.shard and its like, perhaps without the environment
    from c4c.launched import explain_missing

    sys.excepthook = explain_missing
