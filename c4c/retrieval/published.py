"""Published results that an evaluation can be compared with, and what differs."""

import re
from dataclasses import dataclass

from shards.split import Split

_TEST_VIDEOS = range(7010, 10_000)  # MSR-VTT's own test split, of which JSFusion's 1000 are a part


@dataclass(frozen=True)
class Published:
    """R@1, R@5, R@10, MdR, MnR of both directions as published; v2t None: not published."""

    name: str
    t2v: tuple[float, float, float, float, float]
    v2t: tuple[float | None, ...] | None
    differs: str
    source: str


_OFFICIAL = "arXiv:2104.08860 (Luo et al., 2021), training on 9k videos"
_RECIPE = "ViT-B/32 from OpenAI's weights, up to 12 frames at 1 frame/s, 32 words, fp16; the best epoch is chosen on the test split"
MSRVTT_1K = (
    Published("CLIP4Clip meanP", (43.1, 70.4, 80.8, 2.0, 16.2), (43.1, 70.5, 81.2, 2.0, 12.4), f"{_RECIPE}.", _OFFICIAL),
    Published(
        "CLIP4Clip seqTransf", (44.5, 71.4, 81.6, 2.0, 15.3), (42.7, 70.9, 80.6, 2.0, 11.6),
        f"{_RECIPE}; a Transformer of 4 layers over the frames. Users report 43.4 with the released code.", _OFFICIAL,
    ),
    Published(
        "mmaction2, mean", (43.1, 69.4, 78.9, 2.0, 16.8), None,
        "ViT-B/32 from OpenAI's weights, always 12 frames by segments and no mask, 77 words, fp32 AdamW; frames scaled to a short "
        "side of 256 and cropped to 224, a narrower view.", "mmaction2, configs/retrieval/clip4clip/README.md",
    ),
)  # fmt: skip


def published(split: Split, n_texts: int) -> tuple[Published, ...]:
    """What was published on this split; () where the split is not known to be a published one.

    So far that is JSFusion's test split of MSR-VTT ("1k-A"): 1000 videos of MSR-VTT's test split, each with one caption.
    """
    if str(split.info.get("name", "")).lower() != "msrvtt" or (len(split), n_texts) != (1000, 1000):
        return ()
    ids = [re.fullmatch(r"video(\d+)", split.video(i).id) for i in range(len(split))]
    return MSRVTT_1K if all(one and int(one[1]) in _TEST_VIDEOS for one in ids) else ()
