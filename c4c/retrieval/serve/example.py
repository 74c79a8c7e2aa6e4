"""The frames of an uploaded clip or picture, as the index has made those of its videos. Runs in a process of worker.py."""

import io
from pathlib import Path

import av
import numpy as np
from PIL import Image

from pipelines.config import DataConfig
from pipelines.example_clips import clip_of_file
from shards import VideoError
from shards.video.picture import short

# no playlist or list of files, which name further files
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,gif,m4v,h264,hevc,vvc,mpegvideo,obu,ivf,mxf,rm,dv,apng,nut,"
    "yuv4mpegpipe,av1,amr,swf,vob,vc1,avif"
)
# not EPS: PIL gives it to Ghostscript
_PICTURES = {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "PPM", "JPEG2000"}
_LARGEST = 1 << 27  # pixels of a picture


def frames(job: dict) -> dict:
    """Write `pixels` and `mask` of the file `path` (see clip_of_file), made with `settings`, into the npz `out`.

    Raises VideoError for what is neither a video nor a picture."""
    path = Path(job["path"])
    Image.MAX_IMAGE_PIXELS = _LARGEST // 2  # PIL warns from there on, and refuses twice as many
    Image.init()
    Image.ID[:] = [kind for kind in Image.ID if kind in _PICTURES]
    if not _is_picture(path):
        _refuse_lists(path)
    config = DataConfig.from_plain(job["settings"])
    try:
        pixels, mask = clip_of_file(path, config)
    except ValueError as error:  # "FILE is no video that can be read: why"; the file is a temporary one
        raise VideoError(str(error).partition("can be read: ")[2] or "it is damaged") from error
    np.savez(job["out"], pixels=pixels, mask=mask)
    return {}


def _is_picture(path: Path) -> bool:
    try:
        with Image.open(path):
            return True
    except Image.DecompressionBombError as error:
        raise VideoError("the picture has too many pixels") from error
    except (OSError, ValueError, SyntaxError):
        return False


def _refuse_lists(path: Path) -> None:
    """Raise VideoError unless the file is in a format that holds its pictures itself."""
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    try:
        with open(path, "rb") as file:
            av.open(io.BufferedReader(file), "r", metadata_errors="ignore", options=options).close()
    except (av.FFmpegError, ValueError, OSError) as error:
        raise VideoError(f"it is in no format that is known here ({short(error)})") from error
