"""What was published for a row of a study: on the same test split, with the settings that the source states.

Only numbers that were checked are here, so that much of the paper's tables is missing: all of its seqLSTM and tightTransf on MSR-VTT, and
all that it says on frames, 3d patches, learning rates and batch sizes.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from c4c.config import Config, to_dict
from c4c.files import read_json_object
from c4c.retrieval.published import Published, published
from c4c.study.config import Recipe, Row
from c4c.study.words import flat
from shards import ShardError
from shards.split import Split

_PAPER = "CLIP4Clip"
_SOURCE = "arXiv:2104.08860 (Luo et al., 2021)"
_QUOTED = f"{_SOURCE}, as later papers and the authors' issue tracker quote it"
_BACKBONES = ("ViT-B-32", "ViT-B-32-quickgelu")
_OFFICIAL = (
    "ViT-B/32 from OpenAI's weights, {frames} frames at 1 frame/s, fp16; the best epoch is chosen on the test split."
)
_NAMES = ("R1", "R5", "R10", "MdR", "MnR")
_MSRVTT_VIDEOS = 9000  # of the training split that the numbers are of
# what a row may vary and still be the paper's, because what follows checks it; a baseline is checked by it too
_CHECKED = {"model.head", "model.linear_patch", "model.backbone", "model.init_from", "data.num_frames", "data.sampling", "train.batch_size",
            "train.freeze_layers", "train.epochs"}  # fmt: skip
# what no source has: settings that must be as this project leaves them
_PLAIN = ("data.frame_order", "data.crop", "data.random_crop", "data.flip", "data.colour", "data.drop_duplicate_captions", "data.weights",
          "data.mean", "data.std", "data.interpolation", "data.resize_mode", "clips.", "model.init_tag", "model.head_layers",
          "train.captions_per_video", "train.label_smoothing", "train.mask_equal_captions", "train.decorrelation", "train.teacher", "train.ema",
          "train.layer_decay", "train.lr_", "train.freeze_text_epochs", "train.freeze_video_epochs", "train.patience")  # fmt: skip
_FEWEST_WORDS = 32  # tokens a caption: the paper's


@dataclass(frozen=True)
class PublishedRow:
    """Published numbers beside a row of ours. metrics: by our names, t2v_R1. differs: what was done differently there."""

    name: str
    metrics: dict[str, float]
    source: str
    differs: str


@dataclass(frozen=True)
class _TestSplit:
    """How the test split of a published result is recognised: its name, videos and texts a video. frames: of the paper's recipe."""

    name: str
    videos: tuple[int, ...]
    one_text: bool
    paragraph: bool
    frames: int


_SPLITS = (
    _TestSplit("msvd", (670,), False, False, 12),
    _TestSplit("lsmdc", (1000,), True, False, 12),
    _TestSplit("activitynet", (4917,), False, True, 64),
    _TestSplit("didemo", (1003, 1004), False, True, 64),
)
_FRAMES = {"msrvtt": 12} | {one.name: one.frames for one in _SPLITS}
# fine-tuned, by (data set, head): text to video, then video to text, as far as they were checked, in the order of _NAMES
_TRAINED: dict[tuple[str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {
    ("msvd", "meanP"): ((46.2, 76.1, 84.6), (56.6, 79.7, 84.3)),
    ("msvd", "seqTransf"): ((45.2, 75.5, 84.3, 2.0, 10.3), (62.0, 87.3, 92.6, 1.0, 4.3)),
    ("lsmdc", "seqLSTM"): ((21.6, 41.8, 49.8, 11.0, 58.0), (20.9, 40.7, 49.1)),
    ("lsmdc", "seqTransf"): ((22.6, 41.0, 49.1, 11.0, 61.0), ()),
    ("activitynet", "meanP"): ((40.5,), (42.5, 74.1, 85.8, 2.0, 6.6)),  # quotations of the others disagree
    ("activitynet", "seqLSTM"): ((), (42.6, 73.4, 85.6)),
    ("activitynet", "seqTransf"): ((40.5,), ()),
    ("didemo", "meanP"): ((43.4, 70.2, 80.6, 2.0, 17.5), (42.5, 70.6, 80.2)),
    ("didemo", "seqTransf"): ((42.8, 68.5, 79.2, 2.0, 18.9), ()),
}
# OpenAI's weights as they are: text to video, then video to text
_ZERO_SHOT: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "msrvtt": ((31.2, 53.7, 64.2, 4.0), (27.2, 51.7, 62.6, 5.0)),
    "msvd": ((37.0, 64.1, 73.8, 3.0), (59.9, 85.2, 90.7, 1.0)),
    "lsmdc": ((11.3, 22.7, 29.2, 56.5), (6.8, 16.4, 22.1, 73.0)),
}
# after post-pretraining, and not fine-tuned: text to video
_POST_PRETRAINED: dict[str, tuple[float, ...]] = {
    "msrvtt": (32.0, 57.0, 66.9, 4.0),
    "msvd": (38.5, 66.9, 76.8),
    "lsmdc": (15.1,),
}


def published_for(row: Row, is_baseline: bool = False) -> tuple[PublishedRow, ...]:
    """Published results that a row can be compared with; () where its test split or its settings are not theirs. is_baseline: whether
    others are compared with it, so that what it varies is the study's own choice."""
    config = row.recipe.config
    if config is None or not (is_baseline or row.values.keys() <= _CHECKED) or not _is_plain(config):
        return ()
    data_set, results = test_split(config)
    if not data_set:
        return ()
    if row.recipe.kind == "evaluate":
        return _zero_shot(data_set, row.recipe, config)
    if (
        row.recipe.source is not None
        or not _is_the_papers(config, _FRAMES[data_set])
        or not _trains_on(data_set, config)
    ):
        return ()
    return _of_report(results, config) if data_set == "msrvtt" else _trained(data_set, config)


def test_split(config: Config) -> tuple[str, tuple[Published, ...]]:
    """(the published data set whose test split `data.test` is, or ''; what the evaluation report shows beside it).

    Reads the split's tables on this machine's disks only; one that cannot be read is no published one.
    """
    path = Path(config.data.test)
    try:
        stamp = (path / "dataset.json").stat().st_mtime_ns
    except OSError:
        return "", ()
    return _test_split(str(path), stamp, config.data.paragraph)


@lru_cache(maxsize=64)
def _test_split(path: str, stamp: int, paragraph: bool) -> tuple[str, tuple[Published, ...]]:
    try:
        split = Split(path)
        texts = len(split) if paragraph else int(split.caption_counts.sum())
        if not paragraph and (found := published(split, texts)):
            return "msrvtt", found
    except (ShardError, OSError, ValueError, KeyError):
        return "", ()
    name, one_text = str(split.info.get("name", "")).lower(), texts == len(split)
    same = (one for one in _SPLITS if one.name == name and len(split) in one.videos and one.paragraph == paragraph)
    return next((one.name for one in same if paragraph or one.one_text == one_text), ""), ()


def _is_plain(config: Config) -> bool:
    """Whether frames and texts are shown as all of the sources show them, and what this project adds is left out."""
    now, default = flat(to_dict(config)), flat(to_dict(Config()))
    data = config.data
    return (
        all(now[key] == default[key] for key in now if key.startswith(_PLAIN))
        and data.sampling in ("uniform", "uniform_by_frame", "segment") and data.image_size in (0, 224)
        and (data.max_words == 0 or data.max_words >= _FEWEST_WORDS)
    )  # fmt: skip


def _is_the_papers(config: Config, frames: int) -> bool:
    """Whether what the paper states of a training, and what a study may vary, is the paper's."""
    model, data, train = config.model, config.data, config.train
    stated = (
        model.backbone in _BACKBONES, model.init_from == "openai", model.linear_patch == "2d", not model.merge, data.num_frames == frames,
        data.sampling == "segment" or data.fps == 1, train.batch_size == 128, train.epochs == 5, not train.max_steps,
        train.freeze_layers <= 0, not train.partial, train.loss == "cross_entropy", train.accumulate == 1,
    )  # fmt: skip
    return all(stated)


def _of_report(results: tuple[Published, ...], config: Config) -> tuple[PublishedRow, ...]:
    """What the evaluation report shows beside this head, on MSR-VTT."""
    names = {"meanP": (f"{_PAPER} meanP", "mmaction2, mean"), "seqTransf": (f"{_PAPER} seqTransf",)}.get(
        config.model.head, ()
    )
    rows = []
    for one in results:
        if one.name in names:
            metrics = _named("t2v", one.t2v) | _named("v2t", one.v2t or ())
            rows.append(PublishedRow(one.name, metrics, one.source, one.differs))
    videos = _videos(config)
    if videos in (None, _MSRVTT_VIDEOS):
        return tuple(rows)
    note = f" It was trained on {_MSRVTT_VIDEOS} videos, and this row on {videos}."
    return tuple(replace(row, differs=row.differs + note) for row in rows)


def _videos(config: Config) -> int | None:
    """Videos to train on; None where dataset.json does not tell."""
    try:
        return sum(int(read_json_object(Path(path) / "dataset.json")["videos"]) for path in _paths(config))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _trains_on(data_set: str, config: Config) -> bool:
    """Whether no training split says that it is of another data set."""
    for path in _paths(config):
        try:
            name = read_json_object(Path(path) / "dataset.json").get("name", data_set)
        except (OSError, ValueError):
            continue
        if str(name).lower() != data_set:
            return False
    return True


def _trained(data_set: str, config: Config) -> tuple[PublishedRow, ...]:
    head = config.model.head
    t2v, v2t = _TRAINED.get((data_set, head), ((), ()))
    if not t2v and not v2t:
        return ()
    metrics = _named("t2v", t2v) | _named("v2t", v2t)
    return (PublishedRow(f"{_PAPER} {head}", metrics, _QUOTED, _OFFICIAL.format(frames=f"up to {_FRAMES[data_set]}")),)


def _zero_shot(data_set: str, recipe: Recipe, config: Config) -> tuple[PublishedRow, ...]:
    """Of OpenAI's weights, or of a run that started from them and was trained on other data than this study's."""
    if recipe.source is not None:
        return _post_pretrained(data_set, recipe.source, config)
    tag, _, backbone = recipe.checkpoint.partition(":")
    frames = config.data.num_frames == _FRAMES[data_set]
    if tag != "openai" or backbone not in _BACKBONES or data_set not in _ZERO_SHOT or not frames:
        return ()
    t2v, v2t = _ZERO_SHOT[data_set]
    source = "arXiv:2102.12443 (Portillo-Quintero et al., 2021), as paperswithcode.com listed it"
    differs = "ViT-B/32, features of frames averaged; other frames may have been taken."
    return (PublishedRow("CLIP, zero-shot", _named("t2v", t2v) | _named("v2t", v2t), source, differs),)


def _post_pretrained(data_set: str, source: Recipe, config: Config) -> tuple[PublishedRow, ...]:
    before = source.config
    if before is None or source.source is not None or data_set not in _POST_PRETRAINED:
        return ()
    model = before.model
    starts_there = model.backbone in _BACKBONES and model.init_from == "openai" and model.head == "meanP"
    if (
        not starts_there
        or not set(_paths(before)).isdisjoint(_paths(config))
        or config.data.num_frames != _FRAMES[data_set]
    ):
        return ()
    differs = (
        "Post-pretrained on a part of HowTo100M (HowTo100M-380k), with mean pooling; its weights were not released."
    )
    return (
        PublishedRow(
            f"{_PAPER}, post-pretrained, zero-shot", _named("t2v", _POST_PRETRAINED[data_set]), _QUOTED, differs
        ),
    )


def _paths(config: Config) -> tuple[str, ...]:
    return (config.data.train,) if isinstance(config.data.train, str) else config.data.train


def _named(way: str, values: tuple[float | None, ...]) -> dict[str, float]:
    return {f"{way}_{name}": value for name, value in zip(_NAMES, values, strict=False) if value is not None}
