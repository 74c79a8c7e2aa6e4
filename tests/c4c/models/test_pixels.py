"""Frames that come as bytes, as a GPU's loader hands them over, are normalised by the model."""

import numpy as np
import pytest
import torch

from c4c.models.clip4clip import CLIP4Clip
from c4c.models.compiled import compile_towers
from pipelines.config import DataConfig
from pipelines.stages.normalise import Normalise
from pipelines.stages.pixels import Pixels

pytestmark = pytest.mark.slow  # imports open_clip

SPEC = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 1000, "width": 64, "heads": 1, "layers": 2},
}
ODD = DataConfig(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.5)).filled()


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """uint8 [2, 3, 32, 32, 3], with every value."""
    return torch.arange(2 * 3 * 32 * 32 * 3).remainder(256).to(torch.uint8).view(2, 3, 32, 32, 3)


def by_the_loader(frames: torch.Tensor, config: DataConfig) -> torch.Tensor:
    """As a CPU's loader hands them over: float32 [2, 3, 3, 32, 32]."""
    out = torch.empty(6, 3, 32, 32)
    Normalise(config).into(out, np.ascontiguousarray(frames.numpy()).reshape(6, 32, 32, 3))
    return out.view(2, 3, 3, 32, 32)


@pytest.mark.parametrize("config", [DataConfig().filled(), ODD], ids=["CLIP's", "others"])
def test_the_numbers_are_the_loaders(frames, config):
    wanted = by_the_loader(frames, config)
    pixels = Pixels(config.mean, config.std)
    torch.testing.assert_close(pixels(frames, torch.float32), wanted, rtol=0, atol=1e-6)
    exact = (frames.double() / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    torch.testing.assert_close(pixels(frames, torch.float32).double(), exact.movedim(-1, -3), rtol=0, atol=1e-6)
    assert torch.equal(pixels(frames, torch.bfloat16), pixels(frames, torch.float32).bfloat16()), "rounded once"


@pytest.mark.parametrize("patch", ["2d", "3d"])
def test_the_model_takes_bytes_and_numbers_alike(frames, patch):
    torch.manual_seed(0)
    model = CLIP4Clip(SPEC, linear_patch=patch, segments=3).eval()
    model.set_pixels(ODD)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    tokens = torch.ones(2, 5, dtype=torch.long)
    with torch.no_grad():
        _, of_bytes = model(frames, mask, tokens)
        _, of_numbers = model(by_the_loader(frames, ODD), mask, tokens)
        model.set_pixels(DataConfig())
        _, of_others = model(frames, mask, tokens)
    torch.testing.assert_close(of_bytes, of_numbers, rtol=0, atol=1e-5)
    assert not torch.allclose(of_bytes, of_others, atol=1e-3), "the settings' mean and deviation count"


@pytest.mark.nightly
def test_a_compiled_normalisation_gives_the_same(frames):
    torch.manual_seed(0)
    model = CLIP4Clip(SPEC, segments=3).eval()
    wanted = model.pixels(frames, torch.float32)
    assert compile_towers(model, 0) is not None
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(model.pixels(frames, torch.float32), wanted, rtol=0, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1, "it was one graph"
