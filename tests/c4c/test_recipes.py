"""The recipes that train modern backbones: each suits its towers, and starts from weights that open_clip lists."""

from pathlib import Path

import open_clip
import pytest

from c4c.config import load
from c4c.models.backbone import settled
from c4c.performance.counts import meta_model

pytestmark = pytest.mark.slow
CFG = Path(__file__).parents[2] / "launch/cfg"
RECIPES = sorted(path.stem for path in CFG.glob("msrvtt_*.yaml") if "official" not in path.stem)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_suits_its_backbone(name):
    config = settled(load(f"{name}.yaml", [], [CFG]))
    model, data = config.model, config.data
    assert model.init_from in open_clip.list_pretrained_tags_by_model(model.backbone)
    assert (data.resize_mode == "squash") is ("_pe_" in name or "siglip" in name)
    assert data.resize == 0 and data.max_words == (32 if "_pe_" in name else 64 if "siglip" in name else 77)
    assert config.train.lora == (8 if name.endswith("lora") else 0)
    trained = sum(p.numel() for p in meta_model(config).parameters() if p.requires_grad)
    assert (trained < 5e6) is name.endswith("lora")
    assert f"{model.init_from}:{model.backbone}" in (CFG / f"{name.removesuffix('_lora')}.yaml").read_text()
