"""What the model of a step (python -m c4c.roofline) expects, for the summary to hold beside what was measured."""

import os
from dataclasses import asdict

import torch

from bench.gpu_parts.parts import Given, Missing
from bench.gpu_parts.step import started
from c4c.performance.hardware import gpu_named, gpu_of_device
from c4c.performance.predict import predict

STAND_IN = "H100"  # where there is no GPU: shows that the part works, and nothing is held beside it


def step(given: Given) -> None:
    """Predicted numbers of the step alone, as the parts `step` and `profile` measure them. Raises Missing."""
    with started(given) as (config, device):
        if device.type == "cuda":
            name, memory = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1] / 2**30
            gpu = gpu_of_device(name, memory)
            if gpu is None:
                raise Missing(f"the model of the step does not know {name}")
        else:
            gpu = gpu_named(STAND_IN)
        found = predict(config, gpu, 1, os.cpu_count() or 1)
    given.note(
        gpu=gpu.name,
        step_s=found.compute_s,
        clips_per_s=config.train.batch_size / found.compute_s,
        mfu_pct=found.mfu_pct * found.step_s / found.compute_s,  # its own counts the loader too
        memory_gib=found.memory_gib,
        launches=found.launches,
        limit=found.limit,
        **{f"{kind}_ms": 1000 * s for kind, s in asdict(found.seconds).items()},
    )
