"""Who is which rank, from what launchers put into the environment."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from c4c import launched
from c4c.launched import command_again
from c4c.zero import distributed
from c4c.zero.distributed import _name_ranks, common_word


def named(**env) -> dict:
    env = {k: str(v) for k, v in env.items()}
    _name_ranks(env)
    return env


def test_alone():
    env = named()
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"]) == ("0", "0", "1", "127.0.0.1")
    assert 0 < int(env["MASTER_PORT"]) < 65536


def test_launchers_that_say_all_are_left_alone():
    given = {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": 5,
             "SLURM_STEP_NUM_TASKS": 9, "SLURM_PROCID": 8}  # fmt: skip
    assert named(**given) == {k: str(v) for k, v in given.items()}


def test_deepspeeds_launcher_calls_it_local_size():
    assert (
        named(RANK=3, LOCAL_RANK=1, WORLD_SIZE=4, LOCAL_SIZE=2, MASTER_ADDR="a", MASTER_PORT=5)["LOCAL_WORLD_SIZE"]
        == "2"
    )


def test_launchers_that_start_a_run_again(monkeypatch):
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        assert not distributed.restarted()
        monkeypatch.setenv(name, "0")
        assert not distributed.restarted()
        monkeypatch.setenv(name, "2")
        assert distributed.restarted()


SLURM = {"SLURM_STEP_NUM_TASKS": 8, "SLURM_PROCID": 5, "SLURM_LOCALID": 1, "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
         "SLURM_STEP_NUM_NODES": 2, "SLURM_JOB_ID": 123456}  # fmt: skip


def test_srun():
    env = named(**SLURM, MASTER_ADDR="node1")
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == ("5", "8", "1", "4")
    assert env["MASTER_PORT"] == named(**SLURM | {"SLURM_PROCID": 0}, MASTER_ADDR="node1")["MASTER_PORT"]


def test_srun_on_several_machines_has_to_say_where_the_first_is():
    with pytest.raises(ValueError, match=r"export MASTER_ADDR=\$\(scontrol show hostnames"):
        named(**SLURM)
    assert named(**SLURM | {"SLURM_STEP_NUM_NODES": 1})["MASTER_ADDR"] == "127.0.0.1"


def test_a_batch_script_without_srun_is_one_rank():
    assert named(SLURM_NTASKS=8, SLURM_PROCID=0)["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("env", "command"),
    [
        ({}, "python launch/train.py --cfg 'a b.yaml' x=1 run.resume=auto"),
        ({"LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, "deepspeed --num_accelerators 2 launch/train.py"),
        ({"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, "torchrun --nproc_per_node 2 launch/train.py"),
        ({"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "4"}, "srun python launch/train.py"),
    ],
)  # fmt: skip
def test_the_command_that_goes_on(env, command, monkeypatch):
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launched.os, "environ", env)
    argv = ["launch/train.py", "--local_rank=1", "--cfg", "a b.yaml", "x=1", "run.resume=auto"]
    monkeypatch.setattr(launched.sys, "argv", argv)
    again = command_again("run.resume=auto")
    assert again.startswith(command)
    assert again.count("run.resume=auto") == 1
    assert "local_rank" not in again


def test_ranks_that_start_again_do_not_meet_the_dead():
    """Three starts on one store; of the second only the first rank comes, and of the third the last is late."""
    store = dist.HashStore()
    said = [_words(store, ranks=(0, 1, 2))]
    with pytest.raises(ValueError, match=r"rank 0 waited 0\.2 s for rank 1 to start"):
        common_word(store, 0, 3, 0.2)
    said.append(_words(store, ranks=(1, 2, 0)))
    for words in said:
        assert len(set(words)) == 1
    assert said[0][0] != said[1][0]


def _words(store, ranks) -> list[str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        waiting = []
        for rank in ranks:
            waiting.append(pool.submit(common_word, store, rank, len(ranks), 20))
            time.sleep(0.1)
        return [w.result() for w in waiting]
