"""HowTo100M: HowTo100M_v1.csv with caption.json or raw_caption.json, as long videos or as clips cut at the captions.

The files are those of the HowTo100M page. The speech in `caption.json` has lost its stop words, `raw_caption.json` keeps
them. Either is several gigabytes and is read as a stream. What stays in memory is the captions of the videos that are
asked for: measured, 230 bytes each, 460 with --clips. At some hundred captions a video, 380 000 videos take 9 GB.
"""

from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from shards import ShardError
from shards.annotations import Caption, Item, Reading, add_annotations, conclude, examples, unknown
from shards.annotations.text import read_csv, seconds
from shards.limits import Limits

_MIN_DURATION = 5.0  # seconds
_Spoken = tuple[float, float, str]  # start, end, text


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of this data set."""
    add_annotations(parser, "caption.json or raw_caption.json")
    parser.add_argument("--list", type=Path, help="HowTo100M_v1.csv: the videos to pack (all of the annotations)")
    parser.add_argument(
        "--category", help="of the list, only those whose category_1 is this ('Food and Entertaining': 380 000 videos)"
    )
    parser.add_argument(
        "--clips", action="store_true", help="cut at the captions while packing (whole videos with timed captions)"
    )
    parser.add_argument(
        "--min-duration", type=Limits(float, 0), default=_MIN_DURATION, metavar="SECONDS",
        help="--clips: captions are joined to their neighbours until a clip is this long (%(default)s)",
    )  # fmt: skip


def read(args: Namespace) -> Reading:
    """Videos in the order of the list, or of the annotations; with --clips, the clips of each."""
    if args.category and not args.list:
        raise ShardError("--category is looked up in --list: give --list HowTo100M_v1.csv")
    wanted, warnings = _wanted(args.list, args.category) if args.list else (None, [])
    spoken: dict[str, tuple[Caption, ...]] = {}
    for id, entry in _stream(args.annotations):
        if wanted is None or id in wanted:
            captions = _captions(entry, f"{args.annotations}: {id}")
            spoken[id] = spoken[id] + captions if id in spoken else captions
    ids = list(spoken if wanted is None else wanted)
    if args.list:
        warnings += unknown(ids, spoken, args.list, args.annotations)
    items: list[Item] = []
    untimed: list[str] = []
    for id in ids:
        meta, captions = (wanted or {}).get(id, {}), spoken.pop(id, ())
        path = args.videos.find(id)
        if args.clips and captions and not args.videos.lacks(id):
            timed = _timed(captions)
            if len(timed) < len(captions):
                untimed.append(id)
            if not timed:
                items.append(Item(id, path, captions, meta, problem="no caption has both text and times to cut at"))
            items += (
                Item(f"{id}_{start * 1000:.0f}_{end * 1000:.0f}", path, (caption,), {**meta, "video": id}, start, end)
                for start, end, caption in clips(captions, args.min_duration)
            )
        else:
            items.append(Item(id, path, captions, meta))
    if not args.clips and args.min_duration != _MIN_DURATION:
        warnings.append(f"--min-duration {args.min_duration:g} is not used without --clips")
    if untimed:
        warnings.append(
            f"{examples(untimed, 'video')} with captions left out by --clips: no text, no times, or repeated"
        )
    return conclude(items, args.videos, warnings=warnings)


def _wanted(path: Path, category: str | None) -> tuple[dict[str, dict], list[str]]:
    """{video id: the other columns} of the list, in its order, and a note of videos that it has several times."""
    columns = ("video_id", "category_1", "category_2", "rank", "task_id")
    wanted: dict[str, dict] = {}
    others: Counter[str] = Counter()
    again = []
    for row in read_csv(path, columns):
        others[row["category_1"]] += 1
        id = row["video_id"].strip()
        if not id:
            raise ShardError(f"{path}, line {row['line']}: the video is not named")
        if category in (None, row["category_1"]):
            meta = {name: row[name] for name in columns[1:]}
            if wanted.setdefault(id, meta) is not meta:
                again.append(id)
    if not wanted:
        listed = ", ".join(repr(name) for name, _ in others.most_common(20))
        raise ShardError(f"{path}: no video has the category_1 {category!r}; the list has {listed or 'no rows'}")
    return wanted, [f"{examples(again, 'row')} of {path.name} repeat a video: the first is used"] if again else []


class _Speech(dict):
    """A dict that remembers a key that was set twice: ijson cannot be stopped from inside."""

    twice = ""

    def __setitem__(self, key: str, value: object) -> None:
        self.twice = key if key in self else self.twice
        super().__setitem__(key, value)


def _stream(path: Path) -> Iterator[tuple[str, dict]]:
    import ijson  # here: no other reader needs it

    try:
        with open(path, "rb") as file:
            for id, entry in ijson.kvitems(file, "", use_float=True, map_type=_Speech):
                if isinstance(entry, _Speech) and entry.twice:
                    raise ShardError(f"{path}: {id} holds the key {entry.twice!r} twice. Join the two")
                yield id, entry
    except FileNotFoundError as error:
        raise ShardError(f"{path}: there is no such file") from error
    except ijson.JSONError as error:
        raise ShardError(f"{path} is not a JSON object of videos ({' '.join(str(error).split())})") from error


def _captions(entry: dict, where: str) -> tuple[Caption, ...]:
    try:
        rows = zip(entry["text"], entry["start"], entry["end"], strict=True)
        return tuple(
            Caption(" ".join((text or "").split()), seconds(start, where), seconds(end, where))
            for text, start, end in rows
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{where}: needs lists text, start and end of the same length ({error})") from error


def clips(captions: tuple[Caption, ...], shortest: float) -> Iterator[tuple[float, float, Caption]]:
    """(start, end, caption) of clips of at least `shortest` seconds, in order of time.

    A caption is joined to those after it until the clip is long enough. Silence longer than `shortest` is not bridged:
    a clip that would end too early there is widened around its middle instead. Empty captions, captions without times and
    repeated captions are left out.
    """
    timed = _timed(captions)
    group: list[_Spoken] = []
    waiting: tuple[float, float, _Spoken] | None = None  # another group may come to the same seconds
    for nth, spoken in enumerate(timed, 1):
        after = timed[nth] if nth < len(timed) else None
        group.append(spoken)
        start, end = group[0][0], max(end for _, end, _ in group)
        if end - start < shortest and after and after[0] - end <= shortest:
            continue
        if end - start < shortest:
            start = max(0.0, (start + end - shortest) / 2)
            end = start + shortest
        if waiting and waiting[:2] == (start, end):
            group.insert(0, waiting[2])
        elif waiting:
            yield _clip(*waiting)
        joined = group[0][0], max(end for _, end, _ in group), " ".join(text for _, _, text in group)
        waiting = start, end, joined
        group = []
    if waiting:
        yield _clip(*waiting)


def _clip(start: float, end: float, spoken: _Spoken) -> tuple[float, float, Caption]:
    return start, end, Caption(spoken[2], *spoken[:2])


def _timed(captions: tuple[Caption, ...]) -> list[_Spoken]:
    """The captions with text and times, in order of time, each once: recognised speech repeats."""
    timed = {
        (c.start, c.end, c.text): None
        for c in captions
        if c.text and c.start is not None and c.end is not None and c.end >= c.start >= 0
    }
    return sorted(timed, key=lambda spoken: spoken[:2])
