"""CLIP4Clip's own checkpoints: the official code's `pytorch_model.bin.N`, and mmaction2's."""

from dataclasses import fields

from torch import Tensor

from c4c.models import towers
from c4c.models.backbone import preprocess_of
from c4c.models.weights import openai
from c4c.models.weights.base import ARCHIVE_EXTRAS, Content, Weights, floats
from pipelines.preprocess import Preprocess
from pipelines.tokens import CLIPS

# settings of a tower that its tensors tell, that are checked by themselves, or that change no feature
_VISION = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "patch_dropout", "output_tokens",
           "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"}  # fmt: skip
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "output_tokens", "hf_tokenizer_name",
         "tokenizer_kwargs", "tokenizer_mode", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}  # fmt: skip
# beginnings of names that a head's weights have, the first head with all of its own; wti's are those of DRL's code
_MARKS = {"seqWTI": ("transformerClip.", "text_weight_fc."), "seqLSTM": ("lstm_visual.",), "seqTransf": ("transformerClip.",),
          "tightTransf": ("cross.",), "wti": ("text_weight_fc.",)}  # fmt: skip


def matches(content: Content) -> bool:
    """Whether its towers are under `clip.`, as both projects write them; c4c's own files have `head.` as well."""
    names = content.state
    return any(name.startswith("clip.") for name in names) and not any(name.startswith("head.") for name in names)


def read(content: Content, spec: dict | None) -> Weights:
    """official: `clip.*` beside the head's modules. mmaction2: {"state_dict": `clip.*`, `adapter.*`}.

    spec: towers that the user named; None: none. Raises ValueError.
    """
    state = {k: v for k, v in content.state.items() if not k.startswith("data_preprocessor.")}
    mmaction2 = content.wrapped or any(name.startswith("adapter.") for name in state)
    clip = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    clip = {k: v for k, v in clip.items() if k not in ARCHIVE_EXTRAS}
    rest = {k.removeprefix("adapter."): v for k, v in state.items() if not k.startswith("clip.")}
    if mmaction2:
        head = "TransformerAdapter" if "positional_embedding" in rest else "SimpleMeanAdapter"
        stack, segments = "transformer.resblocks.", len(rest.get("positional_embedding", range(12)))
    else:
        heads = (name for name, marks in _MARKS.items() if all(any(k.startswith(mark) for k in rest) for mark in marks))
        head = next(heads, "meanP")
        stack, segments = {"tightTransf": "cross.transformer.resblocks."}.get(head, "transformerClip.resblocks."), 12
    spec = openai.family_spec(openai.measured(clip), spec, "mmaction2" if mmaction2 else "the official CLIP4Clip")
    ours = {f"clip.{k}": v for k, v in clip.items()} | {f"head.{k}": v for k, v in rest.items()}
    # ResNets have a convolution of the same name in their stem
    patch = "3d" if "visual.conv2.weight" in clip and clip["visual.conv2.weight"].dim() == 5 else "2d"
    blocks = len({k[len(stack) :].split(".")[0] for k in rest if k.startswith(stack)}) or 4
    return Weights(floats(ours), spec, head, patch, blocks, segments, "mmaction2" if mmaction2 else "official")


def why_not_official(spec: dict) -> str:
    """Why the official layout cannot describe these towers; '' if it can."""
    try:
        vision, text = towers.parts(spec)
        plain = isinstance(vision.layers, int) and not (spec.get("custom_text") or text.hf_model_name)
    except ValueError:
        plain = False
    if not plain or vision.timm_model_name:
        return "towers that are not a plain ViT and CLIP's text transformer"
    differs = ["the activation GELU"] if not spec["quick_gelu"] else []
    for kind, width in (("image", vision.head_width), ("text", text.width / text.heads)):
        if width != towers.HEAD_WIDTH:
            differs.append(f"{kind} attention heads of width {width:g}")
    for kind, tower, known in (("image", vision, _VISION), ("text", text, _TEXT)):
        for field in fields(tower):
            if field.name not in known and (value := getattr(tower, field.name)) != field.default:
                differs.append(f"{field.name}={value} of its {kind} tower")
    tokenizer = CLIPS | spec.get("tokenizer", {})
    if any(tokenizer[key] != CLIPS[key] for key in ("kind", "kwargs", "mode", "fixed_length")):
        differs.append("another tokenizer than CLIP's")
    return " and ".join(differs)


def unsaid_pictures(spec: dict) -> list[str]:
    """A note where pictures are made in another way than CLIP's, which the official layout cannot say."""
    pixels, clips = preprocess_of(spec), Preprocess()
    keys = ("mean", "std", "interpolation", "resize_mode")
    if differing := [f"{key}={getattr(pixels, key)}" for key in keys if getattr(pixels, key) != getattr(clips, key)]:
        return [
            f"the official layout does not say how pictures are made, and its readers make them as CLIP's: this model needs "
            f"{', '.join(differing)}"
        ]
    return []


def to_official(state: dict[str, Tensor], spec: dict) -> dict[str, Tensor]:
    """The weights of a model with towers `spec`, in the official CLIP4Clip's names.

    Raises ValueError for towers that the layout cannot describe: whoever reads it would score wrongly without knowing.
    """
    if differs := why_not_official(spec):
        raise ValueError(
            f"the official layout cannot hold a model with {differs}: it is read as QuickGELU with heads of "
            f"width {towers.HEAD_WIDTH}, and would give wrong scores. Export in another format"
        )
    # which knows no bias; none changes a ranking
    return {k.removeprefix("head."): v for k, v in state.items() if k != "clip.logit_bias"}
