"""torch.compile of the towers: each is one graph, whatever the head, and what is not is told."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from c4c.models import compiled
from c4c.models.attention import attend_directly
from c4c.models.clip4clip import build
from c4c.models.compiled import CompiledTowers, compile_towers
from c4c.models.heads import HEADS
from c4c.settings import ModelConfig, TrainConfig
from c4c.training.param_groups import choose_trained
from tests.often import cases

pytestmark = pytest.mark.slow  # dynamo traces whole towers

FRAMES, WORDS = 3, 12


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Dynamo's memory and counters; no inductor, as graphs alone count here."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiled, "or_as_it_is", lambda graph, inputs: graph.forward)
    monkeypatch.setattr(compiled, "_cannot_compile", lambda device: "")
    with torch._dynamo.config.patch(suppress_errors=True):
        yield
    torch._dynamo.reset()


def model_of(head: str = "meanP", patch: str = "2d"):
    return build(ModelConfig(backbone="ViT-demo-16", init_from="scratch", head=head, linear_patch=patch), FRAMES)


def batch(rows: int = 2) -> tuple:
    return torch.randn(rows, FRAMES, 3, 64, 64), torch.ones(rows, FRAMES).bool(), torch.randint(1, 49407, (rows, WORDS))


OFTEN = ("meanP", "tightTransf", "wti")
WAYS = pytest.mark.parametrize(
    ("head", "patch"),
    cases([*((head, "2d") for head in sorted(HEADS)), ("meanP", "3d")], lambda head, patch: head in OFTEN),
)


@WAYS
def test_a_tower_is_one_graph(head, patch):
    """As dynamo explains it, on what the model gives to each tower."""
    model, given = model_of(head, patch), {}
    for name, tower in (("video", model.clip.visual), ("text", model.clip.transformer)):
        tower.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: given.setdefault(name, (args, kwargs)) and None, with_kwargs=True
        )
    model(*batch())
    for name, tower in (("video", model.clip.visual), ("text", model.clip.transformer)):
        tower._forward_pre_hooks.clear(), tower._forward_pre_hooks_with_kwargs.clear()
        args, kwargs = given[name]
        explained = torch._dynamo.explain(tower)(*args, **kwargs)
        assert (explained.graph_count, explained.graph_break_count) == (1, 0), (name, explained.break_reasons)


@pytest.mark.parametrize("head", ["meanP", "tightTransf"])
def test_a_tower_with_lora_is_one_graph_too(head):
    model, towers = model_of(head), ("video", "text")
    choose_trained(model, TrainConfig(lora=4, lora_on="all"))
    expected = model(*batch_of_ones())
    found = compile_towers(model, 1)
    text, video = model(*batch_of_ones())
    (text.sum() + video.sum()).backward()
    assert found is not None and not found.problem and all(found.graphs[tower] == 1 for tower in towers)
    torch.testing.assert_close((text, video), expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n)


def test_towers_that_attend_directly_are_one_graph_too():
    """As on a GPU."""
    model = model_of("tightTransf")
    expected = model(*batch_of_ones())
    attend_directly(model)
    found = compile_towers(model, 1)
    text, video = model(*batch_of_ones())
    (text.sum() + video.sum()).backward()
    assert found is not None and not found.problem and found.graphs == {"video": 1, "text": 1}
    torch.testing.assert_close((text, video), expected, rtol=1e-4, atol=1e-5)


def batch_of_ones() -> tuple:
    return torch.ones(2, FRAMES, 3, 64, 64), torch.ones(2, FRAMES).bool(), torch.ones(2, WORDS).long()


@WAYS
def test_a_step_compiles_each_tower_once(head, patch):
    torch.manual_seed(0)
    plain = model_of(head, patch)
    model = model_of(head, patch)
    model.load_state_dict(plain.state_dict())
    towers = compile_towers(model, 1)
    # nothing was called yet
    assert towers.problem.startswith("engine.compile: the video and text towers ran uncompiled")
    given = batch()
    for ours, theirs in zip(model(*given), plain(*given), strict=True):
        assert torch.equal(ours, theirs)
        ours.sum().backward(retain_graph=True)
    assert towers.graphs == {"video": 1, "text": 1}
    assert towers.problem == ""


def test_other_shapes_compile_nothing_while_it_is_paused():
    model = model_of()
    towers = compile_towers(model, 1)
    model(*batch())
    with towers.paused(), torch.no_grad():
        paused = model(*batch_of_ones()), model(*batch(5))[0].shape
    assert towers.graphs == {"video": 1, "text": 1}
    model(*batch())
    assert towers.graphs == {"video": 1, "text": 1}  # what was compiled is used again
    torch.testing.assert_close(model(*batch_of_ones()), paused[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "as_they_are"), [("cuda", True), ("cpu", False)])
def test_validation_on_a_gpu_runs_the_towers_as_they_are(device, as_they_are, monkeypatch):
    """It shows them blocks of other sizes than training: each would compile both towers once more."""
    from c4c.training import session as module

    layer, eager = torch.nn.Linear(3, 3), []
    towers = CompiledTowers({"video": layer, "text": torch.nn.Linear(3, 3)})
    engine = SimpleNamespace(
        average=None, eval=lambda: None, train=lambda: None, module=SimpleNamespace(compiled=towers),
        zero_optimization_stage=lambda: 0,
    )  # fmt: skip
    session = module.Session.__new__(module.Session)
    session.device, session.engine, session.model, session.test = torch.device(device), engine, None, None
    session.config = SimpleNamespace(data=SimpleNamespace(num_frames=FRAMES, eval_batch_size=2))
    session.tokenizer = None

    def evaluate(*_, **__):
        layer(torch.ones(2, 3))
        eager.append(towers.graphs["video"] == 0)

    monkeypatch.setattr(module, "evaluate", evaluate)
    session.evaluate()
    assert eager == [as_they_are]
    layer(torch.ones(2, 3))
    assert towers.graphs["video"] == 1  # afterwards they are compiled as before


class Breaking(torch.nn.Module):
    def forward(self, x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2


class Eager(torch.nn.Module):
    @torch._dynamo.disable
    def forward(self, x):
        return x + 1


class Unsupported(torch.nn.Module):
    def forward(self, x):
        return x + 1


def broken(*_):
    raise RuntimeError("no such operation")


@pytest.mark.parametrize(
    ("video", "said"),
    [(Breaking(), "1 graph breaks cut a tower into parts"), (Eager(), "the video tower ran uncompiled")],
    ids=["cut", "eager"],
)
def test_a_tower_that_is_not_one_graph_is_told_in_one_line(video, said):
    text = torch.nn.Linear(3, 3)
    towers = CompiledTowers({"video": video, "text": text})
    video(torch.ones(2, 3)), text(torch.ones(2, 3))
    assert said in towers.problem and "\n" not in towers.problem


def test_a_part_that_fails_in_the_backend_runs_as_it_is_and_is_told(monkeypatch):
    monkeypatch.setattr(compiled, "or_as_it_is", broken)
    video, text = Unsupported(), torch.nn.Linear(3, 3)
    towers = CompiledTowers({"video": video, "text": text})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(video(torch.ones(2)), torch.full((2,), 2.0))
        text(torch.ones(2, 3))
    assert "parts could not be compiled" in towers.problem


def test_a_run_tells_of_it_once_after_the_first_step():
    from c4c.training.trainer import Trainer

    said: list[str] = []
    trainer = Trainer.__new__(Trainer)
    trainer.report = SimpleNamespace(say=said.append)
    trainer._compiled = SimpleNamespace(problem="engine.compile: the text tower ran uncompiled")
    for _ in range(2):
        trainer._check_compiled()
    assert said == ["warning: engine.compile: the text tower ran uncompiled"]
    for fine in (None, SimpleNamespace(problem="")):
        trainer._compiled = fine
        trainer._check_compiled()
    assert len(said) == 1
