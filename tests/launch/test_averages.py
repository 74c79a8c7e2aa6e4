"""What averages.py found: train.ema is the average that float64 gives, changes no step, and goes on with other ranks and stages."""

import json

import pytest

from tests.launch.averages import AGAIN, DECAY, OFTEN, ONE, TWO
from tests.launch.continues import HALF, STEPS
from tests.often import ranked

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]
WAYS = ranked([(ranks, way) for ranks, ways in ((1, ONE), (2, TWO)) for way in ways], OFTEN)


@pytest.fixture(scope="module")
def found(engines) -> dict[int, dict]:
    return {ranks: json.loads((engines / f"{ranks}.json").read_text()) for ranks in (1, 2, 4)}


@pytest.mark.parametrize(("ranks", "way"), WAYS)
def test_it_is_the_average_of_float64(ranks, way, found):
    averaged = found[ranks]["averages"][way]
    assert averaged["differs_by"] < 1e-6
    assert averaged["moved_by"] > 1e-4  # and not the weights themselves
    assert averaged["updates"] == (2 if "bad" in way else STEPS)  # of three steps one was skipped


def test_the_steps_reach_the_decay_itself():
    assert (1 + HALF) / (10 + HALF) < DECAY < (1 + STEPS) / (10 + STEPS)


@pytest.mark.parametrize(("ranks", "way"), WAYS)
def test_it_changes_no_step(ranks, way, found):
    """Bit for bit; of a bad step neither number is one."""
    losses, without = found[ranks]["averages"][way]["losses"], found[ranks]["continues"][way]
    assert json.dumps(losses) == json.dumps(without)


@pytest.mark.parametrize(("ranks", "way"), WAYS)
def test_validation_takes_it_and_leaves_everything_as_it_was(ranks, way, found):
    averaged = found[ranks]["averages"][way]
    assert averaged["inside_differs_by"] == 0.0
    assert not averaged["changed"]


@pytest.mark.parametrize(("ranks", "name"), ranked([(ranks, name) for ranks in AGAIN for name in AGAIN[ranks]], OFTEN))
def test_it_goes_on(ranks, name, found):
    """What was stored is read bit for bit under any ranks and stage; with the same ones, the rest is the same bits, too."""
    averaged = found[ranks]["averages"][name]
    assert averaged["read"]
    assert averaged["differs_by"] <= (0.0 if name.startswith("again") else 1e-3 if "bf16" in name else 1e-4)
