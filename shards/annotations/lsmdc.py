"""LSMDC: LSMDC16_annos_training.csv, _val.csv or LSMDC16_challenge_1000_publictect.csv; clips as .avi in film folders.

Videos and annotations come with a licence from the LSMDC's makers. The csv has no header and six fields between tabs:
clip, start and end as aligned, start and end as extracted, sentence. A clip may have several lines: they are several
captions of one video. The clips are already cut.
"""

from argparse import ArgumentParser, Namespace

from shards import ShardError
from shards.annotations import Caption, Counts, Item, Reading, add_annotations, conclude
from shards.annotations.text import numbered_lines, published

PUBLISHED = {
    "annos.training": Counts(captions=101_079),
    "annos.val": Counts(captions=7408),
    "challenge.1000": Counts(1000, 1000),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of this data set."""
    add_annotations(
        parser, "LSMDC16_annos_training.csv, LSMDC16_annos_val.csv or LSMDC16_challenge_1000_publictect.csv"
    )


def read(args: Namespace) -> Reading:
    """Clips in the order of the csv; `meta` keeps their times in the film."""
    captions: dict[str, list[Caption]] = {}
    times: dict[str, list[dict]] = {}
    for number, line in numbered_lines(args.annotations, " "):  # a tab at a line's beginning: no clip is named
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) == 5:  # an empty sentence, cut off with the tab before it
            fields.append("")
        if len(fields) != 6 or not fields[0]:
            wrong = " instead of 6" if len(fields) != 6 else ", the first of them empty"
            raise ShardError(
                f"{args.annotations}, line {number}: {len(fields)} fields between tabs{wrong} "
                "(clip, start and end aligned, start and end extracted, sentence)"
            )
        clip, *when, sentence = fields
        captions.setdefault(clip, []).append(Caption(sentence))
        stamp = {"aligned": when[:2], "extracted": when[2:]}
        if stamp not in times.setdefault(clip, []):
            times[clip].append(stamp)
    items = [
        Item(clip, args.videos.find(clip), tuple(texts), {"in_film": times[clip]}) for clip, texts in captions.items()
    ]
    return conclude(items, args.videos, published(PUBLISHED, args.annotations))
