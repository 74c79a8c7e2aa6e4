"""c4c's own weights: run folders, and safetensors files that describe their model."""

import json
from contextlib import suppress
from pathlib import Path

import safetensors
from torch import Tensor

from c4c.config import Config, from_dict
from c4c.files import read_json_object
from c4c.merging import Merging
from c4c.models import towers
from c4c.models.backbone import named, preprocess_of
from c4c.models.origin import full_weights
from c4c.models.prompts import prompts_in
from c4c.models.tokenizer_spec import FILES, with_files
from c4c.models.weights.base import Content, Unsaid, Weights, floats
from c4c.training.run_folder import read_config
from c4c.zero.checkpoint import load_weights, resolve


def from_run(folder: Path, tag: str | None, ema: bool = True) -> Weights:
    """tag: a checkpoint's name, `best`, or None for the latest. ema: its averaged weights, where it has some. Raises ValueError."""
    config = from_dict(read_config(folder))
    about = folder / "towers.json"
    tag = resolve(folder, tag)
    state = full_weights(folder, tag, load_weights(folder, tag, ema), config)
    spec = with_files(read_json_object(about) if about.is_file() else named(config.model.backbone), folder / FILES)
    return weights_of_run(state, spec, config)


def weights_of_run(state: dict[str, Tensor], spec: dict, config: Config) -> Weights:
    """A state dict of a run with what the run's settings say of the model. spec: its towers."""
    model = config.model
    return Weights(
        state, spec, model.head, model.linear_patch, model.head_layers, config.data.num_frames, "c4c run",
        merging=model.merging, prompts=prompts_in(state),
    )  # fmt: skip


def matches(content: Content) -> bool:
    """Whether it is a safetensors file that c4c exported."""
    return "c4c" in content.metadata


def read(content: Content, spec: dict | None) -> Weights:
    """What the file says of its model counts, whatever `spec` says. Raises ValueError."""
    try:
        about = json.loads(content.metadata["c4c"])
        about["spec"] = with_files(about["spec"], content.path.with_suffix(".tokenizer"))
        merging = about.pop("merging", {})
        about["merging"] = Merging(tokens=merging.get("tokens", 0), joins=tuple(merging.get("joins", ())))
        return Weights(state=floats(content.state), kind="c4c", **about)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError("the file is damaged: what it says of its model cannot be read") from error


def stated(path: Path) -> dict | None:
    """The towers that a run folder or an exported file describes, with the pixels that it was trained with; None for any other.

    Raises ValueError for a damaged run.
    """
    if path.is_dir():
        return _stated_by_run(path) if (path / "towers.json").is_file() else None
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    with (
        suppress(safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError),
        safetensors.safe_open(path, "pt") as file,
    ):
        return json.loads(file.metadata()["c4c"])["spec"]
    return None  # what is wrong with it is said when the weights are read


def _stated_by_run(folder: Path) -> dict:
    spec = read_json_object(folder / "towers.json")
    if not (folder / "config.yaml").is_file():
        return spec
    data = from_dict(read_config(folder)).data.filled(preprocess_of(spec))
    trained = {
        "mean": list(data.mean), "std": list(data.std), "interpolation": data.interpolation, "resize_mode": data.resize_mode,
        "fill_color": data.fill,
    }  # fmt: skip
    return spec | {"preprocess_cfg": {"size": towers.image_size(spec)} | spec.get("preprocess_cfg", {}) | trained}


def is_stray(content: Content) -> bool:
    """Whether it looks like a checkpoint's model.safetensors that was taken out of its run folder."""
    with_head = any(name.startswith("head.") for name in content.state)
    return "clip.logit_scale" in content.state and (with_head or content.path.suffix == ".safetensors")


def refuse_stray() -> None:
    """Raise Unsaid for a file that `is_stray`."""
    raise Unsaid(
        "it holds the names of c4c's weights without what they are of (head, activation, sizes): it looks like a checkpoint "
        "that was taken out of its run folder. Give the run folder, or a file that `python -m c4c.export` wrote from it. Official CLIP4Clip weights are read as the .bin file they come in"
    )
