"""MSR-VTT: MSRVTT_data.json with the 7k, 9k and JSFUSION csv, the json's own split, or mmaction2's json.

The files are those of the official CLIP4Clip repository's `msrvtt_data.zip`, of the MSR-VTT release
(`train_val_videodatainfo.json`, `test_videodatainfo.json`: the same form) and of mmaction2's `tools/data/msrvtt`. The
published videos are already cut: `start time` and `end time` in the json refer to the YouTube video they come from.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from shards import ShardError
from shards.annotations import Caption, Counts, Item, Reading, conclude, examples, unique, unknown
from shards.annotations.text import expect, published, read_csv, read_json, sentences

OWN = {"train": Counts(6513, 130_260), "validate": Counts(497, 9940), "test": Counts(2990, 59_800)}
PUBLISHED = {
    "train.9k": Counts(9000, 180_000),
    "train.7k": Counts(7010, 140_200),
    "jsfusion": Counts(1000, 1000),
    "msrvtt.data": Counts(10_000, 200_000),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of this data set."""
    parser.add_argument(
        "--annotations", type=Path,
        help='MSRVTT_data.json, or mmaction2\'s json {"video0.mp4": [captions]}; a --split with sentences needs none',
    )  # fmt: skip
    parser.add_argument(
        "--split",
        help="MSRVTT_train.9k.csv, MSRVTT_train.7k.csv, MSRVTT_JSFUSION_test.csv, or train, validate or test: the "
        "json's own split (all of the annotations)",
    )


def read(args: Namespace) -> Reading:
    """Videos in the order of the csv, or of the json."""
    if not args.annotations and not args.split:
        raise ShardError("give --annotations, --split, or both")
    captions, meta, own = _annotations(args.annotations) if args.annotations else ({}, {}, {})
    warnings: list[str] = []
    if args.split is None:
        ids = list(captions)
    elif args.split in OWN:
        ids = [id for id in captions if own.get(id) == args.split]
        if not ids:
            raise ShardError(f"{args.annotations} names no video of its split {args.split!r}")
        if others := [id for id in captions if own.get(id) not in OWN]:
            warnings.append(f"{examples(others, 'video')} of {args.annotations.name} in no split, left out")
    else:
        if not Path(args.split).exists():
            raise ShardError(f"--split {args.split}: there is no such file, and the json's own are {', '.join(OWN)}")
        listed, has_sentences, warnings = _split(Path(args.split))
        ids = list(listed)
        if args.annotations:
            warnings += unknown(ids, captions, Path(args.split), args.annotations)
        captions = listed if has_sentences else {id: captions.get(id, ()) for id in ids}
        if not any(captions.values()):
            raise ShardError(f"{args.split} has no column sentence: give --annotations MSRVTT_data.json with it")
    items = [Item(id, args.videos.find(id), captions[id], meta.get(id, {})) for id in ids]
    counts = OWN.get(args.split) or published(PUBLISHED, Path(args.split) if args.split else args.annotations)
    return conclude(items, args.videos, counts, warnings)


def _annotations(path: Path) -> tuple[dict[str, tuple[Caption, ...]], dict[str, dict], dict[str, str]]:
    """Captions, meta and split by video id."""
    data = expect(read_json(path), dict, path, "an object with videos and sentences, or of lists of captions")
    if "sentences" not in data:
        plain: dict[str, tuple[Caption, ...]] = {}
        for name, texts in data.items():  # with and without .mp4 it is one video
            plain[_stem(name)] = plain.get(_stem(name), ()) + sentences(texts, f"{path}: {name}")
        return plain, {}, {}
    try:
        videos: dict[str, dict] = {}
        for video in data["videos"]:
            if videos.setdefault(str(video["video_id"]), video) != video:
                raise ShardError(f"{path}: the video_id {video['video_id']!r} is listed twice, with different values")
        captions: dict[str, list[Caption]] = {id: [] for id in videos}
        for sentence in data["sentences"]:
            captions.setdefault(str(sentence["video_id"]), []).extend(sentences(sentence["caption"], str(path)))
    except (KeyError, TypeError) as error:
        raise ShardError(
            f"{path}: its videos need a video_id, its sentences a video_id and a caption ({error})"
        ) from error
    meta = {id: {k: v for k, v in video.items() if k not in ("video_id", "id")} for id, video in videos.items()}
    own = {id: str(video.get("split")) for id, video in videos.items()}
    return {id: tuple(texts) for id, texts in captions.items()}, meta, own


def _split(path: Path) -> tuple[dict[str, tuple[Caption, ...]], bool, list[str]]:
    """The videos of a csv, with their captions; whether it has a column `sentence` for these; and what the user should
    know. `vid_key` (msr9770) is no video_id."""
    captions: dict[str, tuple[Caption, ...]] = {}
    ids, has_sentences = [], False
    for row in read_csv(path, ["video_id"]):
        id = _stem(row["video_id"].strip())
        if not id:
            raise ShardError(f"{path}, line {row['line']}: the video is not named")
        has_sentences = "sentence" in row
        captions[id] = captions.get(id, ()) + (sentences(row["sentence"], str(path)) if has_sentences else ())
        ids.append(id)
    return captions, has_sentences, [] if has_sentences else unique(ids, path.name)[1]


def _stem(name: str) -> str:
    return name.removesuffix(".mp4")
