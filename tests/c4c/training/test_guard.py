"""Signals, ranks that differ or fall silent, steps that are not finite, memory that does not suffice."""

import json
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from c4c.errors import device_failure, exit_code, lost_peer, speak
from c4c.training import agreement, watchdog
from c4c.training.agreement import agree
from c4c.training.bad_steps import BAD_STEPS, BadSteps
from c4c.training.early_stopping import EarlyStopping
from c4c.training.memory import out_of_memory
from c4c.training.signals import Stop
from c4c.training.watchdog import Watchdog


def test_a_signal_only_asks_to_stop():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher sends both
        assert stop.signal == "SIGINT"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_terminal_that_is_closed_asks_to_stop_too():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == "SIGHUP"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ranks_that_differ_are_named(monkeypatch):
    def gathers(others):
        def gather(out, mine):
            out[:] = [others, mine]

        monkeypatch.setattr(agreement.dist, "all_gather_object", gather)

    gathers({"train.lr": 1e-4, "contents of data.train": "abc"})
    agree({"train.lr": 1e-4, "contents of data.train": "abc"}, 2)
    with pytest.raises(ValueError, match="the ranks do not agree") as caught:
        agree({"train.lr": 1e-3, "contents of data.train": "abd"}, 2)
    assert "train.lr is 0.0001 on rank 0 and 0.001 on rank 1" in str(caught.value)
    assert "contents of data.train is abc on rank 0 and abd on rank 1" in str(caught.value)
    agree({"train.lr": 1}, 1)


def test_bad_steps_are_counted_and_listed(tmp_path):
    bad = BadSteps(tmp_path, most=3)
    assert bad.note(1, False, 1.0, ["a"], 1, 0) == ""
    for step in (2, 3):
        assert f"step {step} was skipped: its loss is nan" in bad.note(step, True, float("nan"), ["a", "b"], 1, 0)
    assert bad.note(4, False, 1.0, ["a"], 1, 0) == ""  # only those in a row end a run
    bad.note(5, True, float("inf"), ["c"], 1, 0)
    bad.note(6, True, float("inf"), ["c"], 1, 0)
    with pytest.raises(ValueError, match=r"makes 3 in a row \(train\.max_bad_steps=3\).*--replay 7"):
        bad.note(7, True, float("inf"), ["d"], 1, 0)
    assert bad.total == 5
    rows = [json.loads(line) for line in (tmp_path / BAD_STEPS).read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 5, 6, 7]
    assert rows[0] == {"step": 2, "loss": "nan", "keys": ["a", "b"]}
    assert BadSteps(tmp_path, 3, done=5).total == 3  # of a run that goes on behind step 5
    assert BadSteps(tmp_path, 3).total == 0


def test_bad_steps_in_a_row_go_on_over_a_resume(tmp_path):
    first = BadSteps(tmp_path, most=4)
    for step in (1, 3, 4):
        first.note(step, True, float("nan"), ["a"], 1, 0)
    resumed = BadSteps(tmp_path, most=4, done=4)  # steps 3 and 4 were bad
    resumed.note(5, True, float("nan"), ["a"], 1, 0)
    with pytest.raises(ValueError, match="makes 4 in a row"):
        resumed.note(6, True, float("nan"), ["a"], 1, 0)
    after_a_good_one = BadSteps(tmp_path, most=4, done=2)
    for step in (3, 4, 5):
        after_a_good_one.note(step, True, float("nan"), ["a"], 1, 0)


class Store:
    """What ranks tell each other, without a network."""

    def __init__(self):
        self.told: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.told[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.told[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.told for key in keys)

    def clone(self) -> "Store":
        return self

    def set_timeout(self, _) -> None:
        pass


@pytest.fixture
def store(monkeypatch):
    store = Store()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(watchdog, "OTHERS_FIRST_S", 0.2)
    return store


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named(store, capsys):
    ended = threading.Event()
    with (
        Watchdog(0, 2, 0.4, end=lambda code: ended.set()) as first,
        Watchdog(1, 2, 60, end=lambda code: None) as second,
    ):
        second._interval = 0.05
        second._stopped.set()
        for watch in (first, second):
            watch.now("waiting for data")
        first.now("at step 7")  # and the second never gets there
        alive = threading.Thread(target=lambda: [second._publish() or time.sleep(0.02) for _ in range(100)])
        alive.start()
        assert ended.wait(60)
        alive.join()
    err = capsys.readouterr().err
    assert "error: no step for 0 s (engine.timeout_s): rank 1 (pid" in err
    assert f"rank 1 (pid {os.getpid()} on " in err
    assert "is waiting for data since" in err
    assert "rank 0 (" not in err


def test_a_rank_that_is_gone_is_named(store, capsys):
    ended = threading.Event()
    with Watchdog(0, 2, 0.4, end=lambda code: ended.set()) as watch:
        watch.now("at step 7")
        assert ended.wait(60)
    assert "rank 1 (never connected) does not respond" in capsys.readouterr().err


@pytest.mark.slow
def test_a_first_rank_that_is_stopped_is_named(store, capsys, monkeypatch):
    """It holds the store: whoever asks that waits, and the watch must not wait with them."""
    ended, never = threading.Event(), threading.Event()
    monkeypatch.setattr(store, "check", lambda keys: never.wait(20))
    with Watchdog(1, 2, 0.4, end=lambda code: ended.set()) as watch:
        watch.now("at step 7")
        assert ended.wait(60)
        never.set()
    assert "rank 0, which all ranks connect to, does not respond: its process is stopped" in capsys.readouterr().err


def test_a_run_that_goes_on_is_left_alone(store, capsys):
    with Watchdog(0, 2, 0.4, end=lambda code: pytest.fail("ended")) as watch:
        for step in range(12):
            watch.now(f"at step {step}")
            time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_memory_that_does_not_suffice():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    said = out_of_memory(caught.value, "each rank encodes 32 pairs", "train.micro_batch_size=16")
    assert said.startswith("out of memory: each rank encodes 32 pairs; the machine has ")
    assert "GiB. Set train.micro_batch_size=16 (" in said
    assert "can't allocate memory" in said
    assert out_of_memory(RuntimeError("shapes do not match"), "a", "b") is None


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    dist.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.7\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc async 4 bytes"
    ),
    dist.DistBackendError(
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:40])
@pytest.mark.parametrize("pieces", [0, 5])
def test_memory_of_a_gpu_that_does_not_suffice(error, pieces, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 60 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: (60 - pieces) * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 59 * 2**30)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    said = out_of_memory(error, "each rank encodes 32 pairs", "train.micro_batch_size=16")
    assert said.startswith(
        "out of memory: each rank encodes 32 pairs; the GPU has 80.0 GiB, of which the model has used 59.0 "
    )
    assert "decoders and other programs have 19.0, and 1.0 are free" in said
    assert ("5.0 more in pieces: PYTORCH_CUDA_ALLOC_CONF" in said) is bool(pieces)
    assert "Set train.micro_batch_size=16 (" in said and "\n" not in said
    assert not lost_peer(error)
    assert device_failure(error).startswith("out of memory: use smaller batches")


LOST = [
    "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error, NCCL version 2.27.7\nncclRemoteError: "
    "A call failed possibly due to a network error or a remote process exiting prematurely.\nLast error:\nConnection closed",
    "NCCL communicator was aborted on rank 0.",
    "NCCL communicator encountered error set by ProcessGroupNCCL: NCCL error: unhandled system error",
    "NCCL error in: NCCLUtils.cpp:77, unhandled system error (run with NCCL_DEBUG=INFO for details)\nncclSystemError: System call "
    "(e.g. socket, malloc) or external library call failed or device error.\nLast error:\nsocketProgress: Connection closed by "
    "remote peer node1<4711>",
    "[pair.cc:561] Connection closed by peer [127.0.0.1]:48521",
]


@pytest.mark.parametrize("text", LOST, ids=lambda text: text[:40])
def test_a_rank_that_is_gone_is_recognised(text, monkeypatch, capsys):
    monkeypatch.setattr("c4c.errors.time.sleep", lambda _: None)
    assert lost_peer(dist.DistBackendError(text))
    speak(dist.DistBackendError(text), 0)
    said = capsys.readouterr().err
    assert said.startswith("error: the connection to another rank broke (") and said.count("\n") == 1


FAILURES = {
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be": "a computation on the GPU failed: continue",
    "CUDA error: device-side assert triggered": "CUDA_LAUNCH_BLOCKING=1",
    "CUDA error: uncorrectable ECC error encountered": "the GPU itself failed: look into dmesg",
    "CUDA error: no kernel image is available for execution on the device": "this torch has no code for this GPU",
    "CUDA driver version is insufficient for CUDA runtime version": "NVIDIA's driver is too old",
    "The NVIDIA driver on your system is too old (found version 11040)": "NVIDIA's driver is too old",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`": "nvidia-smi",
    "NCCL error in: a.cpp:1, invalid usage\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4b000": "two ranks use the same GPU: start as many ranks",
    "NCCL error in: a.cpp:1, unhandled system error\nncclSystemError: System call failed.\nLast error:\nError while creating shared "
    "memory segment /dev/shm/nccl-aB (size 33554432)": "NCCL found too little shared memory: give the container more",
    "NCCL error in: a.cpp:1, internal error\nncclInternalError: Internal check failed.\nLast error:\nno socket": "NCCL_DEBUG=WARN",
    "CUDA error: an error that nobody has seen yet": "the GPU reported an error: continue with run.resume=auto",
}  # fmt: skip


@pytest.mark.parametrize("text", FAILURES, ids=lambda text: text[:50])
def test_a_gpu_that_fails_is_told_in_one_sentence(text, monkeypatch, capsys):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr("c4c.errors.leave", leave)
    monkeypatch.setattr("c4c.errors.open_streams", lambda: None)

    def command():
        raise torch.AcceleratorError(text) if text.startswith("CUDA error") else RuntimeError(text)

    assert not lost_peer(RuntimeError(text))
    with pytest.raises(Left, match="1"):
        exit_code(command)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert FAILURES[text] in said


def test_a_bug_is_not_a_failure_of_the_gpu():
    assert device_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")) is None

    def command():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        exit_code(command)


def test_every_ranks_error_is_told_once(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("c4c.errors.time.sleep", waited.append)
    speak(ValueError("a"), 0)
    assert waited == []
    speak(ValueError("b"), 3)
    assert waited == [watchdog.OTHERS_FIRST_S]
    assert capsys.readouterr().err == "error: a\nerror on rank 3: b\n"
    gloo = RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:48521")
    assert lost_peer(gloo) and not lost_peer(RuntimeError("shapes"))
    speak(gloo, 0)
    assert "another rank broke" in capsys.readouterr().err


def test_patience_is_lost_after_so_many_validations_without_a_better_one():
    early = EarlyStopping(2, [])
    seen = []
    for score in (3.0, 5.0, 5.0, 6.0, 1.0, 6.0):  # as good is not better
        assert not early.due
        early.note(score, 1, torch.device("cpu"))
        seen.append(early.due)
    assert seen == [False] * 5 + [True]
    assert EarlyStopping(2, [5.0, 5.0, 4.0]).due and not EarlyStopping(3, [5.0, 5.0, 4.0]).due
    assert not EarlyStopping(0, [5.0, 4.0, 3.0]).due
