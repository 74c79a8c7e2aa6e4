"""What dataset.json says of a split, checked before anybody believes it."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

from shards import ShardError
from shards.digest import RULE_KEY, RULES
from shards.schema import FORMAT_VERSION

_SHARD = re.compile(r"[A-Za-z0-9_-]{1,64}")  # a name of files inside the folder, and of no others
_AFTER = ("rejected", "packed")  # of the reconciliation: what packing adds to its counts
_COUNTS = ("published", "annotations", "missing", *_AFTER)
_MOST = 2**50  # of videos, captions and bytes


def is_of_packing(folder: Path) -> bool:
    """Whether a folder is a packed split, whole or damaged. A dataset.json may be another program's: that of a packing has its keys, or
    stands beside shards."""
    try:
        info = json.loads((folder / "dataset.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    except (OSError, ValueError, RecursionError):
        info = None
    if isinstance(info, dict) and {"format", "shards", "profile"} <= info.keys():
        return True
    return any(table.with_suffix(".tar").exists() for table in folder.glob("*.parquet"))


def read_summary(text: str | bytes, path) -> dict:
    """The contents of the dataset.json of the split at `path`. Raises ShardError if it is not one that a packing wrote."""
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}/dataset.json is not JSON ({error}). {_remedy(path)}") from error
    return checked(info, path)


def checked(info, path) -> dict:
    """`info` itself. Raises ShardError if it cannot be the dataset.json of the split at `path`, and says what is wrong."""
    if isinstance(info, dict) and not (type(info.get("format")) is int and info["format"] == FORMAT_VERSION):
        raise ShardError(
            f"{path} has format {_shown(info.get('format'))}; this version reads {FORMAT_VERSION}. Pack it again, "
            "into another folder."
        )
    if wrong := _wrong(info):
        raise ShardError(f"{path}/dataset.json is damaged: {wrong}. {_remedy(path)}")
    return info


def wrong_plan(plan) -> str | None:
    """What cannot be in the plan of a packing; None if all can be. Splits made of others have no numbers in it."""
    if not isinstance(plan, dict):
        return f"it holds {_shown(plan)}, not an object"
    for name, kind in {"name": str, "split": str, "profile": dict}.items():
        if not isinstance(plan.get(name), kind):
            return f"the plan's {name!r} is {_shown(plan.get(name))}"
    for name in ("shards", "shard_videos"):
        if name in plan and not 0 < _int(plan[name]) < 10**9:
            return f"the plan's {name!r} is {_shown(plan[name])}"
    return _wrong_counts(plan.get("reconciliation"))


def _remedy(path) -> str:
    if "://" in str(path):
        return "Upload it again"
    return f"Copy it again, or rebuild it from the tars: python -m c4c.shard repair {shlex.quote(str(path))}"


def _wrong(info) -> str | None:
    if not isinstance(info, dict):
        return f"it holds {_shown(info)}, not an object"
    kinds = {"name": str, "split": str, "profile": dict, "digest": str, "shards": list}
    for name, kind in kinds.items():
        if not isinstance(info.get(name), kind):
            return f"{name!r} is {_shown(info[name])}" if name in info else f"it lacks {name!r}"
    if RULE_KEY in info and _int(info[RULE_KEY]) not in RULES:
        return f"{RULE_KEY!r} is {_shown(info[RULE_KEY])}"
    if wrong := _wrong_numbers(info, ("videos", "captions", "rejected_videos", "rejected_captions")):
        return wrong
    if "plan" in info and not isinstance(info["plan"], dict):
        return f"'plan' is {_shown(info['plan'])}"
    if wrong := _wrong_counts(info.get("reconciliation")):
        return wrong
    if info.get("plan") and (wrong := wrong_plan(info["plan"])):
        return wrong
    profile = info["profile"]
    if not isinstance(profile.get("name"), str):
        return f"the profile's name is {_shown(profile.get('name'))}"
    for name, value in profile.items():
        if type(value) not in (str, int, bool, type(None)) or (type(value) is int and abs(value) > 2**31):
            return f"the profile's {name!r} is {_shown(value)}"
    for name in ("fps", "short_side", "long_side", "squash"):
        if name in profile and (type(profile[name]) is not int or profile[name] < 1):
            return f"the profile's {name!r} is {_shown(profile[name])}"
    if len(sizes := [name for name in ("short_side", "long_side", "squash") if name in profile]) > 1:
        return f"the profile has {' and '.join(sizes)}"
    return _wrong_shards(info)


def _wrong_shards(info: dict) -> str | None:
    names = []
    for number, shard in enumerate(info["shards"]):
        if not isinstance(shard, dict):
            return f"shard {number} is {_shown(shard)}"
        name = shard.get("name")
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            return f"the name of shard {number} is {_shown(name)}"
        if wrong := _wrong_numbers(shard, ("videos", "captions", "bytes")):
            return f"shard {name}: {wrong}"
        if not 0 <= _int(shard.get("table_crc32c")) < 2**32:
            return f"shard {name}: 'table_crc32c' is {_shown(shard.get('table_crc32c'))}"
        names.append(name)
    if twice := [a for a, b in pairwise(sorted(names)) if a == b]:
        return f"shard {twice[0]} is listed twice"
    for what in ("videos", "captions"):
        total = sum(shard[what] for shard in info["shards"])
        if total != info[what]:
            return f"its shards hold {total} {what}, and it says {info[what]}"
    return None


def _wrong_numbers(values: dict, names: tuple[str, ...]) -> str | None:
    for name in names:
        if not 0 <= _int(values.get(name)) < _MOST:
            return f"{name!r} is {_shown(values[name])}" if name in values else f"it lacks {name!r}"
    return None


def _wrong_counts(reconciliation) -> str | None:
    """What cannot be in the counts of annotations; None if there are none."""
    if not reconciliation:
        return None if reconciliation in (None, {}) else f"'reconciliation' is {_shown(reconciliation)}"
    if not isinstance(reconciliation, dict):
        return f"'reconciliation' is {_shown(reconciliation)}"
    if not 0 <= _int(reconciliation.get("files")) < _MOST:
        return f"the reconciliation's 'files' is {_shown(reconciliation.get('files'))}"
    for name in _COUNTS:
        counts = reconciliation.get(name)
        if counts is None and name in _AFTER:
            continue
        if not isinstance(counts, dict) or counts.keys() != {"videos", "captions"}:
            return f"the reconciliation's {name!r} is {_shown(counts)}"
        for n in counts.values():
            if not (0 <= _int(n) < _MOST or (n is None and name != "annotations")):
                return f"the reconciliation's {name!r} holds {_shown(n)}"
    return None


def _int(value) -> int:
    return value if type(value) is int else -1


def _shown(value) -> str:
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'object'}"
    return repr(value) if isinstance(value, str | float | bool | None) and len(repr(value)) < 60 else _short(value)


def _short(value) -> str:
    if type(value) is int:
        return str(value) if abs(value) < 10**18 else "a huge number"
    return repr(value)[:57] + "..."
