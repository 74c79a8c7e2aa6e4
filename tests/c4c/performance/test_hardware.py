"""GPUs by name, and what is assumed beyond their data sheets."""

from dataclasses import fields

import pytest

from c4c.performance.assumptions import Assumptions, assume, describe
from c4c.performance.hardware import GPUS, gpu_named, gpu_of_device, peak_flops


def refused(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    return str(caught.value)


def test_a_gpu_is_found_by_its_name_whatever_the_case():
    assert gpu_named("h100").name == "H100"
    assert gpu_named("rtx 4090").name == "RTX-4090"
    assert gpu_named("A100-40").memory_gib < 40 < gpu_named("A100-80").memory_gib


@pytest.mark.parametrize(
    ("name", "near"), [("H10", "H100"), ("a100", "A100-40 or A100-80"), ("4090", "RTX-4090"), ("L40", "L40S")]
)
def test_an_unknown_gpu_names_the_nearest(name, near):
    assert f"unknown GPU; did you mean {near}?" in refused(gpu_named, name)


def test_an_unknown_gpu_far_from_all_lists_them():
    message = refused(gpu_named, "voodoo")
    assert "did you mean" not in message and all(gpu.name in message for gpu in GPUS)


def test_every_gpu_has_a_peak_that_the_mfu_of_training_uses():
    assert {gpu.name: gpu.flops for gpu in GPUS} == {
        "A100-40": 312e12, "A100-80": 312e12, "H100": 989e12, "H200": 989e12, "L4": 121e12, "L40S": 362e12,
        "RTX-4090": 165e12, "B200": 2250e12,
    }  # fmt: skip
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("Voodoo 2") is None
    assert peak_flops("NVIDIA GH200 480GB") == 989e12 and peak_flops("NVIDIA A10G") == 70e12
    assert peak_flops("Tesla V100-SXM2-32GB") == 125e12 and peak_flops("Tesla T4") == 65e12


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA RTX A1000",
        "NVIDIA RTX A4000",
        "NVIDIA T400",
        "NVIDIA T4G",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_a_name_that_only_begins_like_one_is_another_gpu(device):
    assert peak_flops(device) is None and gpu_of_device(device, 16.0) is None


@pytest.mark.parametrize(
    ("device", "memory_gib", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.5, "A100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA L40S", 44.5, "L40S"),
        ("NVIDIA L4", 22.0, "L4"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX-4090"),
        ("NVIDIA H100 PCIe", 79.1, None),  # another card than the one described
        ("Voodoo 2", 0.01, None),
    ],
)
def test_the_gpu_of_this_machine(device, memory_gib, name):
    gpu = gpu_of_device(device, memory_gib)
    assert (gpu and gpu.name) == name


def test_assumptions_are_set_by_name():
    assumed = assume(["gemm=0.5", "overlap=0", "node=4"])
    assert (assumed.gemm, assumed.overlap, assumed.node) == (0.5, 0, 4)
    assert assumed.bandwidth == Assumptions().bandwidth


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gem=0.5", "unknown assumption gem; did you mean gemm?"),
        ("colour=3", "unknown assumption colour; known are gemm, bandwidth,"),
        ("gemm=1.5", "must be a number above 0, 1 at most"),
        ("gemm=0", "must be a number above 0, 1 at most"),
        ("overlap=-1", "must be a number, 0 or above, 1 at most"),
        ("jpeg_cpu=nan", "must be a number above 0"),
        ("jpeg_cpu=fast", "must be a number above 0"),
        ("gemm", "must be a number above 0"),
    ],
)
def test_assumptions_that_cannot_be(word, message):
    assert refused(assume, [word]).startswith(f"--assume {word}: {message}")


def test_every_assumption_is_described_and_those_that_were_set_are_marked():
    lines = describe(assume(["gemm=0.5"]))
    assert {line[2:].split("=")[0] for line in lines} == {f.name for f in fields(Assumptions)}
    assert [line for line in lines if line.startswith("*")] == [line for line in lines if "gemm=0.5" in line] != []
