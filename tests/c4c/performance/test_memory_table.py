"""What --check says fits a card of 24 GB, against tensors that torch holds."""

import gc
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from c4c.config import Config, load
from c4c.models.backbone import settled
from c4c.models.clip4clip import build
from c4c.performance.assumptions import Assumptions
from c4c.performance.counts import count
from c4c.performance.memory_table import memory_table
from c4c.performance.predict import memory_of, shape_of
from c4c.training.param_groups import choose_trained
from tests.c4c.models import small

pytestmark = pytest.mark.slow  # imports DeepSpeed
RECIPES = Path(__file__).parents[3] / "launch" / "cfg"
NAME = r"  (full|LoRA, rank \d+(?:, \w+)?|text tower frozen|both towers frozen|this run)(?: \*)? "


def demo(*words: str) -> Config:
    return settled(load("demo.yaml", words, [RECIPES]))


def rows(lines: list[str]) -> dict[str, list[float]]:
    """{way: [trained in millions, MiB a pair, the same recomputed, (GiB, pairs, pairs recomputed) of each stage]}"""
    found = {}
    for line in lines:
        if named := re.match(NAME, line):
            found[named.group(1)] = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line[named.end() :])]
    return found


def test_the_ways_to_train():
    lines = memory_table(demo("model.head=seqTransf", "model.head_layers=1", "train.lora=4"), 2)
    found = rows(lines)
    assert list(found) == ["full", "LoRA, rank 4", "text tower frozen", "both towers frozen"]
    assert "  LoRA, rank 4 * " in "\n".join(lines) and "ZeRO 3 x 2 GPUs" in lines[3] and len(lines) == 8
    assert all(len(row) == 12 for row in found.values())
    trained = [row[0] for row in found.values()]
    assert trained[0] > trained[2] > trained[3] and trained[0] > trained[1]
    assert found["full"][1] > found["LoRA, rank 4"][1] > found["both towers frozen"][1]
    assert all(row[2] <= row[1] and row[5] >= row[4] for row in found.values())  # recomputation leaves room for more


def test_under_zero_3_lora_keeps_as_much_as_full_training():
    found = rows(memory_table(demo("data.num_frames=512", "train.lora=4"), 2))
    full, lora = found["full"], found["LoRA, rank 4"]
    assert 1.2 * full[4] < lora[4] < 9999
    assert full[10] <= lora[10] < 1.1 * full[10]


def test_a_run_that_is_none_of_them_is_a_row_and_heads_without_weights_have_no_frozen_towers():
    found = rows(memory_table(demo("train.freeze=[video.blocks.0-2]"), 1))
    assert list(found) == ["full", "this run", "LoRA, rank 16, attention", "text tower frozen"]


def test_towers_without_attention(monkeypatch):
    small.register(monkeypatch, "small-convnext", small.FAMILIES["ConvNeXt"])
    words = ("model.backbone=small-convnext", "data.max_words=16", "train.batch_size=36")  # which 8 ranks do not divide
    assert "LoRA, rank 16, mlp" in rows(memory_table(demo(*words), 1))


def held() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("train", [{"lora": 8, "lora_on": "all"}, {"freeze": "text"}, {}], ids=["LoRA", "text", "full"])
def test_an_engine_keeps_as_much(train):
    """Weights, masters and moments of a bf16 engine on one rank: what is in memory after a step, without its gradients."""
    from c4c.training.step import Learner
    from c4c.zero.distributed import start_distributed
    from c4c.zero.engine import build_engine

    config = demo("engine.precision=bf16", "train.batch_size=2", "model.backbone=ViT-demo-16")
    config = replace(config, train=replace(config.train, **train))
    start_distributed()
    before = held()
    model = build(config.model, 8)
    choose_trained(model, config.train)
    engine = build_engine(Learner(model), config.engine, config.train, 1, {})
    frames, mask, tokens = torch.zeros(2, 8, 3, 64, 64), torch.ones(2, 8).bool(), torch.ones(2, 24).long()
    engine.backward(engine(frames, mask, tokens, torch.ones(2).bool()))
    engine.step()
    engine.zero_grad()
    del frames
    counted = count(config, encoded=2, scored=2)
    memory = memory_of(config, shape_of(config, 1), counted.weights, counted.trained, 0, "cpu", Assumptions())
    expected = (memory.weights + memory.masters + memory.moments) * 2**30
    assert held() - before == pytest.approx(expected, rel=0.02, abs=200_000)


@pytest.mark.parametrize(
    ("train", "most"), [({"lora": 8}, 1.3), ({"freeze": "video"}, 1.8), ({}, 1.2)], ids=["LoRA", "video", "full"]
)
def test_activations_of_a_pair_are_what_autograd_keeps(train, most):
    """Of a real forward pass on the CPU. The most in use is more: in a frozen tower, what a layer needs while it computes."""
    config = demo("engine.precision=fp32", "data.num_frames=4")
    config = replace(config, train=replace(config.train, **train))
    model = build(config.model, 4)
    choose_trained(model, config.train)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def kept(pairs: int) -> int:
        saved: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage  # which keeps its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.train()(torch.zeros(pairs, 4, 3, 64, 64), torch.ones(pairs, 4), torch.ones(pairs, 24).long())
        return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)

    per_pair = (kept(6) - kept(2)) / 4
    few, many = (count(config, encoded=pairs, scored=pairs).activations for pairs in (64, 128))
    counted = (many - few) / 64
    assert per_pair < counted < most * per_pair
