"""A video or a picture of a user's as one clip, for a search by example: frames as evaluation makes them of a video of the index."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.config import DataConfig
from pipelines.segment_frames import Described, frames_of_file
from pipelines.segments import Cutting
from pipelines.stages.resize import resized
from shards import VideoError


def clip_of_file(path: str | Path, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """As `clip_of_picture` or `clip_of_video`, by what the file is. Raises ValueError that names it."""
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
        what = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise ValueError(f"{path} is no video or picture: it is {what}")
    try:
        with Image.open(path) as image:
            animated = getattr(image, "n_frames", 1) > 1
        if not animated:
            return clip_of_picture(path, config)
    except (OSError, Image.DecompressionBombError, SyntaxError):
        pass  # no picture
    try:
        return clip_of_video(path, config)
    except ValueError as error:
        raise ValueError(str(error).replace(" is no video that", " is no video or picture that", 1)) from error


def clip_of_video(path: str | Path, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 [F, S, S, 3], mask bool [F]) of a whole video, F = `num_frames`; slots that it lacks are black and masked out.

    config: the model's, `filled`. Raises ValueError that names the file.
    """
    frames: dict[int, np.ndarray] = {}
    positions: np.ndarray | None = None
    try:
        for part in frames_of_file(path, config, Cutting(segment_s=0)):
            if isinstance(part, Described):  # decoding starts, perhaps anew
                positions, frames = part.segments[0].positions, {}
            else:
                frames |= dict(zip(part.positions.tolist(), part.pixels, strict=True))
    except VideoError as error:
        raise ValueError(f"{path} is no video that can be read: {error}") from error
    assert positions is not None  # or it would have raised
    return _clip([frames[position] for position in positions.tolist()], config)


def clip_of_picture(path: str | Path, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """The same of a still picture, as it is shown: a clip of one frame. Raises ValueError that names the file."""
    try:
        with Image.open(path) as image:
            picture = _rgb(ImageOps.exif_transpose(image))
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        SyntaxError,
    ) as error:  # PNG's errors are SyntaxErrors
        reason = "it is too large" if isinstance(error, Image.DecompressionBombError) else "its format is not known"
        raise ValueError(f"{path} is no picture that can be read: {reason}") from error
    except OSError as error:  # of the system, or PIL's for a file that ends early
        raise ValueError(f"{path} is no picture that can be read: {error.strerror or error}") from error
    return _clip(list(resized([picture], config, uncropped=False)), config)


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]. What is transparent is shown on white, as pages show it; 16 bits are brought to 8."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image, np.float32)
        image = Image.fromarray((grey / (256 if grey.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return np.array(image.convert("RGB"))


def _clip(frames: list[np.ndarray], config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.zeros((config.num_frames, config.image_size, config.image_size, 3), np.uint8)
    mask = np.arange(config.num_frames) < len(frames)
    pixels[: len(frames)] = frames
    return pixels, mask
