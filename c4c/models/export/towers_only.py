"""What a layout that holds two towers, and nothing of CLIP4Clip's, can take, and what goes with it."""

from c4c.models.backbone import preprocess_of
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.prompts import prompts_of
from pipelines.config import DataConfig

_WITHOUT_WEIGHTS = {
    "meanP": "a video is the normalised mean of its frames' normalised features",
    "SimpleMeanAdapter": "a video is the normalised mean of its frames' features",
}


def refuse_more(model: CLIP4Clip, layout: str) -> str:
    """Raise ValueError if there is more to the model than two towers. Returns how their features are to be used."""
    if model.linear_patch == "3d":
        raise ValueError(
            f"{layout} has no place for patches that span three frames (model.linear_patch=3d): use --format c4c or onnx"
        )
    refuse_prompts(model, layout)
    if model.head.name not in _WITHOUT_WEIGHTS:
        raise ValueError(
            f"{layout} holds the two towers only, and the weights of the head {model.head.name} would be lost: use --format "
            "c4c, official or onnx"
        )
    return f"{model.head.name}: {_WITHOUT_WEIGHTS[model.head.name]}"


def refuse_prompts(model: CLIP4Clip, layout: str) -> None:
    """Raise ValueError if the towers have prompt vectors, which other programs' towers do not: without them features are others."""
    if number := prompts_of(model):
        raise ValueError(
            f"{layout} has no place for the {number} prompt vectors in each block of the towers (train.prompts), and without them "
            "features are others: use --format c4c or onnx"
        )


def without_merging(model: CLIP4Clip) -> list[str]:
    """A note where the model merges tokens, which no other program's layout says."""
    if not model.merging:
        return []
    return [
        f"the layout cannot say that the image tower merges tokens ({model.merging.in_words()}): what reads it computes the plain tower, "
        "and other features"
    ]


def pictures(model: CLIP4Clip, data: DataConfig | None) -> dict:
    """How pictures are made for the model, as open_clip's preprocess_cfg."""
    data = (data or DataConfig()).filled(preprocess_of(model.spec))
    return {
        "size": data.image_size, "mean": list(data.mean), "std": list(data.std), "interpolation": data.interpolation,
        "resize_mode": data.resize_mode, "fill_color": data.fill,
    }  # fmt: skip


def about_resize(data: DataConfig | None) -> list[str]:
    """A note where pictures are made larger than the crop first, which those layouts cannot say."""
    if data and data.resize and data.resize != data.image_size:
        return [
            f"its pictures were scaled to {data.resize} before the crop of {data.image_size}, which the layout cannot say"
        ]
    return []
