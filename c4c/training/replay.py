"""`launch/train.py --replay STEP`: run one step of a run again, from a checkpoint before it, and compare."""

import math
from pathlib import Path

from c4c.config import Config
from c4c.files import looked_in
from c4c.training.outcome import Outcome
from c4c.training.screen import Report
from c4c.training.session import Session, make_deterministic
from c4c.zero import checkpoint
from c4c.zero.distributed import start_distributed, stop_distributed
from pipelines.quarantine import json_lines

_ROUNDING = 1e-4  # relative: other ranks, another ZeRO stage, another machine


def replay(config: Config, step: int) -> bool:
    """Run from the newest checkpoint before `step` up to it and compare; whether it came out the same, to rounding.

    Without such a checkpoint it starts where the run did, at step 0. Called on every rank; writes nothing. Raises ValueError
    if there is no such step.
    """
    if config.run.deterministic:
        make_deterministic()
    folder = Path(config.run.dir)
    if not folder.is_dir():
        raise ValueError(f"--replay {step}: there is no run folder {folder}{looked_in(folder)}")
    then = recorded(folder, step)
    before = [t for t in checkpoint.tags(folder) if checkpoint.step_of(t) < step]
    tag, notes = checkpoint.newest_intact(folder, before=step) if before else (None, [])
    rank, world, device = start_distributed(config.engine.timeout_s + 300)
    try:
        session = Session(config, rank, world, device, resume=folder, tag=tag, from_start=not tag)
        say = Report(rank == 0, 1, 1, 0).say
        say(f"replaying step {step} from {tag or 'the start of the run'}")
        for note in notes:
            say(note)
        with session.loader:
            for batch in session.batches(step - session.done):
                outcome = session.step(batch)
        same = _compare(then, outcome, say)
        say(f"rank 0's videos: {' '.join(batch.keys)}")
        return same
    finally:
        stop_distributed()


def recorded(folder: Path, step: int) -> dict:
    """The line of metrics.jsonl for a step. Raises ValueError if there is none."""
    path = folder / "metrics.jsonl"
    rows = {row["step"]: row for row in json_lines(path) if isinstance(row.get("step"), int)}
    if step not in rows:
        raise ValueError(f"--replay {step}: {path} holds steps {min(rows, default=0)} to {max(rows, default=0)}")
    return rows[step]


def _compare(recorded: dict, outcome: Outcome, say) -> bool:
    now = {"train/loss": outcome.loss, "train/grad_norm": outcome.grad_norm, "train/lr": outcome.lr}
    now["train/logit_scale"] = outcome.logit_scale
    if outcome.logit_bias is not None:
        now["train/logit_bias"] = outcome.logit_bias
    verdicts = []
    for name, value in now.items():
        then = recorded.get(name)
        then = math.nan if then is None else then  # how a number that is not finite is recorded
        equal = then == value or (math.isnan(then) and not math.isfinite(value))
        near = equal or math.isclose(then, value, rel_tol=_ROUNDING)
        verdicts.append((equal, near))
        say(
            f"{name:18} then {then:<22.17g} now {value:<22.17g} {'equal' if equal else f'differs by {abs(then - value):.1e}'}"
        )
    same, close = (all(v[i] for v in verdicts) for i in (0, 1))
    say("the same, bit for bit" if same else "the same to rounding" if close else "NOT the same")
    return close
