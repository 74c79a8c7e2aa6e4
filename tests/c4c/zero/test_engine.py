"""DeepSpeed's configuration, derived from ours; the module that it wraps."""

import math
import warnings

import pytest
import torch

from c4c.losses import contrastive_loss
from c4c.models.clip4clip import build
from c4c.models.compiled import compile_towers, or_as_it_is
from c4c.settings import EngineConfig, ModelConfig, TrainConfig
from c4c.training.step import Learner
from c4c.zero import engine
from c4c.zero.config import deepspeed_config

TRAIN = TrainConfig(batch_size=12, lr=0.1, betas=(0.7, 0.8), eps=1e-7, weight_decay=0.2)


def derived(extra: dict | None = None, world: int = 4, **engine) -> dict:
    return deepspeed_config(EngineConfig(**engine), TRAIN, world, extra or {})


def test_what_is_derived():
    config = derived(precision="bf16", zero_stage=2, clip_grad_norm=0.5)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (12, 3)
    assert config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"] == {"stage": 2}
    assert config["optimizer"] == {
        "type": "AdamW", "params": {"lr": 0.1, "betas": [0.7, 0.8], "eps": 1e-7, "weight_decay": 0.2,
                                    "bias_correction": True},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        (0, {"world": 1}),
        (1, {"world": 2}),
        (0, {"world": 1, "precision": "bf16"}),
        (1, {"world": 1, "precision": "fp16"}),
        (3, {"world": 1, "precision": "bf16", "zero_stage": 3}),
        (1, {"world": 2, "precision": "bf16"}),
        (1, {"world": 1, "offload": "optimizer"}),
        (1, {"world": 1, "extra": {"zero_optimization": {"stage": 1}}}),
    ],
)
def test_a_rank_that_has_nobody_to_share_with_does_not(stage, how):
    assert derived(**{"precision": "fp32", "zero_stage": 1} | how)["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision(precision):
    config = derived(precision=precision)
    assert [config[p]["enabled"] for p in ("bf16", "fp16")] == [precision == "bf16", precision == "fp16"]


def test_the_deepspeed_block_lies_on_top():
    config = derived(
        {
            "zero_optimization": {"reduce_bucket_size": 5},
            "optimizer": {"type": "Lion"},
            "comms_logger": {"enabled": True},
        }
    )
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 5}
    assert config["optimizer"]["type"] == "Lion"
    assert config["optimizer"]["params"]["lr"] == 0.1
    assert config["comms_logger"] == {"enabled": True}
    # saying the same is no harm
    assert derived({"gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}) == derived()


@pytest.mark.parametrize(
    ("extra", "path", "owner"),
    [
        ({"train_batch_size": 8}, "train_batch_size=8", "train.batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu=8", "train.micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2", "train.micro_batch_size"),
        ({"gradient_clipping": 3}, "gradient_clipping=3", "engine.clip_grad_norm"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3", "engine.zero_stage"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=False", "engine.precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True", "engine.precision"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.params.lr=1", "train.lr"),
        ({"optimizer": {"params": {"betas": [0, 0]}}}, "optimizer.params.betas=[0, 0]", "train.betas"),
        ({"optimizer": {"params": {"eps": 1}}}, "optimizer.params.eps=1", "train.eps"),
        ({"optimizer": {"params": {"weight_decay": 1}}}, "optimizer.params.weight_decay=1", "train.weight_decay"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler=", "train.schedule"),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else None,
)
def test_a_contradiction_names_both_keys(extra, path, owner):
    with pytest.raises(ValueError, match="contradicts") as caught:
        derived(extra)
    assert f"deepspeed.{path}" in str(caught.value)
    assert owner in str(caught.value)


def test_what_deepspeed_does_by_itself_is_off_unless_asked_for():
    """It waits for the device twice a step to measure throughput; under ZeRO 3 it exchanges gradients beside the backward pass."""
    assert derived()["timers"] == {"throughput": {"enabled": False}}
    assert "overlap_comm" not in derived(zero_stage=2)["zero_optimization"]
    assert derived(zero_stage=3)["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    asked = {"zero_optimization": {"overlap_comm": True}, "timers": {"throughput": {"enabled": True}}}
    both = derived(asked, zero_stage=3)
    assert both["zero_optimization"]["overlap_comm"] and both["timers"]["throughput"]["enabled"]


def test_a_group_is_not_a_number():
    with pytest.raises(
        ValueError, match=r"deepspeed\.zero_optimization=3: it is a group of settings, such as .*\.stage"
    ):
        derived({"zero_optimization": 3})


def test_what_deepspeed_or_the_device_refuses_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = EngineConfig(precision="fp32")
    wrong = {"zero_optimization": {"reduce_bucket_size": "large"}}
    with pytest.raises(ValueError, match=r"DeepSpeed refuses the settings under deepspeed: .*large") as caught:
        engine.require_supported(deepspeed_config(config, TRAIN, 1, wrong), config, wrong)
    assert "\n" not in str(caught.value)
    engine.require_supported(deepspeed_config(config, TRAIN, 1, {}), config, {})
    accelerator = type(
        "Accelerator",
        (),
        {"is_fp16_supported": lambda _: False, "is_bf16_supported": lambda _: True, "device_name": lambda _: "cpu"},
    )
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", accelerator)
    with pytest.raises(
        ValueError, match=r"engine\.precision=fp16: cpu cannot compute in it here: choose bf16 or fp32$"
    ):
        engine.require_supported({}, EngineConfig(precision="fp16"), {})


def test_a_batch_that_cannot_be_shared_out():
    with pytest.raises(ValueError, match=r"train\.batch_size=12 does not divide by 5 ranks: use 10 or 15"):
        derived(world=5)


@pytest.mark.parametrize("wrong", [{"precision": "tf32"}, {"zero_stage": 4}])
def test_what_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=rf"engine\.{next(iter(wrong))}\b"):
        EngineConfig(**wrong)


def test_the_learner_returns_the_loss_of_its_features():
    torch.manual_seed(0)
    learner = Learner(build(ModelConfig(backbone="ViT-demo-16", init_from="scratch"), 2)).eval()
    assert learner.model.clip.logit_scale.shape == (1,)
    assert learner.model.scale().item() == pytest.approx(1 / 0.07, rel=1e-5)
    batch = torch.randn(3, 2, 3, 64, 64), torch.ones(3, 2).bool(), torch.randint(1, 49407, (3, 9))
    valid = torch.tensor([True, True, False])
    text, video = learner(*batch)
    assert (text.shape, video.shape) == ((3, 128), (3, 128))
    expected = contrastive_loss(
        text, video, valid, torch.tensor([math.exp(math.log(1 / 0.07))]), learner.model.head.score
    )
    torch.testing.assert_close(learner(*batch, valid), expected)


def test_accumulation_is_deepspeeds():
    config = deepspeed_config(EngineConfig(), TrainConfig(batch_size=24, accumulate=3), 2, {})
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 3)
    with pytest.raises(ValueError, match=r"train\.accumulate=5 does not divide the 12 pairs of a rank"):
        deepspeed_config(EngineConfig(), TrainConfig(batch_size=24, accumulate=5), 2, {})
    with pytest.raises(ValueError, match=r"train\.accumulate=2 and train\.micro_batch_size=3 both cut the batch"):
        TrainConfig(accumulate=2, micro_batch_size=3)
    with pytest.raises(ValueError, match=r"deepspeed\.gradient_accumulation_steps=2 contradicts train\.accumulate"):
        deepspeed_config(
            EngineConfig(), TrainConfig(batch_size=24, accumulate=3), 2, {"gradient_accumulation_steps": 2}
        )


def test_offload():
    assert derived(zero_stage=2, offload="optimizer")["zero_optimization"] == {
        "stage": 2, "offload_optimizer": {"device": "cpu"},
    }  # fmt: skip
    whole = derived({"zero_optimization": {"offload_param": {"pin_memory": True}}}, zero_stage=3, offload="all")
    assert whole["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    extra = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    assert derived(extra)["zero_optimization"]["offload_optimizer"] == {"device": "nvme"}
    with pytest.raises(ValueError, match=r"offload_optimizer\.device=nvme contradicts engine\.offload"):
        derived(extra, zero_stage=3, offload="optimizer")
    for wrong in ({"offload": "disk"}, {"offload": "optimizer", "zero_stage": 0}, {"offload": "all", "zero_stage": 2}):
        with pytest.raises(ValueError, match=r"engine\.offload\b"):
            EngineConfig(**wrong)


def test_towers_that_cannot_be_compiled_run_as_they_are(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler\nlong story")

    model = build(ModelConfig(backbone="ViT-demo-16", init_from="scratch"), 2)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(
        UserWarning, match=r"engine\.compile: the towers run uncompiled \(RuntimeError: no C\+\+ compiler\)"
    ):
        assert not compile_towers(model, 1)
    with pytest.warns(UserWarning, match="ZeRO 3"):
        assert not compile_towers(model, 3)


def test_passes_of_gradient_caching_are_deepspeeds_accumulation():
    train = TrainConfig(batch_size=24, micro_batch_size=5)
    config = deepspeed_config(EngineConfig(), train, 2, {})
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (5, 3)
    assert config["train_batch_size"] == 5 * 3 * 2
    assert (
        deepspeed_config(EngineConfig(), TrainConfig(batch_size=24, micro_batch_size=99), 2, {})[
            "gradient_accumulation_steps"
        ]
        == 1
    )


@pytest.mark.parametrize("works", [True, False])
def test_a_part_that_inductor_rejects_runs_as_it_is(works, monkeypatch):
    def inductor(graph, inputs):
        if works:
            return graph.forward
        raise ImportError("a6.so: file too short\nlong story")

    torch._dynamo.reset()
    real = torch._dynamo.lookup_backend
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: inductor if name == "inductor" else real(name))
    layer, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    expected = layer(x)
    layer.compile(backend=or_as_it_is)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(layer(x), expected)
    assert [str(w.message) for w in said if "engine.compile" in str(w.message)] == [
        "engine.compile: a part of a tower runs uncompiled (a6.so: file too short)"
    ][works:]


def test_a_compiler_that_fails_is_one_sentence():
    built = RuntimeError(
        "Error building extension 'fused_adam': [1/2] c++ -MMD\nfused_adam.cpp:3: fatal error: Python.h: none\n"
    )
    assert engine.not_compiled(built).startswith(
        "DeepSpeed could not compile or load its optimizer: fused_adam.cpp:3: fatal error: Python.h: none. It needs g++"
    )
    missing = RuntimeError("Unable to JIT load the fused_adam op due to ninja not being installed.")
    assert "due to ninja not being installed. It needs" in engine.not_compiled(missing)
    assert engine.not_compiled(RuntimeError("shapes do not fit")) is None
