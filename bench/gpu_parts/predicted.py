"""What c4c.roofline expects of the step, for the summary to hold beside what was measured."""

import dataclasses
import importlib.util

import torch

from bench.gpu_parts.parts import Given, Missing
from bench.gpu_parts.step import started


def step(given: Given) -> None:
    """Predicted numbers, if there is a model of the step and a GPU that it knows."""
    if importlib.util.find_spec("c4c.roofline") is None:
        raise Missing("there is no c4c/roofline.py")
    from c4c import roofline

    with started(given) as (config, device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "H100"
        found = roofline.predict(config, name)
        given.note(gpu=name, **(dataclasses.asdict(found) if dataclasses.is_dataclass(found) else dict(found)))
