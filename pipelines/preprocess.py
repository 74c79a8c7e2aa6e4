"""What a backbone wants its pictures and captions to be: sizes, how pictures are scaled, and the mean and spread of pixels."""

from dataclasses import dataclass

INTERPOLATIONS = ("bicubic", "bilinear")  # both antialiased, as PIL scales


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The values that settings of the data path have where they are left blank. The defaults are those of OpenAI's CLIP.

    resize_mode, open_clip's words for it: `shortest` scales the short side to the frame's and cuts the centre out, `longest`
    scales the long side and fills the rest with `fill` (0 to 255, for all three colours), `squash` scales both sides.
    """

    image_size: int = 224  # side of the square frame, pixels
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of pixels in 0..1: red, green, blue
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill: int = 0
    max_words: int = 77  # tokens a caption, start and end included


CLIP = Preprocess()
