"""Layouts of one file: c4c's own, which describes itself, and the official CLIP4Clip's."""

import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from c4c.files import discard, replace_text, with_usual_mode
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.export.towers_only import pictures, refuse_prompts, without_merging
from c4c.models.pretrained import evaluation_settings
from c4c.models.prompts import prompts_of
from c4c.models.tokenizer_spec import without_files
from c4c.models.weights.clip4clip import to_official, unsaid_pictures
from pipelines.config import DataConfig
from pipelines.tokens import Tokenizer
from shards import first_line

_OFFICIAL_HEADS = ("meanP", "seqLSTM", "seqTransf", "tightTransf")
_DRL = {"wti": "None", "seqWTI": "seqTransf"}  # heads of DRL's code, which writes CLIP4Clip's layout: its --agg_module


def describe(model: CLIP4Clip, data: DataConfig | None) -> dict:
    """What `c4c.models.weights.read` needs to build the model again; data: how clips and captions are made for it."""
    about = {
        "spec": without_files(model.spec) | ({"preprocess_cfg": pictures(model, data)} if data else {}),
        "head": model.head.name,
        "linear_patch": model.linear_patch,
        "blocks": model.blocks,
        "segments": model.segments,
    }
    merging = {"merging": {"tokens": model.merging.tokens, "joins": list(model.merging.joins)}} if model.merging else {}
    prompts = {"prompts": number} if (number := prompts_of(model)) else {}
    return about | merging | prompts | ({"data": evaluation_settings(data)} if data else {})


def unsaid(model: CLIP4Clip, data: DataConfig | None) -> list[str]:
    """Notes on what the official layout cannot say."""
    notes = [*unsaid_pictures(model.spec | {"preprocess_cfg": pictures(model, data)}), *without_merging(model)]
    if model.clip.logit_bias is not None:
        notes.append(
            "the official layout has no logit_bias, which is left out: scores rank the same, but are no probabilities"
        )
    if (head := model.head.name) not in _OFFICIAL_HEADS:
        readers = f"; DRL's code reads it with --agg_module {_DRL[head]} --interaction wti" if head in _DRL else ""
        notes.append(
            f"the official CLIP4Clip has no head {head}: it would ignore the head's weights and score otherwise{readers}"
        )
    return notes


def write(model: CLIP4Clip, data: DataConfig | None, path: Path, official: bool) -> None:
    """Raises ValueError if the layout cannot hold the model, and OSError.

    The files of a tokenizer that is not CLIP's are written beside c4c's own layout, where they can be had.
    """
    if official:
        refuse_prompts(model, "the official CLIP4Clip's layout")
    state = {k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}
    beside = path.with_name(f".{path.name}.tmp")
    try:
        if official:
            torch.save(to_official(state, model.spec), beside)
        else:
            about = describe(model, data)
            save_file(state, beside, metadata={"format": "pt", "c4c": json.dumps(about, sort_keys=True)})
            replace_text({path.with_suffix(".json"): json.dumps(about, indent=2) + "\n"})
            if model.spec.get("tokenizer", {}).get("kind") == "hf":
                with suppress(ValueError):  # whoever needs it is told where to get it
                    Tokenizer(model.spec["tokenizer"]).save(path.with_suffix(".tokenizer"))
        with_usual_mode(beside)
        os.replace(beside, path)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        reason = first_line(error)
        raise OSError(f"{path} could not be written ({reason}): is there room on the disk?") from error
    finally:
        discard(beside)
