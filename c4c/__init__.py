"""c4c: train, evaluate and search with text-to-video retrieval models of the CLIP4Clip family."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from c4c.models.clip4clip import CLIP4Clip
    from c4c.retriever import Retriever

__all__ = ["CLIP4Clip", "Retriever"]
__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # python -m c4c.shard and its like, perhaps without the environment
    from c4c.launched import explain_missing

    sys.excepthook = explain_missing


def __getattr__(name: str):
    """Imported when asked for: commands must answer at once."""
    if name == "CLIP4Clip":
        from c4c.models.clip4clip import CLIP4Clip

        return CLIP4Clip
    if name == "Retriever":
        from c4c.retriever import Retriever

        return Retriever
    raise AttributeError(f"module c4c has no attribute {name}")
