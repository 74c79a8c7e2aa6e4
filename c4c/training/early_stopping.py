"""Ends a run whose validations get no better."""

import torch
import torch.distributed as dist


class EarlyStopping:
    """`due` once `patience` validations in a row (0: never) were no better than the best before them.

    scores: text-to-video R@1 of the validations so far. Only rank 0's scores count.
    """

    def __init__(self, patience: int, scores: list[float]):
        self.patience, self._scores = patience, list(scores)

    def note(self, score: float, world: int, device: torch.device) -> None:
        """After a validation, on every rank."""
        agreed = torch.tensor([score], dtype=torch.float64, device=device)
        if world > 1:
            dist.broadcast(agreed, 0)
        self._scores.append(agreed.item())

    @property
    def due(self) -> bool:
        """Whether the run should end."""
        if not self.patience or not self._scores:
            return False
        return len(self._scores) - 1 - self._scores.index(max(self._scores)) >= self.patience
