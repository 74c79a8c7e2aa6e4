"""How large pictures are scaled: by their short side, by their long side, or both sides to a square."""

from dataclasses import dataclass

RESIZE_MODES = ("shortest", "longest", "squash")  # open_clip's words
_KEYS = {"shortest": "short_side", "longest": "long_side", "squash": "squash"}  # of a packing profile
_WORDS = {"shortest": "a short side of {0} pixels", "longest": "a long side of {0} pixels", "squash": "{0}x{0} pixels, squashed"}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """A size for pictures of any shape. `mode` says which of their sides is scaled to `side` pixels: `shortest` and `longest`
    keep the shape, and `squash` makes a square of any."""

    mode: str
    side: int

    def __str__(self) -> str:
        return _WORDS[self.mode].format(self.side)

    @property
    def key(self) -> str:
        """What holds the side in a packing profile."""
        return _KEYS[self.mode]

    @property
    def option(self) -> str:
        """The option of `python -m c4c.shard` that packs like this."""
        return f"--{self.key.replace('_', '-')} {self.side}"

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a picture of that width and height once it is scaled, in whole pixels: rounded as PIL and
        torchvision's Resize do it (shortest, squash), or open_clip's ResizeKeepRatio (longest)."""
        if self.mode == "squash":
            return self.side, self.side
        if self.mode == "longest":
            ratio = max(width, height) / self.side
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        return scaled_size(width, height, self.side)


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height with the short side at `short_side` and the long side as PIL/torchvision's Resize rounds it."""
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def stored_geometry(profile: dict) -> Geometry | None:
    """Of the pictures in a split with that packing profile; None if they are as large as in their sources (`copy`)."""
    return next((Geometry(mode, profile[key]) for mode, key in _KEYS.items() if profile.get(key)), None)
