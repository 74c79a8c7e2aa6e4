"""Whether two packings of the same list are the same."""

from __future__ import annotations

import json


def same(found: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """Equal but for where rejected sources lay, which the parquet and rejects.jsonl tell."""
    assert found.keys() == whole.keys()
    for name, data in whole.items():
        if name.endswith((".tar", ".idx")):
            assert found[name] == data, name
    assert said(found) == said(whole)


def said(found: dict[str, bytes]) -> dict:
    """dataset.json without the checksums of the tables."""
    info = json.loads(found["dataset.json"])
    return info | {"shards": [{k: v for k, v in shard.items() if k != "table_crc32c"} for shard in info["shards"]]}
