"""Token merging in the image tower, as numbers: how many tokens each block has, and how many of them it merges."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockTokens:
    """What a block of the image tower sees of one clip: frames, which have a class token each, and patch tokens. It merges `merged` of
    the latter between its attention and its MLP."""

    frames: int
    patches: int
    merged: int


@dataclass(frozen=True, kw_only=True)
class Merging:
    """model.merge and model.merge_frames. Raises ValueError for values that do not go together.

    tokens: of each frame, patch tokens that a block merges into others (r in ToMe, https://arxiv.org/abs/2210.09461); 0: none.
    joins: blocks, from 0, before which each two neighbouring clips become one (https://arxiv.org/abs/2409.01156).
    """

    tokens: int = 0
    joins: tuple[int, ...] = ()

    def __post_init__(self):
        if self.joins and not self.tokens:
            raise ValueError(
                f"model.merge_frames={list(self.joins)} joins frames whose tokens are then merged: set model.merge above 0 too"
            )
        if list(self.joins) != sorted({block for block in self.joins if block >= 0}):
            raise ValueError(
                f"model.merge_frames must be blocks of the image tower, from 0, in rising order; got {list(self.joins)}"
            )

    def __bool__(self) -> bool:
        return self.tokens > 0

    def plan(self, patches: int, blocks: int) -> list[BlockTokens]:
        """Of each block, for frames of `patches` patches. A block merges at most half of a clip's patch tokens, as in ToMe."""
        frames, made = 1, []
        for block in range(blocks):
            if block in self.joins:
                frames, patches = 2 * frames, 2 * patches
            merged = min(self.tokens * frames, patches // 2)
            made.append(BlockTokens(frames, patches, merged))
            patches -= merged
        return made

    def check_frames(self, frames: int) -> None:
        """Raise ValueError if clips of so many frames leave nothing for the last join."""
        if self.joins and 2 ** (len(self.joins) - 1) >= frames:
            raise ValueError(
                f"model.merge_frames={list(self.joins)} joins clips {len(self.joins)} times, and data.num_frames={frames} are one "
                "clip before the last: name fewer blocks, or take more frames"
            )

    def in_words(self) -> str:
        """For people."""
        if not self:
            return "none"
        joined = f"; clips joined by twos before blocks {', '.join(map(str, self.joins))}" if self.joins else ""
        return f"each block merges {self.tokens} tokens of a frame{joined}"


NO_MERGING = Merging()
