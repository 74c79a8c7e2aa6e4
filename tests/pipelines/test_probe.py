"""A GPU's decoders are tried in processes of their own, so that one that crashes, hangs or errs is found."""

import json
import sys
import warnings

import pytest
import torch
from nvidia.dali.pipeline import Pipeline

from pipelines import probe
from pipelines.config import DataConfig
from pipelines.lanes import Lane, _where
from tests.pipelines.test_loader import SMALL

pytestmark = pytest.mark.slow  # imports DALI

CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
HANG = "import time; time.sleep(60)"
WRONG = "print('{\"worst_psnr_db\": 12.3}')"
RIGHT = "print('{\"worst_psnr_db\": 47.0}')"
REFUSED = "raise RuntimeError('nvImageCodec failure: #8')"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    probe.tried.cache_clear()
    probe.warn_once.cache_clear()
    yield
    probe.tried.cache_clear()


def doing(monkeypatch, **programs: str) -> list[str]:
    asked: list[str] = []

    def command(form, device, load):
        asked.append(form)
        return [sys.executable, "-c", programs[form]]

    monkeypatch.setattr(probe, "_command", command)
    return asked


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (CRASH, "it crashes (SIGSEGV)"),
        (WRONG, "its frames differ from the CPU's (12.3 dB, at least 38 are expected)"),
        (REFUSED, "RuntimeError: nvImageCodec failure: #8"),
        (RIGHT, None),
    ],
)
def test_what_becomes_of_a_try(monkeypatch, program, why):
    doing(monkeypatch, roi=program)
    assert probe.tried("roi", "cuda:0", 0.0) == why


def test_one_that_hangs_is_ended(monkeypatch):
    doing(monkeypatch, roi=HANG)
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.5)
    assert probe.tried("roi", "cuda:0", 0.0) == "no answer within 0.5 s"


def test_a_gpu_is_tried_once_and_remembered(monkeypatch):
    asked = doing(monkeypatch, roi=CRASH)
    for _ in range(2):
        probe.tried.cache_clear()  # as another process
        assert probe.tried("roi", "cuda:0", 0.0) == "it crashes (SIGSEGV)"
    assert asked == ["roi"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "another GPU")
    probe.tried.cache_clear()
    probe.tried("roi", "cuda:0", 0.0)
    assert asked == ["roi", "roi"]


@pytest.mark.parametrize("program", [REFUSED, "", "raise SystemExit(3)"])
def test_what_may_pass_another_time_is_not_remembered(monkeypatch, program):
    asked = doing(monkeypatch, roi=program)
    for _ in range(2):
        probe.tried.cache_clear()
        assert probe.tried("roi", "cuda:0", 0.0)
    assert asked == ["roi", "roi"]


def test_a_folder_without_locks_is_no_error(monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    asked = doing(monkeypatch, roi=RIGHT)
    monkeypatch.setattr(probe.fcntl, "flock", refuse)
    assert probe.tried("roi", "cuda:0", 0.0) is None and asked == ["roi"]


CUDA = torch.device("cuda", 0)


def test_the_first_that_passes_is_used(monkeypatch):
    doing(monkeypatch, roi=RIGHT)
    assert _where(CUDA, "intra", DataConfig()) == (CUDA, True)


def test_a_crash_leads_to_whole_pictures(monkeypatch):
    doing(monkeypatch, roi=CRASH, whole=RIGHT)
    with pytest.warns(
        UserWarning, match=r"roi: it crashes \(SIGSEGV\); whole pictures are decoded \(data\.jpeg_crop=whole\)"
    ):
        assert _where(CUDA, "intra", DataConfig()) == (CUDA, False)


def test_where_neither_passes_the_cpu_decodes(monkeypatch):
    doing(monkeypatch, roi=CRASH, whole=WRONG, video=REFUSED)
    with pytest.warns(UserWarning, match=r"the CPU decodes \(data\.decode=cpu\)"):
        assert _where(CUDA, "intra", DataConfig()) == (torch.device("cpu"), True)
    with pytest.warns(UserWarning, match="NVDEC on cuda:0: .*the CPU decodes"):
        assert _where(CUDA, "video", DataConfig()) == (torch.device("cpu"), True)
    with pytest.raises(ValueError, match=r"data\.decode=gpu: no decoder of cuda:0 passes"):
        _where(CUDA, "intra", DataConfig(decode="gpu"))
    with pytest.raises(ValueError, match=r"data\.decode=gpu: no decoder of cuda:0 passes"):
        _where(CUDA, "video", DataConfig(decode="gpu"))


def test_what_is_asked_for_is_not_tried(monkeypatch):
    asked = doing(monkeypatch)
    assert _where(CUDA, "intra", DataConfig(jpeg_crop="whole")) == (CUDA, False)
    assert _where(CUDA, "intra", DataConfig(decode="cpu")) == (torch.device("cpu"), True)
    assert _where(torch.device("cpu"), "intra", DataConfig()) == (torch.device("cpu"), True)
    assert asked == []


def test_the_start_says_what_decodes(monkeypatch, numbered, tmp_path):
    monkeypatch.setattr(Pipeline, "build", lambda self: None)
    said = []
    for programs in ({"roi": RIGHT}, {"roi": CRASH, "whole": RIGHT}, {"roi": CRASH, "whole": CRASH}):
        doing(monkeypatch, **programs)
        probe.tried.cache_clear()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(len(said))))
        with warnings.catch_warnings(action="ignore"):
            lane = Lane(numbered.intra, SMALL, CUDA, 4, training=True)
        said.append(lane.how)
        lane.close()
    assert said == [
        "intra lane, cuda:0 decodes only what the crop needs",
        "intra lane, cuda:0 decodes whole pictures",
        "intra lane, the CPU decodes",
    ]


def test_a_gpu_that_is_asked_for_and_not_there_is_told():
    with pytest.warns(UserWarning, match=r"data\.decode=gpu: there is no GPU that torch can use, so the CPU decodes"):
        assert _where(torch.device("cpu"), "intra", DataConfig(decode="gpu")) == (torch.device("cpu"), True)


@pytest.mark.parametrize("form", ["roi", "whole"])
def test_the_try_itself_on_a_cpu(capsys, form):
    assert probe.main([form, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["worst_psnr_db"] is None, "the CPU's frames are its own"
