"""Every head under every ZeRO stage on two ranks, gradient caching, and the temperature's clamp on the master copy."""

import json
import math

import pytest

from c4c.heads import HEADS

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def results(engines) -> dict:
    return json.loads((engines / "2.json").read_text())["heads"]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("head", sorted(HEADS))
def test_it_learns_and_its_checkpoint_scores_the_same(head, stage, results):
    way = results[f"{head}, ZeRO {stage}"]
    assert way["losses"][-1] < way["losses"][0]
    assert way["losses"] == pytest.approx(results[f"{head}, ZeRO 0"]["losses"], rel=1e-5)
    assert way["checkpoint_differs_by"] < 1e-5


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("head", ["tightTransf", "wti"])
def test_gradient_caching_is_the_whole_batch(head, stage, results):
    cached, whole = results[f"{head}, ZeRO {stage}, cached"]["losses"], results[f"{head}, ZeRO {stage}"]["losses"]
    assert cached == pytest.approx(whole, rel=5e-5)


def test_3d_patches_learn_something_else(results):
    flat, deep = results["meanP, ZeRO 2"]["losses"], results["meanP 3d, ZeRO 2"]["losses"]
    assert deep[0] == pytest.approx(flat[0], rel=1e-5)
    assert deep[-1] < deep[0] and deep[-1] != pytest.approx(flat[-1], rel=1e-4)


@pytest.mark.parametrize("stage", range(4))
def test_the_temperature_is_clamped_on_the_master_copy(stage, results):
    assert results[f"hot, ZeRO {stage}"]["logit_scale"] <= math.log(100) + 1e-6
