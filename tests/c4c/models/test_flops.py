"""Floating point operations, against torch's own count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from c4c.models import backbone, flops
from c4c.models.clip4clip import CLIP4Clip


def test_of_a_pair_as_torch_counts_them():
    spec = backbone.named("ViT-demo-16")
    model = CLIP4Clip(spec).train()  # in evaluation torch fuses attention, which it does not count
    frames, mask = torch.zeros(2, 3, 3, 64, 64), torch.ones(2, 3).bool()
    with FlopCounterMode(display=False) as counter:
        model.encode_video(frames, mask)
        model.encode_text(torch.ones(2, 20).long())
    assert 2 * flops.per_pair(spec, 3, 20) == pytest.approx(counter.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as counter:
        model.encode_video(frames, mask)
        model.encode_text(torch.ones(5, 20).long())
    assert 2 * flops.per_pair(spec, 3, 20, captions=2.5) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_3d_patches_as_torch_counts_them():
    spec = backbone.named("ViT-demo-16")
    model = CLIP4Clip(spec, linear_patch="3d").train()
    with FlopCounterMode(display=False) as counter:
        model.encode_video(torch.zeros(2, 3, 3, 64, 64), torch.ones(2, 3).bool())
        model.encode_text(torch.ones(2, 20).long())
    counted = counter.get_total_flops()
    assert 2 * flops.per_pair(spec, 3, 20, linear_patch="3d") == pytest.approx(counted, rel=0.02)
    assert 2 * flops.per_pair(spec, 3, 20) < 0.9 * counted


def test_a_known_gpus_peak(monkeypatch):
    gpu = torch.device("cuda", 0)
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Voodoo 2", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert flops.peak(gpu, "bf16") == peak
    assert flops.peak(gpu, "fp32") is None
    assert flops.peak(torch.device("cpu"), "bf16") is None
