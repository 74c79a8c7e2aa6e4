"""The index of a search: one LanceDB database, a folder or a URL (s3://bucket/my.index), that `lancedb` opens without this project.

segments    a row a segment, see `schema`; of equal score, no order is promised
failures    videos that could not be read, and why
about       one row of JSON: which checkpoint made the vectors, and how videos were cut
text/       the text tower and head that made them, so that a search needs nothing else

Any number of processes may append at once. The rows of a video are committed together, so what a kill leaves is whole videos. A
video that is indexed again, or by two processes at once, has two sets of rows for a while; `written` tells them apart, the
latest set counts, and the others are hidden until `tidy` deletes them.
"""

import json
import random
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from c4c.retrieval.index import database
from c4c.retrieval.index.ann import LEAST_ROWS, NPROBES, ann_config, candidates
from c4c.retrieval.index.database import MAKE, again, listed, parts, sets_of_rows, short
from c4c.retrieval.index.filters import sql_text
from c4c.retrieval.index.rows import FAILURES, Failure, IndexedVideo, Known, batch, schema
from c4c.retrieval.index.scan import best_rows
from pipelines.segments import Cutting

FORMAT = 1
_TABLES = ("about", "segments", "failures")
_MANY, _SCANNED_AT_ONCE = 8, 16_384  # queries for which vectors are read once for all, and how many vectors are
_FEW_ROWS = 20_000  # up to so many a scan finds an id as fast as an index of ids


@dataclass(frozen=True, kw_only=True)
class About:
    """What all vectors of an index have in common.

    identity: of the checkpoint (`c4c.retrieval.encoder.Identity.to_dict`); late: the head compares frames, which are stored, too;
    width: of a vector; num_frames: of a segment at most; segment_s, stride_s: seconds, segment_s 0 for whole videos;
    runtime: what ran the image tower; version: of c4c."""

    identity: dict
    late: bool
    width: int
    num_frames: int
    segment_s: float
    stride_s: float
    runtime: str
    version: str
    format: int = FORMAT

    def to_json(self) -> str:
        """As the table `about` holds it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "About":
        """Raises ValueError: what is wrong with it, without a name."""
        try:
            values = json.loads(text)
            if (found := values.get("format")) != FORMAT:
                raise ValueError(f"its format is {found}, and this version of c4c reads format {FORMAT}")
            return cls(**{name.name: values[name.name] for name in fields(cls)})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"its table `about` is damaged ({error})") from error

    @property
    def cut(self) -> str:
        """How videos were cut, in words."""
        return str(Cutting(self.segment_s, self.stride_s))

    def difference(self, other: "About") -> str:
        """In which way an index with these settings cannot take vectors of `other`; '' if it can."""
        mine, theirs = self.identity, other.identity
        if mine.get("digest") != theirs.get("digest"):
            return f"of checkpoint {_name(mine)}, not of {_name(theirs)}"
        if (self.segment_s, self.stride_s) != (other.segment_s, other.stride_s):
            return f"of {self.cut}, not of {other.cut}"
        if self.num_frames != other.num_frames:
            return f"of {self.num_frames} frames a segment, not of {other.num_frames}"
        return ""


def _name(identity: Mapping) -> str:
    return f"{identity.get('checkpoint')} ({str(identity.get('digest'))[:12]})"


@dataclass(frozen=True)
class Hit:
    """A segment. `video` is its name, `path` where the file lies (or SPLIT_FOLDER::key); `start`, `end`, and `duration` of the whole video in
    seconds. score: the inner product (cosine) with what was searched for; of a sentence, for a head that compares frames, the head's."""

    id: str
    video: str
    path: str
    start: float
    end: float
    duration: float
    score: float = 0.0


_KNOWN = [name.name for name in fields(Known)]
_HIT = ["id", "video", "path", "start", "end", "duration"]


@dataclass(eq=False)
class Store:
    """An open index. Safe to use from several threads. What other processes append is seen at once (on s3://: within seconds)."""

    uri: str
    about: About
    _segments: Any
    _failures: Any
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _hidden: tuple[int, list[tuple[str, int]]] = (-1, [])  # of which version of the table, and which sets of rows

    # -- open

    @classmethod
    def open(cls, uri: str | Path) -> "Store":
        """Raises ValueError: there is no index, it has another format, or it is damaged."""
        uri = database.plain(uri)
        db = database.connect(uri, create=False)
        try:
            about, segments, failures = (db.open_table(name) for name in _TABLES)
            known = _read(about)
            if missing := set(_schema(known).names) - set(segments.schema.names):
                raise ValueError(f"its table `segments` has no column {min(missing)}")
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise ValueError(f"{uri} is no index that can be read: {short(error)}. {MAKE}") from error
        return cls(uri, known, segments, failures)

    @classmethod
    def about_of(cls, uri: str | Path) -> About | None:
        """What an index says of itself; None if there is none yet. Raises ValueError for a damaged one, or something else."""
        uri = database.plain(uri)
        if not database.may_be_index(uri):
            return None
        if (about := database.table_of(database.connect(uri, create=True), uri, "about")) is None:
            return None
        try:
            return _read(about)
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise ValueError(f"{uri} is no index that can be read: {short(error)}. {MAKE}") from error

    @classmethod
    def create(cls, uri: str | Path, about: About, text_encoder: Path) -> "Store":
        """Make an index, or complete one that a killed process began; opens it where it is there.

        text_encoder: the folder that `TextEncoder.save` wrote, copied into the index. Raises ValueError if there is one of another
        checkpoint, or with other segments; OSError where nothing can be written."""
        uri = database.plain(uri)
        db = database.connect(uri, create=True)
        row = pa.table({"json": [about.to_json()]})
        # `about` decides whose index it is, and comes first: of two processes, one makes it, and the other compares
        for name, data, columns in (
            ("about", row, row.schema),
            ("segments", None, _schema(about)),
            ("failures", None, FAILURES),
        ):
            database.make_table(db, uri, name, data, columns)
            if name == "about" and (difference := _read(db.open_table(name)).difference(about)):
                raise ValueError(f"{uri} is an index {difference}: use those, or another --out")
        database.put_text(uri, text_encoder)
        return cls.open(uri)

    def text_encoder(self) -> Path:
        """A local folder with what `TextEncoder.save` wrote; of a remote index, a copy in the user's cache. Raises ValueError."""
        return database.fetched_text(self.uri, str(self.about.identity.get("digest")))

    # -- read

    def search(
        self, vectors: np.ndarray, k: int, *, where: str | None = None, exact: bool = True, nprobes: int | None = None
    ) -> list[list[Hit]]:
        """For each of `vectors` (float32 [Q, D]) the k segments of the greatest inner product, best first.

        where: an SQL condition on the columns; exact: look at all; otherwise use the ANN index where there is one, with `nprobes` of
        its partitions (more find more). Raises ValueError for a condition that is none, or vectors of another width."""
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.about.width:
            raise ValueError(f"{self.uri} holds vectors of {self.about.width} numbers, not of {vectors.shape[-1]}")
        if exact and len(vectors) >= _MANY:
            return self._nearest_to_many(vectors, k, where)
        return [self._nearest(vector, k, where, exact, nprobes) for vector in vectors]

    def _nearest(self, vector: np.ndarray, k: int, where: str | None, exact: bool, nprobes: int | None) -> list[Hit]:
        query = self._segments.search(vector, vector_column_name="vector").distance_type("dot")
        query = query.select([*_HIT, "_distance"]).limit(k)
        if shown := self._shown(where):
            query = query.where(shown, prefilter=True)
        if exact:
            query = query.bypass_vector_index()
        else:
            query = query.refine_factor(candidates(k)).nprobes(nprobes or NPROBES)
        rows = database.run_query(query.to_arrow, where).to_pylist()
        # by their name: another process may have committed the same video between two looks at the table
        hits = {row["id"]: _hit(row, 1.0 - row["_distance"]) for row in rows}
        return sorted(hits.values(), key=lambda hit: (-hit.score, hit.id))

    def _nearest_to_many(self, vectors: np.ndarray, k: int, where: str | None) -> list[list[Hit]]:
        query = self._segments.search().select(["vector"]).with_row_id(True)
        if shown := self._shown(where):
            query = query.where(shown)
        rows, scores = database.run_query(lambda: best_rows(query.to_batches(_SCANNED_AT_ONCE), vectors, k), where)
        wanted = np.unique(rows)
        if not len(wanted):
            return [[] for _ in vectors]
        taken = self._segments.take_row_ids(wanted.tolist()).select(_HIT).with_row_id().to_arrow().to_pylist()
        by_row = {row["_rowid"]: row for row in taken}
        return [
            sorted((_hit(by_row[r], s) for r, s in zip(*one, strict=True)), key=lambda hit: (-hit.score, hit.id))
            for one in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def vectors_of(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """float32 [D] of each of the segments that the index holds."""
        return self._column(ids, "vector", (self.about.width,))

    def frames_of(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """float32 [F, D] of each of the segments; zeros stand for frames that a segment lacks. Only of late heads."""
        if not self.about.late:
            raise ValueError(f"{self.uri} holds no frames: its head compares whole videos")
        return self._column(ids, "frames", (self.about.num_frames, self.about.width))

    def _column(self, ids: Sequence[str], name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        out: dict[str, np.ndarray] = {}
        for part in parts(ids):
            rows = self._rows(["id", name], f"id IN ({listed(part)})")
            flat = rows[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
            out |= dict(zip(rows["id"].to_pylist(), flat.reshape(len(rows), *shape), strict=True))
        return out

    def thumbnail(self, id: str) -> bytes:
        """JPEG of the segment's middle frame. Raises ValueError if there is no such segment."""
        rows = self._rows(["thumbnail"], f"id = {sql_text(id)}")
        if not len(rows):
            raise ValueError(f"{self.uri} has no segment {id}")
        return rows["thumbnail"][0].as_py()

    def segments_of(self, video: str) -> list[Hit]:
        """All segments of a video, in order; none if the index does not hold it."""
        return sorted(map(_hit, self._rows(_HIT, f"video = {sql_text(video)}").to_pylist()), key=lambda hit: hit.id)

    def segment(self, id: str) -> Hit | None:
        """One segment; None if there is no such."""
        rows = self._rows(_HIT, f"id = {sql_text(id)}").to_pylist()
        return _hit(rows[0]) if rows else None

    def known(self) -> list[Known]:
        """What is indexed: a row a video, the latest one."""
        return [Known(**row) for row in self._rows(_KNOWN, "segment = 0").to_pylist()]

    def known_of(self, video: str) -> Known | None:
        """What is indexed of one video; None if the index does not hold it."""
        rows = self._rows(_KNOWN, f"segment = 0 AND video = {sql_text(video)}").to_pylist()
        return Known(**rows[0]) if rows else None

    @property
    def version(self) -> int:
        """A number that changes with the rows."""
        return self._segments.version

    def videos(self) -> list[str]:
        """Names of the videos, sorted."""
        return sorted(self._rows(["video"], "segment = 0")["video"].to_pylist())

    def a_video(self, where: str | None = None) -> str | None:
        """The name of a video for which the condition holds; None if there is none."""
        rows = self._rows(["video"], f"segment = 0 AND ({where or 'true'})", most=1)
        return rows["video"][0].as_py() if len(rows) else None

    @property
    def n_videos(self) -> int:
        """How many videos the index holds."""
        return database.run_query(lambda: self._segments.count_rows(self._shown("segment = 0")), None)

    def __len__(self) -> int:
        """How many segments the index holds."""
        return database.run_query(lambda: self._segments.count_rows(self._shown(None)), None)

    def failures(self) -> list[tuple[str, str]]:
        """(path, reason) of the videos that could not be read, sorted."""
        return sorted((failure.path, failure.reason) for failure in self.failed())

    def failed(self) -> list[Failure]:
        """The same with size and time of the files."""
        rows = {row["path"]: Failure(**row) for row in self._failures.to_arrow().to_pylist()}
        return list(rows.values())

    @property
    def has_ann(self) -> bool:
        """Whether there is an ANN index of the vectors."""
        return any("vector" in index.columns for index in self._segments.list_indices())

    def _rows(self, columns: list[str], where: str, most: int | None = None) -> pa.Table:
        query = self._segments.search().select(columns).where(self._shown(where))
        return database.run_query((query if most is None else query.limit(most)).to_arrow, None)

    def _shown(self, where: str | None) -> str | None:
        """The condition, and that no superseded rows are meant."""
        version = self._segments.version
        with self._lock:
            if self._hidden[0] != version:
                self._hidden = version, self._superseded()
            hidden = self._hidden[1]
        if not hidden:
            return where
        condition = f"NOT ({sets_of_rows(hidden)})"
        return condition if where is None else f"({where}) AND {condition}"

    def _superseded(self) -> list[tuple[str, int]]:
        """(video, written) of sets of rows that later ones of the same file replace."""
        columns = ["video", "path", "written"]
        firsts = database.run_query(self._segments.search().select(columns).where("segment = 0").to_arrow, None)
        latest = firsts.group_by(["video", "path"]).aggregate([("written", "max"), ("written", "count")])
        several = latest.filter(pa.compute.greater(latest["written_count"], 1))
        if not len(several):
            return []
        most = {(row["video"], row["path"]): row["written_max"] for row in several.to_pylist()}
        rows = firsts.to_pylist()
        return sorted({(r["video"], r["written"]) for r in rows if r["written"] < most.get((r["video"], r["path"]), 0)})

    # -- write

    def append(self, videos: Sequence[IndexedVideo], before: Mapping[str, int] | None = None) -> None:
        """Add videos in one commit; what the index held of them is then deleted. before: {video: written}, as `known` gave it.

        The new rows come first, so that a kill in between leaves no moment without the video."""
        if not videos:
            return
        before = {} if before is None else before
        now = time.time_ns() + random.randrange(1000)  # so that no two processes write the same number
        columns = _schema(self.about)
        rows = [batch(v, max(now, before.get(v.video, 0) + 1), columns) for v in videos]
        table = pa.Table.from_batches(rows, schema=columns)
        again(lambda: self._segments.add(table, write_parallelism=1))
        self.delete_sets([(v.video, before[v.video]) for v in videos if v.video in before])

    def delete_sets(self, sets: Sequence[tuple[str, int]]) -> None:
        """Delete the rows of (video, written) each."""
        for part in parts(sets):
            again(lambda part=part: self._segments.delete(sets_of_rows(part)))  # type: ignore[misc]

    def fail(self, failures: Sequence[Failure]) -> None:
        """Note videos that could not be read."""
        if failures:
            rows = pa.Table.from_pylist([asdict(failure) for failure in failures], schema=FAILURES)
            merge = self._failures.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
            again(lambda: merge.execute(rows))

    def forgive(self, paths: Iterable[str]) -> None:
        """Forget failures."""
        for part in parts(sorted(paths)):
            again(lambda part=part: self._failures.delete(f"path IN ({listed(part)})"))  # type: ignore[misc]

    def tidy(self, ann: bool = False) -> str:
        """Delete superseded rows, join small files, drop old versions, and bring indexes up to date. Returns a note, or ''.

        ann: make an ANN index, if there is none and there are enough segments."""
        self.delete_sets(self._superseded())
        for table in (self._segments, self._failures):
            database.housekeeping(table, self.uri)
        if len(self) >= _FEW_ROWS:
            database.index_columns(self._segments, ("id", "video"))
        if ann and not self.has_ann:
            if len(self) < LEAST_ROWS:
                return f"no ANN index was made: it needs at least {LEAST_ROWS} segments, and exact search is as fast until then"
            self.build_ann()
        return ""

    def build_ann(self) -> None:
        """Make the ANN index of the vectors, in place of one that is there. Raises ValueError if there are too few."""
        if (rows := self._segments.count_rows()) < LEAST_ROWS:
            raise ValueError(
                f"an ANN index needs at least {LEAST_ROWS} segments, and {self.uri} has {rows}: search without"
            )
        again(lambda: self._segments.create_index("vector", config=ann_config(rows, self.about.width)))


def _hit(row: dict[str, Any], score: float = 0.0) -> Hit:
    return Hit(**{name: row[name] for name in _HIT}, score=score)


def _schema(about: About) -> pa.Schema:
    return schema(about.width, about.num_frames if about.late else 0)


def _read(table: Any) -> About:
    """Of the table `about`. Raises ValueError."""
    rows = table.to_arrow()["json"].to_pylist()
    if len(rows) != 1:
        raise ValueError(f"its table `about` has {len(rows)} rows")
    return About.from_json(rows[0])
