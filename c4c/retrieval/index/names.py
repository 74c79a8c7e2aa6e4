"""What to say where no video of an index has a name that a filter asks for."""

import os
from collections.abc import Iterator

from c4c.retrieval.index.filters import Choice, as_regex, of_path, sql_text
from c4c.retrieval.index.store import Store
from shards.tar import key_to_name

_MOST_PARTS = 30  # folders of a path that are looked at


def hint(store: Store, choice: Choice) -> str:
    """A note on `choice.path`, '' where there are such names: one that was probably meant, or an example of the names there are."""
    if choice.path is None or store.a_video(of_path(choice.path)) is not None:
        return ""
    start = f"no name in the index matches {choice.path!r}"
    for other in _others(choice.path):
        if store.a_video(of_path(other)) is not None:
            return f"{start}; did you mean {other!r}?"
    bare = _bare(choice.path)
    any_case = as_regex(f"*{bare}*").replace("(?s)", "(?is)", 1)
    if bare and (name := store.a_video(f"regexp_like(video, {sql_text(any_case)})")) is not None:
        return f"{start}; did you mean {name!r}?"
    name = store.a_video()
    return start if name is None else f"{start}; names are like {name!r}"


def _others(glob: str) -> Iterator[str]:
    """What may have been meant, the likeliest first: a path of which the end is a name, as --json writes them, or a part of a name."""
    if "::" in glob:
        yield key_to_name(glob.rpartition("::")[2])
    parts = [part for part in os.path.normpath(glob).split("/") if part]
    for first in range(max(0, len(parts) - _MOST_PARTS), len(parts)):
        yield "/".join(parts[first:])
    for text in dict.fromkeys((_bare(glob), _bare(parts[-1] if parts else ""))):
        if text:
            yield f"*{text}*"


def _bare(glob: str) -> str:
    return glob.removeprefix("./").strip("/*")
