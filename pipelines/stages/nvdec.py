"""Which stored videos a GPU's video decoder (NVDEC, as DALI drives it) shows as a player does. The others PyAV decodes.

What is not certain here is a no: a wrong picture is worse than a slow one. Sizes and formats are those of NVIDIA's NVDEC
application note for GPUs since Ampere; they are not asked of the GPU at hand, because all ranks and runs must decide alike.
"""

from shards.schema import Video

# least width and height; the most is 4096 for H.264 and 8192 for the others
_LEAST = {"h264": (48, 16), "hevc": (144, 144), "vp9": (128, 128), "av1": (128, 128)}
_MOST = {"h264": 4096, "hevc": 8192, "vp9": 8192, "av1": 8192}
_CONTAINERS = ("mp4", "m4v", "mov", "mkv", "webm")
_BT601 = (2, 5, 6)  # not specified, BT.470BG, SMPTE 170M; ITU-T H.273, table 4. DALI converts by no other matrix
_HDR = (16, 18)  # transfer characteristics PQ and HLG, which are brought to BT.709


def why_not(video: Video) -> str | None:
    """Why NVDEC is not to decode a video, in a few words; None if it may."""
    coding, (low, high) = video.coding, video.inside
    if video.codec not in _LEAST:
        return f"codec {video.codec}"
    if video.ext not in _CONTAINERS:
        return f"container {video.ext}"
    if coding is None or not coding.width or not coding.height:
        return "size unknown"
    if video.rotation % 360 or video.mirrored:
        return "turned or mirrored by its display matrix"
    if (coding.width, coding.height) != (video.width, video.height):
        return "pixels that are not square"
    if coding.pix_fmt != "yuv420p":
        return f"pixel format {coding.pix_fmt or 'unknown'}"
    if coding.colorspace not in _BT601 or coding.color_trc in _HDR or coding.color_range == 2:
        return "colours other than BT.601 in limited range"
    least, most = _LEAST[video.codec], _MOST[video.codec]
    if coding.width < least[0] or coding.height < least[1] or max(coding.width, coding.height) > most:
        return f"size {coding.width}x{coding.height}"
    if not video.frames.sliceable or low > 0 or high < len(video.frames):
        return "frames outside an edit list, or more than one packet a frame"
    return None
