"""Whose AdamW updates the weights on a GPU: what has to be there to compile DeepSpeed's, and what follows if it is not."""

import os
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from c4c.settings import EngineConfig, TrainConfig
from c4c.zero import adam
from c4c.zero.config import deepspeed_config

TRAIN = TrainConfig(batch_size=8)


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def headers(folder: Path, names: tuple[str, ...] = adam.HEADERS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("")
    return folder


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A toolkit in a folder, with nvcc and all headers; nothing else is looked at."""
    toolkit = tmp_path / "cuda"
    executable(toolkit / "bin" / "nvcc")
    headers(toolkit / "include")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit))
    monkeypatch.setattr(adam, "_package_folders", list)
    monkeypatch.setattr(adam, "_compiled_before", lambda: False)
    for name in ("CPATH", "CPLUS_INCLUDE_PATH", "CUDA_INC_PATH", "PYTORCH_NVCC", "CXX"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    return toolkit


def test_a_whole_toolkit_compiles(machine):
    assert adam.missing_to_compile() == ""


def test_no_toolkit(machine, monkeypatch):
    (machine / "bin" / "nvcc").unlink()
    assert adam.missing_to_compile() == f"there is no nvcc in {machine / 'bin'}"
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert adam.missing_to_compile() == "there is no nvcc"


def test_no_compiler_for_the_host(machine, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert adam.missing_to_compile() == "there is no C++ compiler"


def test_no_headers_of_python(machine, monkeypatch):
    monkeypatch.setattr(adam.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "Python.h" in adam.missing_to_compile()


def test_nvcc_without_headers(machine):
    """As pip and conda have it: nvcc comes alone."""
    for name in ("cusparse.h", "cublas_v2.h"):
        (machine / "include" / name).unlink()
    assert adam.missing_to_compile() == "nvcc is there, but the CUDA headers cusparse.h, cublas_v2.h are not"


@pytest.mark.parametrize("where", ["CPATH", "CPLUS_INCLUDE_PATH", "CUDA_INC_PATH", "targets"])
def test_headers_elsewhere(where, machine, tmp_path, monkeypatch):
    (machine / "include" / "cusparse.h").unlink()
    if where == "targets":
        headers(machine / "targets" / "x86_64-linux" / "include", ("cusparse.h",))
    else:
        found = headers(tmp_path / "elsewhere", ("cusparse.h",))
        monkeypatch.setenv(where, f"/nowhere{os.pathsep}{found}" if where != "CUDA_INC_PATH" else str(found))
    assert adam.missing_to_compile() == ""


def test_headers_of_nvidias_packages_are_shown_to_the_compiler(machine, tmp_path, monkeypatch):
    (machine / "include" / "cusparse.h").unlink()
    packages = [headers(tmp_path / "nvidia" / name / "include", has) for name, has in
                (("cu13", ("cusparse.h",)), ("cudnn", ("cudnn.h",)))]  # fmt: skip
    monkeypatch.setattr(adam, "_package_folders", lambda: packages)
    monkeypatch.setenv("CPATH", "/already")
    assert adam.missing_to_compile() == ""
    assert os.environ["CPATH"] == f"/already{os.pathsep}{packages[0]}"
    assert adam.missing_to_compile() == ""
    assert os.environ["CPATH"].count("cu13") == 1


def choice(extra: dict | None = None, train: TrainConfig = TRAIN, world: int = 1, gpu: bool = True, **engine):
    return adam.use_torchs_adam(EngineConfig(**engine), train, world, extra or {}, gpu)


ASKED = {"optimizer": {"params": {"torch_adam": True}}}
REFUSED = {"optimizer": {"params": {"torch_adam": False}}}


def test_a_machine_with_a_toolkit_takes_deepspeeds(machine):
    assert choice() == (False, "")


def test_a_machine_without_takes_torchs_and_says_so(machine, monkeypatch):
    (machine / "bin" / "nvcc").unlink()
    used, note = choice()
    assert used
    assert note == (
        f"optimizer: torch's fused AdamW; DeepSpeed's cannot be compiled here (there is no nvcc in {machine / 'bin'})"
    )
    assert choice(REFUSED) == (False, "")
    assert choice(offload="optimizer") == (False, "")  # DeepSpeed's Adam on the host, which g++ compiles
    assert choice(gpu=False) == (False, "")
    monkeypatch.setattr(adam, "_compiled_before", lambda: True)
    assert choice() == (False, "")


def test_who_asks_for_torchs_gets_it(machine):
    assert choice(ASKED) == (True, "")
    assert choice(ASKED, gpu=False) == (True, "")


def test_one_machine_without_decides_for_all(machine, monkeypatch):
    def gather(out, own):
        out[:] = [own, "", "there is no nvcc"]

    monkeypatch.setattr(adam.dist, "all_gather_object", gather)
    used, note = choice(world=3)
    assert used and note.endswith("(there is no nvcc, on the machine of rank 2)")


def test_what_torchs_cannot_do_is_refused(machine):
    with pytest.raises(ValueError, match=r"torch_adam=maybe: must be true or false"):
        adam.use_torchs_adam(
            EngineConfig(), TrainConfig(batch_size=8), 1, {"optimizer": {"params": {"torch_adam": "maybe"}}}, True
        )
    bert = TrainConfig(batch_size=8, bias_correction=False)
    assert choice(train=bert) == (False, "")
    with pytest.raises(
        ValueError, match=r"train\.bias_correction=false is not possible with .*torch_adam=true\). Set train"
    ):
        choice(ASKED, bert)
    (machine / "bin" / "nvcc").unlink()
    with pytest.raises(
        ValueError, match=r"cannot be compiled: there is no nvcc.* or install the CUDA toolkit$"
    ) as caught:
        choice(train=bert)
    assert "\n" not in str(caught.value)


def test_deepspeed_is_told():
    params = deepspeed_config(EngineConfig(), TRAIN, 2, {}, torchs_adam=True)["optimizer"]["params"]
    assert params == {
        "torch_adam": True, "fused": True, "lr": TRAIN.lr, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.05,
    }  # fmt: skip
    extra = {"optimizer": {"params": {"torch_adam": True, "set_grad_none": True, "amsgrad": True}}}
    params = deepspeed_config(EngineConfig(), TRAIN, 2, extra, torchs_adam=True)["optimizer"]["params"]
    assert params["amsgrad"] and "set_grad_none" not in params
