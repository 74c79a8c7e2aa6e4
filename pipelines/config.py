"""Settings of the data path."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipelines.bounds import COUNT, MONTH_S, check_values
from pipelines.frame_sampling import ORDERS, RULES
from pipelines.preprocess import CLIP, INTERPOLATIONS, Preprocess
from shards.remote import Local
from shards.video.geometry import RESIZE_MODES, Geometry

LANES = ("auto", "video", "intra")
PIXELS = ("float32", "float16")
DECODE = ("auto", "gpu", "cpu")
JPEG_CROP = ("auto", "roi", "whole")
CROPS = ("start", "centre", "end")

_MOST_GB = 10**9
_CHOICES = {
    "sampling": RULES, "frame_order": ORDERS, "pixels": PIXELS, "lane": LANES, "decode": DECODE, "jpeg_crop": JPEG_CROP,
    "interpolation": INTERPOLATIONS, "resize_mode": RESIZE_MODES, "crop": CROPS,
}  # fmt: skip
# what a model sees of a clip and its captions in evaluation depends on these alone
EVALUATION_SETTINGS = (
    "num_frames", "sampling", "fps", "frame_order", "image_size", "resize_mode", "interpolation", "fill", "resize", "crop",
    "max_words", "paragraph", "mean", "std",
)  # fmt: skip
# what is left to the backbone, and the value that says so
BLANKS = {"image_size": 0, "max_words": 0, "mean": (), "std": (), "interpolation": "", "resize_mode": "", "fill": -1}


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Decoded frames of the training split, kept from one epoch to the next. Worth it on fast local disk or /dev/shm."""

    dir: str = ""  # folder, on this machine's own disk or in /dev/shm; empty: no cache
    max_gb: float = 20.0  # of that folder, 1e9 bytes each; clips beyond that are decoded every time
    # where sampling draws at random (segment, random): draw from so many stored frames of a video, evenly spread, and
    # keep those; 0: from all. It counts without a cache, too: what is drawn does not depend on what is cached
    frames: int = 0

    def __post_init__(self):
        check_values("cache", self, {"frames": (0, COUNT), "max_gb": (-_MOST_GB, _MOST_GB)})
        if self.max_gb <= 0:
            raise ValueError(f"cache.max_gb={self.max_gb}: must be above 0; cache.dir='' turns the cache off")


@dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """Training on parts of long videos, as their timed captions mark them (pipelines/narration.py). Testing is on whole ones."""

    cut: bool = False  # a pair shows its caption's seconds and no others; one without times stands for the whole video
    min_s: float = 5.0  # seconds a clip lasts at least; a shorter one is widened to both sides
    merge: bool = False  # before that, a short one is joined with what is said next, texts too
    bag: int = 1  # captions of a pair, its own and those said nearest to it; above 1 needs train.loss=mil_nce

    def __post_init__(self):
        check_values("clips", self, {"min_s": (0, MONTH_S), "bag": (1, 1000)})
        if self.bag > 1 and not self.cut:
            raise ValueError(
                f"clips.bag={self.bag} takes the captions around a clip: set clips.cut=true, or clips.bag=1"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, which frames of it, at what size. What the backbone knows may be left blank, see `filled`."""

    # folder of the training split, or its URL (s3://, gs://, hf://, https://); or a list of them, mixed in every batch
    train: str | tuple[str, ...] = ""
    weights: tuple[float, ...] = ()  # of each in a list: its share of every batch; none: as many as it has captions
    epoch_samples: int = 0  # pairs of an epoch; 0: as many as there are, in all sets of a list
    shuffle_block: int = 0  # pairs shuffled among each other; 0: all, or 32768 of large sets (pipelines/pair_order.py)
    test: str = ""  # folder or URL of the split that validation and launch/eval.py rank
    local_dir: str = ""  # folder on a disk of this machine for what is read from URLs; empty: ~/.cache/c4c/shards
    local_gb: float = 20.0  # of that folder at most, 1e9 bytes each, for all ranks of the machine together
    ahead: int = 16  # batches whose bytes are fetched from URLs ahead of the one in the making, up to half of local_gb
    server_timeout_s: float = 300.0  # the most that a request takes; a server that fails for so long ends the run
    num_frames: int = 12  # frames a video
    # uniform, head, tail (CLIP4Clip's rules over `fps` frames a second), segment (mmaction2's), random (any, in training).
    # Where a video's frame rate varies, they go by seconds; uniform_by_frame and so on count frames there as the originals do
    sampling: str = "uniform"
    fps: int = 1  # frames a second that uniform, head and tail choose from
    frame_order: str = "forward"  # or reverse, or random (in training)
    image_size: int = 0  # side of the square frame, pixels; 0: the backbone's
    # how a picture becomes it: shortest (the short side is scaled to it, and the centre cut out), longest (the long side is, and
    # the rest filled) or squash (both sides are, whatever the shape); empty: the backbone's
    resize_mode: str = ""
    interpolation: str = ""  # bicubic or bilinear, both antialiased; empty: the backbone's
    fill: int = -1  # colour around pictures with resize_mode=longest, 0 (black) to 255; -1: the backbone's
    resize: int = 0  # with resize_mode=shortest, the short side before the crop, pixels; 0: image_size
    # with resize_mode=shortest, which part of the long side is shown: start (left or top), centre or end
    crop: str = "centre"
    # in training: least share of the picture that a random crop keeps, 0.5 say; 0: what resize_mode shows
    random_crop: float = 0.0
    flip: float = 0.0  # in training: chance that a clip is mirrored; captions that say left or right turn false
    colour: float = 0.0  # in training: most by which brightness, contrast and saturation change, 0.2 say
    # of frames that the loader normalises; float16: half the memory. Training and evaluation on a GPU normalise in the model
    pixels: str = "float32"
    max_words: int = 0  # tokens a caption, start and end included; 0: as many as the backbone's text tower takes
    paragraph: bool = False  # a video's captions, joined in their order, are one text (ActivityNet, DiDeMo)
    # in training, of a video's captions that are equal but for case and spaces only the first counts
    drop_duplicate_captions: bool = False
    lane: str = "auto"  # auto: intra for intra shards, video for all others
    decode: str = "auto"  # where frames are decoded for training on a GPU: gpu or cpu; auto: gpu, if it passes a try
    # of a JPEG on a GPU: roi decodes only what the crop needs, whole all of it; auto: roi, if it passes a try (docs/gpu.md)
    jpeg_crop: str = "auto"
    # share of the JPEGs that engines of their own decode, where a GPU has such; its cores decode the others. Between 0 and 1,
    # a frame's pixels depend on its place in the batch
    hw_decoder_load: float = 0.0
    mean: tuple[float, ...] = ()  # of red, green and blue in 0..1; none: the backbone's
    std: tuple[float, ...] = ()
    threads: int = 0  # decoding threads a rank; 0: the cores of the machine over its ranks
    prefetch: int = 2  # batches made ahead of the step
    read_timeout_s: float = 60.0  # a video of which nothing can be read for so long is passed over as bad
    eval_batch_size: int = 32  # videos a rank decodes at once in validation; no number depends on it
    max_bad_fraction: float = 0.01  # of the samples read; above it the run ends

    def __post_init__(self):
        check_values("data", self, {
            "num_frames": (1, 4096), "fps": (1, 1000), "image_size": (0, 8192), "resize": (0, 8192), "max_words": (-COUNT, 4096),
            "fill": (-1, 255),
            "threads": (0, 1024), "prefetch": (1, 1024), "eval_batch_size": (1, 65536), "ahead": (0, 10_000),
            **dict.fromkeys(("epoch_samples", "shuffle_block"), (0, 10**12)),
            **dict.fromkeys(("random_crop", "flip", "colour", "max_bad_fraction", "hw_decoder_load"), (0, 1)),
            **dict.fromkeys(("read_timeout_s", "server_timeout_s"), (0, MONTH_S)), "local_gb": (0, _MOST_GB),
        })  # fmt: skip
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known and getattr(self, name) != BLANKS.get(name):
                raise ValueError(f"data.{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name in ("local_gb", "server_timeout_s", "read_timeout_s"):
            if not getattr(self, name):
                raise ValueError(f"data.{name}={getattr(self, name)}: must be above 0")
        sets = 1 if isinstance(self.train, str) else len(self.train)
        if self.weights and (len(self.weights) != sets or not all(0 < w < float("inf") for w in self.weights)):
            raise ValueError(
                f"data.weights={list(self.weights)}: give one number above 0 for each of the {sets} folders in data.train"
            )
        if self.max_words < 3 and self.max_words != BLANKS["max_words"]:
            raise ValueError(f"data.max_words={self.max_words}: must be at least 3, for a start, a word and an end")
        if {len(self.mean), len(self.std)} - {0, 3} or not all(std > 0 for std in self.std):
            raise ValueError(
                "data.mean and data.std: give one number for each of red, green and blue; those of std must be above 0"
            )
        if self.paragraph and self.drop_duplicate_captions:
            raise ValueError(
                "data.paragraph and data.drop_duplicate_captions cannot be used together: a paragraph has all captions of its video"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        if self.crop != "centre" and self.resize_mode in ("longest", "squash"):
            raise ValueError(
                f"data.crop={self.crop}: data.resize_mode={self.resize_mode} (maybe the backbone's) crops nothing; leave data.crop out"
            )
        if self.resize and self.resize < self.image_size:
            raise ValueError(
                f"data.resize={self.resize} is smaller than data.image_size={self.image_size}, the crop that is cut from it"
            )
        if self.resize and self.resize_mode in ("longest", "squash"):
            raise ValueError(
                f"data.resize={self.resize} is the short side before a crop, and data.resize_mode={self.resize_mode} (maybe the "
                "backbone's) crops nothing: set data.resize=0, or data.resize_mode=shortest"
            )

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "DataConfig":
        """Of values as JSON holds them, with lists for tuples. Raises ValueError as the class does."""
        made: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**made)

    def filled(self, by: Preprocess = CLIP) -> "DataConfig":
        """The same with a backbone's values where this one's are blank. Raises ValueError if they do not go with the others."""
        values = {
            field.name: getattr(by, field.name)
            for field in fields(by)
            if getattr(self, field.name) == BLANKS[field.name]
        }
        return replace(self, **values) if values else self

    @property
    def short_side(self) -> int:
        """Of pictures before the crop, pixels."""
        return self.resize or self.image_size

    @property
    def geometry(self) -> Geometry:
        """How large whole pictures are scaled before the frame is made of them. Only of settings that are `filled`."""
        return Geometry(self.resize_mode, self.short_side)

    @property
    def local(self) -> Local:
        """Where pieces of remote splits are kept."""
        return Local(Path(self.local_dir) if self.local_dir else None, self.local_gb, self.server_timeout_s)
