"""Random edits of the text files of a split and of annotations: whatever reads them works, or says in one sentence what is
wrong. More of them by hand: `python -m tests.shards.test_edits 10000`."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from c4c.shard_tools import token_lengths
from pipelines.config import DataConfig
from pipelines.survey import notes
from shards.annotations import Caption, Item
from shards.packing.pack import finish_parts, missing
from shards.split import Split, find_splits
from shards.tools import dedup, verify
from shards.tools.info import describe, measure
from shards.tools.repair import repair
from shards.tools.reshard import SplitPart, merge, split
from tests.edits import changed, damaged, several
from tests.shards.sets import COPY, packed, reading
from tests.videos import encode

pytestmark = pytest.mark.slow

COUNT, SEED = 500, 17


class Serial:
    """In place of a pool of processes."""

    def __init__(self, *_):
        pass

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda *_: None  # noqa: E731
    map = staticmethod(map)


def with_other_bytes(data: bytes, rng: random.Random) -> bytes:
    return several(damaged, data, rng)


def with_other_values(data: bytes, rng: random.Random) -> bytes:
    """JSON, or JSON lines, with one to three values of another kind, lost, doubled or exchanged."""
    try:
        return json.dumps(several(changed, json.loads(data), rng)).encode()
    except ValueError:
        rows = [json.loads(line) for line in data.decode().splitlines()]
        at = rng.randrange(len(rows))
        rows[at] = several(changed, rows[at], rng)
        return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Place:
    """A small split, another one to merge it with, annotations of several kinds, and what reads each of them."""

    def __init__(self, folder: Path):
        self.folder, videos = folder, folder / "videos"
        videos.mkdir(parents=True)
        items = []
        for i, name in enumerate(("video0", "my phone%2F[1]", "v_abc")):
            (videos / f"{name}.mp4").write_bytes(encode(6 + i, 10, (48, 32)))
            items.append(Item(name, videos / f"{name}.mp4", (Caption(f"one {i}", 0.0, 0.5), Caption("two")), {"n": i}))
        gone = Item("gone", videos / "gone.mp4", (Caption("three"),))
        counts = {"files": 3, "published": {"videos": 5, "captions": None}, "warnings": []}
        counts |= {"annotations": {"videos": 3, "captions": 5}, "missing": {"videos": 1, "captions": 1}}
        packed([items[0], gone, items[1]], folder / "set", COPY, workers=1, reconciliation=counts)
        packed(items[2:], folder / "other", COPY, workers=1)
        texts = {
            "captions.csv": 'video,caption,start,end\nvideo0,"one, a",0,1.5\nvideo0,"b ""quoted""",,\nv_abc.mp4,c\n',
            "captions.jsonl": '{"video": "video0.mp4", "captions": ["a", {"text": "b", "start": 0, "end": 1}], "meta": {"x": [1]}}\n'
            '{"video": "v_abc.mp4", "id": "cut_1", "cut": [0.1, 0.5], "caption": "c"}\n',
            "videos/video0.json": '{"captions": ["a", {"text": "b", "start": 0}], "meta": {"x": 1}, "cut": [0, 0.5]}',
            "msrvtt.json": '{"videos": [{"video_id": "video0", "category": 1, "split": "train", "start time": 1.5}], "sentences":'
            ' [{"caption": "a", "video_id": "video0", "sen_id": 0}]}',
            "activitynet.json": '{"v_abc": {"duration": 2.5, "timestamps": [[0, 1.5]], "sentences": ["a"]}}',
            "didemo.json": '[{"annotation_id": 0, "video": "video0.mp4", "description": "a", "times": [[0, 1], [1, 1]]}]',
            "howto100m.json": '{"video0": {"text": ["a", "b"], "start": [0, 1.5], "end": [1.0, 2.5]}}',
            "webvid.csv": "videoid,contentUrl,duration,page_dir,name\nvideo0,u,PT00H00M02S,p,a caption\n",
            "lsmdc.csv": "video0\t00.00.00\t00.00.01\t00.00.00\t00.00.01\tSOMEONE walks.\n",
        }
        for name, text in texts.items():
            (folder / name).write_text(text)
        self.readers: dict[str, tuple[Callable[[], object], ...]] = {
            "set/dataset.json": self._of_a_split(), "set/rejects.jsonl": self._of_a_split(),
        }  # fmt: skip
        for name in texts:
            kind, option = Path(name).stem, "--annotations"
            if name.startswith("captions"):
                kind, option = "folder", "--captions"
            options = (option, folder / name) if "/" not in name else ()
            options += ("--clips",) if kind == "howto100m" else ()
            self.readers[name] = (lambda k=kind if options else "folder", o=options: reading(k, videos, *o),)
        self.whole = {name: (folder / name).read_bytes() for name in self.readers}

    def _of_a_split(self) -> tuple[Callable[[], object], ...]:
        path, out = self.folder / "set", self.folder / "made"

        def read() -> None:
            found = Split(path)
            assert all(found.video(i).size and found.captions(i) for i in range(len(found)))
            assert found.caption_counts.sum() == found.info["captions"]
            notes(found, found, DataConfig())

        return (
            read, lambda: find_splits(path), lambda: describe(path), lambda: json.dumps(measure(path)),
            lambda: token_lengths(path), lambda: verify.verify(path, 1), lambda: merge([path, self.folder / "other"], out),
            lambda: split(path, out, [SplitPart("a", 0.5), SplitPart("b")]), lambda: dedup.dedup([path, self.folder / "other"]),
            lambda: missing(path), lambda: finish_parts(path), lambda: repair(path, workers=1),
        )  # fmt: skip

    def try_one(self, seed: int) -> str:
        """Edit one file, and have everything read it that does. Returns what came of it, "works" or "refused"."""
        rng = random.Random(seed)
        name = rng.choice(list(self.readers))
        data = self.whole[name]
        edit = with_other_values if "json" in name.rpartition(".")[2] and rng.random() < 0.6 else with_other_bytes
        refused = 0
        before = {path: path.read_bytes() for path in (self.folder / "set").iterdir()}
        readers = self.readers[name]
        for read in rng.sample(readers, min(4, len(readers))):
            (self.folder / name).write_bytes(edit(data, random.Random(seed)))
            try:
                read()
            except (ValueError, OSError) as error:
                assert str(error) and "\n" not in str(error) and len(str(error)) < 8000, (seed, name, str(error)[:300])
                refused += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}, {name}: {type(error).__name__}: {error}") from error
            shutil.rmtree(self.folder / "made", ignore_errors=True)
            for path, text in before.items():
                if path.read_bytes() != text:
                    path.write_bytes(text)
        (self.folder / name).write_bytes(data)
        return f"{name} {'refused' if refused else 'works'}"


def run(place: Place, count: int, first: int = 0) -> Counter:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ProcessPoolExecutor", Serial)
        return Counter(place.try_one(seed) for seed in range(first, first + count))


def test_random_edits_end_in_a_sentence_or_work(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    found = run(place, COUNT, SEED * 10**6)
    by_end = Counter()
    for name, times in found.items():
        by_end[name.split()[1]] += times
    assert by_end["refused"] > COUNT // 4 and by_end["works"] > COUNT // 5, found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, times in sorted(run(Place(Path(folder) / "place"), int(sys.argv[1])).items()):
            print(name, times)
