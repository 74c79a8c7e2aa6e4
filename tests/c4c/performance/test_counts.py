"""StepCounts on the meta device, against formulas, torch's own counter, real models and a real engine."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from c4c.config import Config, load
from c4c.models.attention import DirectAttention
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.flops import per_pair
from c4c.models.heads import HEADS
from c4c.performance.assumptions import assume
from c4c.performance.counts import activation_curve, count, meta_model
from c4c.performance.hardware import gpu_named
from c4c.performance.predict import memory_of, predict, shape_of
from tests.c4c.configs import SHIPPED
from tests.often import ways

pytestmark = pytest.mark.slow

GIB = 2**30


def demo(*words: str) -> Config:
    return load("demo.yaml", words, [SHIPPED])


def msrvtt(*words: str) -> Config:
    return load("msrvtt.yaml", words, [SHIPPED])


@pytest.mark.parametrize(
    ("config", "pairs"),
    [(demo(), 16), (msrvtt("train.freeze_layers=-1"), 8), (msrvtt(), 8)],
    ids=["ViT-demo-16", "ViT-B-32", "ViT-B-32, frozen patches"],
)
def test_operations_are_those_of_the_formula(config, pairs):
    found = count(config, encoded=pairs, scored=pairs)
    vision, frames = found.spec["vision_cfg"], config.data.num_frames
    formula = pairs * per_pair(found.spec, frames, config.data.max_words)
    assert found.forward.flops == pytest.approx(formula, rel=0.002)
    # a product's gradient is two products; pixels need none, and frozen patches neither
    patches = pairs * frames * 2 * 3 * vision["image_size"] ** 2 * vision["width"]
    left_out = patches if config.train.freeze_layers < 0 else 2 * patches
    # fused attention computes its scores again
    assert 1 <= found.backward.flops / (2 * formula - left_out) < 1.02


def test_operations_are_those_that_torch_counts_on_real_tensors():
    config = demo("data.num_frames=3")
    model = build(config.model, 3).train()  # in evaluation torch fuses attention, which it does not count
    frames, mask = torch.zeros(4, 3, 3, 64, 64), torch.ones(4, 3).bool()
    with FlopCounterMode(display=False) as counter:
        model(frames, mask, torch.ones(4, config.data.max_words).long())
    assert count(config, encoded=4, scored=4).forward.flops == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_parameters_are_those_of_the_model():
    config = demo("train.freeze_layers=1")
    found, model = count(config, encoded=2, scored=2), build(config.model, 8)
    assert found.weights == sum(p.numel() for p in model.parameters())
    assert 0 < found.trained < found.weights
    assert count(demo(), encoded=2, scored=2).trained == found.weights
    assert count(msrvtt(), encoded=2, scored=2).weights == 151_277_313  # as open_clip's model_profile.csv has it


def test_the_activation_is_that_of_the_weights():
    for source, quick in (("openai", True), ("laion2b_s34b_b79k", False), ("scratch", False)):
        assert meta_model(msrvtt("model.backbone=ViT-B-32", f"model.init_from={source}")).spec["quick_gelu"] == quick


@pytest.mark.parametrize("loss", ways(["cross_entropy", "mil_nce", "sigmoid"], ["sigmoid"]))
@pytest.mark.parametrize("head", sorted(HEADS))
def test_every_head(head, loss):
    words = ["clips.bag=3", "clips.cut=true"] if loss == "mil_nce" else []
    config = demo(f"model.head={head}", f"train.loss={loss}", "data.num_frames=4", *words)
    alone, one_of_four = (count(config, encoded=8, scored=8, world=world) for world in (1, 4))
    assert alone.forward == one_of_four.forward and alone.backward == one_of_four.backward
    if loss == "sigmoid":  # one way, and one rank's features at a time
        assert one_of_four.scoring.flops == 4 * alone.scoring.flops
        assert one_of_four.activations < 1.1 * alone.activations
    assert one_of_four.scoring.flops > 3 * alone.scoring.flops  # against four times as many, and both ways
    assert alone.scoring.flops > 0 and alone.activations > 0
    width = alone.spec["embed_dim"]
    texts = (3 if loss == "mil_nce" else 1) * (config.data.max_words if HEADS[head].tokens else 1)
    assert alone.features in (4 * width * (texts + 1), 4 * width * (texts + 4))  # a video is one row, or one a frame


@pytest.mark.parametrize("head", ["meanP", "wti"])
def test_several_captions_a_video(head):
    words = [f"model.head={head}", "data.num_frames=4"]
    options = ["train.label_smoothing=0.1", "train.mask_equal_captions=true", "train.decorrelation=0.001"]
    one = count(demo(*words), encoded=8, scored=8)
    for more in ([], options):
        config = demo(*words, "train.captions_per_video=3", *more)
        several, one_of_four = (count(config, encoded=8, scored=8, world=world) for world in (1, 4))
        texts = several.forward.flops - one.forward.flops
        spec, frames, length = several.spec, 4, config.data.max_words
        added = 8 * (per_pair(spec, frames, length, 3) - per_pair(spec, frames, length))
        assert texts == pytest.approx(added, rel=0.05)  # wti also projects each word
        assert several.scoring.flops > 2 * one.scoring.flops and one_of_four.scoring.flops > 3 * one.scoring.flops
        assert several.features > one.features


def test_captions_that_are_padded_to_the_full_length_cost_it(tmp_path):
    vision = {"image_size": 64, "patch_size": 16, "layers": 1, "width": 64}
    found = {}
    for name, text in (("causal", {}), ("both ways", {"no_causal_mask": True})):
        (tmp_path / name).mkdir()
        text |= {"context_length": 24, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1}
        about = {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text, "custom_text": True}}
        (tmp_path / name / "open_clip_config.json").write_text(json.dumps(about))
        for words in (6, 24):
            config = demo(f"model.backbone=local-dir:{tmp_path / name}", f"data.max_words={words}")
            found[name, words] = count(config, encoded=4, scored=4).forward.flops
    assert found["both ways", 6] == found["both ways", 24] == found["causal", 24] > found["causal", 6]


def test_patches_over_three_frames():
    flat, deep = (count(demo(f"model.linear_patch={patch}"), encoded=4, scored=4) for patch in ("2d", "3d"))
    grid, patch, width = 16, 3 * 16 * 16, 128
    assert deep.forward.flops - flat.forward.flops == 2 * 2 * grid * patch * width * 4 * 8  # two taps more


def test_checkpointing_trades_a_forward_pass_for_memory():
    plain, less = (
        count(msrvtt(f"engine.activation_checkpointing={on}"), encoded=8, scored=8) for on in ("false", "true")
    )
    assert less.forward == plain.forward
    again = (less.backward.flops - plain.backward.flops) / plain.forward.flops
    assert 0.6 < again < 0.7  # all but the last product of each block, whose result nothing needs, and the patches
    assert less.activations < plain.activations / 5


def test_a_curve_of_activations_is_that_of_counts():
    for head in ("meanP", "wti"):
        config = demo("data.num_frames=4", f"model.head={head}")
        curve = activation_curve(config, world=2)
        for pairs in (100, 400):
            counted = count(config, encoded=pairs, scored=pairs, world=2).activations
            assert curve(pairs) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("encoded", [8, 200, 600])
def test_a_curve_goes_through_what_is_known_and_scores_as_many_as_it_is_told(encoded):
    config = demo("data.num_frames=2", "train.loss=mil_nce", "clips.bag=3", "clips.cut=true", "train.batch_size=1024")
    known = count(config, encoded=encoded, scored=1024).activations
    curve = activation_curve(config, scored=1024, known=(encoded, known))
    assert curve(encoded) == known
    for pairs in (64, 400):
        assert curve(pairs) == pytest.approx(count(config, encoded=pairs, scored=1024).activations, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_a_real_backward_pass_is_kept_for(precision):
    config = demo("data.num_frames=3", f"engine.precision={precision}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = build(config.model, 3).train().to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = model(
            torch.zeros(8, 3, 3, 64, 64, dtype=dtype),
            torch.ones(8, 3).bool(),
            torch.ones(8, config.data.max_words).long(),
        )
    assert len(features) == 2  # and so everything kept is still there
    found = count(config, encoded=8, scored=8).activations
    words = model.clip.token_embedding.weight.nbytes  # whose gradient is there at the end, when little else is
    assert max(sum(kept.values()), words) < found < 1.1 * sum(kept.values()) + words


@pytest.mark.parametrize(
    ("precision", "stage", "kept", "ema"),
    [("fp32", 0, False, 0), ("bf16", 1, False, 0), ("bf16", 1, True, 0), ("bf16", 2, True, 0), ("bf16", 2, True, 0.9)],
)
def test_weights_masters_and_moments_are_those_of_an_engine(precision, stage, kept, ema):
    """kept: ZeRO is asked for in DeepSpeed's own words, without which one rank runs without it."""
    from c4c.training.step import Learner
    from c4c.zero.distributed import start_distributed
    from c4c.zero.engine import build_engine

    words = [f"deepspeed.zero_optimization.stage={stage}"] * kept
    config = demo(
        f"engine.precision={precision}",
        f"engine.zero_stage={stage}",
        "train.batch_size=2",
        "train.freeze_layers=1",
        f"train.ema={ema}",
        *words,
    )
    start_distributed()
    model = build(config.model, 8)
    from c4c.training.param_groups import choose_trained

    choose_trained(model, config.train)
    engine = build_engine(Learner(model), config.engine, config.train, 1, config.deepspeed)
    found, shape = count(config, encoded=2, scored=2), shape_of(config, 1)
    assert shape.stage == engine.zero_optimization_stage() == (stage if kept else 0)
    memory = memory_of(config, shape, found.weights, found.trained, 0, "cpu", assume([]))
    weights = sum(p.nbytes for p in engine.module.parameters())
    optimizer = engine.optimizer
    flat = "single_partition_of_fp32_groups" if kept else "fp32_groups_flat"
    masters = sum(t.nbytes for t in getattr(optimizer, flat, ()))
    frames, mask, tokens = torch.zeros(2, 8, 3, 64, 64), torch.ones(2, 8).bool(), torch.ones(2, 24).long()
    engine.backward(engine(frames, mask, tokens, torch.ones(2).bool()))
    engine.step()
    states = [t for state in engine.basic_optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    moments = sum(t.nbytes for t in states if t.numel() > 1)
    assert memory.weights * GIB == weights
    # ZeRO pads its groups to a few bytes
    assert memory.masters * GIB == pytest.approx(masters, abs=64)
    assert memory.moments * GIB == pytest.approx(moments, abs=128)


def compiled(config: Config) -> Config:
    return replace(config, engine=replace(config.engine, compile=True))


def test_an_h100_by_hand():
    """128 pairs of 12 frames and 77 words: 42.9 TFLOP, 43 ms at the peak; with GELU 105 to 130 ms eager, about 92 compiled."""
    config, h100 = msrvtt(), gpu_named("H100")
    counts = count(config, encoded=128, scored=128)
    ideal = predict(config, h100, assumptions=assume(["gemm=1", "bandwidth=1"]), counts=counts)
    assert ideal.flops / h100.flops == pytest.approx(0.043, rel=0.02)
    assert 0.043 < ideal.seconds.matrix_products < 0.050  # attention and narrow products wait for memory
    gelu = msrvtt("model.backbone=ViT-B-32", "model.init_from=scratch")
    assert 0.105 < predict(gelu, h100).step_s < 0.130
    assert predict(compiled(gelu), h100).step_s == pytest.approx(0.092, rel=0.1)
    # OpenAI's QuickGELU is three kernels, and more in the backward pass
    assert 0.140 < predict(config, h100, counts=counts).step_s < 0.165
    assert predict(compiled(config), h100, counts=counts).step_s == pytest.approx(0.102, rel=0.1)


def test_attention_is_counted_as_a_gpu_reaches_it(monkeypatch):
    """Its queries, keys and values are views of one product: fewer bytes are moved than on torch's own way."""

    def moved() -> int:
        towers = count(demo(), encoded=8, scored=8)
        return sum(op.bytes * op.launches for op in (*towers.forward.ops, *towers.backward.ops) if not op.flops)

    parts = meta_model(demo()).clip.modules()
    assert {type(part) for part in parts if isinstance(part, torch.nn.MultiheadAttention)} == {DirectAttention}
    direct = moved()
    monkeypatch.setattr("c4c.performance.counts.attend_directly", lambda model: None)
    assert direct < 0.8 * moved()


def test_pictures_of_another_size_than_the_towers_take():
    sizes = [count(demo(f"data.image_size={size}"), encoded=2, scored=2).forward.flops for size in (64, 96)]
    assert sizes[1] > 2 * sizes[0]  # 36 patches instead of 16
    with pytest.raises(ValueError, match=r"patches of 16 pixels, and 90 is no multiple"):
        count(demo("data.image_size=90"), encoded=2, scored=2)


def test_attention_is_torchs_own_again_afterwards():
    before = torch.nn.functional.scaled_dot_product_attention
    count(demo("data.num_frames=2"), encoded=2, scored=2)
    assert torch.nn.functional.scaled_dot_product_attention is before
    assert isinstance(meta_model(demo()), CLIP4Clip)
