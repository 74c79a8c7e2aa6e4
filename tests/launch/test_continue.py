"""The same losses on any number of ranks, at any ZeRO stage, and after going on from any other's checkpoint."""

import json
import math

import pytest

from tests.launch.continues import AGAIN, BF16, COMMON, FP16, HALF, SAVED, TWO

pytestmark = pytest.mark.timeout(1200)  # the first launch in a new environment compiles DeepSpeed's optimizer
ROUNDING = 2e-5  # relative, after six steps in fp32
HALF_ROUNDING = 2e-2  # of 16-bit numbers
ONE_RANK = "ZeRO 0"


@pytest.fixture(scope="module")
def found(engines) -> dict[int, dict[str, list[float]]]:
    return {ranks: json.loads((engines / f"{ranks}.json").read_text())["continues"] for ranks in (1, 2, 4)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("way", COMMON)
def test_the_losses_of_one_rank_without_zero(way, ranks, found):
    alone = f"{ONE_RANK}, accumulated" if "accumulated" in way else ONE_RANK
    assert found[ranks][way] == pytest.approx(found[1][alone], rel=ROUNDING)


def test_they_are_losses_of_something_that_learns(found):
    whole, parts = found[1][ONE_RANK], found[1][f"{ONE_RANK}, accumulated"]
    assert whole[-1] < 0.9 * whole[0]
    assert parts != pytest.approx(whole, rel=0.01)  # fewer negatives


@pytest.mark.parametrize("way", [way for way in TWO if not way.startswith(("bad", "search", "frozen"))])
def test_precision_and_where_things_are_kept_change_only_rounding(way, found):
    assert found[2][way] == pytest.approx(found[2]["ZeRO 1"], rel=HALF_ROUNDING if way in BF16 | FP16 else ROUNDING)


@pytest.mark.parametrize("way", [way for way in TWO if "bad" in way])
def test_a_bad_step_changes_nothing(way, found):
    """At step 2 one rank had a NaN; the one after has the loss that the second would have had."""
    losses, (first, second, *_) = found[2][way], found[2][way.removeprefix("bad, ")]
    assert losses[0] == first
    assert math.isnan(losses[1])
    assert losses[2] == pytest.approx(second, rel=1e-6)


@pytest.mark.parametrize("stage", range(4))
def test_fp16_looks_for_a_loss_scale_that_does_not_overflow(stage, found):
    counted = found[2][f"search, ZeRO {stage}, fp16"]
    assert not counted[0] and counted[-1]
    assert counted == sorted(counted)


@pytest.mark.parametrize("way", SAVED[2])
def test_going_on_with_the_same_ranks_is_bit_for_bit(way, found):
    assert found[2][f"again, {way}"] == found[2][way][HALF:]


@pytest.mark.parametrize(("ranks", "name"), [(r, n) for r in AGAIN for n in AGAIN[r] if not n.startswith("again")])
def test_going_on_with_others_is_as_if_unbroken(ranks, name, found):
    source_ranks, source, _ = AGAIN[ranks][name]
    rounding = HALF_ROUNDING if "bf16" in source else ROUNDING
    assert found[ranks][name] == pytest.approx(found[source_ranks][source][HALF:], rel=rounding)
