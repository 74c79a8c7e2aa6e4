"""What engines.py found: the same losses on any number of ranks and at any stage, also after a stop; every head learns."""

import json
import math

import numpy as np
import pytest

from tests.launch.continues import AGAIN, BF16, CHEAP, FP16, HALF, OFTEN, ONE, SAVED, SOME, TWO
from tests.launch.every_head import OFTEN as HEADS_OFTEN
from tests.launch.every_head import WAYS as HEADS
from tests.often import ranked, ways

# the first launch in a new environment compiles DeepSpeed's optimizer
pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]
ROUNDING = 2e-5  # relative, in fp32
HALF_ROUNDING = 0.15  # relative, in 16 bits
ONE_RANK = "ZeRO 0"


@pytest.fixture(scope="module")
def found(engines) -> dict[int, dict[str, list]]:
    """{ranks: {way: [[loss, norm of the gradient] of each step]}}"""
    return {ranks: json.loads((engines / f"{ranks}.json").read_text())["continues"] for ranks in (1, 2, 4)}


@pytest.fixture(scope="module")
def heads(engines) -> dict[str, dict]:
    return json.loads((engines / "2.json").read_text())["heads"]


def assert_same(found: list, expected: list, half: bool = False) -> None:
    rounding = {"rel": HALF_ROUNDING} if half else {"rel": ROUNDING}
    assert np.array(found) == pytest.approx(np.array(expected), **rounding)


@pytest.mark.parametrize(("ranks", "way"), ranked([(ranks, way) for ranks in SOME for way in SOME[ranks]], OFTEN))
def test_the_losses_and_gradients_of_one_rank_without_zero(way, ranks, found):
    alone = ONE_RANK + next(
        (kind for kind in (", accumulated", ", sigmoid", ", options", ", merging", ", seqWTI") if kind in way), ""
    )
    assert_same(found[ranks][way], found[1][alone])


def test_they_are_losses_of_something_that_learns(found):
    whole, parts = (np.array(found[1][way])[:, 0] for way in (ONE_RANK, f"{ONE_RANK}, accumulated"))
    assert whole[-1] < 0.9 * whole[0]
    assert parts != pytest.approx(whole, rel=0.01)  # fewer negatives
    assert np.array(found[1][f"{ONE_RANK}, sigmoid"])[:, 0] != pytest.approx(whole, rel=0.01)
    options = np.array(found[1][f"{ONE_RANK}, options"])[:, 0]
    assert options[-1] < options[0]
    seq_wti = np.array(found[1][f"{ONE_RANK}, seqWTI"])[:, 0]
    assert seq_wti[-1] < seq_wti[0] and seq_wti != pytest.approx(options, rel=0.01)
    merging = np.array(found[1][f"{ONE_RANK}, merging"])[:, 0]
    assert merging[-1] < 0.9 * merging[0]
    assert merging != pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(
    "way", ways([way for way in TWO if way not in CHEAP and not way.startswith(("bad", "search", "frozen"))], OFTEN[2])
)
def test_precision_and_where_things_are_kept_change_only_rounding(way, found):
    half = way in BF16 | FP16 or "bf16" in way or "fp16" in way
    assert_same(found[2][way], found[2]["ZeRO 1, sigmoid" if "sigmoid" in way else "ZeRO 1"], half)


@pytest.mark.parametrize("way", ways(CHEAP, OFTEN[2]))
def test_cheap_training_is_the_same_at_every_stage(way, found):
    kind = way.partition(",")[0]
    first, losses = found[2][f"{kind}, ZeRO 0"], np.array(found[2][way])[:, 0]
    assert_same(found[2][way], first, "bf16" in way or "fp16" in way)
    assert losses[-1] < losses[0]
    assert np.array(first)[-1] != pytest.approx(np.array(found[2]["ZeRO 0"])[-1], rel=1e-3)  # it is not full training
    if kind == "LoRA":  # B is 0 at first
        assert first[0][0] == pytest.approx(found[2]["ZeRO 0"][0][0], rel=ROUNDING)


@pytest.mark.parametrize("way", ["alone, bf16", "alone, bf16, cached"])
def test_one_rank_without_zero_comes_to_the_bits_of_zero_1_in_bf16(way, found):
    assert found[1][way] == found[1][way.replace("alone", "ZeRO kept")]


def test_one_rank_with_torchs_adamw_differs_by_rounding_only(found):
    assert_same(found[1]["alone, bf16, torch's"], found[1]["alone, bf16"], half=True)


@pytest.mark.parametrize(
    ("ranks", "way"), ranked([(n, way) for n, known in ((1, ONE), (2, TWO)) for way in known if "bad" in way], OFTEN)
)
def test_a_bad_step_changes_nothing(ranks, way, found):
    """At step 2 one rank had a NaN; the one after has the loss that the second would have had."""
    steps, (first, second, *_) = found[ranks][way], found[ranks][way.removeprefix("bad, ")]
    assert steps[0] == first
    assert not any(math.isfinite(value) for value in steps[1])
    assert_same(steps[2], second)


@pytest.mark.parametrize("way", ways([way for way in TWO if way.startswith("search")], OFTEN[2]))
def test_fp16_looks_for_a_loss_scale_that_does_not_overflow(way, found):
    counted = found[2][way]
    assert not counted[0] and counted[-1]
    assert counted == sorted(counted)


@pytest.mark.parametrize(
    ("ranks", "name"), ranked([(r, n) for r in AGAIN for n in AGAIN[r] if n.startswith("again")], OFTEN)
)
def test_going_on_with_the_same_ranks_is_bit_for_bit(ranks, name, found):
    assert found[ranks][name] == found[ranks][name.removeprefix("again, ")][HALF:]


@pytest.mark.parametrize(
    ("ranks", "name"), ranked([(r, n) for r in AGAIN for n in AGAIN[r] if not n.startswith("again")], OFTEN)
)
def test_going_on_with_others_is_as_if_unbroken(ranks, name, found):
    source_ranks, source, _ = AGAIN[ranks][name]
    assert_same(found[ranks][name], found[source_ranks][source][HALF:], "bf16" in source)


@pytest.mark.parametrize("source", ways([way for way in SAVED[2] if way in CHEAP], OFTEN[2]))
def test_what_is_frozen_is_not_stored(source, engines):
    from safetensors import safe_open

    (file,) = (engines / f"2 {source}" / "checkpoints").glob("step*/model.safetensors")
    with safe_open(file, "pt") as stored:
        names = set(stored.keys())
    kind = source.partition(",")[0]
    assert ("clip.transformer.resblocks.0.mlp.c_fc.weight" in names) == (kind == "by layer")
    assert ("clip.visual.transformer.resblocks.1.attn.lora_b" in names) == (kind == "LoRA")
    assert ("clip.transformer.resblocks.1.prompts" in names) == (kind == "prompts")
    assert not any("visual.transformer.resblocks.0." in name and "lora" in name for name in names)  # train.freeze
    assert "clip.logit_scale" in names


# ---- every head, on two ranks ----


def of(kind: str) -> list:
    """Values of `way`: those whose names hold `kind`."""
    return ways([name for name in HEADS if kind in name], HEADS_OFTEN)


@pytest.mark.parametrize(
    "way", ways([name for name, way in HEADS.items() if way.keys() == {"head", "stage", "save"}], HEADS_OFTEN)
)
def test_it_learns_and_its_checkpoint_scores_the_same(way, heads):
    found, first = heads[way], heads[f"{HEADS[way]['head']}, ZeRO 0"]
    assert found["losses"][-1] < found["losses"][0]
    assert found["losses"] == pytest.approx(first["losses"], rel=1e-5)
    assert found["checkpoint_differs_by"] < 1e-5


@pytest.mark.parametrize(
    "way", ways([n for n, way in HEADS.items() if way.keys() == {"head", "stage", "micro"}], HEADS_OFTEN)
)
def test_gradient_caching_is_the_whole_batch(way, heads):
    assert heads[way]["losses"] == pytest.approx(heads[way.removesuffix(", cached")]["losses"], rel=5e-5)


@pytest.mark.parametrize("way", of("options"))
def test_several_captions_and_decorrelation_at_every_stage(way, heads):
    found, first = heads[way], heads["wti, ZeRO 0, options"]
    assert found["losses"] == pytest.approx(first["losses"], rel=5e-5)
    # later, words have two frames that are equally good to rounding, and the gradient goes to either
    assert found["norms"][:3] == pytest.approx(first["norms"][:3], rel=5e-5)
    assert first["losses"][-1] < first["losses"][0]


@pytest.mark.parametrize("way", of("taught"))
def test_a_teacher_at_every_stage(way, heads):
    found, first = heads[way], heads["meanP, ZeRO 0, taught"]
    assert found["losses"] == pytest.approx(first["losses"], rel=5e-5)
    assert found["norms"] == pytest.approx(first["norms"], rel=5e-5)
    assert first["losses"][-1] < first["losses"][0] != pytest.approx(heads["meanP, ZeRO 0"]["losses"][0], rel=1e-3)


@pytest.mark.parametrize("way", of("sigmoid"))
def test_the_sigmoid_loss_of_heads_whose_weights_score(way, heads):
    found, first = heads[way], heads[f"{HEADS[way]['head']}, ZeRO 0, sigmoid"]
    assert first["losses"][-1] < first["losses"][0] and first["logit_bias"] != -4.0
    assert found["losses"] == pytest.approx(first["losses"], rel=5e-5)
    assert found["norms"] == pytest.approx(first["norms"], rel=5e-5)
    assert ("logit_bias" in found) == ("cached" not in way)
    if "logit_bias" in found:
        assert found["logit_bias"] == pytest.approx(first["logit_bias"], abs=1e-5)
        assert found["checkpoint_differs_by"] < 1e-5


@pytest.mark.nightly
def test_3d_patches_learn_something_else(heads):
    flat, deep = heads["meanP, ZeRO 2"]["losses"], heads["meanP 3d, ZeRO 2"]["losses"]
    assert deep[0] == pytest.approx(flat[0], rel=1e-5)
    assert deep[-1] < deep[0] and deep[-1] != pytest.approx(flat[-1], rel=1e-4)


@pytest.mark.parametrize("way", of("short"))
def test_the_shorter_ways_lead_to_the_same_steps(way, heads):
    long, short = heads[f"{HEADS[way]['patch']}, long"], heads[way]
    assert short["losses"] == pytest.approx(long["losses"], rel=5e-5)
    assert short["norms"][:3] == pytest.approx(long["norms"][:3], rel=5e-5)
    assert long["losses"][-1] < long["losses"][0]


@pytest.mark.parametrize("way", of("hot"))
def test_the_temperature_is_clamped_on_the_master_copy(way, heads):
    assert heads[way]["logit_scale"] <= math.log(100) + 1e-6
