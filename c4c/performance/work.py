"""What a step is made of: kernels with their operations and bytes, weights, and memory. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    """GPU kernels that are alike: of each, the operations and the bytes read and written; and how many there are.

    flops: of matrix products, convolutions and attention; 0 for all others.
    """

    flops: int
    bytes: int
    launches: int


@dataclass(frozen=True)
class Work:
    """The kernels of a part of a step."""

    ops: tuple[Op, ...]

    @property
    def flops(self) -> int:
        """Of all of them; a multiplication and an addition are two."""
        return sum(op.flops * op.launches for op in self.ops)

    @property
    def bytes(self) -> int:
        """Read and written by those that are no matrix products."""
        return sum(op.bytes * op.launches for op in self.ops if not op.flops)

    @property
    def launches(self) -> int:
        """Kernels."""
        return sum(op.launches for op in self.ops)


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """What a rank's step is made of. The parts are of one pass; see `c4c.performance.predict` for how often each is run."""

    spec: dict  # of the towers; see c4c.models.towers
    weights: int  # numbers in all parameters
    trained: int  # of them not frozen
    tensors: int  # trained parameters
    gathered: int  # parameters that ZeRO 3 partitions; smaller ones every rank keeps
    forward: Work  # encoding, from uint8 frames to features
    backward: Work  # of encoding, with what activation checkpointing computes again
    scoring: Work  # the head's scores, the loss, and their backward pass
    activations: int  # bytes, the most at any time of a pass, without weights and their gradients
    features: int  # bytes that stand for a pair, which ranks exchange
