"""Which stored videos a GPU's video decoder (NVDEC, as DALI 2.4 drives it) shows as a player does. The others PyAV decodes.

What is not certain is a no: a wrong picture is worse than a slow one. Sizes and formats are those of NVIDIA's NVDEC application
note; they are not asked of the GPU at hand, because all ranks and runs must decide alike.

DALI takes each decoded picture for the next frame that is shown, so videos with pictures that are not shown (AV1, VP9) or with two
pictures a frame (fields) come out shifted. It keeps decoders for later videos, and compares the size that is shown with the size
that is coded, so only videos whose sizes are whole macroblocks, where both are the same, cannot get one of another size.
"""

from shards.schema import Video

_LEAST = {"h264": (48, 16), "hevc": (144, 144)}  # width and height
_MOST = {"h264": 4096, "hevc": 8192}
_MACROBLOCK = 16  # pixels
_CONTAINERS = ("mp4", "m4v", "mov", "mkv")
_BT601 = (2, 5, 6)  # not specified, BT.470BG, SMPTE 170M; ITU-T H.273, table 4. DALI converts by no other matrix
_HDR = (16, 18)  # transfer characteristics PQ and HLG, which are brought to BT.709
_WITH_CHROMA_FORMAT = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)  # profiles; ITU-T H.264, 7.3.2.1.1
_SPS = 7  # the type of a NAL unit


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
    size = (coding.width, coding.height)
    if size != (video.width, video.height):
        return "pixels that are not square"
    if coding.pix_fmt != "yuv420p":
        return f"pixel format {coding.pix_fmt or 'unknown'}"
    if coding.colorspace not in _BT601 or coding.color_trc in _HDR or coding.color_range == 2:
        return "colours other than BT.601 in limited range"
    if (
        any(n % _MACROBLOCK or n < least for n, least in zip(size, _LEAST[video.codec], strict=True))
        or max(size) > _MOST[video.codec]
    ):
        return f"size {coding.width}x{coding.height}"
    if video.codec == "h264" and not only_frames(video.extradata):
        return "fields, or a header that does not say"
    if not video.frames.sliceable or low > 0 or high < len(video.frames):
        return "frames outside an edit list, or more than one packet a frame"
    return None


def only_frames(extradata: bytes) -> bool:
    """Whether H.264 is coded in frames only (frame_mbs_only_flag), by the first parameter set of an avcC box (ISO 14496-15, 5.3.3.1)."""
    try:
        if extradata[0] != 1 or extradata[8] & 31 != _SPS:
            return False
        bits = _Bits(extradata[9 : 8 + int.from_bytes(extradata[6:8], "big")])
        profile = bits.take(8)
        bits.take(16)  # constraints, level
        bits.golomb()  # number of the set
        if profile in _WITH_CHROMA_FORMAT:
            if bits.golomb() == 3:  # 4:4:4
                return False
            bits.golomb(), bits.golomb(), bits.take(1)  # bit depths, transform bypass
            if bits.take(1):  # scaling matrices
                return False
        bits.golomb()  # of frame numbers
        kind = bits.golomb()  # of the order in which pictures are shown
        if kind == 1:
            return False
        if kind == 0:
            bits.golomb()
        bits.golomb(), bits.take(1), bits.golomb(), bits.golomb()  # reference frames, gaps, width, height
        return bits.take(1) == 1
    except IndexError:
        return False


class _Bits:
    """Bits of a NAL unit (ITU-T H.264, 7.2 and 9.1)."""

    def __init__(self, data: bytes):
        data = data.replace(b"\0\0\3", b"\0\0")  # what keeps start codes out
        self._bits, self._at = "".join(f"{byte:08b}" for byte in data), 0

    def take(self, count: int) -> int:
        """The next bits as a number. Raises IndexError past the end."""
        if self._at + count > len(self._bits):
            raise IndexError
        self._at += count
        return int(self._bits[self._at - count : self._at], 2) if count else 0

    def golomb(self) -> int:
        """The next Exp-Golomb code."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)
