"""Two machines' worth of ranks on loopback addresses: each launcher goes on where another was told to stop.

torchrun's rendezvous, where a killed rank makes both agents restart; DeepSpeed's hostfile; Slurm's variables.
"""

import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from subprocess import Popen

import pytest

from tests.launch.kills import curve, validations
from tests.launch.runs import free_port, ranks_of, step_in, wait_for_step

pytestmark = [pytest.mark.launch, pytest.mark.nightly, pytest.mark.timeout(1200)]
SCRIPT, HOSTS = "launch/train.py", ("127.0.0.1", "127.0.0.2")
ROUNDING = 1e-5  # a rank that has a machine to itself computes in more threads


class Stages:
    """A run of ten steps, and how each launcher's two commands ended: {launcher: [(exit code, stderr)]}."""

    def __init__(self, launcher):
        self.launcher, self.run, self.ended = launcher, launcher.folder / "machines", {}
        self.words = launcher.words(f"run.dir={self.run}", "checkpoint.every_steps=1")

    def torchrun(self) -> None:
        """A rank is killed; both agents start theirs again, which has to go on though run.resume is never; SIGTERM."""
        meet = f"--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint {HOSTS[0]}:{free_port()} --max_restarts 3"
        command = [sys.executable, "-m", "torch.distributed.run", *meet.split()]
        agents = self._start([[*command, "--local_addr", host, SCRIPT, *self.words] for host in HOSTS])
        self._reach(2, agents)
        ranks_of(agents[1])[0].send_signal(signal.SIGKILL)
        self._reach(4, agents)
        ranks_of(agents[0])[0].send_signal(signal.SIGTERM)
        self._finish("torchrun", agents)

    def hostfile(self) -> None:
        """Ctrl-C on the machine that is not the first."""
        hosts = self.launcher.folder / "hosts"
        hosts.write_text("".join(f"{host} slots=2\n" for host in HOSTS))
        slots = f"{HOSTS[0]}:0@{HOSTS[1]}:1"  # one of each, and on this machine not the same
        meet = f"--hostfile {hosts} --include {slots} --no_ssh --master_addr {HOSTS[0]} --master_port {free_port()}"
        command = [str(Path(sys.executable).parent / "deepspeed"), *meet.split()]
        words = [SCRIPT, *self.words, "run.resume=auto"]
        nodes = [self.launcher.start([*command, "--node_rank", str(i), *words]) for i in range(2)]
        self._reach(step_in(self.run / "metrics.jsonl") + 1, nodes)
        ranks_of(nodes[1])[0].send_signal(signal.SIGINT)
        self._finish("hostfile", nodes)

    def slurm(self) -> None:
        """A job that was put back into the queue: run.resume is never, and it has to go on all the same."""
        job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_NODES": "2",
               "SLURM_LOCALID": "0", "SLURM_RESTART_COUNT": "1", "MASTER_ADDR": HOSTS[0], "MASTER_PORT": str(free_port())}  # fmt: skip
        tasks = [job | {"SLURM_PROCID": str(i)} for i in range(2)]
        self._finish("srun", self._start([[sys.executable, SCRIPT, *self.words]] * 2, tasks))

    def _start(self, commands: list[list[str]], envs: Iterable[dict] = ({}, {})) -> list[Popen]:
        started = []
        for number, (command, env) in enumerate(zip(commands, envs, strict=True)):
            gpu = {"CUDA_VISIBLE_DEVICES": str(number)} if self.launcher.device == "cuda" else {}
            started.append(self.launcher.start(command, **gpu, **env))
        return started

    def _reach(self, step: int, processes: list[Popen]) -> None:
        wait_for_step(self.run / "metrics.jsonl", step, processes[0])

    def _finish(self, name: str, processes: list[Popen]) -> None:
        said = [process.communicate(timeout=300) for process in processes]
        self.ended[name] = [(process.returncode, err) for process, (_, err) in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def stages(launcher) -> Stages:
    stages = Stages(launcher)
    stages.torchrun()
    stages.hostfile()
    stages.slurm()
    return stages


@pytest.mark.parametrize("launcher_name", ["torchrun", "hostfile", "srun"])
def test_every_command_ends_well(launcher_name, stages):
    (first, said), (second, _) = stages.ended[launcher_name]
    assert (first, second) == (0, 0), stages.ended[launcher_name]
    assert f"2 x {stages.launcher.device}" in said


def test_a_killed_rank_starts_again_and_goes_on(stages):
    (_, said), _ = stages.ended["torchrun"]
    assert said.count(f"2 x {stages.launcher.device}") == 2
    assert "continuing after step" in said
    assert not stages.run.with_name("machines.old1").exists()


def test_signals_say_how_to_go_on(stages):
    (_, by_term), _ = stages.ended["torchrun"]
    (_, by_int), _ = stages.ended["hostfile"]
    assert "stopped by SIGTERM after step" in by_term
    assert "    torchrun --nproc_per_node 1 launch/train.py --cfg demo.yaml" in by_term
    assert "stopped after step" in by_int  # the first rank got no signal itself
    assert "    deepspeed launch/train.py --cfg demo.yaml" in by_int
    for said in (by_term, by_int):
        assert "run.resume=auto    (on the same machines as before)" in said


def test_the_curve_is_that_of_one_machine(stages, runs):
    found, unbroken = curve(stages.run), curve(runs["2 ranks"])
    assert [row["step"] for row in found] == [row["step"] for row in unbroken]
    for name in ("train/loss", "train/grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in unbroken], rel=10 * ROUNDING), name
    assert validations(stages.run) == validations(runs["2 ranks"])
