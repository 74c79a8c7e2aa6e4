"""What every family of checkpoints is read into, and what of a file its reader gets to see."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from c4c.merging import NO_MERGING, Merging

ARCHIVE_EXTRAS = {"input_resolution", "context_length", "vocab_size"}  # sizes that OpenAI's archives carry as tensors


@dataclass(frozen=True)
class Weights:
    """A state dict in c4c's names (`clip.*`, `head.*`), fp32, and the model it fits."""

    state: dict[str, Tensor]
    spec: dict  # the towers; see c4c.models.towers
    head: str = "meanP"
    linear_patch: str = "2d"
    blocks: int = 4
    segments: int = 12
    kind: str = ""  # what the file was recognised as
    data: dict = field(default_factory=dict)  # settings of the data that go with it, where it says them
    merging: Merging = NO_MERGING  # of tokens in the image tower
    prompts: int = 0  # vectors in each block of both towers; see c4c.models.prompts


@dataclass(frozen=True)
class Content:
    """The tensors of a file, by the names that stand in it."""

    path: Path
    state: dict[str, Tensor]  # without the `module.` that a wrapper for several GPUs puts before each name
    metadata: dict[str, str] = field(default_factory=dict)  # of safetensors
    wrapped: bool = False  # whether they were the `state_dict` of a larger object
    archive: bool = False  # whether it is one of TorchScript


class Unsaid(ValueError):
    """The file holds weights that are known, but not what has to be known of their towers."""


def floats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fractions as fp32; numbers that count or index stay as they are."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
