"""Steps that changed nothing because the loss or a gradient was not finite."""

import json
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch.distributed as dist

from c4c.files import lines_up_to
from pipelines.quarantine import append_line

BAD_STEPS = "bad_steps.jsonl"


class BadSteps:
    """Counts the steps that changed nothing because the loss or a gradient was not finite, and lists them in the run folder.

    done: steps that a resumed run has behind it, whose bad ones count. Those at its end count as in a row with the next ones: a
    run that is started again and again may not go on for ever without learning anything.
    """

    def __init__(self, folder: Path, most: int, done: int = 0):
        self._folder, self._most, self.total, self._in_a_row = folder, most, 0, 0
        if done and (listing := folder / BAD_STEPS).exists():
            steps = [json.loads(line).get("step") for line in lines_up_to(listing, done)]
            self.total, bad = len(steps), set(steps)
            self._in_a_row = next(back for back in count() if done - back not in bad)

    def note(self, step: int, bad: bool, loss: float, keys: list[str], world: int, rank: int) -> str:
        """After step `step`, on every rank; keys: of this rank's videos. Returns the warning to show, '' if there is none.

        Raises ValueError, on every rank, once too many in a row were bad.
        """
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if not bad:
            return ""
        self.total += 1
        parts: list = [keys] * world
        if world > 1:
            dist.all_gather_object(parts, keys)
        listing = self._folder / BAD_STEPS
        if rank == 0:
            row = {"step": step, "loss": str(loss), "keys": [key for part in parts for key in part]}
            with suppress(OSError):  # a full disk: the message below names the step too
                append_line(listing, row)
        what = f"step {step} was skipped: its loss is {loss}, or a gradient is not finite"
        if self._in_a_row >= self._most:
            raise ValueError(
                f"{what}. That makes {self._in_a_row} in a row (train.max_bad_steps={self._most}). Their videos are in "
                f"{listing}; --replay {step} runs one again. Usual causes: train.lr is too high, "
                "engine.precision=fp16 where bf16 is possible"
            )
        return f"warning: {what}. Its videos are in {listing}"
