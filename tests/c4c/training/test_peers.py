"""Two ranks that exchange something at every step; one of them is killed, stopped, or ends."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.runs import ROOT, free_port

pytestmark = pytest.mark.slow

RANK = """
import os, sys, time
import torch
import torch.distributed as dist
from c4c.errors import exit_code
from c4c.training.peers import Peers
from c4c.training.signals import Stop
from c4c.training.watchdog import Watchdog

rank, timeout = int(os.environ["RANK"]), float(os.environ["TIMEOUT"])
sys.argv = ["launch/train.py", "--cfg", "demo.yaml"]
dist.init_process_group("gloo", rank=rank, world_size=2)

def command():
    with Peers(rank, 2, timeout) as peers, Stop(), Watchdog(rank, 2, timeout, peers=peers) as watch:
        for step in range(3000):
            watch.now(f"at step {step}")
            dist.all_reduce(torch.zeros(1))
            if step == 5:
                print("ready", flush=True)
            if os.path.exists(os.environ["END"]) and rank == 1:
                raise ValueError("a reason of its own")
            time.sleep(0.01)
    return 0

sys.exit(exit_code(command))
"""


class Ranks:
    def __init__(self, folder, timeout_s: float):
        env = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": "2",
            "LOCAL_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        env |= {
            "PYTHONPATH": str(ROOT),
            "TIMEOUT": str(timeout_s),
            "END": str(folder / "end"),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        self.both = [
            subprocess.Popen([sys.executable, "-c", RANK], env=env | {"RANK": str(rank)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for rank in (0, 1)
        ]  # fmt: skip
        for rank in self.both:
            assert rank.stdout.readline() == "ready\n", rank.communicate()

    def said_by(self, rank: int) -> str:
        out = self.both[rank].communicate()[1]
        assert self.both[rank].returncode == 1, out
        return re.sub(r"pid \d+", "pid N", out)


@pytest.fixture
def ranks(tmp_path):
    started = []

    def start(timeout_s: float = 30) -> Ranks:
        started.append(Ranks(tmp_path, timeout_s))
        return started[-1]

    yield start
    for process in (p for ranks in started for p in ranks.both if p.poll() is None):
        process.kill()
        process.communicate()


COMMAND = "Continue with\n    deepspeed --num_accelerators 2"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named_at_once(rank, ranks):
    """Long before `timeout_s`, which a test would not live to see."""
    both = ranks(timeout_s=3600)
    both.both[rank].kill()
    both.both[rank].wait()
    err = both.said_by(1 - rank)
    reason = "it was" if rank else "unless it gave a reason above, it was"
    said = (
        f"error: rank {rank} (pid N) vanished: {reason} killed, usually because memory ran out (see dmesg). {COMMAND}"
    )
    assert err.startswith(said) and err.endswith(" launch/train.py --cfg demo.yaml run.resume=auto\n")
    assert err.count("\n") == 2


def test_a_rank_that_ends_with_an_error_did_not_vanish(ranks, tmp_path):
    both = ranks()
    (tmp_path / "end").touch()
    assert both.said_by(1) == "error on rank 1: a reason of its own\n"
    assert both.said_by(0).startswith("error: the connection to another rank broke (")


@pytest.mark.nightly
def test_a_rank_that_was_stopped_blames_itself(ranks):
    both = ranks(timeout_s=2)
    os.kill(both.both[0].pid, signal.SIGSTOP)
    assert "rank 0, which all ranks connect to, does not respond: its process is stopped" in both.said_by(1)
    os.kill(both.both[0].pid, signal.SIGCONT)
    err = both.said_by(0)
    assert re.match(
        r"error: rank 0, this process, was itself stopped for \d+ s \(engine\.timeout_s is 2\), and the other ranks have ended",
        err,
    )
    assert COMMAND in err and "vanished" not in err


@pytest.mark.nightly
def test_ranks_that_were_all_stopped_go_on(ranks):
    both = ranks(timeout_s=2)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in both.both:
            os.kill(rank.pid, number)
        time.sleep(3.5)
    assert [rank.poll() for rank in both.both] == [None, None]
    both.both[1].kill()
    both.both[1].wait()
    assert both.said_by(0).startswith("error: rank 1 (pid N) vanished")
