"""Whether pictures as a split stores them are what a recipe can use: refused where its frames would be wrong, and said where they
would be scaled up."""

from pipelines.config import DataConfig
from shards.split import Split
from shards.video.geometry import Geometry, stored_geometry

_VIDEOS = 100  # of a split that are looked at
_ROUNDING = 1.02  # by which a side may be too short: stored sides are whole, and of some codecs even


def require_shape(split: Split, config: DataConfig) -> None:
    """Raise ValueError if a split's pictures are squashed, and the recipe wants the shape that the videos have."""
    stored, wanted = stored_geometry(split.info["profile"]), config.geometry
    if stored is not None and stored.mode == "squash" != wanted.mode:
        raise ValueError(
            f"{split.path} was packed with {stored.option}: its pictures are {stored}, and data.resize_mode={wanted.mode} wants the "
            f"videos' own shape, with {wanted}. Pack the videos with {wanted.option}, or use data.resize_mode=squash with a "
            "backbone that was trained so"
        )


def enlarged(split: Split, config: DataConfig) -> str | None:
    """By how much the recipe scales up what a split stores; None if it does not, or the stored pictures are the sources'."""
    stored, wanted = stored_geometry(split.info["profile"]), config.geometry
    if stored is None:
        return None
    setting, instead = f"data.{'resize' if config.resize else 'image_size'}={wanted.side}", ""
    if stored.mode == wanted.mode:
        factor, least, times = wanted.side / stored.side, 1.0, "times"
        instead = f", or set data.resize={stored.side}" if stored.side >= config.image_size else ""
    else:
        factor, least, times = _most(split, wanted), _ROUNDING, "times at most"
        setting = f"data.resize_mode={wanted.mode} with {setting}"
    if factor <= least:
        return None
    return (
        f"{split.path} was packed with {stored}, and {setting} scales it up {factor:.2f} {times}: pack it with "
        f"{wanted.option}{instead}"
    )


def _most(split: Split, wanted: Geometry) -> float:
    """By how much a side of a picture is scaled up at most, of the split's first videos."""
    most = 0.0
    for index in range(min(len(split), _VIDEOS)):
        video = split.video(index)
        width, height = wanted.size(video.width, video.height)
        most = max(most, width / video.width, height / video.height)
    return most
