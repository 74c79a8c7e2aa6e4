"""Started by DeepSpeed's launcher: many engines, one after another, on tensors drawn here.

    deepspeed --num_accelerators N tests/launch/engines.py FOLDER [--whole]

Writes FOLDER/N.json: what every_head.py (on two ranks), continues.py and averages.py found; `--whole` runs every kind at every
stage, as the nightly tests need it.
"""

import json
import sys
from pathlib import Path

import torch

from c4c.training.session import make_deterministic
from c4c.zero.distributed import start_distributed, stop_distributed
from tests.launch import averages, continues, every_head


def main() -> None:
    folder = Path(next(word for word in sys.argv[1:] if not word.startswith("-")))
    whole = "--whole" in sys.argv
    if torch.cuda.is_available():
        make_deterministic()
    rank, world, _ = start_distributed()
    found = {"continues": continues.results(folder, rank, world, whole)}
    found["averages"] = averages.results(folder, rank, world, whole)
    if world == 2:
        found["heads"] = every_head.results(folder, rank, world, whole)
    if rank == 0:
        (folder / f"{world}.json").write_text(json.dumps(found))
    stop_distributed()


if __name__ == "__main__":
    main()
