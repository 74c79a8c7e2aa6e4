"""The decay's warm-up, settings that an average cannot go with, and its file in a checkpoint."""

import pytest
import torch

from c4c.settings import TrainConfig
from c4c.zero import checkpoint, ema
from c4c.zero.checkpoint import EMA, MODEL, load_weights
from c4c.zero.snapshot import restore, save
from tests.c4c.zero.checkpoints import Engine, flip, refused

pytestmark = pytest.mark.slow  # imports DeepSpeed


class Averaging(Engine):
    """With an average of its weights."""

    def __init__(self, rank: int = 0):
        super().__init__(rank)
        self.average = ema.WeightAverage(self, 0.9)
        self.applied = True

    def was_step_applied(self) -> bool:
        return self.applied

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses += super().train(1)
            self.average.update(self)
        return losses

    def averages(self) -> dict[str, torch.Tensor]:
        return {name: self.optimizer.state[weight][ema.KEY].clone() for name, weight in self.module.named_parameters()}


@pytest.mark.parametrize("updates", [1, 2, 8, 80, 81, 100, 10_000])
def test_the_decay_warms_up(updates):
    expected = 1 - min(0.9, (1 + updates) / (10 + updates))
    assert ema.weight_of(0.9, updates) == pytest.approx(expected, rel=1e-12)
    assert float(ema.weight_of(0.9, torch.tensor(updates))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_skipped_step_changes_nothing(on_device):
    """on_device: the host does not know that it was skipped."""
    engine = Averaging()
    engine.train(2)
    before, updates = engine.averages(), int(engine.average.updates)
    engine.applied = False
    if on_device:
        engine.step_is_bad = torch.tensor(True)
    engine.average.update(engine)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.averages().items())
    assert int(engine.average.updates) == updates == 2
    engine.step_is_bad, engine.applied = torch.tensor(False) if on_device else None, True
    engine.train(1)
    assert int(engine.average.updates) == 3
    assert not torch.equal(engine.averages()["weight"], before["weight"])


def test_an_error_in_a_validation_leaves_the_weights(tmp_path):
    engine = Averaging()
    engine.train(3)
    weight, average = engine.module.weight.detach().clone(), engine.averages()["weight"]
    with pytest.raises(KeyError), engine.average.in_use(engine):
        assert torch.equal(engine.module.weight, average)
        raise KeyError
    assert torch.equal(engine.module.weight, weight) and torch.equal(engine.averages()["weight"], average)


def test_going_on_is_bit_for_bit(tmp_path):
    engine = Averaging()
    engine.train(3)
    save(engine, tmp_path, 3)
    engine.train(3)
    again = Averaging()
    again.train(1)
    restore(again, tmp_path)
    assert again.average.updates == 3
    again.train(3)
    assert all(torch.equal(tensor, engine.averages()[name]) for name, tensor in again.averages().items())


def test_which_weights_are_loaded(tmp_path):
    engine = Averaging()
    engine.train(3)
    save(engine, tmp_path, 3)
    averaged, last = load_weights(tmp_path), load_weights(tmp_path, ema=False)
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in engine.averages().items())
    assert all(torch.equal(tensor, last[name]) for name, tensor in engine.module.state_dict().items())
    assert not torch.equal(averaged["weight"], last["weight"])


def test_an_average_that_is_lost_or_damaged_is_not_passed_over(tmp_path):
    engine = Averaging()
    engine.train(2)
    save(engine, tmp_path, 2)
    folder = tmp_path / "checkpoints" / "step00000002"
    flip(folder / EMA, -3)
    assert "ema.safetensors does not match its checksum" in checkpoint.damage(folder)
    assert "ema.safetensors does not match its checksum" in refused(load_weights, tmp_path)
    (folder / EMA).unlink()
    assert checkpoint.has_average(folder)
    for call, args in (
        (load_weights, (tmp_path,)),
        (restore, (Averaging(), tmp_path)),
        (checkpoint.newest_intact, (tmp_path,)),
    ):
        assert "ema.safetensors is missing" in refused(call, *args)
    assert load_weights(tmp_path, ema=False).keys() == engine.module.state_dict().keys()
    assert checkpoint.damage(folder, (MODEL,)) == ""


def test_a_run_without_one_has_none(tmp_path):
    engine = Engine()
    engine.train(2)
    save(engine, tmp_path, 2)
    folder = tmp_path / "checkpoints" / "step00000002"
    assert (
        not (folder / EMA).exists()
        and not checkpoint.has_average(folder)
        and checkpoint.which_weights(folder, True) == ""
    )
    assert torch.equal(load_weights(tmp_path)["weight"], engine.module.weight)
    assert "holds no averaged weights: it was written without train.ema" in refused(restore, Averaging(), tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [("optimizer.type", "Lion"), ("zero_optimization.offload_optimizer.device", "nvme"),
     ("zero_optimization.offload_optimizer.ratio", 0.5), ("optimizer.params.amsgrad", True),
     ("bf16.bf16_master_weights_and_grads", True)],
)  # fmt: skip
def test_what_cannot_be_averaged_is_refused(path, value):
    settings: dict = {"optimizer": {"type": "AdamW"}}
    ema.require_averages(0.9, settings)
    part = settings
    for key in path.split(".")[:-1]:
        part = part.setdefault(key, {})
    part[path.rpartition(".")[2]] = value
    ema.require_averages(0.0, settings)
    with pytest.raises(ValueError, match=rf"train\.ema=0\.9 is not possible with deepspeed\.{path}={value}"):
        ema.require_averages(0.9, settings)


@pytest.mark.parametrize("wrong", [1.0, 1.5, -0.1])
def test_a_decay_is_below_1(wrong):
    with pytest.raises(ValueError, match=r"train\.ema=") as caught:
        TrainConfig(ema=wrong)
    assert "\n" not in str(caught.value)
