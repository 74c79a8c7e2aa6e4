"""What the card itself can do: the ceilings that the other parts are held against."""

import torch
from torch import Tensor

from bench.gpu_parts.clock import rate_twice
from bench.gpu_parts.parts import FRAMES, Given

PATCHES, WIDTH, HIDDEN = 50, 768, 3072  # of ViT-B/32: tokens a picture, width, width of the MLP


def ceilings(given: Given) -> None:
    """Matrix products in TFLOP/s, copies in GB/s (what is copied, not read plus written); each measured twice."""
    device = given.device
    on_gpu = device.type == "cuda"
    seconds = given.seconds / 8
    torch.set_float32_matmul_precision("highest")
    side = 8192 if on_gpu else 512
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        given.note(**{f"tflops_{name}": _product(side, side, side, dtype, seconds, device)})
    if on_gpu:
        torch.set_float32_matmul_precision("high")
        given.note(tflops_tf32=_product(side, side, side, torch.float32, seconds, device))
    rows = (given.batch_size if on_gpu else 1) * FRAMES * PATCHES
    given.note(tflops_bf16_mlp=_product(rows, WIDTH, HIDDEN, torch.bfloat16, seconds, device))
    size = (1 << 30) if on_gpu else (64 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    given.note(gb_per_s_device_copy=_copies(torch.empty_like(source), source, seconds))
    if on_gpu:
        size = min(size, given.batch_size * FRAMES * 224 * 224 * 3)  # a batch of frames
        there, here = source[:size], torch.empty(size, dtype=torch.uint8, pin_memory=True)
        given.note(gb_per_s_host_to_device_pinned=_copies(there, here, seconds))
        given.note(gb_per_s_device_to_host_pinned=_copies(here, there, seconds))
        given.note(gb_per_s_host_to_device_pageable=_copies(there, torch.empty(size, dtype=torch.uint8), seconds))
    else:
        given.note(left_out_here="copies to a device and TF32 need a GPU")


def _product(m: int, k: int, n: int, dtype: torch.dtype, seconds: float, device: torch.device) -> list[float]:
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return rate_twice(lambda: torch.mm(a, b, out=out), 2 * m * k * n / 1e12, seconds, device)


def _copies(to: Tensor, source: Tensor, seconds: float) -> list[float]:
    device = to.device if to.device.type == "cuda" else source.device
    return rate_twice(lambda: to.copy_(source, non_blocking=True), source.numel() / 1e9, seconds, device)
