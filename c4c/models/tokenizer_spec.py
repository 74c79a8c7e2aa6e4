"""Which tokenizer a backbone's captions are for, from open_clip's model config."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from open_clip.factory import parse_model_name

from pipelines.lengths import CONTEXT

FILES = "tokenizer"  # in a run folder: a copy of its files
# the vocabularies that open_clip takes for a name with "siglip" and no tokenizer in its config, as the hub has them
_SIGLIP = (
    ("siglip2", "timm/ViT-B-16-SigLIP2"),
    ("i18n", "timm/ViT-B-16-SigLIP-i18n-256"),
    ("", "timm/ViT-B-16-SigLIP"),
)


def describe(model_cfg: dict[str, Any], name: str) -> dict[str, Any]:
    """spec["tokenizer"] of a backbone, as `pipelines.tokens.Tokenizer` takes it: what open_clip's get_tokenizer(name) makes.

    model_cfg: open_clip's model config. name: the backbone: one of open_clip.list_models(), `hf-hub:ID` or `local-dir:DIR`.
    Raises ValueError for a prefix without a name behind it.
    """
    schema, identifier = parse_model_name(name)
    text = model_cfg.get("text_cfg", {})
    about = {
        "kind": "clip", "name": "", "context_length": text.get("context_length", CONTEXT),
        "kwargs": deepcopy(text.get("tokenizer_kwargs", {})), "mode": None, "fixed_length": depends_on_padding(text),
    }  # fmt: skip
    if hub := text.get("hf_tokenizer_name", ""):
        about |= {"kind": "hf", "name": hub, "mode": text.get("tokenizer_mode")}
        if schema == "local-dir":  # always from the folder, whatever the config names
            about |= {"name": str(Path(identifier).absolute()), "hub": hub}
    elif schema is None and "siglip" in identifier.lower():
        hub = next(hub for part, hub in _SIGLIP if part in identifier.lower())
        about |= {"kind": "hf", "name": hub, "kwargs": {"clean": "canonicalize"}}
    return about


def depends_on_padding(text_cfg: dict[str, Any]) -> bool:
    """Whether the text tower's features of a caption change with the padding behind it, so that it needs the length that it
    was trained with.

    They do where every token sees the padding (no_causal_mask), where the feature is taken at the row's end (pool_type last,
    CoCa's embed_cls, tokenizer_mode clips) or is all of them (none), and may where it is taken at the highest token id while
    the padding is not known to be lower. Hugging Face's towers mask the padding; causal ones never see it.
    """
    if text_cfg.get("tokenizer_mode") == "clips":
        return True
    if text_cfg.get("hf_model_name"):
        return False
    pool = text_cfg.get("pool_type", "argmax")
    return bool(
        text_cfg.get("no_causal_mask")
        or text_cfg.get("embed_cls")
        or pool in ("last", "none")
        or (pool == "argmax" and text_cfg.get("hf_tokenizer_name"))
    )


def with_files(spec: dict[str, Any], copy: Path) -> dict[str, Any]:
    """The spec with `copy`, the folder where a run or an exported file keeps a copy of its tokenizer's files, if it is there."""
    about = spec.get("tokenizer", {})
    if about.get("kind") != "hf" or not copy.is_dir():
        return spec
    return spec | {"tokenizer": about | {"files": str(copy.absolute())}}


def without_files(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec as it is written to disk: without the place of such a copy, which moves with what it belongs to."""
    if "files" not in spec.get("tokenizer", {}):
        return spec
    return spec | {"tokenizer": {key: value for key, value in spec["tokenizer"].items() if key != "files"}}


def row_length(spec: dict[str, Any], max_words: int) -> int:
    """Tokens that the text tower is given for a caption cut to `max_words`: without a tokenizer at hand, what
    `pipelines.tokens.Tokenizer.length` says (but for vocabularies that pad in front).
    """
    about = spec.get("tokenizer") or {}
    return about["context_length"] if about.get("fixed_length") else max_words
