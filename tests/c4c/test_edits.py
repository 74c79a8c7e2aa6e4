"""Random edits of configurations and of a run's files end in one sentence, or work: never in a traceback.

python -m tests.c4c.test_edits 20000       # as many of them
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from c4c.config import from_dict, load, require, to_dict
from c4c.models import weights
from c4c.models.pretrained import open_checkpoint
from c4c.training import stages
from c4c.training.bad_steps import BAD_STEPS
from c4c.training.metric_log import Metrics
from c4c.training.replay import recorded
from c4c.training.run_folder import check_continuation, last_validation, mark_done, read_config, read_done, validations
from c4c.zero import checkpoint
from pipelines.quarantine import append_line, json_lines
from tests.edits import changed, damaged, edited_json, edited_lines

CFG = Path(__file__).parents[2] / "launch" / "cfg"

pytestmark = pytest.mark.slow  # imports DALI
IN_A_TEST = 600


def make_run(run: Path) -> None:
    """A small run folder with all its files, two checkpoints among them."""
    config = load("demo.yaml", [f"run.dir={run}"], [CFG])
    (run / "config.yaml").parent.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    metrics = Metrics(run, 0)
    scores = dict.fromkeys(("R1", "R5", "R10", "MdR", "MnR"), 10.0)
    for step in range(1, 7):
        metrics.step(
            step, {"train/loss": 1 / step, "train/lr": 1e-4, "train/grad_norm": 1.0, "train/logit_scale": 14.0}
        )
    for step in (3, 6):
        metrics.validation(step, {"t2v": scores, "v2t": scores, "n_texts": 3, "n_videos": 3})
        tensors = {"a": torch.zeros(2)}
        state = {"step": step, "updates": step, "loss_scaler": {}, "data": "0" * 64}
        checkpoint.write(run, step, {checkpoint.MODEL: tensors, checkpoint.OPTIMIZER: tensors}, state)
    metrics.close()
    mark_done(run, 6, "step00000006")
    append_line(run / "quarantine.jsonl", {"split": "data/a", "key": "a", "id": "a", "reason": "torn"})
    append_line(run / BAD_STEPS, {"step": 2, "loss": "nan", "keys": ["a"]})
    (run / "towers.json").write_text(json.dumps({"embed_dim": 8, "quick_gelu": True}))
    (run / "zero-shot.json").write_text(json.dumps({"t2v": scores, "v2t": scores, "n_texts": 3, "n_videos": 3}))


def read_run(run: Path) -> None:
    """What commands read of a run folder before anything heavy."""
    config = read_config(run)
    from_dict(config)
    check_continuation(run, to_dict(load("demo.yaml", [f"run.dir={run}"], [CFG])))


def read_checkpoints(run: Path) -> None:
    checkpoint.exist(run)
    checkpoint.best(run)
    tag, _ = checkpoint.newest_intact(run)
    checkpoint.read_state(run / checkpoint.FOLDER / tag)
    checkpoint.resolve(run, "best")


def go_on(run: Path) -> None:
    """What a resumed run makes of its history."""
    Metrics(run, 3).close()
    assert all(row.get("step", 0) <= 3 for row in json_lines(run / "metrics.jsonl"))
    validations(run)
    last_validation(run)


PIPELINE = {
    "launcher": "deepspeed",
    "stages": [
        {"name": "a", "cfg": "demo.yaml", "set": {"run.dir": "runs/a"}},
        {"name": "b", "eval": "a", "data": "data/demo/test"},
        {"name": "c", "cfg": "demo.yaml", "from": "a", "set": {"run.dir": "runs/c", "train.lr": 1e-5}},
    ],
}


def edit(rng: random.Random, folder: Path, run: Path, kept: dict[str, bytes]) -> None:
    """One edit, and what reads it. Raises what the reader raises; the run folder is as before afterwards."""
    kind = rng.randrange(9)
    if kind == 0:
        base = rng.choice(
            [p for p in sorted(CFG.glob("*.yaml")) if "two_stage" not in p.stem and "study" not in p.stem]
        )
        (folder / "a.yaml").write_bytes(damaged(base.read_bytes(), rng))
        return require(load(str(folder / "a.yaml"), (), [CFG]))
    if kind == 1:
        tree = changed(to_dict(load("demo.yaml", (), [CFG])), rng)
        (folder / "a.yaml").write_text(yaml.dump(tree), "utf-8", "surrogatepass")
        return require(load(str(folder / "a.yaml"), (), [CFG]))
    if kind == 2:
        words = [b"train.lr=1e-4", b"data.train=[data/a, data/b]", b"deepspeed.zero_optimization.stage=2", b"run.dir=x"]
        word = damaged(rng.choice(words), rng).decode(errors="surrogateescape")
        return require(load("demo.yaml", [word], [CFG]))
    if kind == 3:
        text = yaml.dump(changed(PIPELINE, rng)).encode("utf-8", "surrogatepass")
        (folder / "p.yaml").write_bytes(text if rng.random() < 0.5 else damaged(text, rng))
        stages.read(folder / "p.yaml", [], [CFG])
        return None
    readers: dict[str, Callable[[Path], object]] = {
        "config.yaml": read_run, "checkpoints/latest": read_checkpoints, "done.json": read_done,
        "checkpoints/step00000006/state.json": read_checkpoints, "metrics.jsonl": go_on, "eval.jsonl": read_checkpoints,
        "quarantine.jsonl": lambda run: json_lines(run / "quarantine.jsonl"), BAD_STEPS: go_on,
        "towers.json": lambda run: weights.read(run), "zero-shot.json": lambda run: stages.scored(run / "zero-shot.json"),
    }  # fmt: skip
    name = rng.choice(list(readers))
    make = edited_lines if name.endswith("jsonl") else edited_json if name.endswith("json") else damaged
    (run / name).write_bytes(make(kept[name], rng))
    try:
        readers[name](run)
        if name == "metrics.jsonl":
            recorded(run, 2)
        if name == "config.yaml":
            open_checkpoint(str(run))
    finally:
        for file, content in kept.items():
            (run / file).write_bytes(content)
    return None


def try_edits(count: int, seed: int, folder: Path) -> dict[str, int]:
    """How many of `count` edits worked and how many were refused. Any other end raises AssertionError that shows it."""
    run, ends = folder / "run", {"worked": 0, "refused": 0}
    make_run(run)
    kept = {
        str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts
    }
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        try:
            edit(rng, folder, run, kept)
            ends["worked"] += 1
        except (ValueError, OSError) as error:
            assert not isinstance(error, UnicodeError), f"edit {number}: {error!r}"
            said = str(error)
            assert len(said) > 15, f"edit {number}: {error!r} says too little"
            ends["refused"] += 1
        except Exception as error:
            raise AssertionError(f"edit {number} ends in {error!r}") from error
    return ends


def test_edits_end_in_one_sentence_or_work(tmp_path):
    ends = try_edits(IN_A_TEST, 0, tmp_path)
    assert min(ends.values()) > IN_A_TEST / 20


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(try_edits(int(sys.argv[1]), 1, Path(place)))
