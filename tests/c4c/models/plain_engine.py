"""A training step without DeepSpeed."""

from torch import Tensor

from c4c.training.step import Learner


class Engine:
    """As much of a DeepSpeed engine as a step asks for: gradients add up in the weights."""

    optimizer = average = None

    def __init__(self, module: Learner):
        self.module = module

    def __call__(self, *args) -> Tensor:
        return self.module(*args)

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        loss.backward()

    def step(self) -> None:
        pass

    def zero_optimization_stage(self) -> int:
        return 1
