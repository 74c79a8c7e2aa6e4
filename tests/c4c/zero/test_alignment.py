"""What a model is given on a GPU alone: weights that begin in DeepSpeed's flat tensors where kernels read fast, and its attention."""

from types import SimpleNamespace

import deepspeed
import pytest
from torch import nn

from c4c.models.attention import DirectAttention
from c4c.models.clip4clip import build
from c4c.settings import EngineConfig, ModelConfig, TrainConfig
from c4c.training.param_groups import parameter_groups, put_odd_sizes_last
from c4c.training.step import Learner
from c4c.zero import engine, patches
from c4c.zero.distributed import start_distributed

pytestmark = pytest.mark.slow  # imports DeepSpeed

READ_AT_ONCE = 16  # bytes


class Caught(Exception):
    """Instead of an engine."""


def learner(loss: str = "cross_entropy") -> Learner:
    return Learner(build(ModelConfig(backbone="ViT-demo-16", init_from="scratch", head="seqTransf"), 4), loss)


def groups_given(device: str, decay: str, monkeypatch) -> tuple[list[list], Learner]:
    """Weights that DeepSpeed is given on such a device, in groups, and the module."""

    def caught(**given):
        raise Caught(given["model_parameters"])

    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: SimpleNamespace(device_name=lambda: device))
    monkeypatch.setattr(engine, "require_supported", lambda *_: None)
    monkeypatch.setattr(deepspeed, "initialize", caught)
    module, train = learner(), TrainConfig(decay=decay)
    extra = {"optimizer": {"params": {"torch_adam": True}}}
    with pytest.raises(Caught) as found:
        engine.build_engine(module, EngineConfig(precision="bf16"), train, 1, extra)
    return [group["params"] for group in found.value.args[0]], module


@pytest.mark.parametrize("decay", ["mmaction2", "official"])
def test_on_a_gpu_no_weight_stands_behind_one_of_an_odder_size(decay, monkeypatch):
    groups, module = groups_given("cuda", decay, monkeypatch)
    assert {id(w) for group in groups for w in group} == {id(w) for w in module.parameters()}
    for group in groups:
        begin = 0
        for weight in group:
            assert weight.numel() == 1 or begin * 2 % 128 == 0
            begin += weight.numel()


def test_on_a_cpu_weights_keep_their_order(monkeypatch):
    groups, module = groups_given("cpu", "official", monkeypatch)
    places = {id(weight): place for place, weight in enumerate(module.parameters())}
    for group in groups:
        assert [places[id(w)] for w in group] == sorted(places[id(w)] for w in group)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attention_goes_the_direct_way_on_a_gpu_alone(device, monkeypatch):
    _, module = groups_given(device, "mmaction2", monkeypatch)
    kinds = {type(part) for part in module.modules() if isinstance(part, nn.MultiheadAttention)}
    assert kinds == {DirectAttention if device == "cuda" else nn.MultiheadAttention}


@pytest.mark.parametrize("loss", ["cross_entropy", "sigmoid"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_lays_them_in_this_order(stage, loss, no_rank):
    """Without it the temperature is the first of its group, and what follows begins 2 bytes off."""
    start_distributed()
    for ordered in (False, True):
        module = learner(loss)
        groups = parameter_groups(module, TrainConfig(loss=loss, decay="official"))
        for group in groups:
            del group["part"]
        if ordered:
            put_odd_sizes_last(groups)
        settings = {"train_batch_size": 1, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True},
                    "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": True}}}  # fmt: skip
        with patches.flat_masters():
            made = deepspeed.initialize(model=module, model_parameters=groups, config=settings)[0].optimizer
        flats = made.bit16_groups_flat if stage else made.fp16_groups_flat
        spans = [(flat.data_ptr(), flat.data_ptr() + flat.nbytes) for flat in flats]
        askew = 0
        for weight in module.parameters():
            (begin,) = [begin for begin, end in spans if begin <= weight.data_ptr() < end]
            askew += weight.numel() > 1 and (weight.data_ptr() - begin) % READ_AT_ONCE > 0
        assert bool(askew) is not ordered, askew
