"""The database under an index: how it is opened, written by several processes at once, and asked; and the folder `text` beside
its tables."""

import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from c4c.retrieval.index.filters import sql_text
from shards.storage import filesystem, place
from shards.user_cache import user_cache

_TRIES = 30  # of a commit that another process's came before
_AT_ONCE = 500  # names in one condition
# versions older than that are read by nobody any more, as readers look for the latest at each query, or every few seconds
_OLD, _OLD_REMOTE = timedelta(seconds=10), timedelta(minutes=5)
# a table of so many rows is written anew only once it has that many files, not at each small change
_LARGE, _MANY_FILES = 100_000, 16
_REMOTE_INTERVAL = timedelta(seconds=5)  # between two looks whether a remote table has changed
_TEXT = "text"
_COMPLETE = "complete.json"  # of a remote text folder: names of its files
MAKE = "Make one with python -m c4c.index --ckpt RUN --videos FOLDER --out INDEX"
T = TypeVar("T")


def plain(uri: str | Path) -> str:
    """A URL as it is, and a path made absolute."""
    uri = str(uri).removeprefix("file://")
    return uri if "://" in uri else os.path.abspath(uri)


def may_be_index(uri: str) -> bool:
    """Whether there may be an index, or the beginning of one. Raises ValueError if there is something else."""
    if "://" in uri:
        return True
    if os.path.exists(uri) and not os.path.isdir(uri):
        raise ValueError(f"{uri} is no index: it is a file, and an index is a folder")
    begun = os.path.isdir(os.path.join(uri, "about.lance"))
    if not begun and os.path.isdir(uri) and os.listdir(uri):
        raise ValueError(
            f"{uri} is no index: it is a folder of other things. Name the folder that python -m c4c.index wrote, or a new one for --out"
        )
    return begun


def connect(uri: str, create: bool) -> Any:
    """The database. Raises ValueError if there is none, unless one is to be made, or what is there is something else."""
    if not may_be_index(uri) and not create:  # connecting would make the folder
        raise ValueError(f"there is no index at {uri}. {MAKE}")
    os.environ.setdefault("LANCEDB_LOG", "error")  # what it warns of is told here, or tried again
    import lancedb

    interval = _REMOTE_INTERVAL if "://" in uri else timedelta(0)
    try:
        return lancedb.connect(uri, read_consistency_interval=interval, storage_options=storage_options(uri))
    except (RuntimeError, ValueError, OSError) as error:
        raise _unreachable(uri, error) from error


def table_of(db: Any, uri: str, name: str) -> Any:
    """A table; None if it is not there. Raises OSError if that cannot be told."""
    try:
        return db.open_table(name)
    except (RuntimeError, ValueError, OSError) as error:
        if f"'{name}' was not found" in str(error):
            return None
        raise _unreachable(uri, error) from error


def _unreachable(uri: str, error: Exception) -> OSError:
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    advice = (
        "; check its name, and the credentials in AWS_ACCESS_KEY_ID and the other variables" if "://" in uri else ""
    )
    return OSError(f"{uri} cannot be reached ({code[1] if code else short(error)}){advice}")


def make_table(db: Any, uri: str, name: str, data: pa.Table | None, columns: pa.Schema) -> None:
    """Create a table unless it is there."""
    if table_of(db, uri, name) is not None:
        return
    try:
        db.create_table(name, data=data, schema=columns, mode="create")
    except (ValueError, RuntimeError, OSError) as error:
        if table_of(db, uri, name) is None:  # else another process made it
            raise OSError(f"{uri} cannot be written ({short(error)})") from error


def storage_options(uri: str) -> dict[str, str] | None:
    """What LanceDB needs to know of a bucket beside AWS's usual environment variables, which it reads itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not uri.startswith("s3://") or not endpoint:
        return None
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


# ---- text ----


def put_text(uri: str, source: Path) -> None:
    """Copy the folder of the text tower into the index, unless it is there."""
    if "://" in uri:
        folder = place(f"{uri}/{_TEXT}")
        files, done = filesystem(folder), f"{folder.path}/{_COMPLETE}"
        if not files.exists(done):
            names = [str(path.relative_to(source)) for path in sorted(source.rglob("*")) if path.is_file()]
            for name in names:
                files.put_file(str(source / name), f"{folder.path}/{name}")
            files.pipe_file(done, json.dumps(names).encode())  # last: without it the folder is not complete
        return
    target = Path(uri) / _TEXT
    if not target.is_dir():
        with tempfile.TemporaryDirectory(prefix=".text-", dir=uri) as part:
            try:
                shutil.copytree(source, Path(part) / _TEXT)
            except shutil.Error as error:  # a list of all files
                reason = str(error.args[0][0][2])  # with a number before it and two paths behind
                raise OSError(f"{target} cannot be written ({re.sub(r'^.Errno [0-9]+. |: .*', '', reason)})") from error
            _rename_new(Path(part) / _TEXT, target)


def _rename_new(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first, with the same
            raise


def fetched_text(uri: str, digest: str) -> Path:
    """The folder of the text tower on this machine; of a remote index a copy in the user's cache. Raises ValueError."""
    missing = f"{uri} has no text tower: an indexing that was killed at its beginning left it out. Index again"
    if "://" not in uri:
        if not (folder := Path(uri) / _TEXT).is_dir():
            raise ValueError(missing)
        return folder
    cache = user_cache() / "text"
    if not (target := cache / digest).is_dir():
        folder = place(f"{uri}/{_TEXT}")
        files = filesystem(folder)
        try:
            names = json.loads(files.cat_file(f"{folder.path}/{_COMPLETE}"))
        except FileNotFoundError as error:
            raise ValueError(missing) from error
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".text-", dir=cache) as part:
            for name in names:
                copy = Path(part) / _TEXT / Path(name)
                if not copy.resolve().is_relative_to(Path(part).resolve()):
                    raise ValueError(f"{uri}: its folder {_TEXT} lists {name!r}, which is no file in it")
                copy.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(f"{folder.path}/{name}", str(copy))
            _rename_new(Path(part) / _TEXT, target)
    return target


# ---- commits ----


def again(commit: Callable[[], T]) -> T:
    """What a commit returns; it is tried again where another process's came first. Raises OSError."""
    for attempt in range(_TRIES):
        try:
            return commit()
        except (RuntimeError, OSError) as error:
            if "conflict" not in str(error).lower() or attempt == _TRIES - 1:
                raise OSError(f"the index could not be written: {short(error)}") from error
            time.sleep(random.uniform(0, min(2.0, 0.02 * 2**attempt)))
    raise AssertionError("the last try returns or raises")


def housekeeping(table: Any, uri: str) -> None:
    """Join small files, drop old versions, and bring indexes up to date. Where other processes keep coming first, theirs is the last
    commit, and they do it.

    Of a large table, all of which that may write anew, it waits until there are many files. What was written anew is then as old as a
    version that somebody may still read; since the next time may be long in coming, it stays to see it out and drops that, too (but in a
    bucket, where that takes minutes)."""
    large = table.count_rows() >= _LARGE
    if large and table.stats()["fragment_stats"]["num_fragments"] < _MANY_FILES:
        return
    _optimize(table, _OLD_REMOTE if "://" in uri else _OLD)
    if large and "://" not in uri:
        time.sleep(_OLD.total_seconds() + 0.1)
        _optimize(table, _OLD)


def _optimize(table: Any, older_than: timedelta) -> None:
    for attempt in range(5):
        try:
            table.optimize(cleanup_older_than=older_than)
            return
        except (RuntimeError, OSError) as error:
            if "conflict" not in str(error).lower():
                raise OSError(f"the index could not be written: {short(error)}") from error
            time.sleep(random.uniform(0, 0.1 * 2**attempt))


def index_columns(table: Any, names: Sequence[str]) -> None:
    """Have rows found by what stands in these columns, without looking at all."""
    from lancedb.index import BTree

    have = {column for index in table.list_indices() for column in index.columns}
    for name in set(names) - have:
        again(lambda name=name: table.create_index(name, config=BTree()))  # type: ignore[misc]


def run_query(query: Callable[[], T], where: str | None) -> T:
    """What a query returns. where: a condition of the user's in it, which is then the likeliest to be at fault: ValueError.

    Raises OSError otherwise."""
    for last in (False, True):
        try:
            return query()
        except (RuntimeError, ValueError, OSError) as error:
            if not last and "Not found: " in str(error):  # another process has joined the files meanwhile
                continue
            if where:
                raise ValueError(f"the condition {where!r} cannot be used ({short(error)})") from error
            raise OSError(f"the index cannot be read ({short(error)})") from error
    raise AssertionError("the last try returns or raises")


def parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """The items, as many at a time as one condition may name."""
    return (items[i : i + _AT_ONCE] for i in range(0, len(items), _AT_ONCE))


def listed(texts: Iterable[str]) -> str:
    """SQL strings with commas between, for IN (…)."""
    return ", ".join(map(sql_text, texts))


def sets_of_rows(sets: Iterable[tuple[str, int]]) -> str:
    """The condition that holds for the rows of (video, written) each."""
    return " OR ".join(f"(video = {sql_text(video)} AND written = {written})" for video, written in sets)


def short(error: BaseException) -> str:
    """A library's error in one line, without places in its source."""
    return re.sub(r"^(lance error: )?(LanceError\(\w+\): )?", "", str(error).split("\n")[0].split(", /")[0].strip())[
        :200
    ]
