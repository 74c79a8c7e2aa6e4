"""Where the step's time goes on the device: kernels, copies, synchronisations, and gaps between kernels."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch

from bench.gpu_parts.clock import LEAST, WARM, synchronise, timed
from bench.gpu_parts.parts import Given
from bench.gpu_parts.step import build_fixed, started

TOP, LONGEST = 20, 8  # rows
GAP_US = 5.0  # a shorter pause between kernels is their launch itself
# the first pattern that a kernel's name matches; names of cuBLAS, CUTLASS, cuDNN, flash attention, inductor, PyTorch and Apex
KINDS = (
    ("copies", r"memcpy|memset"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|fprop|wgrad|dgrad|convol|conv2d|splitk|triton_tem"),
    ("optimizer", r"multi_tensor|adam|lamb"),
    ("communication", r"nccl"),
    (
        "element-wise and reductions",
        r"element|norm|softmax|reduce|gelu|triton|copy|cat|index|gather|scatter|fill|add|mul",
    ),
)


class Span(NamedTuple):
    """Something that ran from `start` to `end`, in microseconds."""

    name: str
    start: float
    end: float


def step(given: Given) -> None:
    """torch.profiler's account of some steps, after as many steps without it that tell how long they really take."""
    with started(given) as (config, device):
        made = build_fixed(config, device)
        steps = LEAST[device.type]
        for _ in range(WARM[device.type]):
            made.step()
        step_s = timed(made.step, given.seconds / 4, device)["step_s"]
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        synchronise(device)
        with torch.profiler.profile(activities=kinds) as profiler:
            for _ in range(steps):
                made.step()
            synchronise(device)
        events = profiler.events() or []
        given.note(step_s=step_s, steps=steps, **on_host(_spans(events, torch.autograd.DeviceType.CPU), steps))
        if device.type == "cuda":
            given.note(**on_device(_spans(events, torch.autograd.DeviceType.CUDA), steps, step_s))
        else:
            given.note(left_out_here="kernels, copies and gaps need a GPU; operators of the host are listed instead")
            rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)[:TOP]
            given.note(operators=[
                {"name": row.key, "ms": row.self_cpu_time_total / 1000 / steps, "calls": row.count / steps} for row in rows
            ])  # fmt: skip


def _spans(events: Iterable, kind) -> list[Span]:
    """Annotations are left out: they cover kernels, and pauses between them."""
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == kind and not event.is_user_annotation
    ]


def on_host(spans: list[Span], steps: int) -> dict:
    """Launches, and calls that make the host wait, a step."""
    waits: dict[str, list[float]] = defaultdict(list)
    launches = 0
    for name, start, end in spans:
        launches += bool(re.match(r"cu(da)?LaunchKernel", name))
        if "Synchronize" in name or name == "aten::_local_scalar_dense":
            waits[name].append(end - start)
    found = {name: {"calls": len(each) / steps, "ms": sum(each) / 1000 / steps} for name, each in sorted(waits.items())}
    return {"launches": launches / steps, "synchronisations": found}


def on_device(spans: list[Span], steps: int, step_s: float) -> dict:
    """Of a step: the kernels and copies that take longest, time by kind, and the gaps.

    `busy_pct` is the time that something ran over `step_s`, which was measured without the profiler: under it, the host is
    slower and the gaps are longer.
    """
    by_name, kinds, busy, gaps = defaultdict(list), defaultdict(float), 0.0, []
    until, before = None, ""
    for name, start, end in sorted(spans, key=lambda span: span.start):
        by_name[name].append(end - start)
        kinds[kind_of(name)] += end - start
        if until is not None and start - until > GAP_US:
            gaps.append({"us": start - until, "after": before[:80], "before": name[:80]})
        busy += max(0.0, end - max(start, start if until is None else until))
        if until is None or end > until:
            until, before = end, name
    rows = [
        {"name": name[:160], "kind": kind_of(name), "ms": sum(each) / 1000 / steps, "calls": len(each) / steps}
        for name, each in by_name.items()
    ]
    rows.sort(key=lambda row: -row["ms"])
    return {
        "kernels": [row for row in rows if row["kind"] != "copies"][:TOP],
        "copies": [row for row in rows if row["kind"] == "copies"],
        "kinds_ms": {kind: us / 1000 / steps for kind, us in sorted(kinds.items(), key=lambda item: -item[1]) if us},
        # as c4c.performance.predict cuts a step
        "matrix_products_ms": (kinds["matrix products"] + kinds["attention"]) / 1000 / steps,
        "memory_bound_ms": (kinds["element-wise and reductions"] + kinds["other"]) / 1000 / steps,
        "optimizer_ms": kinds["optimizer"] / 1000 / steps,
        "busy_ms": busy / 1000 / steps,
        "busy_pct": busy / 1e4 / steps / step_s,
        "gaps": {
            "calls": len(gaps) / steps,
            "ms": sum(gap["us"] for gap in gaps) / 1000 / steps,
            "longest": sorted(gaps, key=lambda gap: -gap["us"])[:LONGEST],
        },
    }


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
