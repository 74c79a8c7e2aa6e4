"""WebVid: results_2M_train.csv, results_2M_val.csv, results_10M_train.csv or results_10M_val.csv, and videos/.

The csv were those of the WebVid page, which is no longer there; copies may have an extra column `page_idx`. Files lie
at {page_dir}/{videoid}.mp4 below the folder `videos`.
"""

from argparse import ArgumentParser, Namespace

from shards import ShardError
from shards.annotations import Caption, Item, Reading, add_annotations, conclude, examples
from shards.annotations.text import read_csv

COLUMNS = ("videoid", "contentUrl", "duration", "page_dir", "name")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of this data set."""
    add_annotations(parser, "results_2M_train.csv and the like")


def read(args: Namespace) -> Reading:
    """Videos in the order of the csv; a video of several rows has several captions."""
    items: dict[str, Item] = {}
    repeated: list[str] = []
    elsewhere: list[str] = []
    for row in read_csv(args.annotations, COLUMNS):
        id, folder = row["videoid"].strip(), row["page_dir"].strip().strip("/")
        if not id:
            raise ShardError(f"{args.annotations}, line {row['line']}: the video is not named")
        caption = Caption(" ".join(row["name"].split()))
        if (known := items.get(id)) is None:
            path = args.videos.find(f"{folder}/{id}.mp4" if folder else id, id)
            meta = {"url": row["contentUrl"], "duration": row["duration"], "page_dir": row["page_dir"]}
            items[id] = Item(id, path, (caption,), meta)
            continue
        if folder != known.meta["page_dir"].strip().strip("/"):
            elsewhere.append(id)
        if caption not in known.captions:
            items[id] = Item(id, known.path, (*known.captions, caption), known.meta)
        else:
            repeated.append(id)
    warnings = [f"{examples(repeated, 'row')} with the caption of an earlier row left out"] if repeated else []
    if elsewhere:
        warnings.append(
            f"{examples(elsewhere, 'row')} with another page_dir than an earlier row of the video: the file is that one's"
        )
    return conclude(list(items.values()), args.videos, warnings=warnings)
