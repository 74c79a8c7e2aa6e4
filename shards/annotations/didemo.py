"""DiDeMo: train_data.json, val_data.json or test_data.json, with train_list.txt and so on; train with data.paragraph.

The files are those of the DiDeMo release (LisaAnne/LocalizingMoments) and of the official CLIP4Clip repository. A
video's descriptions stay single, in the json's order. Names keep their extension there; a re-encoded file may have
another.
"""

from argparse import ArgumentParser, Namespace

from shards import ShardError
from shards.annotations import Caption, Counts, Item, Reading, add_annotations, conclude, unique, unknown
from shards.annotations.text import expect, published, read_json, read_lines
from shards.limits import Limits

CHUNK = 5.0  # seconds: annotators marked whole chunks of this length
PUBLISHED = {
    "train.list": Counts(videos=8392),
    "val.list": Counts(videos=1065),
    "test.list": Counts(videos=1004),
    "train.data": Counts(videos=8395),
    "val.data": Counts(videos=1065),
    "test.data": Counts(videos=1004),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of this data set."""
    lists = "train_list.txt, val_list.txt or test_list.txt (all annotations)"
    add_annotations(parser, "train_data.json, val_data.json or test_data.json", lists)
    parser.add_argument(
        "--seconds",
        type=Limits(float, 0),
        help="keep only the first SECONDS seconds; the papers look at seconds 0 to 31: 32 (all)",
    )


def read(args: Namespace) -> Reading:
    """Videos in the order of the list, or of the descriptions."""
    captions: dict[str, list[Caption]] = {}
    for nth, entry in enumerate(expect(read_json(args.annotations), list, args.annotations, "a list of descriptions")):
        name, caption = _caption(entry, f"{args.annotations}, entry {nth}")
        captions.setdefault(name, []).append(caption)
    ids, warnings = list(captions), list[str]()
    if args.split:
        ids, warnings = unique(read_lines(args.split), args.split.name)
        warnings += unknown(ids, captions, args.split, args.annotations)
    items = [
        Item(id, args.videos.find(id), tuple(captions.get(id, ())), {}, None, args.seconds) for id in ids
    ]  # fmt: skip
    return conclude(items, args.videos, published(PUBLISHED, args.split or args.annotations), warnings)


def _caption(entry: dict, where: str) -> tuple[str, Caption]:
    """The video's name and the description, with the mean of what the annotators marked, as the official code has it."""
    try:
        firsts, lasts = zip(*entry.get("times") or [(None, None)], strict=True)
        start = end = None
        if firsts[0] is not None:
            start, end = CHUNK * sum(firsts) / len(firsts), CHUNK * (sum(lasts) / len(lasts) + 1)
        return str(entry["video"]), Caption(" ".join(entry["description"].split()), start, end)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{where}: needs video, description and times [[first, last], …] ({error})") from error
